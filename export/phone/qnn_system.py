"""Reads a context binary, in a process of its own: the job `read` of a `Process`.

Qualcomm's libQnnSystem reads the description that its compiler put at the head of a binary, through the public function
`QnnSystemContext_getMetadata`. It trusts what it reads, so a damaged file may end this process, and no other.

The structures are those of the public headers, as C lays them out; a version says which of their fields are there.

**Source**: QAIRT SDK, `include/QNN/QnnTypes.h`, `QnnCommon.h` and `System/QnnSystemContext.h`.
"""

from __future__ import annotations

import ctypes
import mmap
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from export.run.library import library
from refimpl.errors import InputError

MOST = 4096  # graphs of a binary, or tensors of a graph: no real description has more
RANK = 16
DEFINED, SCALE_OFFSET, BITWIDTH_SCALE_OFFSET = 1, 0, 2  # Qnn_Definition_t, Qnn_QuantizationEncoding_t
HTP = 6  # QNN_BACKEND_ID_HTP

DTYPES = {
    0x0008: "int8", 0x0016: "int16", 0x0032: "int32", 0x0064: "int64",
    0x0108: "uint8", 0x0116: "uint16", 0x0132: "uint32", 0x0164: "uint64",
    0x0216: "float16", 0x0232: "float32", 0x0264: "float64",
    0x0304: "sfixed4", 0x0308: "sfixed8", 0x0316: "sfixed16", 0x0332: "sfixed32",
    0x0404: "ufixed4", 0x0408: "ufixed8", 0x0416: "ufixed16", 0x0432: "ufixed32", 0x0508: "bool8",
}  # fmt: skip


def structure(name: str, *fields: tuple[str, Any], base: Any = ctypes.Structure) -> Any:
    """A C structure, or with `base` a union, of such fields."""
    return type(name, (base,), {"_fields_": list(fields)})


# Tensors.
Version = structure("Qnn_Version_t", ("major", c_uint32), ("minor", c_uint32), ("patch", c_uint32))
ScaleOffset = structure("Qnn_ScaleOffset_t", ("scale", c_float), ("offset", c_int32))
WithBits = structure("Qnn_BwScaleOffset_t", ("bits", c_uint32), ("scale", c_float), ("offset", c_int32))
ByAxisAndBits = structure("Qnn_BwAxisScaleOffset_t", ("bits", c_uint32), ("axis", c_int32), ("count", c_uint32),
                          ("scales", c_void_p), ("offsets", c_void_p))  # the largest of the union  # fmt: skip
Encodings = structure("encodings", ("one", ScaleOffset), ("with_bits", WithBits), ("largest", ByAxisAndBits),
                      base=ctypes.Union)  # fmt: skip
QuantizeParams = structure("Qnn_QuantizeParams_t", ("definition", c_uint32), ("encoding", c_uint32), ("of", Encodings))
Buffer = structure("Qnn_ClientBuffer_t", ("data", c_void_p), ("size", c_uint32))
Memory = structure("memory", ("buffer", Buffer), ("handle", c_void_p), base=ctypes.Union)
TENSOR = [("id", c_uint32), ("name", c_char_p), ("kind", c_uint32), ("format", c_uint32), ("dtype", c_uint32),
          ("grid", QuantizeParams), ("rank", c_uint32), ("dims", POINTER(c_uint32)), ("memory_kind", c_uint32),
          ("memory", Memory)]  # fmt: skip
Sparse = structure("Qnn_SparseParams_t", ("kind", c_uint32), ("elements", c_uint32), ("dimensions", c_uint32))
Tensor1 = structure("Qnn_TensorV1_t", *TENSOR)
Tensor2 = structure("Qnn_TensorV2_t", *TENSOR, ("dynamic", c_void_p), ("sparse", Sparse), ("produced", c_uint8))
Tensor = structure("Qnn_Tensor_t", ("version", c_uint32),
                   ("of", structure("tensors", ("v1", Tensor1), ("v2", Tensor2), base=ctypes.Union)))  # fmt: skip

# Graphs: later versions add fields to the end.
GRAPH = [("name", c_char_p), ("n_inputs", c_uint32), ("inputs", POINTER(Tensor)), ("n_outputs", c_uint32),
         ("outputs", POINTER(Tensor)), ("n_updatable", c_uint32), ("updatable", POINTER(Tensor)),
         ("blob_size", c_uint32), ("blob", c_void_p), ("first", c_uint32), ("last", c_uint32)]  # fmt: skip
GRAPHS = {
    version: structure(f"QnnSystemContext_GraphInfo_{version}", ("version", c_uint32),
                       ("of", structure(f"QnnSystemContext_GraphInfoV{version}_t", *GRAPH[:length])))
    for version, length in ((1, 5), (2, 7), (3, 11))
}  # fmt: skip

# The binary.
_HEAD = [("backend", c_uint32), ("build", c_char_p), ("core", Version), ("backend_api", Version), ("soc", c_char_p)]
_TAIL = [("blob_size", c_uint64), ("n_context_tensors", c_uint32), ("context_tensors", POINTER(Tensor)),
         ("n_graphs", c_uint32), ("graphs", c_void_p)]  # fmt: skip
Info1 = structure("QnnSystemContext_BinaryInfoV1_t", *_HEAD, ("hardware", Version), ("blob", Version),
                  ("hardware_info_size", c_uint32), ("hardware_info", c_void_p), *_TAIL)  # fmt: skip
Info3 = structure("QnnSystemContext_BinaryInfoV3_t", *_HEAD, ("blob", Version), *_TAIL, ("platform", c_void_p),
                  ("metadata_size", c_uint32), ("metadata", c_void_p), ("soc_model", c_uint32))  # fmt: skip
Info = structure("QnnSystemContext_BinaryInfo_t", ("version", c_uint32),
                 ("of", structure("infos", ("v1", Info1), ("v3", Info3), base=ctypes.Union)))  # fmt: skip


def function(*arguments: Any) -> Any:
    """The type of a function of the library: it returns 0, or the number of an error."""
    return ctypes.CFUNCTYPE(c_int64, *arguments)


Interface = structure(
    "QnnSystemInterface_t",
    ("create", function(POINTER(c_void_p))),
    ("binary_info", c_void_p),
    ("metadata", function(c_void_p, c_void_p, c_uint64, POINTER(POINTER(Info)))),
    ("free", function(c_void_p)),
)
Provider = structure("provider", ("backend", c_uint32), ("name", c_char_p), ("version", Version), ("of", Interface))


def interface() -> Any:
    """The library's functions. Raises InputError if the package or the library is not here."""
    path = library("QnnSystem")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise InputError(f"cannot load {path}: {error}; install onnxruntime-qnn again") from None
    providers, count = POINTER(POINTER(Provider))(), c_uint32()
    code = loaded.QnnSystemInterface_getProviders(ctypes.byref(providers), ctypes.byref(count))
    if code or not count.value:
        raise InputError(f"{path} offers no interface (code {code}); install onnxruntime-qnn again")
    return providers[0].contents.of


def described(path: str) -> dict[str, Any]:
    """What a context binary says of itself. Raises InputError for a file that the library does not take."""
    functions, handle, info = interface(), c_void_p(), POINTER(Info)()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as data:
        view = (ctypes.c_char * len(data)).from_buffer(data)
        try:
            functions.create(ctypes.byref(handle))
            code = functions.metadata(handle, ctypes.addressof(view), len(data), ctypes.byref(info))
            if code or not info:
                raise InputError(f"the library reads no context binary in it (code {code & 0xFFFF})")
            found = _binary(info.contents)
            functions.free(handle)
            return found
        finally:
            del view


def _binary(info: Any) -> dict[str, Any]:
    if info.version not in (1, 2, 3):
        raise InputError(f"its description has version {info.version}, expected 1 to 3")
    of = info.of.v3 if info.version == 3 else info.of.v1
    graphs: list[dict[str, Any]] = []
    if of.n_graphs > MOST:
        raise InputError(f"it claims {of.n_graphs} graphs")
    if of.n_graphs:
        version = ctypes.cast(of.graphs, POINTER(c_uint32))[0]
        if version not in GRAPHS:
            raise InputError(f"the description of its graphs has version {version}, expected 1 to 3")
        array = ctypes.cast(of.graphs, POINTER(GRAPHS[version]))
        graphs = [_graph(array[i].of) for i in range(of.n_graphs)]
    return {
        "backend": "HTP" if of.backend == HTP else f"backend {of.backend}", "build": _text(of.build),
        "core": _version(of.core), "blob": _version(of.blob), "soc": _text(of.soc),
        "soc_model": of.soc_model if info.version == 3 else None, "graphs": graphs,
    }  # fmt: skip


def _graph(of: Any) -> dict[str, Any]:
    if max(of.n_inputs, of.n_outputs) > MOST:
        raise InputError(f"a graph of it claims {max(of.n_inputs, of.n_outputs)} tensors")
    return {
        "name": _text(of.name),
        "inputs": [_tensor(of.inputs[i]) for i in range(of.n_inputs)],
        "outputs": [_tensor(of.outputs[i]) for i in range(of.n_outputs)],
    }


def _tensor(tensor: Any) -> dict[str, Any]:
    of = tensor.of.v2 if tensor.version == 2 else tensor.of.v1
    if of.rank > RANK:
        raise InputError(f"a tensor of it claims {of.rank} axes")
    found = {
        "name": _text(of.name),
        "shape": [of.dims[i] for i in range(of.rank)],
        "dtype": DTYPES.get(of.dtype, f"type {of.dtype:#06x}"),
    }
    if of.grid.definition == DEFINED and of.grid.encoding in (SCALE_OFFSET, BITWIDTH_SCALE_OFFSET):
        grid = of.grid.of.one if of.grid.encoding == SCALE_OFFSET else of.grid.of.with_bits
        found |= {"scale": grid.scale, "offset": grid.offset}
    return found


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace")


def _version(of: Any) -> str:
    return f"{of.major}.{of.minor}.{of.patch}"


def read(folder: Path, path: str) -> dict[str, Any]:
    """The job `read`."""
    return described(path)


JOBS = {"read": read}
