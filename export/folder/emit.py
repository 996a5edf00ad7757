"""`emit` a model as ONNX graphs: the plan, the profile, the golden prompt and the encodings that its options make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from export.folder.goldens import golden_prompt
from export.folder.save import Parts
from export.graphs.cut import HIDES, matching_modules
from export.graphs.plan import Plan
from export.graphs.profiles import Profile, adapted, expect_groups, profile_for
from export.graphs.runs import build
from refimpl.blocks.quantize import QuantizedWeight
from refimpl.errors import InputError
from refimpl.grids.calibrate import calibrate
from refimpl.grids.encodings import MASK, Encodings
from refimpl.model import Model
from refimpl_kernels.affine import Encoding


@dataclass(frozen=True)
class ExportOptions:
    """The options of `emit`.

    Shapes:

    - `tokens`: how many a graph takes at a time; several numbers make a graph each, over the same weights
    - `context`: the window in tokens; None is the model's
    - `parts`: how many graphs the layers are split into. 1 has everything in one graph; with more, the first part is
      the embedding and the last has the head
    - `layers`: only so many of the first layers, with norm and head behind them; `encodings` are cut the same way

    The form of the graphs:

    - `profile`: what they are for, a row of `graphs.profiles`; None is "qdq" for a model with int4 weights, and
      "plain" for any other
    - `opset`, `ir_version`, `forms`: these replace the profile's

    Numbers:

    - `prompt`: a text or ids, from which the golden inputs are made
    - `encodings`: those of the model. If the profile needs some and none are given, they are calibrated on the prompt
    - `encodings_version`: of the files that are written
    - `border`: "codes" makes codes of the inputs and outputs of a graph on grids, as Genie and Qualcomm's compiler take
      them. Goldens stay floats: whoever runs the graph puts them on the grids

    Instead of parts, or beside them:

    - `graphs`: globs on modules and taps, such as `model.layers.3.mlp` or `*.scores`. Each match becomes a graph alone,
      whose golden is what the whole model has there; there are no parts then
    - `probe`: globs on taps that become outputs of the graphs as well
    """

    tokens: int | Sequence[int] = (128, 1)
    context: int | None = None
    parts: int = 1
    profile: str | None = None
    opset: int | None = None
    ir_version: int | None = None
    forms: Iterable[str] | None = None
    prompt: str | Sequence[int] | None = None
    encodings: Encodings | None = None
    encodings_version: str = "1.0.0"
    graphs: str | Sequence[str] = ()
    probe: str | Sequence[str] = ()
    layers: int | None = None
    border: str = "floats"

    def row(self, model: Model) -> tuple[str, Profile]:
        """The profile's name, and its row with what the model and these options change in it."""
        blocks = any(isinstance(weight, QuantizedWeight) and weight.blocks.format == "int4"
                     for weight in model.weights.values())  # fmt: skip
        name = self.profile or ("qdq" if blocks else "plain")
        row = profile_for(name, blocks, self.encodings is not None)
        if self.border not in ("floats", "codes"):
            raise InputError(f"border is {self.border!a:.40}, expected floats or codes")
        if self.border == "codes" and not row.on_grids:
            raise InputError("a border of codes needs a graph on grids; give encodings with the profile qdq")
        row = replace(row, coded=self.border == "codes")
        row = adapted(row, name, self.opset, self.ir_version, self.forms)
        expect_groups(row.forms, model.config.num_attention_heads, model.config.num_key_value_heads)
        return name, row

    def plan(self, model: Model, name: str, row: Profile) -> Plan:
        """The graphs. Their golden prompt is still to be chosen: `Plan.room` bounds its length."""
        config = model.config
        sizes = {self.tokens} if isinstance(self.tokens, int) else set(self.tokens)
        context = config.max_position_embeddings if self.context is None else self.context
        modules = matching_modules(config, [self.graphs] if isinstance(self.graphs, str) else self.graphs)
        hides = tuple(tap for form, taps in HIDES.items() if form in row.forms for tap in taps)
        tokens = tuple(sorted(sizes, reverse=True))
        plan = Plan(config, tokens, context, self.parts, profile=name, modules=modules, hides=hides)
        return plan.probing([self.probe] if isinstance(self.probe, str) else self.probe)


def emit(
    model: Model,
    tokens: int | Sequence[int] = (128, 1),
    context: int | None = None,
    parts: int = 1,
    profile: str | None = None,
    **more: Any,
) -> Parts:
    """The model as static ONNX graphs: one for each part and each number of `tokens` at a time.

    `more` are the other fields of `ExportOptions`, which describes them all: `encodings`, `prompt`, `opset`,
    `ir_version`, `forms`, `graphs`, `probe`, `layers`, `encodings_version`, `border`.

    No weight is written yet; `Parts.save` does that. Raises InputError for numbers that do not fit the model, or each
    other.
    """
    options = ExportOptions(tokens, context, parts, profile, **more)
    encodings = options.encodings
    if options.layers is not None:
        model = model.truncated(options.layers)
        encodings = encodings and encodings.of(model.config, model.weights)
    name, row = options.row(model)
    plan = options.plan(model, name, row)
    ids = _prompt(model, plan, options.prompt)
    plan = replace(plan, prompt=len(ids))
    if row.encodings and encodings is None:
        encodings = calibrate(model, np.array([ids]), dtype="float64")  # the same ranges with any BLAS
    if encodings is not None:
        encodings.check(model.config, model.weights)
        grid = encodings.activations.get(MASK)
        if isinstance(grid, Encoding):
            plan = replace(plan, lowest_mask=float(np.float32(grid.low)))
    built = {spec.name: build(model, spec, row, encodings) for run in plan.runs for spec in run}
    return Parts(model, plan, ids, built, row, encodings, options.encodings_version)


def _prompt(model: Model, plan: Plan, prompt: str | Sequence[int] | None) -> list[int]:
    return golden_prompt(model, plan.room) if prompt is None else model.token_ids(prompt).reshape(-1).tolist()
