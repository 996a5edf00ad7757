"""The tape: one more evaluator of the decoder's operations, which can say how the loss depends on each tensor.

The derivative of a chain of functions is the product of theirs. So the gradient of a loss is found backwards: for
y = f(x), dL/dx is dL/dy times the transpose of f's derivative, which is called f's adjoint. The tape computes each
operation by another evaluator (NumPy or Numba), and writes down its result with one adjoint for each input:

    y = softmax(x)          dL/dx = y * (g - sum(g * y))          where g = dL/dy, of the same shape as y

`Tape.backward` reads it from the end to the beginning. A tensor that is used twice, as the residual stream is by each
layer, gets the sum of what both uses say: so the gradient of the stream arrives at the first layer undiminished.

>>> from refimpl_kernels.ops import NumPyOps
>>> tape = Tape(NumPyOps("float64"))
>>> x = tape.tensor(np.array([[1.0, 2.0]]))
>>> y = x * x + x * 3.0
>>> tape.backward(y, np.ones((1, 2)))                       # d(x² + 3x)/dx = 2x + 3
>>> x.gradient
array([[5., 7.]])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from refimpl.checkpoint.weights import NormHead
from refimpl.gradients.adapters import Adapted
from refimpl.gradients.products import matmul, product, transposed_product
from refimpl_kernels.ops import TILE_BYTES, NumPyOps

Adjoint = Callable[[np.ndarray], np.ndarray]


class Tensor:
    """An array on a tape, and `inputs`: what it was computed from, each with the adjoint that leads back there."""

    __slots__ = ("array", "gradient", "inputs", "name", "tape")
    __array_ufunc__ = None  # so that `array * tensor` asks the tensor

    def __init__(self, tape: Tape, array: np.ndarray, inputs: tuple[tuple[Any, Adjoint], ...] = ()):
        self.tape, self.array, self.inputs = tape, array, inputs
        self.gradient: np.ndarray | None = None
        self.name = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def add(self, gradient: np.ndarray) -> None:
        """Adds the gradient that one more use of this tensor brings."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def __add__(self, other):
        a, b = self.array, _array(other)
        return self.tape.write(a + b, (self, _summed_to(a)), (other, _summed_to(b)))

    def __sub__(self, other):
        a, b = self.array, _array(other)
        return self.tape.write(a - b, (self, _summed_to(a)), (other, lambda g: _summed_to(b)(-g)))

    def __mul__(self, other):
        a, b = self.array, _array(other)
        return self.tape.write(a * b, (self, lambda g: _summed_to(a)(g * b)), (other, lambda g: _summed_to(b)(g * a)))

    __radd__, __rmul__ = __add__, __mul__

    def reshape(self, *shape: int) -> Tensor:
        """The same numbers in another shape."""
        return self.tape.write(self.array.reshape(shape), (self, lambda g: g.reshape(self.shape)))

    def transpose(self, *axes: int) -> Tensor:
        """The axes in another order."""
        back = np.argsort(axes)
        return self.tape.write(self.array.transpose(axes), (self, lambda g: g.transpose(back)))

    def __getitem__(self, part) -> Tensor:
        def spread(g):
            whole = np.zeros(self.shape, g.dtype)
            whole[part] = g
            return whole

        return self.tape.write(self.array[part], (self, spread))


class Leaf:
    """A parameter: `weight` as it is stored, and the `gradient` of its values, if that is `wanted`."""

    def __init__(self, name: str, weight: Any, wanted: bool):
        self.name, self.weight, self.wanted = name, weight, wanted
        self.gradient: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    add = Tensor.add


@dataclass(frozen=True)
class AdaptedLeaf:
    """The leaves of a weight with a correction of low rank."""

    shape: tuple[int, ...]
    base: Leaf
    a: Leaf
    b: Leaf
    scale: float


class Leaves(Mapping[str, Any]):
    """The parameters of a model as leaves, by their names. `wanted` chooses those whose gradients are computed.

    A tied head is the embedding's own parameter: there is one gradient, the sum of both uses.
    """

    def __init__(self, weights: Mapping[str, Any], wanted: Callable[[str], bool], tied: bool = False):
        self.weights, self.wanted, self.tied = weights, wanted, tied
        self.leaves: dict[str, Leaf] = {}

    def __getitem__(self, name: str) -> Any:
        weight = self.weights[name]
        if isinstance(weight, Adapted):
            module = name.removesuffix(".weight")
            a, b = (self._leaf(f"{module}.lora_{part}.weight", getattr(weight, part.lower())) for part in "AB")
            return AdaptedLeaf(weight.shape, self._leaf(name, weight.base), a, b, weight.scale)
        if hasattr(weight, "adjoint"):  # its scales learn
            return self._leaf(name.removesuffix("weight") + "scales", weight)
        return self._leaf("model.embed_tokens.weight" if self.tied and name == "lm_head.weight" else name, weight)

    def _leaf(self, name: str, weight: Any) -> Leaf:
        if name not in self.leaves:
            self.leaves[name] = Leaf(name, weight, self.wanted(name))
        return self.leaves[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


class Tape:
    """The operations over `Tensor`s, computed by `ops`; see `refimpl_kernels/ops.py` for what each one means.

    float32 and float64 are their own wide formats, so `upcast` and `type_as` have nothing to do. What is not a Tensor
    (a mask, a table of positions, a number) is a constant; so is a parameter whose gradient is not wanted, and the
    embedding of the token `padding`, as in `torch.nn.Embedding`'s padding_idx (in a Baichuan, that is <unk>, too).
    """

    def __init__(self, ops: NumPyOps, padding: int | None = None, recording: bool = True):
        self.ops, self.padding, self.recording = ops, padding, recording
        self.order: list[Tensor] = []

    def tensor(self, array: np.ndarray) -> Tensor:
        """A tensor to begin with."""
        return Tensor(self, array)

    def write(self, array: np.ndarray, *inputs: tuple[Any, Adjoint]) -> Tensor:
        """The result of an operation, and the adjoint for each of its inputs. Nothing is kept if not `recording`."""
        if not self.recording:
            return Tensor(self, array)
        known = tuple((x, adjoint) for x, adjoint in inputs if isinstance(x, Tensor) or getattr(x, "wanted", False))
        self.order.append(Tensor(self, array, known))
        return self.order[-1]

    def tap(self, name: str, x: Tensor) -> Tensor:
        """The same tensor under its name, by which `backward` shows its gradient."""
        named = self.write(x.array, (x, lambda g: g))
        named.name = name
        return named

    def backward(self, result: Tensor, gradient: np.ndarray, show: Callable = lambda name, gradient: gradient) -> None:
        """Takes the gradient of the loss by `result`; stores those by the first tensors and by the leaves in these.

        `show(name, gradient)` gets that of each named tensor, last to first; the gradient that it returns goes on. The
        tape is empty afterwards, because entries are released as they are read.
        """
        result.add(gradient)
        while self.order:
            y = self.order.pop()
            if y.gradient is None:  # the loss does not depend on it
                continue
            g = show(y.name, y.gradient) if y.name else y.gradient
            for x, adjoint in y.inputs:
                x.add(adjoint(g))
            y.gradient, y.inputs = None, ()

    # --- the operations, in the order of refimpl_kernels/ops.py ---

    def upcast(self, x: Any) -> Any:
        return x

    def type_as(self, x: Any, other: Any) -> Any:
        return x

    def parameter(self, weight: Leaf) -> Tensor:
        return self.write(self.ops.parameter(weight.weight), (weight, lambda g: g))

    def take(self, weight: Leaf, ids: np.ndarray) -> Tensor:
        def scatter(g):
            whole, flat = np.zeros(weight.shape, g.dtype), ids.reshape(-1)
            order = np.argsort(flat, kind="stable")
            rows, starts = np.unique(flat[order], return_index=True)
            whole[rows] = np.add.reduceat(_rows(g)[order], starts, axis=0)  # a token that occurs twice counts twice
            if self.padding is not None:
                whole[self.padding] = 0
            return whole

        return self.write(self.ops.take(weight.weight, ids), (weight, scatter))

    def linear(self, x: Tensor, weight: Leaf | AdaptedLeaf, bias: Leaf | None = None) -> Tensor:
        if isinstance(weight, AdaptedLeaf):
            correction = self.linear(self.linear(x, weight.a), weight.b) * weight.scale
            return self.linear(x, weight.base, bias) + correction
        y = self.ops.linear(x.array, weight.weight, None if bias is None else bias.weight)
        return self.write(
            y, (x, lambda g: self.times_weight(g, weight.weight)), (weight, lambda g: of_weight(g, x.array, weight)),
            (bias, lambda g: _rows(g).sum(0)),
        )  # fmt: skip

    def times_weight(self, g: np.ndarray, weight: Any) -> np.ndarray:
        """g (..., O) @ weight (O, I), which is read tile by tile as the forward reads it."""
        rows, (outs, ins) = _rows(g), weight.shape
        step = max(1, TILE_BYTES // (ins * g.dtype.itemsize))
        total: np.ndarray | None = None
        for start in range(0, outs, step):
            tile = slice(start, min(start + step, outs))
            part = product(rows[:, tile], weight.read(g.dtype, tile))
            total = part if total is None else np.add(total, part, out=total)
        assert total is not None
        return total.reshape(*g.shape[:-1], ins)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        x, y = a.array, b.array
        return self.write(
            self.ops.matmul(x, y), (a, lambda g: matmul(g, y.swapaxes(-1, -2))),
            (b, lambda g: matmul(x.swapaxes(-1, -2), g)),
        )  # fmt: skip

    def weighted_sum(self, probs: Tensor, value: Tensor) -> Tensor:
        p, v = probs.array, value.array
        return self.write(
            self.ops.weighted_sum(p, v), (probs, lambda g: matmul(g, v.swapaxes(-1, -2))),
            (value, lambda g: matmul(p.swapaxes(-1, -2), g)),
        )  # fmt: skip

    def mean(self, x: Tensor) -> Tensor:
        return self.write(self.ops.mean(x.array), (x, lambda g: np.broadcast_to(g / x.shape[-1], x.shape)))

    def rsqrt(self, x: Tensor) -> Tensor:
        y = self.ops.rsqrt(x.array)
        return self.write(y, (x, lambda g: -0.5 * g * y * y * y))

    def sigmoid(self, x: Tensor) -> Tensor:
        y = self.ops.sigmoid(x.array)
        return self.write(y, (x, lambda g: g * y * (1 - y)))

    def softmax(self, x: Tensor) -> Tensor:
        y = self.ops.softmax(x.array)

        def adjoint(g):
            gy = g * y
            gy -= y * gy.sum(-1, keepdims=True)
            return gy

        return self.write(y, (x, adjoint))

    def split(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        ends = list(accumulate(sizes))
        return [x[..., end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def concat(self, pieces: Sequence[Tensor], axis: int = -1) -> Tensor:
        arrays = [piece.array for piece in pieces]
        ends = list(accumulate(array.shape[axis] for array in arrays))

        def cut(number):
            return lambda g: np.split(g, ends[:-1], axis=axis)[number]

        joined = self.ops.concat(arrays, axis)
        return self.write(joined, *((piece, cut(number)) for number, piece in enumerate(pieces)))


def of_weight(g: np.ndarray, x: np.ndarray, leaf: Leaf) -> np.ndarray:
    """The gradient of a matrix W (O, I), where y = x Wᵀ for x (..., I), and g (..., O) is the gradient by y: gᵀ x."""
    gradient = transposed_product(_rows(g), _rows(x))
    if isinstance(leaf.weight, NormHead):
        return through_lengths(leaf.weight, gradient)
    return leaf.weight.adjoint(gradient) if hasattr(leaf.weight, "adjoint") else gradient


def through_lengths(head: NormHead, g: np.ndarray) -> np.ndarray:
    """NormHead's adjoint: from the gradient by the rows of length 1 to that by the rows w as they are stored.

    With n = w / |w|, dL/dw = (g - n (n · g)) / |w|: what would only make the row longer changes nothing. A row shorter
    than 1e-12 is divided by that constant. Source: `torch.nn.functional.normalize`.
    """
    w = head.array.astype(g.dtype, copy=False)
    lengths = np.sqrt(np.einsum("oi,oi->o", w, w))[:, None]
    floored = np.maximum(lengths, np.asarray(1e-12, g.dtype))
    along = np.einsum("oi,oi->o", w, g)[:, None] / floored**2  # so that w * along = n (n · g)
    return (g - w * np.where(lengths > 1e-12, along, 0)) / floored


def _array(x: Any) -> Any:
    return x.array if isinstance(x, Tensor) else x


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _summed_to(x: Any) -> Adjoint:
    """The adjoint of being broadcast: the gradient summed over the axes along which `x` was repeated."""
    shape = np.shape(x)

    def fold(g):
        extra = g.ndim - len(shape)
        axes = tuple(i for i in range(g.ndim) if i < extra or (shape[i - extra] == 1 and g.shape[i] != 1))
        return g.sum(axes, keepdims=True).reshape(shape) if axes else g

    return fold
