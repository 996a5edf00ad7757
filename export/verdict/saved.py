"""A saved run: all figures of a verdict as JSON, to be judged again without the device's arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.causes.evidence import Cause
from export.measure.flat import from_flat
from export.measure.kinds import KINDS
from export.measure.limits import Thresholds
from export.verdict.verdict import FORMAT, Verdict
from refimpl.config import Config
from refimpl.errors import InputError, one_line
from refimpl.files import read_json, write_whole
from refimpl.names import taps

LARGEST_RUN = 256 << 20  # bytes; a larger file is not read


def save_run(verdict: Verdict, path: str | Path) -> None:
    """Writes a run, whole or not at all."""
    write_whole(path, verdict.to_json())


def read_run(path: str | Path) -> Verdict:
    """A run that was saved. Raises InputError for anything else."""
    path = Path(path)
    stored = read_json(path, LARGEST_RUN, LARGEST_RUN // 8)
    if stored.get("format") != FORMAT:
        raise InputError(f"{path} has the format {stored.get('format')!a:.40}, expected {FORMAT!r}; run verify again")
    try:
        return _run(stored)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())[:200]}; run verify again") from None


def _run(stored: dict[str, Any]) -> Verdict:
    config = Config(**stored["config"])
    known = taps(config)
    tensors = tuple(from_flat(tensor) for tensor in stored["tensors"])
    inside = {graph: tuple(tap for tap in known if tap in set(inner)) for graph, inner in stored["inside"].items()}
    if stored["kind"] not in KINDS or any(t.tap not in inside.get(t.graph, known) for t in tensors):
        raise ValueError("it is of another model than it says")
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("it has a tensor twice")
    causes = {name: Cause(one_line(str(cause["name"])), one_line(str(cause["text"])), cause.get("partial") is True)
              for name, cause in stored["causes"].items()}  # fmt: skip
    return Verdict(
        tensors, KINDS[stored["kind"]], config, causes,
        remarks=tuple(one_line(str(remark)) for remark in stored["remarks"]), about=dict(stored["about"]),
        thresholds=Thresholds(**{k: None if v is None else float(v) for k, v in stored["thresholds"].items()}),
        inside=inside,
    )  # fmt: skip
