"""An export's graphs as one model: a prompt in, tokens out, on any executor.

The host does what a phone's host does: ids, mask and position tables for each call, the hidden state from part to part,
and the cache, to which every call adds the keys and values that it gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from export.graphs.plan import Arrays, GraphSpec, Plan, carry, host_inputs
from export.run.executor import Executor
from refimpl.errors import InputError
from refimpl.model import Model


def generate(model: Model, folder: Path, plan: Plan, executor: Executor, ids: Sequence[int]) -> Iterator[int]:
    """The likeliest next token, again and again, until the context is full.

    `model` gives position tables and the mask, `folder` and `plan` the graphs (`read_manifest`). The graphs of the
    largest size read the prompt, those of the smallest go on. Raises InputError for an export of modules, for a prompt
    that the context cannot hold, and if the executor fails.
    """
    if not plan.chained:
        raise InputError(f"{folder} holds modules alone, not a model; export it in parts")
    if not 0 < len(ids) <= plan.context:
        raise InputError(f"the prompt has {len(ids)} tokens, expected 1 to {plan.context}, the context of the graphs")
    kept, done, new = Arrays(), 0, list(ids)
    while done + len(new) <= plan.context:
        for start in range(0, len(new), plan.tokens[0]):
            piece = new[start : start + plan.tokens[0]]
            run = next(run for run in reversed(plan.runs) if run[0].tokens >= len(piece))
            if done > plan.context - run[0].tokens:
                return  # its cache has no room for the past
            flow = Arrays(kept)
            for spec in run:
                flow |= _call(model, folder, replace(spec, real=len(piece), past=done), executor, piece, flow)
            kept = {name: np.concatenate([kept[name], array], axis) if name in kept else array
                    for name, (array, axis) in _new_cache(run, flow, len(piece)).items()}  # fmt: skip
            done += len(piece)
        token = int(flow["logits"][0, -1].argmax())
        yield token
        new = [token]


def _call(
    model: Model, folder: Path, spec: GraphSpec, executor: Executor, ids: Sequence[int], flow: Arrays
) -> Arrays:  # fmt: skip
    host = host_inputs(model, spec, ids)
    inputs = {v.name: carry(spec, v, flow) if v.source else host[v.name] for v in spec.inputs}
    (outputs,) = executor.run(folder / spec.name, [inputs])
    return outputs


def _new_cache(run: Sequence[GraphSpec], flow: Arrays, real: int) -> dict[str, tuple[np.ndarray, int]]:
    """The keys and values that a run has added, without padding, each with the axis of its tokens."""
    found = {}
    for spec in run:
        for value in spec.outputs:
            if value.name.startswith("past_"):
                array = np.moveaxis(flow[value.name], value.token_axis, 0)[-real:]
                found[value.name] = np.moveaxis(array, 0, value.token_axis), value.token_axis
    return found
