"""Tiny models of the five families, the same bytes everywhere: an engine, or its converter, is tried on them.

Their weights are made of PCG64's raw bits, which no version of NumPy changes. They are random, so each answer depends
on every part of the arithmetic. The Baichuans have the small tokenizer of the embedded model. The 13Bs have 40 layers,
because llama.cpp tells a Baichuan with ALiBi by that number, and 6 heads, which are no power of two.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from refimpl.checkpoint.resolve import expected_shapes
from refimpl.config import FAMILIES, config_from_keys
from refimpl.errors import InputError
from refimpl.model import EMBEDDED

VERSION = 1  # of the weights: `data/` holds the answers of this version
NAMES = {family: f"tiny-{family.lower()}" for family in FAMILIES}
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def config_keys(family: str) -> dict[str, Any]:
    """The config.json of a family's tiny model."""
    alibi, qwen = family.endswith("13B"), family == "Qwen2-7B"
    spelled = "BaiChuan" if family == "Baichuan-7B" else "Baichuan"
    keys: dict[str, Any] = {
        "model_type": "baichuan", "architectures": [f"{spelled}ForCausalLM"], "tokenizer_class": "BaichuanTokenizer",
        "vocab_size": 3584, "hidden_size": 48 if alibi else 64, "intermediate_size": 64 if alibi else 96,
        "num_hidden_layers": 40 if alibi else 3, "num_attention_heads": 6 if alibi else 4, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "tie_word_embeddings": False,
        "model_max_length" if alibi else "max_position_embeddings": 4096 if alibi else 512,
    }  # fmt: skip
    if family.startswith("Baichuan2"):
        keys["z_loss_weight"] = 0.0
    else:
        del keys["tokenizer_class"]
    if qwen:
        keys.update(model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=272, num_key_value_heads=2,
                    rope_theta=1e6, eos_token_id=260, bos_token_id=258, pad_token_id=258)  # fmt: skip
    return keys


def weights(family: str) -> dict[str, np.ndarray]:
    """The parameters of a family's tiny model, float32."""
    config = config_from_keys(config_keys(family))
    bits = np.random.PCG64(1000 * VERSION + list(FAMILIES).index(family))
    found = {}
    for name, shape in expected_shapes(config).items():
        raw = bits.random_raw(math.prod(shape)) >> np.uint64(40)  # 24 bits: what a float32 holds
        uniform = (raw.astype(np.float64) / (1 << 23) - 1).reshape(shape) * math.sqrt(3)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * uniform
        elif name.startswith(("model.embed", "lm_head")):
            rows = np.exp(0.5 * uniform[:, :1]) if name.startswith("lm_head") else 1.0  # NormHead makes these equal
            values = uniform * rows * (1.0 if name.startswith("model") else 3 / math.sqrt(shape[1]))
        elif len(shape) == 1:
            values = uniform
        else:
            looks = any(part in name for part in ("W_pack", "q_proj", "k_proj", "v_proj"))
            scale = (2.4 if config.alibi else 2.0) if looks else 1.0  # a token 2048 back can win
            if "o_proj" in name or "down_proj" in name:  # a deep model of random weights is chaos: three layers matter
                scale = 1.0 if int(name.split(".")[2]) < 3 else 0.02
            values = uniform * scale / math.sqrt(shape[1])
        if name.startswith("lm_head"):  # so that some texts end
            values[config.eos_token_id] *= np.arange(shape[1]) == 0 if config.norm_head else 3
        if name == "model.norm.weight" and config.norm_head:
            values[0] = 3
        if name.startswith("lm_head") and family == "Qwen2-7B":  # its tokens are bytes: most answers shall be letters
            values[[id for id in range(config.vocab_size) if id != config.eos_token_id and not 33 <= id < 127]] *= 0.3
        found[name] = values.astype(np.float32)
    return found


def write(family: str, folder: str | Path) -> Path:
    """Writes a family's tiny model into the new folder `folder`: Hugging Face's layout, tokenizer included.

    Raises InputError for a folder that exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists; choose another name, or remove it")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another one") from None
    (folder / "config.json").write_text(json.dumps(config_keys(family), indent=1))
    generation: dict[str, Any] = {"do_sample": False, "max_new_tokens": 64}
    if family != "Qwen2-7B":
        generation |= {"user_token_id": 195, "assistant_token_id": 196}
        shutil.copy(EMBEDDED / "tokenizer.model", folder / "tokenizer.model")
    else:
        (folder / "tokenizer.json").write_text(json.dumps(_byte_level(), ensure_ascii=False))
        keys = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    save_file(weights(family), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _byte_level() -> dict[str, Any]:
    """A tokenizer.json whose tokens are the 256 bytes, two pairs, and Qwen2's special tokens."""
    from refimpl.text.tokenizer import byte_letters

    merged = {"th": 256, "in": 257}  # llama.cpp refuses a vocabulary without a merge
    special = [{"id": 258 + n, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for n, text in enumerate(QWEN_SPECIAL)]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": byte_letters() | merged,
                  "merges": [" ".join(text) for text in merged]},
    }  # fmt: skip


def write_all(folder: str | Path) -> list[Path]:
    """Writes the tiny models of all families into the new folder, and each as a GGUF file if the library is there."""
    from importlib.util import find_spec

    from refimpl.blocks.gguf_out import write_gguf
    from refimpl.checkpoint.folder import Checkpoint

    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists; choose another name, or remove it")
    made = [write(family, folder / NAMES[family]) for family in FAMILIES]
    if find_spec("gguf") is not None:
        for path in made:
            write_gguf(Checkpoint.read(path), path.with_suffix(".gguf"))
    return made


def family_in(name: str) -> str:
    """The family whose tiny model a name is of. Raises InputError if it is none."""
    found = [family for family, one in NAMES.items() if one in name.lower()]
    if not found:
        raise InputError(f"{name!r:.80} does not say the family; give it with --family, such as Baichuan2-7B")
    return found[0]
