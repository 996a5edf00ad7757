"""The table of causes: what may be wrong, and who looks for it. Of equally near causes, the first is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

from export.causes.architecture import architecture
from export.causes.cache import past
from export.causes.evidence import Detector, Evidence, Guess
from export.causes.host import never_written, padding_side, parts_exchanged, stale, swapped
from export.causes.layout import channels_permuted, heads_permuted, shifted, transposed
from export.causes.mask import mask
from export.causes.numbers import (
    byte_order,
    dtypes,
    narrowed,
    not_dequantized,
    not_finite,
    of_another_tensor,
    saturated,
    scale,
    scale_of_parts,
    wrapped,
    zero_point,
    zeros,
)
from export.causes.rope import positions, rope
from export.causes.weights import embedding, norm_head, weights
from export.causes.whatif import Hypothesis, WhatIf, last_name
from export.graphs.cut import stage


def computed_again(hypotheses: Callable[[WhatIf], Iterator[Hypothesis]]) -> Detector:
    """The detector that computes the graph again under each hypothesis. It needs the model."""

    def detector(e: Evidence) -> Iterator[Guess]:
        if e.references.model is None:
            return
        layers: dict[int, list[str]] = {}
        for tap in e.suspects:
            layers.setdefault(stage(tap, e.config.num_hidden_layers), []).append(tap)
        # One fault is in one layer; another model differs in all of them.
        several = len(layers) > 1
        views = [(where(n, e.config.num_hidden_layers) if several else "", replace(e, suspects=tuple(own)))
                 for n, own in layers.items()]  # fmt: skip
        for place, view in [*views, ("", e)] if several else views:
            doubtful = {last_name(tap) for tap in view.suspects}
            for hypothesis in hypotheses(view):
                if doubtful.intersection(hypothesis.at):
                    yield Guess(hypothesis.text + place, view.if_true(hypothesis))

    return detector


def where(stage: int, layers: int) -> str:
    """A stage of a model in words: its layers are 0, 1, …, and the head comes after the last."""
    return ", in the embedding" if stage < 0 else ", after the last layer" if stage == layers else f", in layer {stage}"


CAUSES: dict[str, Detector] = {
    "byte order": byte_order,
    "not finite": not_finite,
    "never written": never_written,
    "zeros": zeros,
    "padding side": padding_side,
    "names swapped": swapped,
    "stale": stale,
    "shifted": shifted,
    "heads permuted": heads_permuted,
    "transposed": transposed,
    "RoPE": rope,
    "NormHead missing": norm_head,
    "codes": not_dequantized,
    "encoding": of_another_tensor,
    "scale": scale,
    "zero point": zero_point,
    "signedness": wrapped,
    "saturation": saturated,
    "parts exchanged": parts_exchanged,
    "positions": positions,
    "past": past,
    "mask": mask,
    "embedding": computed_again(embedding),
    "architecture": computed_again(architecture),
    "weights": computed_again(weights),
    "channels": channels_permuted,
    "scales": scale_of_parts,
    "dtype": lambda e: chain(narrowed(e), computed_again(dtypes)(e)),
}
