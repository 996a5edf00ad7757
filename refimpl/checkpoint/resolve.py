"""From a checkpoint's tensors to what the decoder reads: the one place that knows how checkpoints differ.

`resolve` asks each of CHECKS whether the tensors fit the config; then the head is found, which may be the embedding,
and may be a NormHead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from refimpl.checkpoint import bitsandbytes
from refimpl.checkpoint.doctor import broken_promise, frequencies, mismatch
from refimpl.checkpoint.foreign import of_an_engine, stubs, unmerged
from refimpl.checkpoint.weights import FLOATS, NormHead, QuantizedWeight, Weight, Weights, quantized_weight
from refimpl.config import Config
from refimpl.errors import InputError, at_most

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def resolve(config: Config, tensors: Mapping[str, Any]) -> Weights:
    """The weights as the decoder reads them, from a checkpoint's tensors. Quantized matrices stay quantized.

    Raises InputError for missing, unknown and wrongly shaped tensors, and for formats that are not floating point.
    """
    found = Found.among(config, tensors)
    for check in CHECKS:
        if problem := check(found):
            raise InputError(problem)
    entries: dict[str, Any] = {
        name: found.quantized.get(name) or Weight(value)
        for name, value in found.all.items()
        if name not in found.unread or name in found.quantized  # a tied head may have blocks of its own
    }
    head = entries.get(HEAD) or entries[EMBEDDING]
    if config.norm_head and isinstance(head, Weight):  # blocks hold the head as it is used, after NormHead
        head = NormHead(head.array)
    return Weights({**entries, HEAD: head})


@dataclass(frozen=True)
class Found:
    """The tensors of a checkpoint: `plain` ones, `quantized` matrices, and the names of those `of_bitsandbytes`."""

    config: Config
    plain: Mapping[str, Any]
    quantized: Mapping[str, QuantizedWeight]
    of_bitsandbytes: frozenset[str]

    @classmethod
    def among(cls, config: Config, tensors: Mapping[str, Any]) -> Found:
        """The tensors, sorted. Raises InputError for a quantized matrix that is not as bitsandbytes writes it."""
        ours = {name: weight for name, weight in tensors.items() if isinstance(weight, QuantizedWeight)}
        plain, blocks = bitsandbytes.collect({name: array for name, array in tensors.items() if name not in ours})
        theirs = {name: quantized_weight(*found) for name, found in blocks.items()}
        return cls(config, plain, {**ours, **theirs}, frozenset(theirs))

    @cached_property
    def all(self) -> dict[str, Any]:
        """Name -> tensor or quantized matrix, in the order of `shapes`."""
        both = {**self.plain, **self.quantized}
        return {name: both[name] for name in [*self.shapes, *both] if name in both}

    @cached_property
    def unread(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors here that a checkpoint may hold, although the official code does not use them.

        Baichuan 1 saved RoPE's frequencies, which its code computes with the same values anyway. And if the head is
        the embedding, a file may still hold a head.
        """
        config = self.config
        shapes: dict[str, tuple[int, ...]] = {name: (config.head_dim // 2,) for name in frequencies(config)}
        if config.tie_word_embeddings:
            shapes[HEAD] = (config.vocab_size, config.hidden_size)
        return {name: shape for name, shape in shapes.items() if name in self.plain or name in self.quantized}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> the shape that the config gives it, for every tensor that the checkpoint must or may hold."""
        return {**expected_shapes(self.config), **self.unread}


def a_list(found: Found) -> str | None:
    """A list in place of a tensor. A `.bin` may hold lists only for bitsandbytes' matrices."""
    for name, shape in found.shapes.items():
        if isinstance(found.plain.get(name), list):
            return f"{name} is a list, expected a tensor of shape {shape}"
    return None


def another_engine(found: Found) -> str | None:
    """Matrices that another engine has quantized."""
    return of_an_engine(found.plain)


def unmerged_adapter(found: Found) -> str | None:
    """An adapter among the weights."""
    return unmerged(found.plain)


def without_numbers(found: Found) -> str | None:
    """Tensors that are there without their numbers."""
    return stubs({name: found.plain[name] for name in found.shapes if name in found.plain})


def another_model(found: Found) -> str | None:
    """Weights and a config of different models."""
    strange = mismatch(found.config, {name: getattr(value, "shape", ()) for name, value in found.all.items()})
    return f"config.json describes a {found.config.family}, but {strange}" if strange else None


def missing_or_unknown(found: Found) -> str | None:
    """Parameters without a tensor, and tensors whose names no parameter has."""
    missing = [name for name in found.shapes if name not in found.all]
    unknown = sorted(found.all.keys() - found.shapes.keys())
    said = [f"lacks {at_most(missing, 3)}"] * bool(missing) + [f"has unknown {at_most(unknown, 3)}"] * bool(unknown)
    return f"the checkpoint {' and '.join(said)}; config.json describes a {found.config.family}" if said else None


def wrong_shape(found: Found) -> str | None:
    """Tensors of other shapes than the config says."""
    for name, shape in found.shapes.items():
        if name in found.all and found.all[name].shape != shape:
            return f"{name} has shape {found.all[name].shape}, config.json ({found.config.family}) says {shape}"
    return None


def not_floats(found: Found) -> str | None:
    """Parameters that are not floating point."""
    for name in found.shapes:
        if name in found.plain and found.plain[name].dtype not in FLOATS:
            return f"{name} is {found.plain[name].dtype}, expected float32, float16 or bfloat16"
    return None


def quantized_outside_layers(found: Found) -> str | None:
    """Quantized matrices outside the layers, where bitsandbytes quantizes none."""
    for name in sorted(found.of_bitsandbytes):
        if not name.startswith("model.layers."):
            return f"{name} is quantized, expected the matrices of the layers alone to be"
    return None


def nothing_quantized(found: Found) -> str | None:
    """A config that speaks of quantization, over weights that are not quantized."""
    if found.config.quantized and not found.quantized:
        return "config.json has a quantization_config, but no matrix is quantized; remove it, or quantize()"
    return None


def head_not_normalised(found: Found) -> str | None:
    """A head that is not normalised, although the config says so."""
    return broken_promise(found.config, found.plain)


# A person reads only the first problem. So a check comes before those that find the same and explain it less well.
CHECKS: tuple[Callable[[Found], str | None], ...] = (
    a_list,
    another_engine,
    unmerged_adapter,
    without_numbers,
    another_model,
    missing_or_unknown,
    wrong_shape,
    not_floats,
    quantized_outside_layers,
    nothing_quantized,
    head_not_normalised,
)


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter that a checkpoint of this config must hold."""
    hidden, inter = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    qkv = {"W_pack": q + 2 * kv} if config.qkv_packed else {"q_proj": q, "k_proj": kv, "v_proj": kv}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        for module, rows in qkv.items():
            shapes[f"{at}.self_attn.{module}.weight"] = (rows, hidden)
            if config.qkv_bias:
                shapes[f"{at}.self_attn.{module}.bias"] = (rows,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, q)
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = (inter, hidden)
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inter)
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def model_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> the shape of every parameter of a model in memory. That includes a tied head, which no file needs."""
    return {**expected_shapes(config), HEAD: (config.vocab_size, config.hidden_size)}
