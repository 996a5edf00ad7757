"""Rows of Q4_0, Q4_1, Q4_K, Q8_0, MXFP4 and NVFP4 to the bytes of a GGUF file, and back.

A row is a sequence of blocks. Each has the fields of the format's `BLOCK`, a NumPy structure; the files of the formats
(q4_0.py and so on) draw it.

**Source**: gguf-py quants.py; ggml-common.h: block_q4_0, block_q4_1, block_q4_K, block_q8_0.

>>> from refimpl_kernels import formats
>>> raw = to_bytes(formats.quantize(np.ones((1, 32), np.float32), "q4_0"))
>>> raw.tobytes().hex(" ", -2)
'00b0 0000 0000 0000 0000 0000 0000 0000 0000'
>>> formats.dequantize(from_bytes(raw, "q4_0"))[0, :4]
array([1., 1., 1., 1.], dtype=float32)
"""

from __future__ import annotations

import numpy as np

from refimpl_kernels import formats
from refimpl_kernels.formats import q4_k

FORMATS = ("q4_0", "q4_1", "q4_k", "q8_0", "mxfp4", "nvfp4")


def to_bytes(blocks: formats.Blocks) -> np.ndarray:
    """The bytes (O, bytes a row), uint8, of blocks in a GGUF format. Raises ValueError for another format."""
    structure = _structure(blocks.format)
    rows = blocks.shape[0]
    whole = np.empty((rows, blocks.shape[1] // _weights(structure, blocks.format)), structure)
    parts = blocks.arrays()
    if blocks.format == "q4_k":
        six = q4_k.pack_six_bits(*(parts.pop(name).reshape(-1, 8) for name in ("sub_scales", "sub_mins")))
        parts["six_bits"] = six
    for name, part in parts.items():
        whole[name] = part.reshape(whole[name].shape).view(structure[name].base)
    return whole.view(np.uint8).reshape(rows, -1)


def from_bytes(raw: np.ndarray, format: str) -> formats.Blocks:
    """The blocks that rows (O, bytes a row) of a GGUF tensor hold.

    Raises ValueError for a format that is not GGUF's, and for rows that are not whole blocks.
    """
    structure = _structure(format)
    if raw.ndim != 2 or raw.dtype != np.uint8 or raw.shape[1] % structure.itemsize or 0 in raw.shape:
        raise ValueError(
            f"the bytes of {format} are {raw.dtype} {raw.shape}, expected uint8 (O, bytes a row), in blocks of "
            f"{structure.itemsize} bytes; the tensor is cut short or has another format"
        )
    whole = np.ascontiguousarray(raw).view(structure)
    parts = {name: np.ascontiguousarray(whole[name]).reshape(len(raw), -1) for name in structure.names or ()}
    if format == "q4_k":
        six = q4_k.unpack_six_bits(parts.pop("six_bits").reshape(-1, 12))
        parts.update({n: part.reshape(len(raw), -1) for n, part in zip(("sub_scales", "sub_mins"), six, strict=True)})
    form = formats.FORMATS[format]
    parts["packed"] = parts["packed"].view(form.module.pack(np.zeros((1, 256), form.code_dtype)).dtype)
    shape = len(raw), whole.shape[1] * _weights(structure, format)
    header = {"format": format, "shape": shape, "block_size": int(form.block_size), "axis": 1}
    return formats.from_arrays(header, parts)


def _weights(structure: np.dtype, format: str) -> int:
    """How many weights a structure holds: those of one block, or for NVFP4 those of four blocks."""
    return structure["packed"].itemsize * (1 if formats.FORMATS[format].code_dtype == "int8" else 2)


def _structure(format: str) -> np.dtype:
    if format not in FORMATS:
        raise ValueError(f"{format} is not a format of GGUF; {', '.join(FORMATS)} are")
    return formats.FORMATS[format].module.BLOCK
