"""A tensor in pieces, a piece for each head: how batched attention becomes a graph of single heads.

Qualcomm's converter wants attention head by head: a projection each, a product each. The decoder says it once for all
heads, on (1, H, T, D). So where a graph has the form "heads", such a tensor is a `Stack` of H tensors (1, 1, T, D) that
no node joins, and each operation is done to every piece. What one thing is for all heads (cos, the mask) is shared by
the pieces, what has a slice for each (the past keys) is cut.

H / K query heads that share a key head are rows of one product in the decoder; here they stay single heads, each
with its key head: `group` remembers how many belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.graphs.symbols import Tensor


@dataclass(frozen=True)
class Stack:
    """Tensors of size 1 along `axis`, which together are one. `group` of them count as rows of one head."""

    pieces: tuple[Tensor, ...]
    axis: int
    group: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.pieces[0].shape)
        shape[self.axis] = len(self.pieces) // self.group
        shape[self.axis + 1] *= self.group
        return tuple(shape)

    @property
    def graph(self) -> Any:
        return self.pieces[0].graph

    def __add__(self, other: Any) -> Stack:
        return apply(lambda a, b: a + b, self, other)

    def __sub__(self, other: Any) -> Stack:
        return apply(lambda a, b: a - b, self, other)

    def __mul__(self, other: Any) -> Stack:
        return apply(lambda a, b: a * b, self, other)

    def transpose(self, *axes: int) -> Stack:
        pieces = tuple(piece.transpose(*axes) for piece in self.pieces)
        return Stack(pieces, axes.index(self.axis), self.group)

    def reshape(self, *shape: int) -> Any:
        """Heads in groups, (B, H, T, D) -> (B, K, H/K*T, D), or single again; or (B, T, H, D) -> (B, T, H*D).

        Raises ValueError for another shape: the decoder asks for no other.
        """
        heads = len(self.pieces)
        if len(shape) == 4 and heads % shape[self.axis] == 0 and self.axis == 1:
            return Stack(self.pieces, 1, heads // shape[1])
        if len(shape) == 3 and self.axis == 2:
            return self.graph.concat(self.pieces, 3).reshape(*shape)
        raise ValueError(f"cannot reshape heads {self.shape} to {shape}")


def joined(x: Any) -> Tensor:
    """One tensor, of the heads of a `Stack` or the parts of a linear, or as it is."""
    if isinstance(x, Stack):
        return x.graph.concat(x.pieces, x.axis)
    return x.graph.concat([joined(part) for part in x.parts], len(x.shape) - 1) if x.parts else x


def apply(function: Callable[..., Tensor], *operands: Any) -> Stack:
    """`function` of the pieces of each head. The first `Stack` says which heads there are."""
    first = next(operand for operand in operands if isinstance(operand, Stack))
    heads = range(len(first.pieces))
    pieces = tuple(function(*(piece(operand, first, head) for operand in operands)) for head in heads)
    return Stack(pieces, first.axis, first.group)


def piece(operand: Any, stack: Stack, head: int) -> Any:
    """What a head of `stack` needs of another operand: its piece, its slice, or all of what all heads share."""
    if isinstance(operand, Stack):
        return operand.pieces[head * len(operand.pieces) // len(stack.pieces)]
    rank = len(stack.pieces[0].shape)
    shape: Sequence[int] = getattr(operand, "shape", ())
    axis = stack.axis - rank + len(shape)
    return operand if axis < 0 or shape[axis] == 1 else operand.cut(axis, head)
