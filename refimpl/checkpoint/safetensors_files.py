"""The tensors in a safetensors file, mapped from disk."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from refimpl.errors import InputError
from refimpl.files import cannot_read, expect_content, parse_json

# The names of number formats in a safetensors header.
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
HEADER = 16 << 20  # bytes; a 7B model's header has 40 KB, one of 30,000 tensors 4 MB
DIMENSIONS = 64  # that NumPy gives an array at most


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file as read-only arrays mapped from disk; only the header is read.

    The safetensors library validates the file (wrong lengths, overlaps, holes, truncation). But it would copy the
    tensors. So they are mapped here, at the places that the accepted header gives.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            expect_content(path, file.read(64))
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if length > HEADER:  # before the library parses it, which takes a hundred times the memory
                raise InputError(f"{path} has a header of {length} bytes, expected at most {HEADER}; download it again")
            header = parse_json(file.read(length))
        with safe_open(path, framework="numpy"):
            pass
    except OSError as error:
        raise InputError(cannot_read(path, error)) from None
    except InputError:
        raise
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a valid safetensors file: {error}; download it again") from None
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", offset=0)[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{name} in {path} has the format {entry['dtype']}, which is not known here")
        if len(entry["shape"]) > DIMENSIONS:
            raise InputError(f"{name} in {path} has {len(entry['shape'])} dimensions, expected at most {DIMENSIONS}")
        start, stop = entry["data_offsets"]
        dtype = np.dtype(DTYPES[entry["dtype"]])
        # `frombuffer` cannot take an empty buffer or a misaligned one; a view of the bytes can be both.
        tensors[name] = data[start:stop].view(np.ndarray).view(dtype).reshape(entry["shape"])
    return tensors
