"""The engines on this machine: onnxruntime, and ONNX's own evaluator with the operator that it lacks.

**Source** of that operator, MatMulNBits: onnxruntime docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.graphs.borders import across
from export.graphs.ops import MICROSOFT
from export.graphs.plan import Arrays
from export.run.executor import ends
from refimpl.errors import InputError
from refimpl_kernels.formats import matmulnbits


@dataclass(frozen=True)
class Engine:
    """An engine on this machine: onnxruntime, reference, or auto, the first that is installed."""

    name: str = "auto"

    def run(self, graph: Path, inputs: Sequence[Arrays]) -> list[Arrays]:
        """The outputs for each of the inputs. Raises InputError if the engine cannot run the graph."""
        _, outputs = ends(graph)
        try:
            compute = engine_called(self.name)(graph / "model.onnx")

            def run(given: Sequence[Arrays]) -> list[Arrays]:
                return [dict(zip(outputs, compute(list(outputs), fed), strict=True)) for fed in given]

            return across(graph / "model.onnx", inputs, run)
        except InputError:
            raise
        except Exception as error:  # each engine raises its own kinds
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"the engine cannot run {graph.name}: {reason}; try another engine, or export again"
            ) from None


def engine_called(name: str) -> Callable[[Path], Callable]:
    """A function that opens a graph and returns its `run(output names, inputs)`. Raises InputError for another name."""
    installed = find_spec("onnxruntime") is not None
    if name == "reference" or (name == "auto" and not installed):
        return lambda path: reference_evaluator(path).run
    if name not in ("auto", "onnxruntime"):
        raise InputError(f"engine is {name!r}, expected auto, onnxruntime or reference")
    if not installed:
        raise InputError("onnxruntime is not installed; install refimpl[onnxruntime], or use the engine reference")
    import onnxruntime

    def opened(path: Path) -> Callable:
        if lacks := too_new(path, onnxruntime.__version__):
            if name == "auto":
                return reference_evaluator(path).run
            raise InputError(lacks)
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run

    return opened


def too_new(path: Path, version: str) -> str:
    """Why a version of onnxruntime cannot run a graph; "" if it can. Python 3.10 has none that knows opset 23."""
    opsets = [o.version for o in onnx.load(path, load_external_data=False).opset_import if o.domain in ("", "ai.onnx")]
    numbers = tuple(int(number) for number in version.split(".")[:2] if number.isdecimal())
    if max(opsets, default=0) < 23 or numbers >= (1, 24):
        return ""
    return (f"onnxruntime {version} does not run opset {max(opsets)}; install 1.24 or newer (Python 3.11), take the "
            "engine reference, or export with --opset 21")  # fmt: skip


def reference_evaluator(path: Path) -> Any:
    """ONNX's own evaluator (`onnx.reference.ReferenceEvaluator`) of the graph in a file."""
    from onnx.reference import ReferenceEvaluator  # here, because it takes a while to import
    from onnx.reference.op_run import OpRun

    class MatMulNBits(OpRun):
        """A (…, K) times the transpose of a matrix (N, K) in blocks of 4 bits."""

        op_domain = MICROSOFT

        def _run(self, A, B, scales, zero_points=None, K=None, N=None, bits=4, block_size=32, accuracy_level=0):
            parts = matmulnbits.from_tensors(B, scales.reshape(N, -1), zero_points)
            codes = matmulnbits.unpack(parts.pop("packed"), B.shape[1] * block_size).reshape(N, -1, block_size)
            weight = matmulnbits.dequantize(codes, **{name: part[..., None] for name, part in parts.items()})
            return (np.matmul(A, weight.reshape(N, -1)[:, :K].T),)

    return ReferenceEvaluator(with_weights(path), new_ops=[MatMulNBits])


def with_weights(path: Path) -> onnx.ModelProto:
    """A model with its weights in memory. ONNX's own loader refuses a file that graphs share by hard links."""
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            said = {entry.key: entry.value for entry in tensor.external_data}
            with open(path.parent / Path(said["location"]).name, "rb") as file:
                file.seek(int(said.get("offset", 0)))
                tensor.raw_data = file.read(int(said["length"])) if "length" in said else file.read()
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    return proto
