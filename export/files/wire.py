"""Protobuf's wire format, field by field, from a mapped file that is not trusted.

A message is a sequence of fields. A field is a number, which the schema explains, and a value: an integer, some bytes,
or the 4 or 8 bytes of a float. What is read is counted. A file with more than FIELDS fields or TEXT bytes of names,
which no real graph has, is refused before memory or time grow with it.

**Source**: protobuf's encoding guide.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refimpl.errors import InputError

FIELDS = 4_000_000  # a graph of 20,000 nodes has 700,000
TEXT = 64 << 20  # bytes of names
INTEGER, FLOAT32, FLOAT64 = -1, -2, -3  # in the place of a last byte: what a field holds instead of bytes


class DamagedError(Exception):
    """The bytes do not say what their format demands; the message says where."""


class Wire:
    """Reads protobuf messages from bytes. `stop` is a field's last byte, or INTEGER, FLOAT32 or FLOAT64."""

    def __init__(self, data: Any):
        self.data, self.fields_left, self.text_left = data, FIELDS, TEXT

    def fields(self, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Number, first byte and stop of each field; an integer field gives the integer in the place of the byte."""
        data = self.data
        while at < stop:
            self.fields_left -= 1
            if self.fields_left < 0:
                raise DamagedError(f"it has more than {FIELDS:,} fields, which no graph needs")
            tag = data[at]
            at += 1
            if tag & 0x80:
                tag, at = self.varint(at - 1, stop)
            kind = tag & 7
            if kind == 2:
                if at < stop and not data[at] & 0x80:
                    length = data[at]
                    at += 1
                else:
                    length, at = self.varint(at, stop)
                if length > stop - at:
                    raise DamagedError(f"at byte {at} should be {length} bytes, but only {stop - at} are there")
                yield tag >> 3, at, at + length
                at += length
            elif kind == 0:
                value, at = self.varint(at, stop)
                yield tag >> 3, value, INTEGER
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
                if at > stop:
                    raise DamagedError(f"it ends within a number at byte {stop}")
                yield (tag >> 3, at - 8, FLOAT64) if kind == 1 else (tag >> 3, at - 4, FLOAT32)
            else:
                raise DamagedError(f"byte {at} begins no field")

    def varint(self, at: int, stop: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= stop:
                raise DamagedError(f"it ends within a number at byte {stop}")
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return value, at
        raise DamagedError(f"the number before byte {at} has no end")

    def integer(self, value: int, stop: int) -> int:
        """The value of an integer field, as 64 bits with a sign."""
        if stop != INTEGER:
            raise DamagedError(f"at byte {value} are bytes where a number belongs")
        return value - (1 << 64) if value >= 1 << 63 else value

    def integers(self, value: int, stop: int) -> list[int]:
        """The integers of one field of a repeated number: one of them, or all packed together."""
        if stop < 0:
            return [self.integer(value, stop)]
        found, at = [], value
        while at < stop:
            one, at = self.varint(at, stop)
            found.append(self.integer(one, INTEGER))
            if len(found) > 64:
                raise DamagedError("a tensor has more than 64 axes")
        return found

    def message(self, value: int, stop: int) -> tuple[int, int]:
        if stop < 0:
            raise DamagedError("a number is where a message belongs")
        return value, stop

    def text(self, value: int, stop: int) -> str:
        start, stop = self.message(value, stop)
        self.text_left -= stop - start
        if self.text_left < 0:
            raise DamagedError(f"its names have more than {TEXT >> 20} MiB")
        try:
            return self.data[start:stop].decode("utf-8")
        except UnicodeDecodeError:
            raise DamagedError(f"the name at byte {start} is not UTF-8") from None

    def number(self, value: int, stop: int) -> float:
        """The value of a float32 field, from the place of its bytes."""
        if stop != FLOAT32:
            raise DamagedError(f"field at byte {value} is not a float32")
        return struct.unpack("<f", self.data[value : value + 4])[0]


@contextmanager
def mapped(path: Path) -> Iterator[Any]:
    """The bytes of a file. Raises InputError for what cannot be read."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe would be waited for
                raise InputError(f"{path.name} is not a file")
            if not os.fstat(file.fileno()).st_size:  # which cannot be mapped
                yield b""
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror}") from None
