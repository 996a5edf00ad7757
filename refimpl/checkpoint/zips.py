"""Where the members of an uncompressed zip archive lie. An archive that could be read in two ways is refused.

Zip says everything twice: in a local header before each member, and in the central directory at the end. Programs that
read different copies see different archives, which has been used to hide checkpoints from scanners. Here both copies
must agree, and every byte of the file must belong to exactly one record:

    archive  = member* entry* end
    member   = local-header name extra data [descriptor]       one after the other from byte 0, no gaps, no overlaps
    extra    = [zip64] [padding]                               the member's sizes and place; "FB", a length, Z, Z, ...
    end      = [end64 locator64] end-of-directory              the last bytes of the file, without a comment

Members are stored (method 0), neither compressed nor encrypted, on one disk, and no two share a name.

Source: PKWARE's APPNOTE.TXT 6.3, section 4.3; PyTorch writes such archives with miniz.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from refimpl.errors import InputError

MEMBER_LIMIT = 1 << 15  # read in half a second; Baichuan2-13B in 4 bits has 1300
DESCRIPTOR, UTF8 = 1 << 3, 1 << 11  # the flags that may be set: sizes follow the data; the name is UTF-8
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF  # "too large for this field: see the zip64 record"


class Member(NamedTuple):
    """A member's bytes are `data[start:stop]` of the archive; `crc` is what the archive says their CRC-32 is."""

    start: int
    stop: int
    crc: int


def stored_members(data: np.ndarray, ahead: Callable[[int], None] = lambda at: None) -> dict[str, Member]:
    """Name -> place of each member of the archive in `data` (N,) uint8, which may be mapped: only headers are read.

    `ahead` is called with the place of every local header before the first is read.

    Raises InputError for an archive that this module's grammar does not describe.
    """
    entries, directory = _entries(data)
    for entry in entries:
        ahead(min(entry[-1], len(data) - 1))
    members: dict[str, Member] = {}
    free = 0  # where the next member must begin
    for name, flags, crc, size, offset in sorted(entries, key=lambda entry: entry[-1]):
        if offset != free:
            raise InputError(f"the zip member {name!a:.80} begins at byte {offset}, expected {free}: a gap or overlap")
        if name in members:
            raise InputError(f"the zip archive has two members {name!a:.80}")
        start, free = _local_member(data, name, flags, crc, size, offset)
        members[name] = Member(start, start + size, crc)
    if free != directory:
        raise InputError(f"the zip archive's members end at byte {free}, but its directory begins at {directory}")
    return members


def _unpack(layout: str, data: np.ndarray, offset: int, signature: bytes, what: str) -> tuple[int, ...]:
    """The fields after a record's signature, little-endian, `layout` as in `struct`."""
    layout = "<4s" + layout
    length = struct.calcsize(layout)
    if not 0 <= offset <= len(data) - length:
        raise InputError(f"the zip archive ends inside its {what}; download it again")
    found, *fields = struct.unpack(layout, data[offset : offset + length].tobytes())
    if found != signature:
        raise InputError(f"no {what} stands at byte {offset} of the zip archive; it is damaged or not plain zip")
    return tuple(fields)


def _entries(data: np.ndarray) -> tuple[list[tuple[str, int, int, int, int]], int]:
    """(name, flags, crc, size, offset) of each entry of the central directory, and where that begins."""
    end = len(data) - 22
    *disks, count, count_again, size, start, comment = _unpack("HHHHIIH", data, end, b"PK\5\6", "end record")
    if any(disks) or comment or count != count_again:
        raise InputError("the zip archive is split over disks or has a comment, expected a plain one")
    stop = end
    if end >= 20 and data[end - 20 : end - 16].tobytes() == b"PK\6\7":
        disk, stop, total = _unpack("IQI", data, end - 20, b"PK\6\7", "zip64 locator")
        length, _, _, *disks, count64, again64, size64, start64 = _unpack(
            "QHHIIQQQQ", data, stop, b"PK\6\6", "zip64 end record"
        )
        told = (min(count64, FULL16), min(size64, FULL32), min(start64, FULL32))
        plain = disk == 0 and total == 1 and not any(disks) and length == 44 and stop + 56 == end - 20
        if not plain or count64 != again64 or told != (count, size, start):
            raise InputError("the zip archive's two end records disagree; it is damaged or made to mislead")
        count, size, start = count64, size64, start64
    if count > MEMBER_LIMIT:
        raise InputError(f"the zip archive has {count} members, expected at most {MEMBER_LIMIT}")
    if start + size != stop:
        raise InputError(f"the zip directory of {size} bytes from byte {start} on does not end at byte {stop}")
    entries, at = [], start
    for _ in range(count):
        entry, at = _entry(data, at)
        entries.append(entry)
    if at != stop:
        raise InputError(f"the zip directory's {count} entries end at byte {at}, expected {stop}")
    return entries, start


def _entry(data: np.ndarray, at: int) -> tuple[tuple[str, int, int, int, int], int]:
    """One entry of the central directory, and where the next begins."""
    _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment, disk, _, mode, offset = _unpack(
        "HHHHHHIIIHHHHHII", data, at, b"PK\1\2", "directory entry"
    )
    at += 46
    name = _name(data, at, name_length)
    extra = data[at + name_length : at + name_length + extra_length].tobytes()
    full = [field == FULL32 for field in (size, packed, offset)]
    if extra:  # zip64 alone: other records could give the member another name
        if len(extra) != 4 + 8 * sum(full) or extra[:4] != struct.pack("<HH", 1, 8 * sum(full)):
            raise InputError(f"the zip member {name!a:.80} has extra records that are not known here")
        wide = iter(struct.unpack(f"<{sum(full)}Q", extra[4:]))
        size, packed, offset = (next(wide) if field == FULL32 else field for field in (size, packed, offset))
    elif any(full):
        raise InputError(f"the zip member {name!a:.80} lacks the zip64 record with its size")
    if method != 0 or packed != size:
        raise InputError(f"the zip member {name!a:.80} is compressed (method {method}), expected stored ones")
    if flags & ~(DESCRIPTOR | UTF8):
        raise InputError(f"the zip member {name!a:.80} has the flags {flags:#x}; it is encrypted or patched")
    if disk or comment or mode >> 28 not in (0, 8):  # the file type of a Unix mode: none or a regular file
        raise InputError(f"the zip member {name!a:.80} is a link, commented or on another disk; expected a plain file")
    return (name, flags, crc, size, offset), at + name_length + extra_length


def _name(data: np.ndarray, at: int, length: int) -> str:
    try:
        name = data[at : at + length].tobytes().decode()
    except UnicodeDecodeError:
        raise InputError(f"the zip archive has a member whose name at byte {at} is not UTF-8") from None
    if not name.isprintable() or "\\" in name or {"", "..", "."} & set(name.split("/")):
        raise InputError(f"the zip archive has a member {name!a:.80}, which is not a name inside it")
    return name


def _local_member(data: np.ndarray, name: str, flags: int, crc: int, size: int, offset: int) -> tuple[int, int]:
    """Where a member's bytes begin, and where the record of the next member must begin."""
    _, local_flags, method, _, _, *numbers, name_length, extra_length = _unpack(
        "HHHHHIIIHH", data, offset, b"PK\3\4", "local header"
    )
    start = offset + 30 + name_length + extra_length
    # A zip64 local header keeps its sizes in the extra field; one with a descriptor may leave them 0.
    allowed = [[crc, size, size], [crc, FULL32, FULL32]] + [[0, 0, 0]] * bool(flags & DESCRIPTOR)
    same = local_flags == flags and method == 0 and numbers in allowed
    if not same or _name(data, offset + 30, name_length) != name:
        raise InputError(f"the two headers of the zip member {name!a:.80} disagree; it is damaged or made to mislead")
    if not _understood(data[start - extra_length : start].tobytes(), size, offset, wide=numbers[1] == FULL32):
        raise InputError(f"the zip member {name!a:.80} has other extra records than its sizes and padding; refused")
    stop = start + size
    if stop > len(data):
        raise InputError(f"the zip member {name!a:.80} ends at byte {stop} of {len(data)}; download the file again")
    if flags & DESCRIPTOR:
        # miniz writes wide sizes where it has written a zip64 record before
        for layout in ("<4sIQQ", "<4sIII")[: 1 + (size <= FULL32)]:
            record = struct.pack(layout, b"PK\7\10", crc, size, size)
            if data[stop : stop + len(record)].tobytes() == record:
                return start, stop + len(record)
        raise InputError(f"the descriptor after the zip member {name!a:.80} disagrees with its header")
    return start, stop


def _understood(extra: bytes, size: int, offset: int, wide: bool) -> bool:
    """Whether a local header's extra field is what PyTorch writes: zip64's record, then padding.

    If `wide`, the record must hold the sizes. In a record that a descriptor will follow, miniz gives 0 for the packed
    bytes, because it has not counted them yet.
    """
    for sizes in [(size, size)] if wide else [(), (size, size), (size, 0)]:
        for numbers in (sizes, (*sizes, offset)):
            record = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
            rest = extra.removeprefix(record)
            padding = struct.pack("<2sH", b"FB", max(0, len(rest) - 4)) + b"Z" * (len(rest) - 4)
            if extra.startswith(record) and rest in (b"", padding):
                return True
    return False
