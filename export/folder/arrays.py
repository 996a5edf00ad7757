"""The golden inputs and outputs of an export, read from its folder, and a graph's outputs as taps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from export.folder.manifest import TEST_DATA
from export.graphs.plan import Arrays, GraphSpec, Value, unpadded
from refimpl.errors import InputError
from refimpl.trace import Trace


def as_trace(spec: GraphSpec, outputs: Mapping[str, np.ndarray]) -> Trace:
    """A graph's outputs as the taps that they show, without padding."""
    return Trace((value.tap or value.name, unpadded(value, outputs[value.name], spec)) for value in spec.outputs)


def read_arrays(folder: Path, spec: GraphSpec, kind: str, values: list[Value]) -> Arrays:
    """The golden inputs or outputs of a graph. Raises InputError if they are not what the plan says."""
    arrays = Arrays()
    for i, value in enumerate(values):
        path = folder / TEST_DATA.format(spec.name) / f"{kind}_{i}.pb"
        proto = onnx.TensorProto()
        try:
            proto.ParseFromString(path.read_bytes())
            if proto.data_location == onnx.TensorProto.EXTERNAL:
                raise ValueError("its data is elsewhere")
            arrays[value.name] = onnx.numpy_helper.to_array(proto)
        except (DecodeError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is not a tensor: {error}; export again") from None
    return checked(arrays, values, spec.name)


def checked(arrays: Arrays, values: list[Value], graph: str) -> Arrays:
    """The arrays, if their shapes and dtypes are those of the values."""
    for value in values:
        if value.name not in arrays:
            raise InputError(f"{graph} gives no {value.name}; export again")
        array = arrays[value.name]
        if (array.shape, array.dtype) != (value.shape, value.dtype):
            raise InputError(
                f"{value.name} of {graph} is {array.dtype} {array.shape}, expected {value.dtype} {value.shape}; "
                "export again"
            )
    return arrays
