"""The graphs of an export as a model that writes: an engine or the emulated NPU computes, tokens are chosen as ever."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from export.folder.chain import Chain
from export.folder.manifest import read_manifest
from export.run.executor import Executor
from refimpl.cache import KVCache
from refimpl.errors import InputError
from refimpl.model import Model


class Chained(KVCache):
    """A cache whose keys and values are those that graphs gave."""

    def __init__(self, chain: Chain, capacity: int):
        super().__init__(1, capacity)
        self.chain = chain


class Graphs(Model):
    """A model whose forward is run by an executor, from the graphs of an export of it.

    Its context is that of the graphs. Raises InputError for a folder that is no export of this model in parts.
    """

    def __init__(self, model: Model, folder: Path, executor: Executor):
        plan, _ = read_manifest(folder)
        if replace(plan.config, max_position_embeddings=model.config.max_position_embeddings) != model.config:
            raise InputError(f"{folder} is an export of another model than {model.folder}; name its model with --of")
        context = min(plan.context - plan.tokens[0], model.config.max_position_embeddings)
        if context < 2:
            raise InputError(f"the graphs in {folder} have no room for a past; export them with a larger --context")
        config = replace(model.config, max_position_embeddings=context)
        super().__init__(config, model.weights, model.folder, model.asked_backend)
        self.plain, self.exported, self.plan, self.executor = model, folder, plan, executor
        Chain(model, folder, plan, executor)  # refuses an export of modules

    def new_cache(self, batch: int = 1, capacity: int | None = None, dtype: str | None = None) -> KVCache:
        """An empty cache of the graphs. Raises InputError for a batch."""
        if batch != 1:
            raise InputError("the graphs of an export compute one sequence; ask for one at a time")
        return Chained(Chain(self.plain, self.exported, self.plan, self.executor), capacity or self.plan.context)

    def forward(self, ids, dtype, attention_mask, cache, tap, logits_to_keep=0):
        """Raises InputError: graphs do not show their tensors."""
        raise InputError("an export's graphs do not show what they do inside; ask the model that was exported")

    def __call__(self, ids, dtype="float32", attention_mask=None, cache=None, logits_to_keep=0) -> np.ndarray:
        """Logits (1, T or 1, V). Graphs give those of the last token of each piece, so all of them take T calls."""
        ids = self.token_ids(ids)
        cache = cache or self.new_cache()
        if not isinstance(cache, Chained):
            raise InputError("the cache is of another model; make one with new_cache()")
        step = self.plan.tokens[0] if logits_to_keep else 1
        rows = [cache.chain(piece.tolist()) for piece in np.split(ids[0], range(step, ids.shape[1], step))]
        cache.advance(np.ones((1, cache.chain.done), np.int64))
        return np.stack(rows[-1:] if logits_to_keep else rows)[None]
