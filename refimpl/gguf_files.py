"""What a GGUF file says of itself, and where its tensors lie: read as data, mapped, in bounded time and memory.

    file     = "GGUF" version count-of-tensors count-of-facts fact* tensor* padding data
    fact     = key kind value                      string: length, then UTF-8; list: kind, count, then the values
    tensor   = name dimensions sizes kind place    the innermost size first; the place counts from where data begins

Integers are little-endian, lengths and counts have 64 bits. Tensors lie at multiples of `general.alignment` (32)
and do not overlap. A model may be split into files `NAME-00001-of-00003.gguf`. Each has this form; the first has the
facts.

**Source**: the GGUF specification of ggml (docs/gguf.md), version 3; gguf-py constants.py for kinds and block sizes.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import InputError, at_most

MAGIC, VERSIONS = b"GGUF", (2, 3)
LARGEST_HEADER = 32 << 20  # bytes; Qwen2's, with 151,936 words and their merges, has 6 MB
MOST_TENSORS, MOST_FACTS, MOST_TEXTS, MOST_DIMENSIONS = 1 << 16, 1 << 12, 1 << 20, 4
STRING, LIST = 8, 9
NUMBERS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


class Kind(NamedTuple):
    """How a tensor's numbers are stored: a block of `weights` numbers takes `nbytes` bytes."""

    name: str
    weights: int
    nbytes: int


# fmt: off
KINDS = {
    number: Kind(name, weights, nbytes)
    for number, name, weights, nbytes in (
        (0, "f32", 1, 4), (1, "f16", 1, 2), (2, "q4_0", 32, 18), (3, "q4_1", 32, 20), (6, "q5_0", 32, 22),
        (7, "q5_1", 32, 24), (8, "q8_0", 32, 34), (10, "q2_k", 256, 84), (11, "q3_k", 256, 110), (12, "q4_k", 256, 144),
        (13, "q5_k", 256, 176), (14, "q6_k", 256, 210), (16, "iq2_xxs", 256, 66), (17, "iq2_xs", 256, 74),
        (18, "iq3_xxs", 256, 98), (19, "iq1_s", 256, 50), (20, "iq4_nl", 32, 18), (21, "iq3_s", 256, 110),
        (22, "iq2_s", 256, 82), (23, "iq4_xs", 256, 136), (28, "f64", 1, 8), (29, "iq1_m", 256, 56),
        (30, "bf16", 1, 2), (34, "tq1_0", 256, 54), (35, "tq2_0", 256, 66), (39, "mxfp4", 32, 17),
        (40, "nvfp4", 64, 36),
    )
}
# fmt: on


class Stored(NamedTuple):
    """A tensor in the file: the shape as NumPy has it, the kind, and its bytes (…, bytes a row) uint8, mapped."""

    shape: tuple[int, ...]
    kind: str
    data: np.ndarray


@dataclass(frozen=True)
class GGUF:
    """`facts`: key -> a number, a text, or a list (numbers as an array). `tensors`: name -> `Stored`."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, Stored]


def read_gguf(path: str | Path) -> GGUF:
    """A model in GGUF, with all of its files if it is split. Headers are read; tensors are mapped.

    Raises InputError for a file that is cut short, damaged, of another version, or not GGUF, and for a missing file of
    a split model.
    """
    whole = _read_file(path := Path(path))
    count = whole.facts.get("split.count", 0)
    if not count or count == 1:
        return whole
    cut = re.fullmatch(r"(.+)-00001-of-(\d{5})\.gguf", path.name)
    if not cut or int(cut[2]) != count or not 2 <= count <= 1 << 10:
        first = f"NAME-00001-of-{count:05}.gguf"
        raise InputError(f"{path} is one of {count} files; give the first, which is called {first}")
    tensors = dict(whole.tensors)
    for number in range(2, count + 1):
        other = path.with_name(f"{cut[1]}-{number:05}-of-{count:05}.gguf")
        if not other.is_file():
            raise InputError(f"{other} is missing, but {path.name} is the first of {count}; download it again")
        more = _read_file(other).tensors
        if twice := sorted(more.keys() & tensors.keys()):
            raise InputError(f"{other} has {at_most(twice, 3)} once more; download all of its files again")
        tensors |= more
    expected = whole.facts.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise InputError(f"{path} and its files have {len(tensors)} tensors, expected {expected}; download them again")
    return GGUF(path, whole.facts, tensors)


def _read_file(path: Path) -> GGUF:
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is empty or no file"
        raise InputError(f"cannot read {path}: {reason}; is the path right?") from None
    try:
        return _parse(path, data.view(np.ndarray))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _parse(path: Path, data: np.ndarray) -> GGUF:
    if data[:4].tobytes() != MAGIC:
        raise InputError("this is not a GGUF file, which begins with the letters GGUF; give another file")
    header = _Header(data)
    version = header.number("<u4")
    if version not in VERSIONS:
        raise InputError(f"the GGUF version is {version!r:.20}, expected 2 or 3, little-endian; convert it again")
    count = header.count(MOST_TENSORS, "tensors")
    facts: dict[str, Any] = {}
    for _ in range(header.count(MOST_FACTS, "facts")):
        key = header.text()
        if key in facts:
            raise InputError(f"it says {key!a:.80} twice; convert it again")
        facts[key] = header.value(header.number("<u4"))
    places = [_place(header) for _ in range(count)]
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise InputError(f"general.alignment is {alignment!r:.40}, expected a power of two")
    start = -(-header.at // alignment) * alignment
    tensors: dict[str, Stored] = {}
    free = start
    for name, shape, kind, offset in sorted(places, key=lambda place: place[3]):
        first = start + offset
        row = shape[-1] // kind.weights * kind.nbytes
        nbytes = int(np.prod(shape[:-1], dtype=object)) * row
        if name in tensors:
            raise InputError(f"it has two tensors {name!a:.80}; convert it again")
        if first < free or offset % alignment:
            raise InputError(f"the tensor {name!a:.80} begins at byte {first}, within another or not aligned")
        if first + nbytes > len(data):
            raise InputError(f"the tensor {name!a:.80} ends at byte {first + nbytes} of {len(data)}; it is cut short")
        tensors[name] = Stored(shape, kind.name, data[first : first + nbytes].reshape(*shape[:-1], row))
        free = first + nbytes
    return GGUF(path, facts, tensors)


def _place(header: _Header) -> tuple[str, tuple[int, ...], Kind, int]:
    """The name, shape, kind and offset of one tensor."""
    name, dimensions = header.text(), header.number("<u4")
    if not 1 <= dimensions <= MOST_DIMENSIONS or not name.isprintable() or len(name) > 64:
        raise InputError(f"a tensor is called {name!a:.80} and has {dimensions} dimensions, expected 1 to 4")
    shape = tuple(header.number("<u8") for _ in range(dimensions))[::-1]
    number, offset = header.number("<u4"), header.number("<u8")
    if number not in KINDS:
        raise InputError(f"the tensor {name} is of kind {number}, which is not known here; quantize the model anew")
    kind = KINDS[number]
    if not all(1 <= size < 1 << 40 for size in shape) or shape[-1] % kind.weights:
        raise InputError(f"the tensor {name} has shape {shape}, expected rows of a multiple of {kind.weights}")
    return name, shape, kind, offset


class _Header:
    """A cursor over the header: each call reads what comes next, up to `LARGEST_HEADER`."""

    def __init__(self, data: np.ndarray):
        self.data, self.at, self.texts = data, 4, 0

    def take(self, size: int) -> np.ndarray:
        if size > LARGEST_HEADER or self.at + size > min(len(self.data), LARGEST_HEADER):
            raise InputError(f"its header ends within {size} bytes at byte {self.at}; it is cut short or damaged")
        taken = self.data[self.at : self.at + size]
        self.at += size
        return taken

    def number(self, dtype: str) -> Any:
        return self.take(np.dtype(dtype).itemsize).view(dtype)[0].item()

    def count(self, most: int, of: str) -> int:
        count = self.number("<u8")
        if count > most:
            raise InputError(f"it has {count} {of}, expected at most {most}; it is damaged")
        return count

    def text(self) -> str:
        return self._decoded(self.take(self.number("<u8")).tobytes())

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != LIST:
            raise InputError(f"a fact is of kind {kind}, which GGUF does not have; it is damaged")
        inner, count = self.number("<u4"), self.number("<u8")
        if inner in NUMBERS:
            dtype = np.dtype(NUMBERS[inner])
            return self.take(min(count, LARGEST_HEADER + 1) * dtype.itemsize).view(dtype).copy()
        if inner == STRING:
            return self._texts(count)
        raise InputError(f"a list holds values of kind {inner}; lists of lists are not read here")

    def _texts(self, count: int) -> list[str]:
        """The strings of a list: a vocabulary, or its merges."""
        self.texts += count
        if self.texts > MOST_TEXTS:
            raise InputError(f"its lists have {self.texts} texts, expected at most {MOST_TEXTS}; it is damaged")
        raw, at, found = self.data[self.at : LARGEST_HEADER].data, 0, []
        for _ in range(count):
            end = at + 8 + (struct.unpack_from("<Q", raw, at)[0] if at + 8 <= len(raw) else LARGEST_HEADER)
            if end > len(raw):
                raise InputError("its header ends within a list of texts; it is cut short or damaged")
            found.append(self._decoded(bytes(raw[at + 8 : end])))
            at = end
        self.at += at
        return found

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise InputError(f"a text at byte {self.at} of its header is not UTF-8; it is damaged") from None
