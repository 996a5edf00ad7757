"""What a model computes: its forward over token ids, all at once, layer by layer, or recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import backends
from refimpl.cache import KVCache, expect_dtype, expect_fits, no_cache
from refimpl.checkpoint.weights import Weights
from refimpl.config import Config
from refimpl.decoder import Decoder
from refimpl.errors import InputError, at_most
from refimpl.files import read_json
from refimpl.positions import attention_bias, rope_tables, token_positions
from refimpl.text.tokenizer import Tokenizer, load_tokenizer
from refimpl.trace import Tap, Trace, expect_same_prompt, feeding, prompt_of, recording, silent
from refimpl_kernels.ops import DTYPES, NumPyOps


class Forward:
    """A config, weights, and the one forward over them. Immutable.

    `folder`: where its tokenizer is. `asked_backend`: what the caller asked for, or None; `backend`: what computes.
    `decoder_class`: `refimpl.decoder.Decoder`, or a subclass of it that replaces some of its methods.
    """

    def __init__(
        self,
        config: Config,
        weights: Weights,
        folder: Path | None = None,
        backend: str | None = None,
        decoder_class: type[Decoder] = Decoder,
    ):
        self.config, self.weights, self.folder = config, weights, folder
        self.asked_backend = backend
        self.backend = backends.choose(backend, weights)
        self.decoder_class = decoder_class

    def __call__(
        self,
        ids,
        dtype: str = "float32",
        attention_mask=None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> np.ndarray:
        """Logits (B, T, V) of token ids: a list, an array (T,) or (B, T), or a text.

        `dtype`: "float32"; "float64", the oracle, positions included; "bfloat16" or "float16", which round after
        each operation as PyTorch does. `attention_mask` (B, past + T): 0 for padding, which may stand on the left.
        With a `cache`, `ids` continue what is in it, in pieces of any size. `logits_to_keep`: the number
        of last tokens whose logits are wanted, 0 for all. The last token's logits say what continues a text.

        Raises InputError for ids outside the vocabulary, an empty prompt, or more tokens than the context holds.
        """
        return self.forward(ids, dtype, attention_mask, cache, silent, logits_to_keep)

    def trace(
        self, ids, dtype: str = "float32", attention_mask=None, feed: Mapping | None = None, taps: str | None = None
    ) -> Trace:
        """Every tensor of one forward, in computing order: name (see `refimpl.names`) -> array.

        `taps`: a glob on names, to record some of them. `feed`: a trace of another run. Once a tensor is computed and
        recorded, the run goes on with the value from `feed`, so that each recorded tensor shows its own error and
        inherits none. Raises InputError if `feed` is of other token ids, or has names that this model lacks.
        """
        from refimpl.names import taps as known

        ids, feed = self.token_ids(ids), Trace() if feed is None else feed
        if not isinstance(feed, Mapping):
            raise InputError(f"feed is a {type(feed).__name__}, expected a trace")
        if not isinstance(taps, str | None):
            raise InputError(f"taps is {taps!r:.60}, expected one glob such as 'model.layers.*.mlp'")
        about = {"engine": "refimpl", "family": self.config.family, "dtype": dtype, "config": asdict(self.config)}
        trace = Trace(meta={**about, "ids": prompt_of(ids), "fed": bool(feed)})
        expect_same_prompt(trace, feed)
        if odd := feed.keys() - known(self.config).keys():
            raise InputError(f"this model has no tensor {at_most(sorted(odd), 3)}; feed a trace of the same model")
        self.forward(ids, dtype, attention_mask, None, recording(trace, taps, then=feeding(feed)))
        if taps is not None and not trace:
            raise InputError(f"no tensor is called {taps!r}; names are such as {at_most(list(known(self.config)), 3)}")
        return trace

    def forward(
        self, ids, dtype: str, attention_mask, cache: KVCache | None, tap: Tap, logits_to_keep: int = 0
    ) -> np.ndarray:
        """The forward behind `__call__` and `trace`, with any tap."""
        ids, ops = self.token_ids(ids), self.ops(dtype)
        if not isinstance(logits_to_keep, int | np.integer) or logits_to_keep < 0:
            raise InputError(f"logits_to_keep is {logits_to_keep!r}, expected a number of tokens, or 0 for all")
        batch, tokens = ids.shape
        if cache is not None:
            expect_fits(cache, batch, self.config.num_hidden_layers, self.weights)
        past = cache.length if cache is not None else 0
        self.expect_room(past + tokens)
        if attention_mask is not None:
            attention_mask = np.array(attention_mask)
            if attention_mask.shape != (batch, past + tokens) or attention_mask.dtype.kind not in "iub":
                raise InputError(
                    f"attention_mask is {attention_mask.dtype} {attention_mask.shape}, expected integers of shape "
                    f"{(batch, past + tokens)}: it covers the cache and the new tokens"
                )
            attention_mask = attention_mask.astype(np.int64)
        if cache is None:
            mask = np.ones_like(ids) if attention_mask is None else attention_mask
        else:
            mask = cache.extended_mask(attention_mask, tokens)

        cos, sin = self.position_tables(token_positions(mask)[:, past:], ops.wide)
        bias = self.attention_bias(mask, tokens, ops.wide)
        logits_from = max(0, tokens - logits_to_keep) if logits_to_keep else 0
        logits = self.decoder(ops, tap, cache)(ids, cos, sin, bias, logits_from)
        if cache is not None:
            cache.advance(mask, self.weights)
        return logits

    def stages(
        self, ids, dtype: str = "float32", tap: Tap = silent, start: int = 0, stream: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """The forward of a prompt, step by step: the residual stream (B, T, C) after the embedding and each layer, and
        at last the logits (B, T, V). Each step is computed when the iterator is asked for it.

        So several runs can go side by side, layer by layer. With the `stream` that enters layer `start`, a run begins
        there; `start` may be the number of layers. Raises InputError as a call does.
        """
        ids, ops = self.token_ids(ids), self.ops(dtype)
        self.expect_room(ids.shape[1])
        mask = np.ones_like(ids)
        cos, sin = self.position_tables(token_positions(mask), ops.wide)
        bias = self.attention_bias(mask, ids.shape[1], ops.wide)
        decoder = self.decoder(ops, tap, None)
        if stream is None:
            yield (stream := decoder.embed(ids))
        for i in range(start, self.config.num_hidden_layers):
            yield (stream := decoder.layer(i, stream, cos, sin, bias))
        yield decoder.head(stream)

    def head(self, stream: np.ndarray, dtype: str = "float32") -> np.ndarray:
        """The logits (B, T, V) of a stream (B, T, C) that has left the last layer."""
        return self.decoder(self.ops(dtype), silent, None).head(stream)

    def expect_room(self, tokens: int) -> None:
        """Raises InputError for more tokens than the context holds."""
        if tokens > self.config.max_position_embeddings:
            raise InputError(f"{tokens} tokens exceed the context of {self.config.max_position_embeddings}; use fewer")

    def decoder(self, ops: NumPyOps, tap: Tap, cache: KVCache | None) -> Decoder:
        """The decoder over this model's weights, with `ops` and `cache`; each tensor passes through `tap`."""
        return self.decoder_class(self.config, self.weights, ops, tap, cache or no_cache)

    def ops(self, dtype: str) -> NumPyOps:
        """The operations at a number format. Raises InputError for one that is not known."""
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        return backends.ops(self.backend, dtype)

    def position_tables(self, positions: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """cos and sin for positions (B, T), (B, 1, T, D/2) each; none for ALiBi, which works on the scores."""
        theta = self.config.rope_theta
        return (None, None) if theta is None else rope_tables(positions, self.config.head_dim, theta, dtype)

    def attention_bias(self, mask: np.ndarray, tokens: int, dtype) -> np.ndarray:
        """What is added to the scores of the last `tokens` positions under a mask (B, S)."""
        return attention_bias(self.config, mask, tokens, dtype)

    def new_cache(self, batch: int = 1, capacity: int | None = None, dtype: str | None = None) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens (the model's context if not given).

        `dtype`: None keeps keys and values as they are computed. A float32 run may round them: to "float16", which
        takes half the memory, or to "int8", which takes a quarter (Q8_0's blocks of 32 with a scale each, as in
        llama.cpp). With long contexts, a run takes as long as reading this memory.

        Raises InputError for another dtype, and for one that does not fit the model's heads.
        """
        expect_dtype(dtype, self.config.head_dim)
        longest = self.config.max_position_embeddings
        return KVCache(self.config.num_hidden_layers, longest if capacity is None else capacity, batch, dtype)

    def token_ids(self, ids) -> np.ndarray:
        """Token ids (B, T) int64 from a text, a list, or an array (T,) or (B, T), checked against the vocabulary."""
        if isinstance(ids, str):
            ids = self.tokenizer.encode(ids)
        try:
            array = np.asarray(ids)
        except ValueError:
            raise InputError("the rows of ids differ in length; pad them on the left and pass attention_mask") from None
        if array.size == 0:
            raise InputError("the prompt is empty; expected at least one token")
        if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
            raise InputError(f"the ids are {array.dtype} of shape {array.shape}, expected integers (T,) or (B, T)")
        wrong = array[(array < 0) | (array >= self.config.vocab_size)]
        if wrong.size:
            raise InputError(f"token id {wrong[0]} is outside the vocabulary of {self.config.vocab_size}")
        return array.astype(np.int64).reshape(-1, array.shape[-1])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer. Raises InputError if it has none."""
        tokenizer = load_tokenizer(self.folder, self.config) if self.folder else None
        if tokenizer is None:
            raise InputError(f"{self.folder} has no tokenizer; pass token ids instead of text")
        return tokenizer

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The keys of the folder's generation_config.json, if there is one."""
        path = self.folder / "generation_config.json" if self.folder else None
        return read_json(path) if path and path.exists() else {}
