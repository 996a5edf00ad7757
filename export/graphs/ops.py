"""The ONNX backend: the decoder's operations, each as the nodes that compute it.

`OnnxOps` has the functions of `refimpl_kernels.ops.NumPyOps`, over symbols. So the graph that a phone runs is
`refimpl/decoder.py`, and there is no second forward. The graph's forms (`profiles.py`) decide how an operation is
written down; the decoder does not know them.

>>> graph = Graph()
>>> x = graph.input("x", (1, 3, 8))
>>> y = OnnxOps(graph).sigmoid(x)
>>> [node.op_type for node in graph.build("g", [x], [x * y]).proto.graph.node]
['Sigmoid', 'Mul']
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from export.graphs.data import Parameter
from export.graphs.profiles import INT4_OPSET
from export.graphs.symbols import Graph, Stack, Tensor, apply
from refimpl.errors import InputError
from refimpl_kernels.formats import int4, matmulnbits
from refimpl_kernels.formats.table import Blocks

STAY = ("gate_proj.weight", "up_proj.weight")  # which Qualcomm's zoo keeps as products (its issue AISW-148745)
LINEARS = ("Conv", "Gemm", "MatMul")  # the operators that multiply by a matrix
MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators


class OnnxOps:
    """The operations of `refimpl_kernels.ops.NumPyOps`, each as the ONNX nodes that compute it in float32.

    The graph's `forms` say how, `weights` (as `graphs.profiles.Profile` has it) how parameters go in. A `Stack` goes
    through head by head. Raises InputError for 4-bit weights in an opset without INT4.
    """

    def __init__(self, graph: Graph, opset: int = 21, weights: str = "int4"):
        self.graph, self.opset, self.weights = graph, opset, weights

    def upcast(self, x: Any) -> Any:
        """x itself, because everything is float32; in the form rank4, norms get rank 4 here."""
        return Tensor.reshape(x, 1, *x.shape) if "rank4" in self.graph.forms and len(x.shape) == 3 else x

    def type_as(self, x: Any, other: Any) -> Any:
        """x at the rank of `other`; the type is the same."""
        return x if len(x.shape) == len(other.shape) else x.reshape(*x.shape[-len(other.shape) :])

    def parameter(self, weight: Parameter, *ones: int) -> Tensor:
        """An initializer in float32; or codes, scales and zero points, where DequantizeLinear knows the format.

        DequantizeLinear knows INT4 in blocks along the rows. A weight in any other format is written as the values that
        it stands for. `ones` are the further axes of a Conv's kernel.
        """
        graph, blocks = self.graph, self._blocks(weight)
        if blocks is None or self.weights != "int4":
            graph.sources[weight.name] = weight
            return graph.parameter(weight.name, (*weight.shape, *ones), TensorProto.FLOAT, weight.tiles)
        if self.opset < INT4_OPSET:
            raise InputError(f"{weight.name} is in 4-bit blocks, which opset {self.opset} lacks; use {INT4_OPSET}")
        parts = {"codes": (blocks.shape, TensorProto.INT4, blocks.packed),
                 "scales": (blocks.scales.shape, TensorProto.FLOAT, blocks.scales)}  # fmt: skip
        if blocks.zero_points is not None:
            packed = int4.pack(blocks.zero_points.reshape(1, -1))
            parts["zero_points"] = (blocks.scales.shape, TensorProto.INT4, packed)
        inputs = [self._initializer(f"{weight.name}.{part}", (*shape, *ones), dtype, array)
                  for part, (shape, dtype, array) in parts.items()]  # fmt: skip
        out = graph.add("DequantizeLinear", inputs, (*blocks.shape, *ones), axis=1, block_size=blocks.block_size)
        return out if out.name else graph.tap(weight.name, out)

    def _blocks(self, weight: Parameter) -> Blocks | None:
        """The 4-bit blocks of a parameter, or of some of its rows, if ONNX has an operator for them."""
        blocks = getattr(weight.weight, "blocks", None)
        if blocks is None or (blocks.format, blocks.axis) != ("int4", 1) or blocks.shape[1] % 2:
            return None
        return blocks.rows(slice(weight.rows.start, weight.rows.stop))

    def _initializer(self, name: str, shape: Sequence[int], dtype: int, array: np.ndarray) -> Tensor:
        return self.graph.parameter(name, tuple(shape), dtype, lambda: iter([array]))

    def take(self, weight: Parameter, ids: Tensor) -> Tensor:
        return self.graph.add("Gather", (self.parameter(weight), ids), (*ids.shape, weight.shape[1]), axis=0)

    def linear(self, x: Tensor, weight: Parameter, bias: Parameter | None = None) -> Tensor:
        """Gemm, which takes a weight as the checkpoint has it, (O, I); or a 1x1 Conv; or MatMulNBits."""
        out_features, in_features = weight.shape
        tokens = math.prod(x.shape[:-1])
        shape = (*x.shape[:-1], out_features)
        blocks = self._blocks(weight)
        if blocks is not None and self.weights == "matmulnbits":
            out = self._matmulnbits(x, weight.name, blocks)
            out = out if bias is None else out + self.parameter(bias)
        elif "conv" in self.graph.forms and not weight.of.endswith(STAY):
            image = x.reshape(1, tokens, 1, in_features).transpose(0, 3, 2, 1)
            inputs = [image, self.parameter(weight, 1, 1)] + ([self.parameter(bias)] if bias else [])
            out = self.graph.add("Conv", inputs, (1, out_features, 1, tokens)).transpose(0, 3, 2, 1).reshape(*shape)
        else:
            rows = x.reshape(tokens, in_features)
            inputs = [rows, self.parameter(weight)] + ([self.parameter(bias)] if bias else [])
            out = self.graph.add("Gemm", inputs, (tokens, out_features), transB=1).reshape(*shape)

        def features(start: int, stop: int, suffix: str) -> Tensor:
            rows = weight.part(start, stop, suffix)
            part = self.linear(x, rows, bias and bias.part(start, stop, suffix))
            inner = part  # what computes it, in the operator's own layout, is called like the weight
            while inner.node and inner.node.op in ("Reshape", "Transpose"):
                inner = inner.node.inputs[0]
            inner.name = rows.name.removesuffix(".weight")
            self.graph.shown[inner.name] = rows.of.removesuffix(".weight")
            out.parts.append(part)
            return part

        out.features = features
        return out

    def _matmulnbits(self, x: Tensor, name: str, blocks: Blocks) -> Tensor:
        """onnxruntime's operator. Its codes are 0 … 15 about 8 where INT4's are -8 … 7: the highest bit differs."""
        out_features, in_features = blocks.shape
        if in_features % blocks.block_size or blocks.block_size < 16 or blocks.block_size & (blocks.block_size - 1):
            raise InputError(f"{name} has blocks of {blocks.block_size}; MatMulNBits takes 16, 32, 64, 128, …")
        zero_points = None if blocks.zero_points is None else blocks.zero_points.astype(np.uint8) + 8 & 15
        tensors = matmulnbits.tensors(blocks.packed ^ 0x88, blocks.scales, blocks.block_size, zero_points)
        kinds = {"B": TensorProto.UINT8, "scales": TensorProto.FLOAT, "zero_points": TensorProto.UINT8}
        inputs = [self._initializer(f"{name}.{part}", array.shape, kinds[part], array)
                  for part, array in tensors.items()]  # fmt: skip
        words = dict(K=in_features, N=out_features, bits=4, block_size=blocks.block_size, accuracy_level=1)
        return self.graph.add("MatMulNBits", (x, *inputs), (*x.shape[:-1], out_features), domain=MICROSOFT, **words)

    def matmul(self, a: Any, b: Any) -> Any:
        if isinstance(a, Stack) or isinstance(b, Stack):
            return apply(self.matmul, a, b)
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return self.graph.add("MatMul", (a, b), (*batch, a.shape[-2], b.shape[-1]))

    weighted_sum = matmul

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the last axis, which stays as 1. (Since opset 18 the axes are an input.)"""
        axes, shape = np.array([-1], np.int64), (*x.shape[:-1], 1)
        if self.opset < 18:
            return self.graph.add("ReduceMean", (x,), shape, axes=axes.tolist())
        return self.graph.add("ReduceMean", (x, self.graph.constant(axes)), shape)

    def rsqrt(self, x: Tensor) -> Tensor:
        return self.graph.add("Reciprocal", (self.graph.add("Sqrt", (x,), x.shape),), x.shape)

    def sigmoid(self, x: Tensor) -> Tensor:
        return self.graph.add("Sigmoid", (x,), x.shape)

    def softmax(self, x: Any) -> Any:
        if isinstance(x, Stack):
            return apply(self.softmax, x)
        return self.graph.add("Softmax", (x,), x.shape, axis=-1)

    def split(self, x: Any, sizes: Sequence[int]) -> list[Any]:
        """Splits along the last axis. If the form takes W_pack apart, its parts are linears of their own."""
        if isinstance(x, Stack):
            heads = [self.split(piece, sizes) for piece in x.pieces]
            return [Stack(pieces, x.axis, x.group) for pieces in zip(*heads, strict=True)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        if x.features and ("unpack" in self.graph.forms or self.graph.heads_together):
            return [x.features(starts[i], starts[i] + size, str(i)) for i, size in enumerate(sizes)]
        shapes = [(*x.shape[:-1], size) for size in sizes]
        if self.opset < 18 and len(set(sizes)) == 1:  # equal parts need not be counted
            return self.graph.add("Split", (x,), *shapes, axis=-1)
        return self.graph.add("Split", (x, self.graph.constant(np.array(sizes, np.int64))), *shapes, axis=-1)

    def concat(self, pieces: Sequence[Any], axis: int = -1) -> Any:
        return self.graph.concat(pieces, axis)
