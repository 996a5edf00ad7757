"""An executor runs a graph on inputs: an engine here, or a device behind AI Hub (`export.hub.session.Session`).

    run(graph_folder, [inputs, …]) -> [outputs, …]

Inputs and outputs are name -> array, with the names and in the order of the graph. Code that looks for a fault is the
same wherever a graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import onnx
from google.protobuf.message import DecodeError

from export.graphs.plan import Arrays
from refimpl.errors import InputError


class Executor(Protocol):
    """Runs a graph's folder on some inputs. Raises InputError if it cannot."""

    def run(self, graph: Path, inputs: Sequence[Arrays]) -> list[Arrays]: ...


def ends(graph: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The inputs and the outputs of a graph's folder, in order, name -> shape. Raises InputError for another folder."""
    path = graph / "model.onnx"
    try:
        proto = onnx.load(path, load_external_data=False).graph
    except FileNotFoundError:
        raise InputError(f"{path} is not there; expected the folder of a graph") from None
    except (OSError, DecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    initializers = {initializer.name for initializer in proto.initializer}
    inputs = [value for value in proto.input if value.name not in initializers]

    def shapes(values) -> dict[str, tuple[int, ...]]:
        return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}

    return shapes(inputs), shapes(proto.output)
