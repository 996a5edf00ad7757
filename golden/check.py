"""The verdict of a golden on a model of this package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from golden.bundle import Case, finest, read, sha256
from golden.compare import Report, compare
from refimpl.config import Config
from refimpl.errors import InputError, at_most
from refimpl.names import shape, taps
from refimpl.trace import Trace

if TYPE_CHECKING:
    from refimpl.model import Model


NARROW = ("bfloat16", "float16")
MODEL = (
    "family", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "num_key_value_heads",
    "rope_theta", "rms_norm_eps",
)  # fmt: skip


def check(model: Model | str | Path, golden: str | Path, dtype: str | None = None, fed: bool | None = None) -> Report:
    """Runs the model on the golden's prompts and compares every tensor, which is called `{case}/{dtype}/{name}`.

    - `dtype`: the number format to run in; by default each that was recorded, judged by the tolerances stored with it.
      A format that was not recorded is judged by the finest one that was, with the rule for `dtype`.
    - `fed`: whether each operation gets the golden's tensors as inputs, so that each tensor shows its own error. By
      default 16-bit runs are fed, because what they inherit soon exceeds any useful limit.

    Padding is left out, because the values there have no meaning. If the verdict is red, the files of the weights are
    hashed, and the report says whether the golden was recorded from others.

    Raises InputError if the golden cannot be read, or belongs to a model with another config.
    """
    if isinstance(model, str | Path):
        from refimpl.model import load

        model = load(model)
    truth = read(golden)
    for name in MODEL:
        has, expected = getattr(model.config, name), getattr(truth.config, name)
        if has != expected:
            raise InputError(f"this model's {name} is {has}, but {golden} was recorded from a model with {expected}; "
                             "check the model that it belongs to")  # fmt: skip
    report = Report(())
    for ran in truth.dtypes if dtype is None else (dtype,):
        by = ran if ran in truth.dtypes else finest(truth.dtypes)
        for name, case in truth.cases.items():
            reference = truth.trace(name, by)
            if not reference:  # not every case is recorded in every format
                continue
            trace = model.trace(case.ids, ran, attention_mask=case.attention_mask,
                                feed=reference if (ran in NARROW if fed is None else fed) else None)  # fmt: skip
            judged = Trace(((tap, x) for tap, x in trace.items() if tap in reference), trace.meta)
            ours, theirs = (without_padding(side, model.config, case) for side in (judged, reference))
            report += compare(ours, theirs).within(f"{name}/{ran}/")
    return report if report else replace(report, remark=_other_weights(model.folder, truth.provenance.get("weights")))


def _other_weights(folder: Path | None, recorded: Any) -> str:
    """The remark for a report if files in `folder` have another sha256 than those that were recorded."""
    if folder is None or not isinstance(recorded, dict):
        return ""
    other = [
        path.name for path in sorted(folder.iterdir()) if path.name in recorded and sha256(path) != recorded[path.name]
    ]
    return f"these are not the weights that were recorded: {at_most(other, 3)}" if other else ""


def without_padding(trace: Trace, config: Config, case: Case) -> Trace:
    """The trace with zeros wherever the query or the key is padding; the same trace if there is no padding."""
    if case.attention_mask is None or case.attention_mask.all():
        return trace
    table, kept, (batch, tokens) = taps(config), Trace(meta=trace.meta), case.ids.shape
    for name, array in trace.items():
        kept[name] = array
        if name not in table or array.shape != shape(table[name], config, batch, tokens, tokens):
            continue
        real = np.ones((batch,) + (1,) * (array.ndim - 1), bool)
        for axis, letter in enumerate(table[name].shape.split()):
            if letter in ("T", "S"):
                spread = (batch,) + (1,) * (axis - 1) + (tokens,) + (1,) * (array.ndim - axis - 1)
                real = real & (case.attention_mask > 0).reshape(spread)
        kept[name] = np.where(real, array, np.zeros((), array.dtype))
    return kept
