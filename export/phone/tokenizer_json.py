"""`tokenizer.json` from a SentencePiece model: the same ids in the format that phones read.

Genie reads Hugging Face's `tokenizer.json`; Baichuan's checkpoints have only SentencePiece's `tokenizer.model`. Both
use the same algorithm (merge the best pair, again and again), but with different settings. The converter of
transformers has the settings of Llama and Gemma: it puts a blank before the text, joins runs of blanks, strips the end,
and drops the bytes of unknown characters. Baichuan does none of that. This module writes:

    normalizer      " " becomes U+2581, nothing else; no blank is put before the text
    pre-tokenizer   none: pieces may span words
    added tokens    <unk> <s> </s> are special, and found first. SentencePiece's user-defined pieces (digits, marks,
                    <reserved_106>, in Baichuan2 1086 of them) are found next, longest first, and never merge
    model           BPE; a merge for each way in which a piece is two others, best score first. Of equal scores (all
                    ways of one piece, and two pieces at a time in Baichuan2) SentencePiece takes the leftmost in the
                    text. Here each has its own rank, which is the same as long as the two pieces cannot overlap
    byte fallback   a character without a piece becomes its UTF-8 bytes, each the piece <0xE4>
    decoder         U+2581 becomes " ", bytes become characters

Decoding is the same too, except for bytes that are not UTF-8. If a run of byte pieces is not text as a whole,
SentencePiece keeps the characters in it, and the library `tokenizers` turns every byte into U+FFFD.

`tokenizers` 0.15.2, 0.19.1 and 0.23.3 were tried. Older versions take the shortest of added tokens ("...." as four),
and so split such texts in another way. Which version Genie contains is not known.

**Source**: SentencePiece's `bpe_model.cc` and `sentencepiece_model.proto`; the JSON of `tokenizers`, with merges as
"a b", which all its versions read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

from export.files.wire import DamagedError, Wire, mapped
from refimpl.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
BPE = 2  # kind of model
BLANK = "\u2581"


@dataclass
class SentencePieceModel:
    """What a `tokenizer.model` says: pieces in the order of their ids, and the settings that this module knows."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # text, score, kind
    kind: int = 1
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    charsmap: bool = False


class _Reader(Wire):
    """Reads SentencePiece's messages."""

    def model(self) -> SentencePieceModel:
        found = SentencePieceModel()
        for number, value, stop in self.fields(0, len(self.data)):
            if number == 1:
                found.pieces.append(self.piece(*self.message(value, stop)))
            elif number == 2:
                for key, inner, end in self.fields(*self.message(value, stop)):
                    if key == 3:
                        found.kind = self.integer(inner, end)
                    elif key == 35:
                        found.byte_fallback = bool(self.integer(inner, end))
            elif number == 3:
                for key, inner, end in self.fields(*self.message(value, stop)):
                    if key == 2:
                        found.charsmap = end > inner
                    elif key in (3, 4, 5):
                        name = ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces")[key - 3]
                        setattr(found, name, bool(self.integer(inner, end)))
        return found

    def piece(self, start: int, stop: int) -> tuple[str, float, int]:
        text, score, kind = "", 0.0, NORMAL
        for number, value, end in self.fields(start, stop):
            if number == 1:
                text = self.text(value, end)
            elif number == 2:
                score = self.number(value, end)
            elif number == 3:
                kind = self.integer(value, end)
        return text, score, kind


def tokenizer_json(path: str | Path) -> dict[str, Any]:
    """What `tokenizer.json` holds for the SentencePiece model at `path`.

    Raises InputError for a file that is damaged, and for a model that the format cannot express: another algorithm, a
    normalizer, a dummy blank, or pieces that merge out of characters which are not pieces themselves.
    """
    path = Path(path)
    try:
        with mapped(path) as data:
            model = _Reader(data).model()
    except DamagedError as error:
        raise InputError(f"{path} is not a SentencePiece model: {error}; copy it again") from None
    except InputError as error:
        raise InputError(f"{path}: {error}; copy it again") from None
    try:
        return _converted(model)
    except InputError as error:
        raise InputError(f"{path} {error}; no tokenizer.json gives the same ids") from None


def _converted(model: SentencePieceModel) -> dict[str, Any]:
    if not model.pieces or model.kind != BPE or not model.byte_fallback:
        raise InputError(f"has {len(model.pieces)} pieces and the kind {model.kind}, expected BPE with byte fallback")
    if model.add_dummy_prefix or model.remove_extra_whitespaces or not model.escape_whitespaces or model.charsmap:
        raise InputError("changes the text before it is split, which no Baichuan does")
    vocabulary = {text: id for id, (text, _, _) in enumerate(model.pieces)}
    if len(vocabulary) < len(model.pieces):
        raise InputError("has two pieces with the same text")
    scores = {text: score for text, score, kind in model.pieces if kind == NORMAL}
    whole = {text for text, _, kind in model.pieces if kind == USER_DEFINED}
    unknown = [text for text, _, kind in model.pieces if kind == UNKNOWN]
    bytes_there = {text for text, _, kind in model.pieces if kind == BYTE}
    if len(unknown) != 1 or any(kind == UNUSED for _, _, kind in model.pieces):
        raise InputError(f"has {len(unknown)} unknown pieces, or unused ones")
    if bytes_there != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise InputError(f"has {len(bytes_there)} pieces for bytes, expected one for each")
    if any(" " in text for text in vocabulary):
        raise InputError("has a piece with a blank, which merges cannot be written with")
    loose = {c for text in scores if len(text) > 1 for c in text} - set(scores) - whole
    if loose:
        raise InputError(f"has pieces of characters that are not pieces, such as {min(loose)!a}")
    added = [
        {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": kind == USER_DEFINED, "special": kind != USER_DEFINED}
        for id, (text, _, kind) in enumerate(model.pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": BLANK},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": unknown[0], "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocabulary, "merges": merges(scores)},
    }  # fmt: skip


def merges(scores: dict[str, float]) -> list[str]:
    """Every way in which a piece is two others, as "left right", best score first.

    Raises InputError if two pieces with one score can overlap: SentencePiece decides by their place in the text.
    """
    groups: dict[float, list[str]] = {}
    for text, score in scores.items():
        groups.setdefault(score, []).append(text)
    found = []
    for score in sorted(groups, reverse=True):
        ways = [(text[:cut], text[cut:]) for text in groups[score] for cut in range(1, len(text))
                if text[:cut] in scores and text[cut:] in scores]  # fmt: skip
        if len(groups[score]) > 1:
            _check_apart(groups[score], ways)
        found += [f"{left} {right}" for left, right in ways]
    return found


def _check_apart(pieces: list[str], ways: list[tuple[str, str]]) -> None:
    """Raises InputError if two pieces could be made of the same part of a text, or one goes on from the other."""
    for one, other in permutations(pieces, 2):
        if other.startswith(one) or other.endswith(one):
            raise InputError(f"has two pieces with one score, {one!a} and {other!a}, and one contains the other")
    for (left, right), (again, end) in permutations(ways, 2):
        if right == again and left + right != again + end:
            raise InputError(f"has two pieces with one score, {left + right!a} and {again + end!a}, that overlap")
