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


class Chain:
    """The graphs of a folder, and what their cache holds.

    `model` gives position tables and the mask, `folder` and `plan` the graphs (`read_manifest`). Raises InputError for
    an export of modules.
    """

    def __init__(self, model: Model, folder: Path, plan: Plan, executor: Executor):
        if not plan.chained:
            raise InputError(f"{folder} holds modules alone, not a model; export it in parts")
        self.model, self.folder, self.plan, self.executor = model, folder, plan, executor
        self.kept, self.done = Arrays(), 0

    def room(self, count: int) -> bool:
        """Whether the cache of the graph that takes so many new ids has room for the past."""
        return self.done <= self.plan.context - self._run(count)[0].tokens

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """The logits (V,) behind some new ids, at most as many as the largest graph takes, which join the cache."""
        run = self._run(len(ids))
        flow = Arrays(self.kept)
        for spec in run:
            real = replace(spec, real=len(ids), past=self.done)
            flow |= _call(self.model, self.folder, real, self.executor, ids, flow)
        for name, (array, axis) in _new_cache(run, flow, len(ids)).items():
            self.kept[name] = np.concatenate([self.kept[name], array], axis) if name in self.kept else array
        self.done += len(ids)
        return flow["logits"][0, -1]

    def _run(self, count: int) -> Sequence[GraphSpec]:
        """The smallest graphs that take so many ids at once."""
        return next(run for run in reversed(self.plan.runs) if run[0].tokens >= count)


def generate(model: Model, folder: Path, plan: Plan, executor: Executor, ids: Sequence[int]) -> Iterator[int]:
    """The likeliest next token, again and again, until the context is full.

    The graphs of the largest size read the prompt, those of the smallest go on. Raises InputError as `Chain` does, for
    a prompt that the context cannot hold, and if the executor fails.
    """
    chain = Chain(model, folder, plan, executor)
    if not 0 < len(ids) <= plan.context:
        raise InputError(f"the prompt has {len(ids)} tokens, expected 1 to {plan.context}, the context of the graphs")
    new = list(ids)
    while chain.done + len(new) <= plan.context:
        for start in range(0, len(new), plan.tokens[0]):
            piece = new[start : start + plan.tokens[0]]
            if not chain.room(len(piece)):
                return
            logits = chain(piece)
        token = int(logits.argmax())
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
