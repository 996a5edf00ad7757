"""The tensors in a `.bin` file of PyTorch, mapped from disk, without PyTorch and without running what the file says.

A `.bin` is a pickled dict of tensors, whose numbers lie in storages beside the pickle. `checkpoint.pickles` reads the
pickle as data; this module says which names it may hold (`NAMES`), what their arguments must be, and where the
storages lie. Two layouts are known:

    zip     = a stored archive (see `checkpoint.zips`) of ROOT/data.pkl, ROOT/data/KEY for each storage, and optionally
              ROOT/byteorder ("little") and PyTorch's other notes about the file (`NOTES`), which are not read
    legacy  = five pickles (a magic number, 1001, a dict about the machine, the dict of tensors, a list of keys), then
              for each key the number of elements in 8 bytes and the elements    (before PyTorch 1.6)

    file    = {name: tensor | list}
    list    = [item, ...], to 16 of them, 3 deep          a quant_state of bitsandbytes
    item    = tensor | list | tuple of items | torch.Size | torch.DTYPE | string | number | True | False | None
    tensor  = _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, {})
            | _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, {}, dtype)
            | _rebuild_parameter(tensor, requires_grad, {})
    storage = persistent id ("storage", a storage type, key, device, count[, None])

The device ("cuda:0") does not matter. A tensor is a view of its storage, with any strides from 0 on that stay within
its bounds. Tensors may share a storage. A tensor that repeats elements, as `expand` makes it, stands for 4 GiB at most.

Source: `torch.save` and `_legacy_save` in PyTorch's torch/serialization.py, and torch/_utils.py.
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.checkpoint.pickles import PICKLE_LIMIT, PROTOCOLS, Constructor, read_pickle
from refimpl.checkpoint.zips import stored_members
from refimpl.errors import InputError, at_most
from refimpl.files import cannot_read, expect_content

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the legacy layout
LARGEST = 1 << 48  # offset, size or stride, so that NumPy's counts of bytes cannot overflow
REPEATED = 4 << 30  # the most bytes of a tensor with more elements than its storage
DIMENSIONS = 8  # at most
LIST_LIMIT, LIST_DEPTH = 16, 3  # a quant_state has 7 items, the longest list in it 8
NOTES = {"byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id"}
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # keys under which trainers keep a model's tensors
NOTE_LIMIT = 64  # bytes; the longest is a number of 40 digits


@dataclass(frozen=True)
class StorageType:
    """Stands for `torch.HalfStorage` and its like: elements of one format, or raw bytes for an untyped storage."""

    dtype: np.dtype


@dataclass(frozen=True)
class Storage:
    """A storage that a pickle names: `count` elements of `dtype` under the name `key`."""

    key: str
    dtype: np.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class TensorView:
    """A tensor that a pickle describes: a view of a storage; `offset` and `stride` in elements of `dtype`."""

    storage: Storage
    dtype: np.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self, storage: np.ndarray) -> np.ndarray:
        """The tensor as a read-only view of its storage's bytes. NumPy checks the bounds once more."""
        width = self.dtype.itemsize
        strides = tuple(step * width for step in self.stride)
        return np.ndarray(self.size, self.dtype, storage, self.offset * width, strides)


def _view(storage: Storage, dtype: np.dtype, offset: Any, size: tuple, stride: tuple) -> TensorView:
    """A TensorView. Raises InputError unless each of its elements lies in the storage."""
    numbers = (offset, *size, *stride)
    if any(type(n) is not int or not 0 <= n < LARGEST for n in numbers) or not len(size) == len(stride) <= DIMENSIONS:
        raise InputError(f"a tensor's offset, sizes or strides are not numbers from 0 on in up to {DIMENSIONS} pairs")
    held = storage.nbytes // dtype.itemsize
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if elements else offset - 1
    vast = not elements and math.prod(n or 1 for n in size) >= LARGEST  # empty, and yet too large for NumPy
    told = f"a tensor of shape {size}, strides {stride} and offset {offset}"
    if last >= held or vast:
        raise InputError(f"{told} does not fit into storage {storage.key!a:.40} of {held} elements")
    if elements > held and elements * dtype.itemsize > REPEATED:
        raise InputError(f"{told} repeats {held} elements beyond {REPEATED >> 30} GiB; save a smaller view")
    return TensorView(storage, dtype, offset, size, stride)


def _tensor(arguments: tuple) -> TensorView:
    match arguments:
        case (Storage() as storage, offset, tuple() as size, tuple() as stride, bool(), {**hooks}, *rest) if not hooks:
            match rest:
                case []:
                    return _view(storage, storage.dtype, offset, size, stride)
                case [np.dtype() as dtype]:
                    return _view(storage, dtype, offset, size, stride)
    raise InputError("a tensor is made of other things than storage, offset, size, stride, flag and no hooks; refused")


def _parameter(arguments: tuple) -> TensorView:
    match arguments:
        case (TensorView() as tensor, bool(), {**hooks}) if not hooks:
            return tensor
    raise InputError("a parameter is made of other things than a tensor, a flag and no hooks; refused")


def _dict(arguments: tuple) -> dict:
    if arguments:
        raise InputError("an OrderedDict is made with arguments, expected an empty one that is filled afterwards")
    return {}


def _size(arguments: tuple) -> tuple:
    match arguments:
        case (tuple() as size,):
            return size
    raise InputError("a torch.Size is made of something else than a tuple; refused")


DTYPES = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8,
    "uint64": np.uint64, "uint32": np.uint32, "uint16": np.uint16, "uint8": np.uint8, "bool": np.bool_,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip
STORAGE_TYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip

# Every name that a file may hold, and what stands for it.
NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Constructor(_dict),
    ("torch._utils", "_rebuild_tensor_v2"): Constructor(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Constructor(_tensor),
    ("torch._utils", "_rebuild_parameter"): Constructor(_parameter),
    ("torch", "Size"): Constructor(_size),
    ("torch.storage", "UntypedStorage"): StorageType(np.dtype(np.uint8)),
    **{("torch", name): StorageType(np.dtype(DTYPES[dtype])) for name, dtype in STORAGE_TYPES.items()},
    **{("torch", name): np.dtype(dtype) for name, dtype in DTYPES.items()},
}


def map_torch(path: Path) -> dict[str, Any]:
    """Name -> tensor of a `.bin` file, as read-only arrays mapped from disk; only headers are read.

    An entry that is a list (the `quant_state` of the official 4-bit checkpoint) comes as a list, which may hold arrays,
    lists, tuples, `np.dtype`s, strings, numbers, flags and None.

    Raises InputError for whatever the module's grammar does not describe, and says what was found.
    """
    try:
        with open(path, "rb") as file:
            expect_content(path, file.read(64))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except InputError:
        raise
    except OSError as error:
        raise InputError(cannot_read(path, error)) from None
    except ValueError as error:
        raise InputError(f"cannot read {path}, which is empty: {error}; download it again") from None

    def ahead(at: int) -> None:  # the disk fetches all headers at once, not one after the other
        if hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_WILLNEED, at // mmap.PAGESIZE * mmap.PAGESIZE, mmap.PAGESIZE)

    try:
        return read_torch(np.frombuffer(mapped, np.uint8), ahead)
    except InputError as error:
        raise InputError(f"{path} is not a PyTorch file that can be read here: {error}") from None


def read_torch(data: np.ndarray, ahead: Callable[[int], None] = lambda at: None) -> dict[str, Any]:
    """Reads a file's bytes (N,) uint8 as `map_torch` does. `ahead` is called with each place that will be read next."""
    start = data[:4].tobytes()
    if start == b"PK\3\4":
        value, storages = _read_zip(data, ahead)
    elif start[:1] == b"\x80" and start[1] in PROTOCOLS:
        value, storages = _read_legacy(data)
    else:
        raise InputError(f"it begins with {start!r}, expected a zip archive or a pickle of protocol 2 to 5")
    if not isinstance(value, dict):
        raise InputError(f"it holds a {type(value).__name__}, expected a dict of tensors")
    return {name: _entry(name, entry, storages) for name, entry in _state(value).items()}


def _state(value: dict) -> dict:
    """The tensors by name. Trainers may keep them beside numbers of their own: {"state_dict": ..., "epoch": 3}."""
    inner = [key for key in WRAPPERS if isinstance(value.get(key), dict) and value[key]]
    if len(inner) != 1 or any(isinstance(entry, TensorView) for entry in value.values()):
        return value
    return value[inner[0]]


def _entry(name: str, value: Any, storages: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, TensorView | list):
        return _arrays(value, storages, LIST_DEPTH)
    raise InputError(f"{name!a:.80} is a {type(value).__name__}, expected a tensor; is it a training checkpoint?")


def _arrays(value: Any, storages: Mapping[str, np.ndarray], depth: int) -> Any:
    """A tensor as its array; a list or tuple with arrays in place of its tensors; a plain value unchanged."""
    if isinstance(value, TensorView):
        return value.array(storages[value.storage.key])
    if isinstance(value, list | tuple):
        if depth == 0 or len(value) > LIST_LIMIT:
            raise InputError(f"a list is longer than {LIST_LIMIT} or deeper than {LIST_DEPTH}; refused")
        return type(value)(_arrays(item, storages, depth - 1) for item in value)
    if not isinstance(value, str | int | float | np.dtype | None):
        raise InputError(f"a list holds a {type(value).__name__}, which no quant_state does; refused")
    return value


def _storages(found: dict[str, Storage]) -> Callable[[tuple], Storage]:
    """A function that turns a persistent id into a storage, and enters it in `found`."""

    def persistent(id: tuple) -> Storage:
        match id:
            case ("storage", StorageType(dtype), str() as key, str(), int(count), *rest) if rest in ([], [None]):
                storage = Storage(key, dtype, int(count))
                if count < 0 or found.setdefault(key, storage) != storage:
                    raise InputError(f"storage {key!a:.40} has {count} elements of {dtype}, but had others before")
                return storage
        raise InputError("a persistent id is not that of a storage; refused")

    return persistent


def _read_zip(data: np.ndarray, ahead: Callable[[int], None]) -> tuple[Any, dict[str, np.ndarray]]:
    """The pickled value, and the bytes of each storage that it names."""
    members = stored_members(data, ahead)
    roots = {name.partition("/")[0] for name in members}
    root = next(iter(roots), "")
    if len(roots) != 1 or f"{root}/data.pkl" not in members:
        raise InputError(f"it holds {at_most(map(ascii, members), 3)}, expected the members of one torch.save")
    notes = {f"{root}/{name}" for name in NOTES} & members.keys()
    if long := [name for name in notes if members[name].stop - members[name].start > NOTE_LIMIT]:
        raise InputError(f"{at_most(map(ascii, long), 3)} has more than {NOTE_LIMIT} bytes; torch.save writes fewer")
    order = members.get(f"{root}/byteorder")
    if order and data[order.start : order.stop].tobytes() != b"little":
        raise InputError("the numbers are not in little-endian byte order; save it again on another machine")
    pickle = members[f"{root}/data.pkl"]
    if pickle.stop - pickle.start > PICKLE_LIMIT:
        raise InputError(f"data.pkl has {pickle.stop - pickle.start} bytes, expected at most {PICKLE_LIMIT}")
    text = data[pickle.start : pickle.stop].tobytes()
    if zlib.crc32(text) != pickle.crc:
        raise InputError("data.pkl is not what its checksum says; download the file again")
    found: dict[str, Storage] = {}
    value, end = read_pickle(text, 0, NAMES, _storages(found))
    if end != len(text):
        raise InputError(f"data.pkl goes on for {len(text) - end} bytes after the end of its pickle; refused")
    storages = {}
    for key, storage in found.items():
        member = members.get(f"{root}/data/{key}")
        if member is None or member.stop - member.start != storage.nbytes:
            has = "no" if member is None else f"{member.stop - member.start}"
            raise InputError(f"storage {key!a:.40} has {has} bytes in the archive, expected {storage.nbytes}")
        storages[key] = data[member.start : member.stop]
    known = {f"{root}/data.pkl", *notes, *(f"{root}/data/{key}" for key in storages)}
    if strange := sorted(members.keys() - known):
        raise InputError(f"the archive holds {at_most(map(ascii, strange), 3)}; torch.save writes no such member")
    return value, storages


def _read_legacy(data: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """The pickled value, and the bytes of each storage that it names."""
    text = data[:PICKLE_LIMIT].tobytes()
    found: dict[str, Storage] = {}
    at = 0
    values = []
    for _ in range(5):
        value, at = read_pickle(text, at, NAMES, _storages(found))
        values.append(value)
        if values[:2] != [MAGIC, PROTOCOL][: len(values)]:
            raise InputError("it does not begin with PyTorch's magic number and version; it is another pickle")
    machine, value, keys = values[2:]
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise InputError("the numbers are not in little-endian byte order; save it again on another machine")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(found):
        raise InputError("the list of storages is not that of the tensors")
    storages = {}
    for key in keys:
        count = int.from_bytes(data[at : at + 8].tobytes(), "little")
        at += 8 + found[key].nbytes
        if count != found[key].count or at > len(data):
            raise InputError(f"storage {key!a:.40} has {count} elements or is cut, expected {found[key].count}")
        storages[key] = data[at - found[key].nbytes : at]
    if at != len(data):
        raise InputError(f"the file goes on for {len(data) - at} bytes after its last storage; refused")
    return value, storages
