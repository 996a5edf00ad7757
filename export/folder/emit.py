"""`emit` a model as ONNX graphs, and `save` them: weights streamed, goldens beside them, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from export.folder.goldens import golden_prompt
from export.folder.save import Parts
from export.graphs.cut import HIDES, matching_modules
from export.graphs.ops import INT4_OPSET
from export.graphs.plan import Plan
from export.graphs.profiles import NORM_OPSET, checked_forms, expect_groups, on_grids, profile_named
from export.graphs.runs import build
from refimpl.blocks.quantize import QuantizedWeight
from refimpl.errors import InputError
from refimpl.grids.calibrate import calibrate
from refimpl.grids.encodings import MASK, Encodings
from refimpl.model import Model
from refimpl_kernels.affine import Encoding


def emit(
    model: Model,
    tokens: int | Sequence[int] = (128, 1),
    context: int | None = None,
    parts: int = 1,
    profile: str | None = None,
    opset: int | None = None,
    ir_version: int | None = None,
    forms: Iterable[str] | None = None,
    prompt: str | Sequence[int] | None = None,
    encodings: Encodings | None = None,
    encodings_version: str = "1.0.0",
    graphs: str | Sequence[str] = (),
    probe: str | Sequence[str] = (),
    layers: int | None = None,
    border: str = "floats",
) -> Parts:
    """The model as static ONNX graphs, one for each part and each number of `tokens` at a time.

    `context` is the window in tokens, by default the model's. `parts`: 1 has everything in one graph; with more, the
    first is the embedding and the last has the head. `profile`: what the graphs are for, see `graphs.profiles`; by
    default "qdq" for a model with int4 weights, "plain" for any other. `opset`, `ir_version` and `forms` take the
    place of the profile's. `prompt`, a text or ids, is what the golden inputs are about. `encodings` are those of
    the model; where the profile needs them and there are none, they come from the prompt alone. They are written in
    `encodings_version`.

    `graphs`: globs on modules and taps, such as `model.layers.3.mlp` or `*.scores`. Each is then a graph alone, with
    what it has in the model as its golden, and there are no parts. `probe`: globs on taps that are outputs of the
    graphs as well. `layers`: the model is cut to so many, with norm and head behind them, and so are `encodings`.
    `border`: with "codes" the inputs and outputs of a graph on grids are codes, as Genie and Qualcomm's compiler take
    them; its goldens stay floats, which whoever runs it puts on the grids.

    No weight is written yet. Raises InputError for numbers that do not fit the model, or each other.
    """
    if layers is not None:
        model = model.truncated(layers)
        encodings = encodings and encodings.of(model.config, model.weights)
    blocks = any(isinstance(weight, QuantizedWeight) and weight.blocks.format == "int4"
                 for weight in model.weights.values())  # fmt: skip
    name = profile or ("qdq" if blocks else "plain")
    row = profile_named(name)
    if encodings is not None and row.weights != "float32":
        if blocks or name != "qdq":
            raise InputError(f"the encodings say which grids weights are on, and so do the 4-bit blocks of {name}; "
                             "give the model as it is with the profile qdq, or no encodings")  # fmt: skip
        newest = NORM_OPSET if ("ai.onnx", NORM_OPSET) in helper.OP_SET_ID_VERSION_MAP else row.opset
        row = replace(row, weights="float32", opset=newest, on_grids=True)
    if border not in ("floats", "codes"):
        raise InputError(f"border is {border!a:.40}, expected floats or codes")
    if border == "codes":
        if not row.on_grids:
            raise InputError("a border of codes needs a graph on grids; give encodings with the profile qdq")
        row = replace(row, coded=True)
    if row.weights != "float32" and not blocks:
        raise InputError(f"the profile {name} is for 4-bit weights, and the model has none; quantize it to int4 first")
    if opset is not None:
        row = replace(row, opset=opset, forms=row.forms | {"fused"} if name == "plain" and opset >= 23 else row.forms)
    if row.on_grids and row.opset < INT4_OPSET:
        raise InputError(f"opset is {row.opset}, but grids of 4 and 16 bits need {INT4_OPSET}")
    lowest = helper.OP_SET_ID_VERSION_MAP.get(("ai.onnx", row.opset), 0)
    if row.opset < 17 or not lowest:
        raise InputError(f"opset is {row.opset}, expected 17 to {onnx.defs.onnx_opset_version()}")
    chosen = checked_forms(row.forms if forms is None else forms, row.opset)
    expect_groups(chosen, model.config.num_attention_heads, model.config.num_key_value_heads)
    if row.on_grids:
        chosen = on_grids(chosen, row.opset)
    row = replace(row, ir_version=max(row.ir_version, lowest) if ir_version is None else ir_version, forms=chosen)
    if not lowest <= row.ir_version <= onnx.IR_VERSION:
        raise InputError(
            f"ir_version is {row.ir_version}, expected {lowest} to {onnx.IR_VERSION} with opset {row.opset}"
        )
    sizes = sorted({tokens} if isinstance(tokens, int) else set(tokens), reverse=True)
    longest = model.config.max_position_embeddings
    config = model.config
    plan = Plan(
        config, tuple(sizes), longest if context is None else context, parts, profile=name,
        modules=matching_modules(config, [graphs] if isinstance(graphs, str) else graphs),
        hides=tuple(tap for form, taps in HIDES.items() if form in row.forms for tap in taps),
    ).probing([probe] if isinstance(probe, str) else probe)  # fmt: skip
    ids = golden_prompt(model, plan.room) if prompt is None else model.token_ids(prompt).reshape(-1).tolist()
    plan = replace(plan, prompt=len(ids))
    if row.encodings and encodings is None:
        encodings = calibrate(model, np.array([ids]), dtype="float64")  # whose ranges no BLAS rounds differently
    if encodings is not None:
        encodings.check(model.config, model.weights)
        grid = encodings.activations.get(MASK)
        if isinstance(grid, Encoding):
            plan = replace(plan, lowest_mask=float(np.float32(grid.low)))
    built = {spec.name: build(model, spec, row, encodings) for run in plan.runs for spec in run}
    return Parts(model, plan, ids, built, row, encodings, encodings_version)
