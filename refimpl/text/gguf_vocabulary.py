"""The tokenizer inside a GGUF file becomes the file that its library reads (tokenizer.model, tokenizer.json), and back.

Of a SentencePiece model, llama.cpp keeps the pieces with their scores and types; of a byte-level BPE, the words and
merges. The library's file holds the same, and a few settings that all Baichuans or all Qwen2 share. So the library cuts
texts into tokens, and nothing here does.

**Source**: sentencepiece_model.proto for the numbers of fields; tokenizer.json of Qwen2-7B-Instruct for its pattern.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.files import read_json, read_small

# Types of pieces: the same numbers in SentencePiece and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)
TEMPLATE = "tokenizer.chat_template"
BPE = 2  # a model's type in SentencePiece
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_file(facts: Mapping[str, Any]) -> bytes | None:
    """The bytes of `tokenizer.model` (Baichuan) or `tokenizer.json` (Qwen2); None if the file has no vocabulary.

    Raises InputError for lists that do not fit each other, and for a vocabulary of another kind.
    """
    kind = facts.get("tokenizer.ggml.model")
    if kind in (None, "no_vocab", "none"):
        return None
    tokens = _list(facts, "tokens", str)
    types = [int(one) for one in _list(facts, "token_type", int, len(tokens), [NORMAL] * len(tokens))]
    if kind == "llama":
        return _sentencepiece(tokens, _list(facts, "scores", float, len(tokens)), types, facts)
    if kind == "gpt2" and facts.get("tokenizer.ggml.pre") == "qwen2":
        return _byte_level(tokens, _list(facts, "merges", str), types)
    raise InputError(f"the vocabulary is of the kind {kind!r:.40}, expected llama (SentencePiece) or gpt2 of qwen2")


def vocabulary_facts(folder: Path, config: Config) -> dict[str, Any]:
    """GGUF's facts about the tokenizer of a folder. Without a tokenizer, the only fact is `no_vocab`.

    Raises InputError for a tokenizer that cannot be read.
    """
    facts: dict[str, Any] = {"model": "no_vocab"}
    sentencepiece, byte_level = folder / "tokenizer.model", folder / "tokenizer.json"
    if config.family == "Qwen2-7B" and byte_level.exists():
        facts = _facts_of_byte_level(read_json(byte_level), config.vocab_size)
    elif config.family != "Qwen2-7B" and sentencepiece.exists():
        facts = _facts_of_sentencepiece(sentencepiece)
        missing = config.vocab_size - len(facts["tokens"])
        if missing > 0:  # words that were added, and padding
            added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
            texts = {id: text for text, id in added.items()}
            more = range(len(facts["tokens"]), config.vocab_size)
            facts["tokens"] += [texts.get(id, f"[PAD{id}]") for id in more]
            facts["scores"] += [0.0] * missing
            facts["token_type"] += [USER_DEFINED if id in texts else UNUSED for id in more]
    if facts["model"] != "no_vocab":
        end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        ids = {"bos": config.bos_token_id, "eos": end, "padding": config.pad_token_id}
        facts |= {f"{name}_token_id": id for name, id in ids.items() if id is not None}
        keys = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        facts |= {"add_bos_token": bool(keys.get("add_bos_token")), "add_eos_token": bool(keys.get("add_eos_token"))}
        if isinstance(keys.get("chat_template"), str):
            return {f"tokenizer.ggml.{k}": v for k, v in facts.items()} | {TEMPLATE: keys["chat_template"]}
    return {f"tokenizer.ggml.{name}": value for name, value in facts.items()}


def _facts_of_sentencepiece(path: Path) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=read_small(path) or b"\0")
    except RuntimeError:
        raise InputError(f"{path} is damaged: it is not a SentencePiece model; copy it again") from None
    ids = range(model.get_piece_size())
    kinds = ((UNKNOWN, model.is_unknown), (CONTROL, model.is_control), (UNUSED, model.is_unused), (BYTE, model.is_byte))
    types = [next((kind for kind, asked in kinds if asked(id)), NORMAL) for id in ids]
    scores = [float(model.get_score(id)) for id in ids]
    return {
        "model": "llama", "tokens": [model.id_to_piece(id) for id in ids], "scores": scores,
        "token_type": _with_user_defined(types, scores), "unknown_token_id": model.unk_id(),
        "add_space_prefix": model.encode("a") != [model.piece_to_id("a")],
    }  # fmt: skip


def _facts_of_byte_level(whole: dict[str, Any], size: int) -> dict[str, Any]:
    words = {id: word for word, id in whole["model"]["vocab"].items()}
    added = {one["id"]: one for one in whole.get("added_tokens", [])}
    tokens = [added[id]["content"] if id in added else words.get(id, f"[PAD{id}]") for id in range(size)]
    types = [
        (CONTROL if added[id].get("special") else USER_DEFINED) if id in added else NORMAL if id in words else UNUSED
        for id in range(size)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    return {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": types, "merges": merges}


def _list(facts: Mapping[str, Any], name: str, of: type, length: int | None = None, default: Any = None) -> Any:
    values = facts.get(f"tokenizer.ggml.{name}", default)
    right = isinstance(values, list) if of is str else hasattr(values, "__len__") and not isinstance(values, str)
    if not right or (length is not None and len(values) != length):
        expected = f"{length} of them" if length else "a list"
        raise InputError(f"tokenizer.ggml.{name} does not fit the vocabulary, expected {expected}; convert it again")
    return values


def _sentencepiece(tokens: Sequence[str], scores: Any, types: Sequence[int], facts: Mapping[str, Any]) -> bytes:
    """A ModelProto: the pieces, a trainer_spec and a normalizer_spec that changes nothing."""
    types = _with_user_defined(types, scores)
    pieces = (
        _field(1, _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, type))
        for token, score, type in zip(tokens, scores, types, strict=True)
    )
    ids = [facts.get(f"tokenizer.ggml.{name}_token_id", default) for name, default in
           (("unknown", 0), ("bos", 1), ("eos", 2))]  # fmt: skip
    if not all(type(id) is int and 0 <= id < len(tokens) for id in ids):
        raise InputError(f"the ids of <unk>, <s> and </s> are {ids}, expected those of three words")
    special = b"".join(_number(40 + n, id) for n, id in enumerate(ids)) + _number(43, (1 << 64) - 1)
    names = b"".join(_field(45 + n, tokens[id].encode()) for n, id in enumerate(ids))
    trainer = _number(3, BPE) + _number(4, len(tokens)) + _number(35, 1) + special + names
    prefix = bool(facts.get("tokenizer.ggml.add_space_prefix", False))  # no Baichuan has one
    normalizer = _field(1, b"identity") + _number(3, prefix) + _number(4, False) + _number(5, True)
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


def _with_user_defined(types: Sequence[int], scores: Any) -> list[int]:
    """The types of pieces, with user-defined pieces restored: llama.cpp's converter may call them normal.

    SentencePiece puts these before the bytes, with a score of 0, which tells them from others. Its tokenizer takes them
    out of a text before anything else.
    """
    bytes_from = list(types).index(BYTE) if BYTE in types else 0
    return [
        USER_DEFINED if type == NORMAL and number < bytes_from and scores[number] == 0 else type
        for number, type in enumerate(types)
    ]


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _field(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _byte_level(tokens: Sequence[str], merges: Sequence[str], types: Sequence[int]) -> bytes:
    """Qwen2's tokenizer.json, with this vocabulary."""
    pairs = [merge.split(" ", 1) for merge in merges]
    special = {id for id, type in enumerate(types) if type in (CONTROL, USER_DEFINED)}
    unused = {id for id, type in enumerate(types) if type == UNUSED}
    added = [
        {"id": id, "content": tokens[id], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": types[id] == CONTROL}
        for id in sorted(special)
    ]  # fmt: skip
    vocabulary = {token: id for id, token in enumerate(tokens) if id not in special | unused}
    whole = {
        "version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": pairs},
    }  # fmt: skip
    return json.dumps(whole, ensure_ascii=False).encode()
