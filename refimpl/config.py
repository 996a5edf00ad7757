"""One frozen `Config` for a checkpoint, read from the keys of Hugging Face's `config.json`.

The five families are rows of `FAMILIES`, not subclasses. Whatever they differ in is a field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from refimpl.errors import InputError, at_most
from refimpl.files import read_json


@dataclass(frozen=True)
class Config:
    """Sizes and facts of one model. The names are Hugging Face's; fields that its `config.json` lacks come last.

    The defaults are Baichuan2-7B. `max_position_embeddings` is the longest context in tokens (Baichuan 13B calls it
    `model_max_length`). A size of 0 means "follows from the others" and is filled in.
    """

    family: str = "Baichuan2-7B"
    vocab_size: int = 125696
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # as many as attention heads
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = 10000.0  # None: ALiBi
    tie_word_embeddings: bool = False
    z_loss_weight: float = 0.0
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    torch_dtype: str = "float32"
    # Facts that no key of config.json states, about the official code and about the checkpoint.
    qkv_packed: bool = True  # one matrix W_pack instead of q_proj, k_proj, v_proj
    qkv_bias: bool = False
    norm_head: bool = True  # the rows of lm_head are scaled to length 1
    rope_upcast: bool = True  # 16-bit models rotate in float32, not in their own dtype
    fused_attention: bool = True  # 16-bit models keep scores and probs in float32 (scaled_dot_product_attention)
    quantized: bool = False  # matrices are quantized, by bitsandbytes or by this package; each says how

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise InputError(f"the family is {self.family!a:.40}, expected one of {', '.join(FAMILIES)}")
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name, most in _SIZES.items():
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= most:
                raise InputError(f"{name} is {size!r:.40}, expected a whole number from 1 to {most}")
        for name, limit in (("rms_norm_eps", 1.0), ("rope_theta", math.inf), ("z_loss_weight", math.inf)):
            number = getattr(self, name)
            if name == "rope_theta" and number is None:
                continue
            if type(number) not in (int, float) or not 0 <= number < limit or (name == "rope_theta" and not number):
                raise InputError(f"{name} is {number!r:.40}, expected a positive number")
        for name in ("tie_word_embeddings", *FACTS[1:]):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"{name} is {getattr(self, name)!r:.40}, expected true or false")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            given = getattr(self, name)
            ids = given if isinstance(given, list) and name == "eos_token_id" else [given]
            if not all(number is None or type(number) is int for number in ids):
                raise InputError(f"{name} is {given!r:.40}, expected a token id")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if not self.alibi and self.head_dim % 2:
            raise InputError(f"the head dimension is {self.head_dim}, but RoPE rotates pairs and needs an even one")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def alibi(self) -> bool:
        """Whether positions are a bias on the scores (ALiBi) and not a rotation (RoPE)."""
        return self.rope_theta is None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def qkv_modules(self) -> tuple[str, ...]:
        return ("W_pack",) if self.qkv_packed else ("q_proj", "k_proj", "v_proj")


OURS = {"quant_method": "refimpl"}  # the quantization_config of a folder that `refimpl quantize` has written
FACTS = ("family", "qkv_packed", "qkv_bias", "norm_head", "rope_upcast", "fused_attention", "quantized")
# No model is larger. The limits bound what a hostile file can make us build.
_SIZES = {
    "vocab_size": 1 << 22, "hidden_size": 1 << 17, "intermediate_size": 1 << 19, "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "max_position_embeddings": 1 << 24,
}  # fmt: skip

# What the official code does although no key of config.json says so (Source: each repository's modeling file).
_BAICHUAN = dict(qkv_packed=True, qkv_bias=False)
FAMILIES: dict[str, dict[str, Any]] = {
    "Baichuan-7B": dict(
        _BAICHUAN, rope_theta=1e4, norm_head=False, rope_upcast=False, fused_attention=False),
    "Baichuan-13B": dict(
        _BAICHUAN, rope_theta=None, norm_head=False, rope_upcast=True, fused_attention=False),
    "Baichuan2-7B": dict(
        _BAICHUAN, rope_theta=1e4, norm_head=True, rope_upcast=True, fused_attention=True),
    "Baichuan2-13B": dict(
        _BAICHUAN, rope_theta=None, norm_head=True, rope_upcast=True, fused_attention=False),
    "Qwen2-7B": dict(  # its rope_theta is a key
        qkv_packed=False, qkv_bias=True, norm_head=False, rope_upcast=False, fused_attention=False),
}  # fmt: skip

# What LLaMA's code does, in whose layout (`model_type` llama, q, k and v apart) people publish a Baichuan of 7B. There
# NormHead has been applied. Source: modeling_llama.py of transformers.
LLAMAFIED = dict(qkv_packed=False, qkv_bias=False, norm_head=False, rope_upcast=False, fused_attention=False)
WORDS = {1: 64000, 2: 125696}  # of a generation; more are padding, or were added

# Without these keys nothing can be built.
_SIZES_STATED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

# The defaults of transformers' Qwen2Config.
_QWEN2_DEFAULTS = {
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 32768,
}  # fmt: skip

# Keys that say nothing about the arithmetic of inference. Any key that is neither here nor a field is refused.
_NEUTRAL = {
    "architectures", "auto_map", "model_type", "tokenizer_class", "transformers_version", "dtype", "torch_dtype",
    "use_cache", "initializer_range", "gradient_checkpointing", "attention_dropout", "model_max_length",
    "max_window_layers", "user_token_id", "assistant_token_id", "name_or_path", "return_dict", "is_decoder",
    "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
    "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_length", "pad_token",
    "unk_token_id", "finetuning_task", "is_encoder_decoder", "num_labels", "classifier_dropout",
    # what transformers 4 writes into every config: about generation, other kinds of models, and what is returned
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix",
    "remove_invalid_values", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "tf_legacy_loss", "tie_encoder_decoder", "torchscript", "typical_p", "use_bfloat16",
}  # fmt: skip

# Keys that would change the numbers. Only these values are understood; None means that the key is not there.
_ONLY: dict[str, tuple] = {
    "hidden_act": ("silu", None),
    "rope_scaling": (None, {"type": "default"}, {"rope_type": "default"}),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1.0, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pruned_heads": (None, {}),
}


def read_config(folder: Path) -> Config:
    """The Config of the checkpoint in `folder`. Raises InputError if it is not understood."""
    path = Path(folder) / "config.json"
    if not path.exists() and (path.parent / "adapter_config.json").exists():
        raise InputError(
            f"{folder} is a LoRA adapter, not a model; merge it into the model that it was trained on: "
            f"refimpl convert MODEL --lora {folder} --out NEW"
        )
    keys = read_json(path)
    try:
        return config_from_keys(keys)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def config_from_keys(keys: Mapping[str, Any]) -> Config:
    """A Config from the keys of a Hugging Face `config.json`.

    Raises InputError for an unknown model type, for a missing size and for any key that may change the numbers and
    is not understood.

    >>> config_from_keys({"model_type": "mistral"})
    Traceback (most recent call last):
    refimpl.errors.InputError: model_type is 'mistral', expected 'baichuan', 'llama' or 'qwen2'
    """
    keys, family = dict(keys), _family(keys)
    facts = dict(FAMILIES[family])
    _take_rope(keys)
    if family == "Qwen2-7B":
        _take_qwen2(keys)
        _expect_keys(keys, (*_SIZES_STATED, "num_key_value_heads", "rope_theta"), family)
    elif keys["model_type"] == "llama":
        facts |= LLAMAFIED | {"rope_theta": keys.get("rope_theta", 1e4)}
        _expect_keys(keys, _SIZES_STATED, f"{family} in LLaMA's layout")
    else:
        _take_baichuan(keys)
        _expect_keys(keys, _SIZES_STATED, family)
    _take_what_changes_numbers(keys)
    quantized = _quantized(keys.pop("quantization_config", None))
    normalized = keys.pop("lm_head_normalized", None)  # `refimpl convert --normalize-head` says so; checked at load
    if normalized not in (None, False, True):
        raise InputError(f"lm_head_normalized is {normalized!r:.40}, expected true or false")
    facts["norm_head"] = facts["norm_head"] and not normalized

    dtype = keys.get("torch_dtype") or keys.get("dtype") or "float32"
    context = keys.get("max_position_embeddings", keys.get("model_max_length", 4096))
    known = {field.name for field in fields(Config)} - set(FACTS)
    unknown = [k for k in keys if k not in known and k not in _NEUTRAL and not k.startswith("_")]
    if unknown:
        raise InputError(f"unknown keys {at_most(unknown)}: they may change the numbers; remove those that do not")
    values = {k: v for k, v in keys.items() if k in known}
    values.update(max_position_embeddings=context, torch_dtype=str(dtype), quantized=quantized)
    return Config(family=family, **{**values, **facts})


# Each of these functions removes the keys that it has understood


def _take_rope(keys: dict[str, Any]) -> None:
    """Moves RoPE's keys from where transformers 5 keeps them to where they used to be."""
    rope = keys.pop("rope_parameters", None)
    if rope is None:
        return
    plain = isinstance(rope, dict) and rope.get("rope_type", "default") == "default"
    if not plain or set(rope) - {"rope_theta", "rope_type", "partial_rotary_factor"}:
        raise InputError(f"rope_parameters is {rope!r:.60}, which is not understood; expected the type 'default'")
    keys["rope_theta"] = rope.get("rope_theta", keys.get("rope_theta"))
    keys.setdefault("partial_rotary_factor", rope.get("partial_rotary_factor"))


def _take_baichuan(keys: dict[str, Any]) -> None:
    """Drops what the official code of Baichuan does not read."""
    heads, kv = keys.get("num_attention_heads"), keys.get("num_key_value_heads")
    if kv not in (None, heads):  # such as Qualcomm's wrapper, which declares Qwen2's sizes for Baichuan2-7B
        raise InputError(
            f"num_key_value_heads is {kv!r}, but a Baichuan has as many as heads, {heads!r}; is it a Qwen2?"
        )
    keys.pop("rope_theta", None)  # hard-coded in the official code, whatever config.json says


def _take_qwen2(keys: dict[str, Any]) -> None:
    """Adds Qwen2's defaults, and drops what its code does not read."""
    for name, default in _QWEN2_DEFAULTS.items():
        keys.setdefault(name, default)
    keys.pop("attention_bias", None)  # Qwen2's code has biases whatever this says
    if keys.get("max_window_layers", 0) == keys.get("num_hidden_layers"):
        keys.pop("use_sliding_window", None)  # only layers after these have a window


def _take_what_changes_numbers(keys: dict[str, Any]) -> None:
    """Removes the keys for which only one value is understood. Raises InputError for any other value."""
    if keys.get("head_dim") and _head_dim(keys) == keys["head_dim"]:
        keys.pop("head_dim")
    for key, allowed in _ONLY.items():
        value = keys.pop(key, None)
        if value not in allowed:
            raise InputError(f"{key} is {value!r:.60}, expected {allowed[0]!r}; this would change the numbers")
    keys.pop("sliding_window", None)  # without use_sliding_window it does nothing
    kinds = keys.pop("layer_types", None) or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise InputError("layer_types has layers without full attention; this would change the numbers")


def _expect_keys(keys: Mapping[str, Any], needed: Sequence[str], family: str) -> None:
    """Raises InputError if a key is missing."""
    for name in needed:
        if keys.get(name) is None:
            raise InputError(f"the key {name} is missing; a {family} cannot be built without it")


def _head_dim(keys: Mapping[str, Any]) -> int | None:
    """The head dimension that follows from the other sizes."""
    hidden, heads = keys.get("hidden_size"), keys.get("num_attention_heads")
    return hidden // heads if type(hidden) is int and type(heads) is int and heads > 0 else None


def _quantized(keys: Any) -> bool:
    """Whether bitsandbytes or this package has quantized the checkpoint, by its `quantization_config`.

    Raises InputError for any other method.
    """
    if keys is None:
        return False
    if keys == OURS:
        return True
    method = keys.get("quant_method", "bitsandbytes") if isinstance(keys, dict) else None
    if method in ("gptq", "awq"):
        raise InputError(
            f"the matrices are quantized by {method.upper()} ({keys.get('bits', 4)!r:.10} bits, groups of "
            f"{keys.get('group_size', 128)!r:.10}), which is not read; take the model that it was made of, and refimpl "
            "quantize it"
        )
    known = method == "bitsandbytes"
    if (
        not known
        or keys.get("llm_int8_threshold", 6.0) != 6.0
        or not (keys.get("load_in_4bit") or keys.get("load_in_8bit"))
    ):
        raise InputError(
            "quantization_config is not of bitsandbytes with a threshold of 6.0; this would change the numbers"
        )
    return True


def _family(keys: Mapping[str, Any]) -> str:
    """The family. The official configs do not name it, so this reads the keys in which they differ.

    13B (ALiBi) has no `max_position_embeddings`. For Baichuan 1 or 2, see `generation`.
    """
    kind = keys.get("model_type")
    if kind == "qwen2":
        return "Qwen2-7B"
    if kind == "llama":
        return _llamafied(keys)
    if kind != "baichuan":
        raise InputError(f"model_type is {kind!r}, expected 'baichuan', 'llama' or 'qwen2'")
    hidden, size = keys.get("hidden_size"), _size(keys)
    if (hidden, size) in ((4096, "13B"), (5120, "7B")):
        has = "no" if size == "13B" else "a"
        raise InputError(
            f"hidden_size is {hidden}, with {has} max_position_embeddings; expected 4096 with one (7B, RoPE) or 5120 "
            "without (13B, ALiBi); use the original config.json"
        )
    number, _ = generation(keys)
    return f"Baichuan{'2' if number == 2 else ''}-{size}"


def _llamafied(keys: Mapping[str, Any]) -> str:
    """Which Baichuan a model in LLaMA's layout was, by its vocabulary. 13B has ALiBi, which LLaMA's code lacks."""
    words = keys.get("vocab_size")
    for number, least in sorted(WORDS.items(), reverse=True):
        if type(words) is int and words >= least:
            return f"Baichuan{'2' if number == 2 else ''}-7B"
    raise InputError(
        f"model_type is llama with a vocabulary of {words!r:.40}; a Baichuan in LLaMA's layout has {WORDS[1]} words, "
        f"or {WORDS[2]} as Baichuan2"
    )


def _size(keys: Mapping[str, Any]) -> str:
    return "7B" if "max_position_embeddings" in keys else "13B"


def generation(keys: Mapping[str, Any]) -> tuple[int, str | None]:
    """The generation of a Baichuan, 1 or 2; and the reason to assume it, or None if `config.json` proves it.

    The generations differ in NormHead, which no key names. These signs tell them apart, the surest first. The
    vocabulary has 64000 words or 125696, unless some were added. Only Baichuan2's code has a z-loss. The class of
    Baichuan-7B is spelled BaiChuan, with two capitals. A tokenizer's class proves nothing: transformers writes one into
    any config.

    >>> generation({"vocab_size": 125699, "max_position_embeddings": 4096})
    (2, 'its vocabulary of 125699 is no smaller than that of Baichuan2')
    """
    words = keys.get("vocab_size")
    classes = [*(keys.get("architectures") or []), *(keys.get("auto_map") or {}).values()]
    spelled = [str(name).rpartition(".")[2] for name in classes]
    if words in (64000, 125696):
        return (1 if words == 64000 else 2), None
    if "z_loss_weight" in keys:
        return 2, None
    if any(name.startswith("BaiChuan") for name in spelled):
        return 1, None
    if _size(keys) == "7B" and any(name.startswith("Baichuan") for name in spelled):
        return 2, None
    if type(words) is int and words > 125696:
        return 2, f"its vocabulary of {words} is no smaller than that of Baichuan2"
    if keys.get("tokenizer_class") == "BaichuanTokenizer":
        return 2, "its tokenizer_class is BaichuanTokenizer"
    return 1, "nothing in it speaks of Baichuan2"


def doubt(keys: Mapping[str, Any]) -> str | None:
    """A remark on a Baichuan whose generation `config.json` does not prove; else None.

    >>> doubt({"model_type": "baichuan", "vocab_size": 64000})
    """
    number, reason = generation(keys) if keys.get("model_type") == "baichuan" else (0, None)
    if reason is None:
        return None
    other = 'add "z_loss_weight": 0 to it if it is one' if number == 1 else "its head is then normalised (NormHead)"
    return f"config.json does not say which Baichuan this is; it is taken for generation {number}: {reason}; {other}"
