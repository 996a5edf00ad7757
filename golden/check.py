"""The verdict of a golden on a model of this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from golden.bundle import Case, read
from golden.compare import Report, compare
from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.names import shape, taps
from refimpl.trace import Trace

if TYPE_CHECKING:
    from refimpl.model import Model


NARROW = ("bfloat16", "float16")


def check(model: Model | str | Path, golden: str | Path, dtype: str | None = None, fed: bool | None = None) -> Report:
    """Runs the model on the golden's prompts and compares every tensor, under `{case}/{dtype}/{name}`.

    Each recorded number format is judged by itself, with the tolerances stored beside it. With a `dtype`, that one
    alone; if PyTorch did not record it, against the finest recorded, with the rule for `dtype`. Padding is left out:
    what stands there is garbage on both sides.

    `fed`: whether each run goes on with the golden's tensors instead of its own, so that each shows its own error. By
    default those of 16 bits do, whose errors would soon be larger than anything that one could judge by.

    Raises InputError if the golden cannot be read, or is of a model of other sizes.
    """
    if isinstance(model, str | Path):
        from refimpl.model import load

        model = load(model)
    truth = read(golden)
    for name in ("family", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"):
        has, expected = getattr(model.config, name), getattr(truth.config, name)
        if has != expected:
            raise InputError(f"this model's {name} is {has}, that of {golden} is {expected}; check the model it is of")
    report = Report(())
    for ran in truth.dtypes if dtype is None else (dtype,):
        by = ran if ran in truth.dtypes else max(truth.dtypes, key=lambda name: np.dtype(name).itemsize)
        for name, case in truth.cases.items():
            reference = truth.trace(name, by)
            if not reference:  # not every case is recorded in every format
                continue
            trace = model.trace(case.ids, ran, attention_mask=case.attention_mask,
                                feed=reference if (ran in NARROW if fed is None else fed) else None)  # fmt: skip
            judged = Trace(((tap, x) for tap, x in trace.items() if tap in reference), trace.meta)
            ours, theirs = (without_padding(side, model.config, case) for side in (judged, reference))
            report += compare(ours, theirs).within(f"{name}/{ran}/")
    return report


def without_padding(trace: Trace, config: Config, case: Case) -> Trace:
    """The trace with zeros wherever a query or a key is padding; the same trace if there is none."""
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
