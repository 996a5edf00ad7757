"""What is wrong with a checkpoint, from the shapes of its tensors: a config of another model, or changed weights.

`mismatch` explains tensors that do not fit the config, `broken_promise` a head that is not normalised as the config
says. `remarks` are about weights that load, but are not what their config says. All of them read shapes and a few
rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.checkpoint.weights import row_lengths
from refimpl.config import Config

# The official checkpoints: vocabulary, hidden, intermediate, layers; and heads, for queries and for keys and values.
OFFICIAL = {
    "Baichuan-7B": (64000, 4096, 11008, 32),
    "Baichuan-13B": (64000, 5120, 13696, 40),
    "Baichuan2-7B": (125696, 4096, 11008, 32),
    "Baichuan2-13B": (125696, 5120, 13696, 40),
    "Qwen2-7B": (152064, 3584, 18944, 28),
}
HEADS = {
    "Baichuan-7B": (32, 32),
    "Baichuan-13B": (40, 40),
    "Baichuan2-7B": (32, 32),
    "Baichuan2-13B": (40, 40),
    "Qwen2-7B": (28, 4),
}
KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
HEAD_KEYS = ("num_attention_heads", "num_key_value_heads")
SAMPLE = 16  # rows of the head that are looked at
# Rounding a row's length and its elements to bfloat16 leaves the length within 2^-8 of 1; rows as trained are far off.
NEAR_ONE = 0.01


def official_sizes(config: Config) -> bool:
    """Whether a config has the sizes of its family's official checkpoint. Numbers of heads do not count."""
    return OFFICIAL.get(config.family) == tuple(getattr(config, key) for key in KEYS)


def official_heads(config: Config) -> bool:
    """Whether it has the official numbers of heads, which the shapes of a Baichuan's tensors do not tell."""
    return HEADS.get(config.family) == tuple(getattr(config, key) for key in HEAD_KEYS)


def mismatch(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Whose weights and whose config these are, if their sizes differ. None if they agree or are unknown."""
    found = sizes(shapes)
    if found is None:
        return None
    described = tuple(getattr(config, key) for key in KEYS)
    packed = any(".W_pack." in name for name in shapes)
    if found == described and packed == config.qkv_packed:
        return None
    differing = [
        f"{key} {theirs} (config.json: {ours})"
        for key, theirs, ours in zip(KEYS, found, described, strict=True)
        if theirs != ours
    ]
    if packed != config.qkv_packed:
        kinds = ("q_proj, k_proj, v_proj", "W_pack")
        differing.append(f"{kinds[packed]} (config.json: {kinds[config.qkv_packed]})")
    if found == described and config.qkv_packed:
        return (
            "the weights have q_proj, k_proj and v_proj where a Baichuan has W_pack: they were made LLaMA's. W_pack is "
            "the three below one another, in this order; join them, or take the config.json with model_type llama"
        )
    owner = next((family for family, known in OFFICIAL.items() if known == found), None)
    whose = f"a {owner}'s" if owner else "another model's"
    return f"the weights are {whose}, with {', '.join(differing)}; take the config.json that came with them"


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int] | None:
    """(vocabulary, hidden, intermediate, layers) that the tensors have; None if an embedding or a layer is missing."""
    layers = {int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d{1,4})\.", name))}
    embedding, gate = shapes.get("model.embed_tokens.weight", ()), shapes.get("model.layers.0.mlp.gate_proj.weight", ())
    if len(embedding) != 2 or len(gate) != 2 or not layers:
        return None
    return *embedding, gate[0], max(layers) + 1


def broken_promise(config: Config, tensors: Mapping[str, Any]) -> str | None:
    """An error message if config.json says that a Baichuan2's head is normalised, and it is not; else None."""
    lengths = _head_lengths(config, tensors)
    if lengths is None or config.norm_head or _near_one(lengths):
        return None
    if not config.qkv_packed:
        return f"{_measured(lengths)}, and LLaMA's code has no NormHead; refimpl convert --layout llama applies it"
    return (
        f"{_measured(lengths)}, but config.json says lm_head_normalized; remove that key, or normalise it with "
        "refimpl convert --normalize-head"
    )


def remarks(config: Config, tensors: Mapping[str, Any]) -> list[str]:
    """What to know about weights that load.

    They have another number of attention heads than the official checkpoint. Or lm_head is normalised although the
    config does not say so, or is not read. Or the saved frequencies are not RoPE's.
    """
    found = []
    if official_sizes(config) and not official_heads(config):
        said, right = (", ".join(map(str, n)) for n in ([getattr(config, k) for k in HEAD_KEYS], HEADS[config.family]))
        found.append(
            f"{' and '.join(HEAD_KEYS)} are {said}, but the {config.family} of these sizes has {right}; take the "
            "config.json that came with it"
        )
    lengths = _head_lengths(config, tensors)
    if lengths is not None and config.norm_head and _near_one(lengths):
        found.append(
            f"{_measured(lengths)}: the head was normalised before, for Baichuan 1 or by a forward before saving; "
            "NormHead normalises it once more, which changes roundings only"
        )
    return found + _unused_head(config, tensors) + _frequencies(config, tensors)


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """Remarks on scales, norms and biases with NaN or infinity. These arrays are small, so they are read whole."""
    found = []
    for name, value in tensors.items():
        parts = value.blocks.parts if hasattr(value, "blocks") else {"": value}
        for part, array in parts.items():
            small = isinstance(array, np.ndarray) and array.dtype.kind in "fV" and (part or array.ndim == 1)
            if small and (count := int((~np.isfinite(array.astype(np.float32))).sum())):
                where = f"{name}.{part}" if part else name
                found.append(
                    f"{where}: {count} of {array.size} numbers are NaN or infinite; was it made of such weights?"
                )
    return found


def _head_lengths(config: Config, tensors: Mapping[str, Any]) -> np.ndarray | None:
    """The lengths of some rows of a Baichuan2's head, without rows of zeros."""
    head = tensors.get("lm_head.weight")
    if not config.family.startswith("Baichuan2") or config.tie_word_embeddings or not isinstance(head, np.ndarray):
        return None
    lengths = row_lengths(_sample(head))
    return lengths[lengths > 0] if lengths.any() else None


def _sample(matrix: np.ndarray) -> np.ndarray:
    """Some of its rows, in float64."""
    return matrix[np.unique(np.linspace(0, len(matrix) - 1, SAMPLE).astype(int))].astype(np.float64)


def _near_one(lengths: np.ndarray) -> bool:
    return bool((np.abs(lengths - 1) < NEAR_ONE).all())


def _measured(lengths: np.ndarray) -> str:
    return f"the rows of lm_head have lengths from {lengths.min():.4g} to {lengths.max():.4g}"


def frequencies(config: Config) -> list[str]:
    """The names under which Baichuan 1 saved RoPE's frequencies (D/2,) of each layer; none with ALiBi."""
    layers = 0 if config.alibi else config.num_hidden_layers
    return [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(layers)]


def _frequencies(config: Config, tensors: Mapping[str, Any]) -> list[str]:
    half = config.head_dim // 2
    for name in frequencies(config):
        expected = (config.rope_theta or 0.0) ** (-np.arange(half) / half)
        if name in tensors and not np.allclose(tensors[name].astype(np.float64), expected, rtol=2**-7):
            return [f"{name} is not RoPE's at theta {config.rope_theta}; it is not read, as the official code does not"]
    return []


def _unused_head(config: Config, tensors: Mapping[str, Any]) -> list[str]:
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if not config.tie_word_embeddings or not isinstance(head, np.ndarray) or not isinstance(embedding, np.ndarray):
        return []
    if np.array_equal(_sample(head), _sample(embedding)):
        return []
    return ["lm_head.weight is not the embedding, but config.json says tie_word_embeddings; it is not read"]
