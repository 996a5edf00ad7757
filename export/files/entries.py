"""Arrays in a device's files, before their numbers are read: names, shapes, and a function that reads.

No file is trusted. A reader first tells the names and shapes that a file states, so that they can be compared with a
manifest; reading then takes no more bytes than stated. Nothing is executed, and no link out of a file is followed.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any, cast, get_args

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from export.graphs.plan import Way
from refimpl.errors import InputError, at_most

SUFFIXES = {".h5", ".hdf5", ".npz", ".npy", ".raw", ".bin", ".pb"}
ENTRIES = 100_000  # of a file or a folder: no run of one model has more
HEADER = 1 << 16  # bytes of a file beside its numbers
NPY_HEADER = 10_000  # bytes: NumPy's own limit, which it checks only after reading as many as the file claims
GZIP, SHUFFLE = 1, 2  # HDF5's numbers of these filters


@dataclass(frozen=True)
class Entry:
    """An array that has not been read. `shape` and `dtype` are None if the file tells only its size."""

    name: str
    source: str
    shape: tuple[int, ...] | None
    dtype: np.dtype | None
    nbytes: int
    read: Callable[[], np.ndarray] = field(repr=False)


def by_graph(
    outputs: Any, graphs: Collection[str], largest: int, way: Way, graph: str | None
) -> Iterator[tuple[str | None, Way, list[Entry]]]:
    """(graph, way, entries) of each set of outputs: a mapping, a file, or a folder, whatever its layout.

    `graphs` are the names that a part of a mapping, a file or a folder may have. `way` and `graph` are used where no
    name says them; the graph is None if nothing does. `largest`: how many numbers the largest output has.

    Raises InputError for another type, an unknown layout, and a file that `of_file` refuses.
    """
    if isinstance(outputs, Mapping):
        yield from _of_nested(outputs, graphs, way, graph)
    elif not isinstance(outputs, str | PathLike):
        raise InputError(
            f"the outputs are of the type {type(outputs).__name__}, expected a path or a mapping of arrays by name"
        )
    elif Path(outputs).is_file():
        path = Path(outputs)
        yield graph or _called(path, graphs), way, list(of_file(path, largest))
    elif Path(outputs).is_dir():
        yield from _of_folder(Path(outputs), graphs, largest, way, graph)
    else:
        raise InputError(f"{Path(outputs)} is neither a file nor a folder; expected what the device returned")


def _of_nested(outputs: Mapping[str, Any], graphs: Collection[str], way: Way, graph: str | None):
    """The sets of a mapping: of arrays, or of such mappings by graph or by way."""
    nested = {name: part for name, part in outputs.items() if isinstance(part, Mapping)}
    if not nested:
        yield graph, way, list(of_mapping(outputs))
    elif len(nested) < len(outputs):
        raise InputError(f"the mapping holds {at_most(nested, 3)} beside arrays; expected graphs, or arrays")
    for name, part in nested.items():
        ways = {how: deeper for how, deeper in part.items() if isinstance(deeper, Mapping)}
        if name in get_args(Way):
            yield from _of_nested(part, graphs, cast(Way, name), graph)
        elif name not in graphs:
            raise InputError(f"there is no graph {name!a:.99}; the export has {at_most(graphs)}")
        elif ways:
            raise InputError(f"{name} holds a mapping {at_most(ways, 3)}, expected arrays by name")
        else:
            yield name, way, list(of_mapping(part))


def _of_folder(path: Path, graphs: Collection[str], largest: int, way: Way, graph: str | None):
    """The sets of a folder: in isolated/ and chained/, in files and folders named like graphs, or the folder itself."""
    inside = sorted(path.iterdir())
    if len(inside) > ENTRIES:
        raise InputError(f"{path} holds {len(inside)} files, expected at most {ENTRIES}")
    ways = [child for child in inside if child.name in get_args(Way) and child.is_dir()]
    for child in ways:
        yield from _of_folder(child, graphs, largest, cast(Way, child.name), graph)
    named = [child for child in inside if _called(child, graphs) and (child.is_dir() or child.suffix in SUFFIXES)]
    for child in named:
        entries = in_folder(child, largest) if child.is_dir() else of_file(child, largest)
        yield _called(child, graphs), way, list(entries)
    if ways or named:
        return
    devices = [str(child) for child in inside if any((child / name).is_dir() for name in get_args(Way))]
    if devices:
        raise InputError(f"{path} holds the outputs of several runs; give one of them: {at_most(devices, 3)}")
    yield graph or _called(path, graphs), way, list(in_folder(path, largest))


def _called(path: Path, graphs: Collection[str]) -> str | None:
    """The graph that a file or folder is named after."""
    return next((name for name in (path.name, path.stem) if name in graphs), None)


def of_mapping(arrays: Mapping[str, Any]) -> Iterator[Entry]:
    """The arrays of a mapping, or of AI Hub's lists with an array for each sample."""
    for name, array in arrays.items():
        source = f"the output {name!a:.99}"
        if isinstance(array, list | tuple) and (not array or hasattr(array[0], "dtype")):
            _expect_samples(len(array), source)
            array = array[0]
        try:
            array = np.asarray(array)
            _plain(array.dtype)
        except ValueError as error:  # ragged lists, texts, anything
            raise InputError(f"{source} is not an array of numbers: {error}") from None
        yield Entry(str(name), source, array.shape, array.dtype, array.nbytes, partial(np.asarray, array))


def of_file(path: Path, largest: int, samples: int = 1) -> Iterator[Entry]:
    """The entries of one file. A dataset of AI Hub has `samples` of each tensor, one after the other.

    Raises InputError for an unknown kind of file, and for a damaged one.
    """
    kinds: dict[str, Callable[[], Iterator[Entry]]] = {
        ".h5": lambda: _of_hdf5(path, samples), ".hdf5": lambda: _of_hdf5(path, samples), ".npz": lambda: _of_npz(path),
        ".npy": lambda: _of_npy(path), ".raw": lambda: _of_raw(path), ".bin": lambda: _of_raw(path),
        ".pb": lambda: _of_pb(path, largest),
    }  # fmt: skip
    if path.suffix not in kinds:
        raise InputError(f"{path} is none of {', '.join(kinds)}; store the outputs as one of these")
    with telling(path):
        for entry in kinds[path.suffix]():
            yield replace(entry, read=partial(_told, path, entry.read))


def _told(path: Path, read: Callable[[], np.ndarray]) -> np.ndarray:
    with telling(path):
        return read()


class UnfitError(ValueError):
    """The file is whole, but its kind of array cannot be an output."""


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Turns any error of reading a damaged or unfit file into an InputError."""
    try:
        yield
    except InputError:
        raise
    except UnfitError as error:
        raise InputError(f"{path}: {error}; store it so") from None
    except Exception as error:  # each reader raises its own kinds
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())[:200]}; fetch it again") from None


def in_folder(path: Path, largest: int) -> Iterator[Entry]:
    """The files of a folder or of its Result_0, by name."""
    inside = sorted(path.iterdir())
    results = [child for child in inside if child.is_dir() and child.name.startswith("Result_")]
    if results:
        _expect_samples(len(results), str(path))
        inside = sorted(results[0].iterdir())
    files = [child for child in inside if child.suffix in SUFFIXES and child.is_file()]
    if not files:
        raise InputError(f"{path} holds no outputs; expected {', '.join(sorted(SUFFIXES))}, or graphs by name")
    if len(files) > ENTRIES:
        raise InputError(f"{path} holds {len(files)} files, expected at most {ENTRIES}")
    for file in files:
        yield from of_file(file, largest)


def _expect_samples(found: int, source: str, given: int = 1) -> None:
    if found != given:
        raise InputError(f"{source} has {found} samples, but inputs had {given}; give the outputs of those inputs")


def _of_npy(path: Path) -> Iterator[Entry]:
    with open(path, "rb") as file:
        dims, dtype, start = _npy_header(file)

    def read() -> np.ndarray:
        with open(path, "rb") as file:
            file.seek(start)
            return _npy_body(file, dims, dtype, str(path))

    yield Entry(path.stem, str(path), dims, dtype, math.prod(dims) * dtype.itemsize, read)


def _of_npz(path: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > ENTRIES:
            raise InputError(f"{path} has {len(members)} members, expected at most {ENTRIES}")
        for member in members:
            source = f"{member.filename!a:.99} of {path}"
            with archive.open(member) as file:
                dims, dtype, _ = _npy_header(file)

            def read(member=member, dims=dims, dtype=dtype, source=source) -> np.ndarray:
                with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                    _npy_header(file)
                    return _npy_body(file, dims, dtype, source)

            name = member.filename.removesuffix(".npy")
            yield Entry(name, source, dims, dtype, math.prod(dims) * dtype.itemsize, read)


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype and place of the numbers. The header is parsed as a literal; objects are refused."""
    version = npy.read_magic(file)
    kinds = {(1, 0): (2, npy.read_array_header_1_0), (2, 0): (4, npy.read_array_header_2_0)}
    if version not in kinds:
        raise ValueError(f"the .npy version is {version}")
    width, reader = kinds[version]
    length = file.read(width)
    if (claimed := int.from_bytes(length, "little")) > NPY_HEADER:
        raise ValueError(f"its header claims {claimed} bytes, expected at most {NPY_HEADER}")
    dims, fortran, dtype = reader(io.BytesIO(length + file.read(claimed)))
    if fortran and sum(axis > 1 for axis in dims) > 1:
        raise UnfitError("its numbers are in Fortran's order, expected C's")
    return dims, _plain(dtype), file.tell()


def _npy_body(file: Any, dims: tuple[int, ...], dtype: np.dtype, source: str) -> np.ndarray:
    wanted = math.prod(dims) * dtype.itemsize
    data = file.read(wanted + 1)
    if len(data) != wanted:
        more = "more" if len(data) > wanted else f"only {len(data)}"
        raise InputError(f"{source} says {wanted} bytes and has {more}; fetch it again")
    return np.frombuffer(data, dtype).reshape(dims)


def _of_raw(path: Path) -> Iterator[Entry]:
    """A file of bare numbers. qnn-net-run adds `_native` to the name of a file that holds codes."""
    size = path.stat().st_size

    def read() -> np.ndarray:
        data = path.read_bytes()
        if len(data) != size:
            raise InputError(f"{path} has changed while it was read; try again")
        return np.frombuffer(data, np.uint8)

    yield Entry(path.stem.removesuffix("_native"), str(path), None, None, size, read)


def _of_pb(path: Path, largest: int) -> Iterator[Entry]:
    import onnx
    from google.protobuf.message import DecodeError

    if path.stat().st_size > 8 * largest + HEADER:
        raise InputError(f"{path} has {path.stat().st_size} bytes; the largest output has {largest} numbers")
    proto = onnx.TensorProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        raise ValueError("it is not an ONNX tensor") from None
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        raise ValueError("its data is elsewhere")
    dims = tuple(proto.dims)
    if math.prod(dims) > largest:  # before anything is made of that shape
        raise InputError(f"{path} has the shape {at_most(dims)}, larger than any output")
    array = onnx.numpy_helper.to_array(proto)
    yield Entry(proto.name or path.stem, str(path), array.shape, _plain(array.dtype), array.nbytes, lambda: array)


def _plain(dtype: np.dtype) -> np.dtype:
    """The dtype, if it is one of real numbers."""
    if dtype.kind not in "fiub" and dtype != ml_dtypes.bfloat16:
        raise UnfitError(f"it holds {str(dtype)[:40]}, expected real numbers")
    return dtype


def _of_hdf5(path: Path, samples: int) -> Iterator[Entry]:
    """AI Hub's datasets. Only hard links are followed; virtual, external and compressed data but gzip is refused."""
    import h5py

    with h5py.File(path, "r") as file:
        data = _held(h5py, file, "data", h5py.Group, str(path))
        if len(data) > ENTRIES:
            raise InputError(f"{path} has {len(data)} tensors, expected at most {ENTRIES}")
        found: list[tuple[int, list[Entry]]] = []
        for key in data:
            group = _held(h5py, data, key, h5py.Group, str(path))
            name, order = _attribute(group, "name", str), _attribute(group, "order", int, len(found))
            source = f"{name!a:.99} of {path}"
            _expect_samples(_attribute(group, "batch_count", int, len(group)), source, samples)
            found.append((order, [_hdf5_entry(h5py, path, group, i, name, source) for i in range(samples)]))
    yield from (entry for _, column in sorted(found, key=lambda pair: pair[0]) for entry in column)


def _hdf5_entry(h5py: Any, path: Path, group: Any, sample: int, name: str, source: str) -> Entry:
    stored = _held(h5py, group, f"batch_{sample}", h5py.Dataset, source)
    _expect_harmless(stored, source)
    at = stored.name

    def read() -> np.ndarray:
        with h5py.File(path, "r") as file:
            return _hdf5_array(file[at], source)

    return Entry(name, source, stored.shape, _plain(stored.dtype), stored.nbytes, read)


def _held(h5py: Any, group: Any, key: str, kind: type, source: str) -> Any:
    """A member of a group, if it is a part of this very file."""
    if not isinstance(group.get(key, getlink=True), h5py.HardLink):
        raise InputError(f"{source} lacks {key!a:.99}, or links to it elsewhere; expected a dataset of AI Hub")
    member = group[key]
    if not isinstance(member, kind):
        raise InputError(f"{source}: {key!a:.99} is a {type(member).__name__}, expected a {kind.__name__}")
    return member


def _attribute(group: Any, key: str, kind: type, default: Any = None) -> Any:
    if key not in group.attrs:
        if default is None:
            raise ValueError(f"{group.name} has no {key}")
        return default
    stored = group.attrs.get_id(key)
    if stored.shape not in ((), (1,)):
        raise ValueError(f"the {key} of {group.name} is an array")
    value = group.attrs[key]
    value = value.decode("utf-8") if isinstance(value, bytes) else value
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"the {key} of {group.name} is not a text")
        return value
    return int(value)


def _expect_harmless(stored: Any, source: str) -> None:
    """Raises InputError for a dataset that keeps its numbers elsewhere, or uses a filter that is not known here."""
    plist = stored.id.get_create_plist()
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    if stored.is_virtual or stored.external:
        raise InputError(f"{source} is kept in other files, which are not opened; expected its numbers here")
    if not set(filters) <= {GZIP, SHUFFLE}:
        raise InputError(f"{source} is compressed by the HDF5 filters {filters}, expected gzip or none")
    if stored.shape is None:
        raise InputError(f"{source} has the shape {stored.shape}, expected an array")
    if stored.chunks and math.prod(stored.chunks) > 2 * max(math.prod(stored.shape), 1) + HEADER:
        raise InputError(f"{source} of shape {stored.shape} has chunks of {stored.chunks}; expected no larger ones")


def _hdf5_array(stored: Any, source: str) -> np.ndarray:
    """The numbers of a dataset; compressed chunks are inflated here, to their own size and no further."""
    if not stored.chunks:
        return stored[()]
    plist, chunk, dtype = stored.id.get_create_plist(), stored.chunks, stored.dtype
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    size = math.prod(chunk) * dtype.itemsize
    out = np.zeros(stored.shape, dtype)
    for corner in product(*(range(0, axis, step) for axis, step in zip(stored.shape, chunk, strict=True))):
        held = stored.id.get_chunk_info_by_coord(corner)
        if not held.size or held.size > size + HEADER:
            raise InputError(f"{source} lacks its chunk at {corner}, or has a larger one; fetch it again")
        mask, data = stored.id.read_direct_chunk(corner)
        for i, kind in reversed(list(enumerate(filters))):
            if mask >> i & 1:
                continue
            if kind == GZIP:
                data = zlib.decompressobj().decompress(data, size + 1)
            else:
                data = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1).T.tobytes()
        if len(data) != size:
            raise InputError(f"{source}: the chunk at {corner} does not hold its {size} bytes; fetch it again")
        place = tuple(slice(at, at + step) for at, step in zip(corner, chunk, strict=True))
        inside = out[place]
        inside[...] = np.frombuffer(data, dtype).reshape(chunk)[tuple(slice(0, axis) for axis in inside.shape)]
    return out
