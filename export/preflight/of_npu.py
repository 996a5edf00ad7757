"""Rules about graphs that round by themselves: what Qualcomm's NPU accepts silently, and computes wrongly.

Such a graph has pairs of QuantizeLinear and DequantizeLinear. Each rule was measured: onnxruntime-qnn 2.7.0 (QNN 2.51),
its emulation of the architectures v75 and v79, against exact results of the same codes. Errors are in steps of the
result's grid. No real NPU was available.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from export.files.graph_folder import GraphFolder
from export.files.skeleton import BITS, NodeInfo
from export.graphs.ops import LINEARS
from export.preflight.rule import rule

MEASURED = "measured: onnxruntime-qnn 2.7.0, emulation"
INT4, UINT8, UINT16 = 22, 2, 4  # ONNX's numbers of types
LARGEST = 8 << 20  # bytes of one operand that the NPU's own memory holds
HALF = 65504.0  # the largest float16


@dataclass(frozen=True)
class Grid:
    """The grid of a DequantizeLinear or QuantizeLinear. None stands for a number that the graph does not state.

    `constant`: its codes are an initializer; `rows`: it has more than one step; `blocks`: it has a step for each block.
    """

    dtype: int
    scale: float | None
    zero_point: float | None
    constant: bool = False
    rows: bool = False
    blocks: bool = False

    @property
    def bits(self) -> int:
        return BITS.get(self.dtype, 0)

    @property
    def range(self) -> tuple[float, float] | None:
        """The values of the first and the last code."""
        if self.scale is None or self.zero_point is None or self.dtype not in (UINT8, UINT16):
            return None
        return -self.zero_point * self.scale, (2**self.bits - 1 - self.zero_point) * self.scale


def whole(graph: GraphFolder) -> list[NodeInfo]:
    """The nodes that take something and give something; another rule names the others, which no checker accepts."""
    return [node for node in graph.graph.nodes if node.inputs and node.outputs]


class Inside:
    """The grids that a graph itself states, by the tensor that stands on one, and the readers of each tensor."""

    def __init__(self, graph: GraphFolder):
        self.graph = graph
        self.made: dict[str, NodeInfo] = {name: node for node in graph.graph.nodes for name in node.outputs}
        self.readers: dict[str, list[NodeInfo]] = {}
        for node in graph.graph.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)
        self.grids = {node.outputs[0]: self.grid(node) for node in graph.graph.nodes
                      if node.op == "DequantizeLinear" and node.outputs and len(node.inputs) > 1}  # fmt: skip

    def grid(self, node: NodeInfo) -> Grid:
        constants = self.graph.constants
        scale, zero = constants.get(node.inputs[1]), constants.get(node.inputs[2]) if len(node.inputs) > 2 else None
        codes = constants.get(node.inputs[0])
        dtype = zero.dtype if zero else codes.dtype if codes else UINT8
        single = scale is not None and math.prod(scale.dims) == 1
        none = len(node.inputs) < 3
        return Grid(dtype, scale.value if scale else None, 0.0 if none else zero.value if zero else None,
                    codes is not None and node.op == "DequantizeLinear", scale is not None and not single,
                    node.ints.get("block_size", 0) > 0)  # fmt: skip

    def rounded(self, name: str) -> Grid | None:
        """The grid on which a tensor's only reader puts it; None unless one QuantizeLinear alone reads it."""
        readers = self.readers.get(name, [])
        if len(readers) == 1 and readers[0].op == "QuantizeLinear" and len(readers[0].inputs) > 1:
            return self.grid(readers[0])
        return None

    def products(self) -> Iterator[tuple[NodeInfo, Grid | None, Grid | None]]:
        """The products of two activations, with the grids of both."""
        for node in whole(self.graph):
            if node.op == "MatMul" and len(node.inputs) == 2:
                a, b = (self.grids.get(name) for name in node.inputs)
                constant = any(name in self.graph.constants for name in node.inputs)
                if not constant and not (a and a.constant) and not (b and b.constant):
                    yield node, a, b


@rule(
    "int4-without-zero-point",
    "error",
    wrong="DequantizeLinear(codes, scales) of INT4 codes",
    source=f"{MEASURED}: 32000 steps off",
    remedy="give it a zero point of zeros, which means the same to ONNX",
)
def int4_without_zero_point(graph: GraphFolder):
    """INT4 weights by rows or as a whole state their zero point: without one, they are read as other numbers."""
    for node in whole(graph):
        codes = graph.constants.get(node.inputs[0]) if node.op == "DequantizeLinear" and node.inputs else None
        if codes and codes.dtype == INT4 and not node.ints.get("block_size") and not any(node.inputs[2:3]):
            yield node.outputs[0], "its DequantizeLinear has INT4 codes and no zero point"


@rule(
    "int4-blocks-off-center",
    "error",
    wrong="INT4 in blocks with a zero point of 1",
    source=f"{MEASURED}: 11000 steps off",
    remedy="quantize blocks symmetrically",
)
def int4_blocks_off_center(graph: GraphFolder):
    """INT4 weights in blocks are symmetric: another zero point than 0 is ignored."""
    for node in whole(graph):
        if node.op == "DequantizeLinear" and node.ints.get("block_size") and len(node.inputs) > 2:
            codes, zero = (graph.constants.get(node.inputs[i]) for i in (0, 2))
            if codes and codes.dtype == INT4 and zero and zero.zeros is False:
                yield node.outputs[0], "its blocks of INT4 have a zero point that is not 0"


@rule(
    "conv-in-blocks",
    "warning",
    wrong="a Conv whose weight is in blocks of 32",
    source=f"{MEASURED}: up to 840 steps off with enable_block_quant_weight_optimization",
    remedy="use Gemm or MatMul, or leave that option of the provider off",
)
def conv_in_blocks(graph: GraphFolder):
    """A weight in blocks belongs to a product, not to a Conv, which takes scales of blocks for others."""
    inside = Inside(graph)
    for node in whole(graph):
        if node.op == "Conv" and len(node.inputs) > 1 and (grid := inside.grids.get(node.inputs[1])) and grid.blocks:
            yield node.outputs[0], "a Conv has its weight in blocks"


@rule(
    "linear-narrows",
    "error",
    wrong="values: 16 bits times INT4 by rows, at once on 8 bits",
    source=f"{MEASURED}: the weight is dequantized on the CPU",
    remedy="round to 16 bits first, with a step 257 times finer, and that to 8",
)
def linear_narrows(graph: GraphFolder):
    """A linear with a step for each row gives as many bits as it takes: else it is computed in floats."""
    inside = Inside(graph)
    for node in whole(graph):
        if node.op in LINEARS and len(node.inputs) > 1:
            x, weight = (inside.grids.get(name) for name in node.inputs[:2])
            gives = inside.rounded(node.outputs[0])
            by_rows = weight and weight.constant and weight.rows and not weight.blocks
            if x and gives and by_rows and x.bits != gives.bits:
                yield node.outputs[0], f"it takes {x.bits} bits and gives {gives.bits}"


@rule(
    "product-16x16",
    "error",
    wrong="probs in uint16 times values in uint16",
    source=f"{MEASURED}: 62 to 600 steps off",
    remedy="put the second operand (keys, values) on 8 bits",
)
def product_16x16(graph: GraphFolder):
    """In a product of two activations on grids at most one has 16 bits: the other is taken as if it had 8."""
    for node, a, b in Inside(graph).products():
        if a and b and a.bits == b.bits == 16:
            yield node.outputs[0], "both operands have 16 bits"


@rule(
    "product-off-center",
    "error",
    wrong="keys in uint8 with a zero point of 124",
    source=f"{MEASURED}: code 255 with a zero point of 124 is 384 steps off",
    remedy="give the 8-bit operand the zero point 128",
)
def product_off_center(graph: GraphFolder):
    """The 8-bit operand of a product with 16 bits has the zero point 128: codes farther than 127 from it are lost."""
    for node, a, b in Inside(graph).products():
        if a and b and {a.bits, b.bits} == {8, 16}:
            narrow = a if a.bits == 8 else b
            if narrow.dtype == UINT8 and narrow.zero_point not in (None, 128.0):
                yield node.outputs[0], f"its 8-bit operand has the zero point {narrow.zero_point:g}"


@rule(
    "sigmoid-range",
    "error",
    wrong="a sigmoid on 0 to 0.9",
    source=f"{MEASURED}: thousands of steps off as an output, 54 on the mean with the range that was seen",
    remedy="put it on 0 to 1, whatever was seen",
)
def sigmoid_range(graph: GraphFolder):
    """A sigmoid's grid is 0 to 1: with another, its codes are those of 0 to 1."""
    inside = Inside(graph)
    for node in whole(graph):
        grid = inside.rounded(node.outputs[0]) if node.op == "Sigmoid" else None
        if grid and (ends := grid.range) and (ends[0] != 0 or abs(ends[1] - 1) > 2.0**-grid.bits):
            yield node.outputs[0], f"its grid is {ends[0]:.4g} to {ends[1]:.4g}"


@rule(
    "transpose-changes-grid",
    "error",
    wrong="a Transpose of keys with zero point 128, rounded with zero point 127",
    source=f"{MEASURED}: the codes stay as they are, a step off",
    remedy="give both sides of a Transpose one grid",
)
def transpose_changes_grid(graph: GraphFolder):
    """What is transposed stays on its grid: another one behind the Transpose is ignored."""
    inside = Inside(graph)
    for node in whole(graph):
        if node.op == "Transpose" and node.inputs and (came := inside.grids.get(node.inputs[0])):
            gone = inside.rounded(node.outputs[0])
            grids = [(grid.dtype, grid.scale, grid.zero_point) for grid in (came, gone) if grid]
            if len(grids) == 2 and grids[0] != grids[1] and not any(None in grid for grid in grids):
                yield node.outputs[0], "it is rounded to another grid than that which it comes from"


def _squares(graph: GraphFolder, inside: Inside) -> Iterator[tuple[NodeInfo, str]]:
    """The squares of tensors, each with the tensor."""
    for node in whole(graph):
        if (node.op == "Mul" and len(set(node.inputs)) == 1) or (node.op == "Pow" and node.inputs):
            yield node, node.inputs[0]


@rule(
    "squares-overflow",
    "error",
    wrong="RMSNorm in small operations of a residual stream on -500 to 900",
    source=f"{MEASURED}: 24 dB, up to 3000 steps off",
    remedy="make it one node, RMSNormalization of opset 23, with its gain on 16 bits",
)
def squares_overflow(graph: GraphFolder):
    """What has no grid of its own is float16: squares of what may lie beyond 256 do not fit it."""
    inside = Inside(graph)
    for node, source in _squares(graph, inside):
        grid = inside.grids.get(source)
        if grid and (ends := grid.range) and not inside.rounded(node.outputs[0]):
            largest = max(-ends[0], ends[1])
            if largest**2 > HALF:
                yield node.outputs[0], f"it squares what goes up to {largest:.4g}, in float16"


@rule(
    "squares-on-grid",
    "warning",
    wrong="a grid on x * x of an RMSNorm",
    source=f"{MEASURED}: 0 dB where the stream is small (the norm of embeddings)",
    remedy="leave a norm without grids inside, or make it one node: RMSNormalization of opset 23",
)
def squares_on_grid(graph: GraphFolder):
    """The squares of a norm have no grid: 16 bits from 0 to the largest square leave nothing of a row that is small."""
    inside = Inside(graph)
    for node, _ in _squares(graph, inside):
        grid = inside.rounded(node.outputs[0])
        means = [reader for mid in inside.readers.get(node.outputs[0], []) for name in mid.outputs
                 for dq in inside.readers.get(name, []) for out in dq.outputs
                 for reader in inside.readers.get(out, []) if reader.op == "ReduceMean"]  # fmt: skip
        if grid and means:
            yield node.outputs[0], "it is rounded before its mean is taken"


@rule(
    "product-too-large",
    "error",
    wrong="one product of 32 heads with 4096 slots of keys",
    source=f"{MEASURED}: QNN_COMMON_ERROR_MEM_ALLOC, code 1002; 8 MB compile, 12 MB do not",
    remedy="put heads in groups (--forms heads=16), or apart (--forms heads)",
)
def product_too_large(graph: GraphFolder):
    """The second operand of a product of activations fits the NPU's own memory: 8 MB of codes."""
    inside = Inside(graph)
    shapes = {value.name: value.shape for value in (*graph.graph.values, *graph.ends)}
    for node, _, grid in inside.products():
        name = node.inputs[1]
        known = graph.standing.get(name)
        bits = grid.bits if grid else known.bits if known else 0
        size = _size(shapes.get(name)) * bits // 8
        if size > LARGEST:
            yield node.outputs[0], f"its second operand has {size / 2**20:.0f} MB of codes"


@rule(
    "slice-too-large",
    "error",
    wrong="a Slice of 16 heads out of 32 with 4096 slots",
    source=f"{MEASURED}: QNN_COMMON_ERROR_MEM_ALLOC, code 1002; a Split of the same compiles",
    remedy="cut it by one Split, as --forms heads=16 does",
)
def slice_too_large(graph: GraphFolder):
    """What more than one head is cut from by a Slice fits the NPU's own memory: 8 MB of codes."""
    inside = Inside(graph)
    shapes = {value.name: value.shape for value in (*graph.graph.values, *graph.ends)}
    for node in whole(graph):
        if node.op == "Slice" and node.inputs:
            grid, out = inside.grids.get(node.inputs[0]), shapes.get(node.outputs[0])
            size = _size(shapes.get(node.inputs[0])) * (grid.bits if grid else 0) // 8
            if size > LARGEST and out and isinstance(out[0], int) and out[0] > 1:
                yield node.outputs[0], f"it is cut from {size / 2**20:.0f} MB of codes"


def _size(shape: tuple[int | str | None, ...] | None) -> int:
    """How many elements there are; 0 if that is not said."""
    if not shape or not all(isinstance(axis, int) for axis in shape):
        return 0
    return math.prod(axis for axis in shape if isinstance(axis, int))
