"""RMSNorm, RoPE and attention as one node each, where the opset has them (from 23 on); or RMSNorm alone.

The decoder writes these three in small operations. It shows the result of each to a tap, and goes on with whatever the
tap returns. So a tap that returns the one node instead leaves the small ones without a reader, and they are not
emitted. What the node needs (input, gain, epsilon, scale) is found by walking back through what the decoder wrote,
step by step, each named here; if the decoder writes something else one day, the walk says so.
"""

from __future__ import annotations

from typing import Any

from export.graphs.symbols import Graph, Tensor
from refimpl.names import NORMS
from refimpl.trace import Tap


def fusing(graph: Graph, then: Tap) -> Tap:
    """The tap that puts one node in the place of many, and passes it on to `then`.

    The graph's form says which operations become one node: RMSNorm with "norm"; RoPE and attention, too, with "fused".
    """

    def tap(name: str, x: Any) -> Any:
        kind = name.rpartition(".")[2]
        if kind in NORMS:
            x = rms_norm(graph, x)
        elif "fused" not in graph.forms:
            pass
        elif kind in ("query", "key") and x.node.op == "Concat":
            x = rope(graph, x)
        elif kind == "context":
            x = attention(graph, x)
        return then(name, x)

    return tap


def rms_norm(graph: Graph, x: Tensor) -> Tensor:
    """gain * (x * 1/sqrt(mean(x * x) + epsilon))"""
    gain, normed = step(x, "Mul", "Reshape")
    source, inverse = step(normed, "Mul", "Reshape")
    (root,) = step(inverse, "Reciprocal")
    (shifted,) = step(root, "Sqrt")
    _, epsilon = step(shifted, "Add")
    out = graph.add("RMSNormalization", (source, gain), source.shape, axis=-1, epsilon=graph.number(epsilon))
    return out.reshape(*x.shape)  # rank 4, where norms have that rank


def rope(graph: Graph, x: Tensor) -> Tensor:
    """[a * cos - b * sin, b * cos + a * sin], a and b the halves of the source; (1, H, T, D)."""
    first, _ = step(x, "Concat")
    cosine, sine = step(first, "Sub")
    half, cos = step(cosine, "Mul")
    _, sin = step(sine, "Mul")
    source = step(half, "Split")[0]
    tables = [table.reshape(*table.shape[1:]) for table in (cos, sin)]  # (1, T, D/2)
    return graph.add("RotaryEmbedding", (source, *tables), x.shape)


def attention(graph: Graph, x: Tensor) -> Tensor:
    """softmax(query keyᵀ * scale + mask) value, of the heads (1, H, T, D), side by side."""
    product = step(step(step(x, "Reshape")[0], "Transpose")[0], "MatMul", "Reshape")
    probs, value = product
    (biased,) = step(probs, "Softmax", "Reshape")
    scores, mask = step(biased, "Add")
    scaled, scale = step(scores, "Mul", "Reshape")
    query, key = step(scaled, "MatMul")
    (query,) = step(query, "Reshape") if query.node and query.node.op == "Reshape" else (query,)
    heads, tokens, size = scores.shape[1], scores.shape[2], value.shape[3]
    inputs = (query, key.transpose(0, 1, 3, 2), value, mask)
    context = graph.add("Attention", inputs, (1, heads, tokens, size), scale=graph.number(scale))
    return context.transpose(0, 2, 1, 3).reshape(*x.shape)


def step(x: Tensor, op: str, *between: str) -> list[Tensor]:
    """The inputs of the `op` that computed x, without a Reshape's shape. Operators `between` the two are skipped.

    Raises ValueError if it is another node: then the decoder has changed, and so must this file.
    """
    while x.node and x.node.op in between:
        x = x.node.inputs[0]
    if x.node is None or x.node.op != op:
        raise ValueError(f"expected {op}, found {x.node.op if x.node else x.name}")
    return [x.node.inputs[0]] if op in ("Reshape", "Split", "Reciprocal", "Sqrt", "Softmax") else list(x.node.inputs)
