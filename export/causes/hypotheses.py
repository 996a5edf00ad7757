"""What a graph gives if one of its operations is done in a known wrong way: hypotheses that need the model.

A hypothesis says at which taps something else goes on: RMSNorm without its gain, a matrix whose codes are unpacked in
the other order, a stream to which nothing is added. The graph is run with it up to the failing tensor, in the same
arithmetic as its reference. So a hypothesis is the same few lines whether the failing tensor is that very tap, which
a probe has shown, or one that comes much later. Only those are tried that change an operation under suspicion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from export.graphs.naming import boundary
from refimpl.names import input_of
from refimpl_kernels.affine import Encoding, fake_quantize, from_range, integers

if TYPE_CHECKING:
    from export.causes.evidence import Evidence

LINEARS = ("W_pack", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
SLOTS = 16  # of the past that are tried each alone, where nothing shows which one it is


@dataclass(frozen=True)
class Hypothesis:
    """At the taps whose last names are `at`, the run goes on with what `change` makes of them, if that is anything."""

    text: str
    at: tuple[str, ...]
    change: Callable[[Operation], np.ndarray | None]


@dataclass(frozen=True, eq=False)
class Operation:
    """A tap in a run: `right` is what was computed, `seen` all taps before it."""

    evidence: Evidence
    tap: str
    right: np.ndarray
    seen: Mapping[str, np.ndarray]

    def __getitem__(self, what: str) -> np.ndarray:
        """The tap of the same layer with this last name."""
        return next(x for name, x in reversed(list(self.seen.items())) if last_name(name) == what)

    @property
    def layer(self) -> int:
        return int(self.tap.split(".")[2])

    @cached_property
    def before(self) -> np.ndarray:
        """What a norm reads."""
        if self.tap.endswith("post_attention_layernorm"):
            return self["attention_residual"]
        spec = self.evidence.spec
        at = boundary(spec.config.num_hidden_layers if self.tap == "model.norm" else self.layer)
        return self.seen[at] if at in self.seen else spec.filled(self.evidence.inputs)[spec.part.reads]

    @property
    def parameters(self) -> Mapping[str, Any]:
        return self.evidence.references.parameters(self.evidence.kind)

    def parameter(self, name: str) -> np.ndarray:
        return self.parameters[name].read(np.dtype(np.float64))

    @cached_property
    def weight(self) -> np.ndarray:
        return self.parameter(f"{self.tap}.weight")

    @property
    def bias(self) -> np.ndarray:
        name = f"{self.tap}.bias"
        return self.parameter(name) if name in self.parameters else np.zeros(1)

    @cached_property
    def grid(self) -> Encoding | None:
        """The weight's."""
        encodings = self.evidence.references.encodings
        found = encodings.parameters.get(f"{self.tap}.weight") if encodings and self.evidence.kind != "float" else None
        return found if isinstance(found, Encoding) and found.scale.ndim else None

    @cached_property
    def codes(self) -> np.ndarray:
        """The weight's, 0 for 0."""
        assert self.grid is not None and self.evidence.references.model is not None
        weights = self.evidence.references.model.weights
        return integers(weights[f"{self.tap}.weight"].read(np.dtype(np.float32)), self.grid).astype(np.int64)

    def linear(self, weight: np.ndarray) -> np.ndarray:
        """The tap, had it been made by another matrix."""
        return (self.seen[input_of(self.tap)] @ weight.T + self.bias).astype(self.right.dtype)


def last_name(tap: str) -> str:
    """Of a tap, "layer" for the output of a layer."""
    last = tap.rpartition(".")[2]
    return "layer" if last.isdigit() else last


def hypotheses(e: Evidence, cause: str) -> Iterator[Hypothesis]:
    """All of one cause."""
    yield from {"architecture": _architecture, "weights": _weights, "embedding": _embedding, "dtype": _dtype}[cause](e)


# Another model


def _architecture(e: Evidence) -> Iterator[Hypothesis]:
    config = e.config
    H, D, root = config.num_attention_heads, config.head_dim, config.head_dim**0.5

    def normed(eps: float = config.rms_norm_eps, centred: bool = False, gain: bool = True) -> Callable:
        def change(o: Operation) -> np.ndarray:
            x = o.before - (o.before.mean(-1, keepdims=True) if centred else 0)
            return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * (o.weight if gain else 1)

        return change

    for eps in (1e-5, 1e-6, 1e-8):
        if eps != config.rms_norm_eps:
            yield Hypothesis(f"RMSNorm has the epsilon {eps:g}, expected {config.rms_norm_eps:g}", NORMS, normed(eps))
    for at in [*((name,) for name in NORMS), NORMS]:
        yield Hypothesis("RMSNorm has no gain: its weight is not applied", at, normed(gain=False))
        yield Hypothesis("the mean is subtracted: LayerNorm, expected RMSNorm", at, normed(centred=True))
        yield Hypothesis("RMSNorm is missing", at, lambda o: o.before)
    yield Hypothesis("gate_proj and up_proj are exchanged", ("gate_proj", "up_proj"), _exchanged)
    gate = {"GELU": _gelu, "ReLU": lambda x: np.maximum(x, 0), "the sigmoid alone": _sigmoid, "missing": lambda x: x}
    for name, function in gate.items():
        yield Hypothesis(f"the activation is {name}, expected SiLU", ("act_fn",), _of(function))
    for name in ("act_fn", "up_proj"):
        yield Hypothesis(f"the product of gate and up is {name} alone", ("product",), _of(lambda x: x, name))
    residual = {"attention_residual": "o_proj", "layer": "down_proj"}
    for at in [("attention_residual",), ("layer",), tuple(residual)]:
        yield Hypothesis("the residual stream is dropped: what is added to it goes on alone", at,
                         lambda o: o[residual[last_name(o.tap)]])  # fmt: skip
    for name, added in residual.items():
        yield Hypothesis(f"{added} is not added to the residual stream", (name,), _without(added))
    yield Hypothesis(f"scores are not divided by the root of the head's size: {root:.4g} times too large", ("scores",),
                     lambda o: o.right * root)  # fmt: skip
    yield Hypothesis(f"scores are divided by the root of the head's size twice: {1 / root:.4g} of what they should be",
                     ("scores",), lambda o: o.right / root)  # fmt: skip
    if config.num_key_value_heads < H:
        yield Hypothesis("query heads take the key heads by turns, expected neighbours to share one",
                         ("scores", "context"), _by_turns)  # fmt: skip
    for head in range(H):
        kept = np.repeat(np.arange(H) != head, D)
        yield Hypothesis(f"head {head} of attention gives zeros", ("context",), _times(kept))


def _of(function: Callable[[np.ndarray], np.ndarray], what: str = "gate_proj") -> Callable[[Operation], np.ndarray]:
    """What a function makes of another tap of the layer."""
    return lambda o: function(o[what])


def _without(what: str) -> Callable[[Operation], np.ndarray]:
    return lambda o: o.right - o[what]


def _times(factors: np.ndarray) -> Callable[[Operation], np.ndarray]:
    return lambda o: o.right * factors


def _exchanged(o: Operation) -> np.ndarray:
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}[last_name(o.tap)]
    return o.linear(o.parameter(f"{o.tap.rpartition('.')[0]}.{other}.weight"))


def _by_turns(o: Operation) -> np.ndarray:
    """Query head h with key head h mod K."""
    config, (B, _, T) = o.evidence.config, o["query"].shape[:3]
    turns = np.arange(config.num_attention_heads) % config.num_key_value_heads
    if last_name(o.tap) == "scores":
        past = np.asarray(o.evidence.inputs[f"past_key_{o.layer}_in"]).transpose(1, 0, 3, 2)
        keys = np.concatenate([past, o["key"]], 2)[:, turns]
        return o["query"] @ keys.swapaxes(2, 3) / math.sqrt(config.head_dim)
    past = np.asarray(o.evidence.inputs[f"past_value_{o.layer}_in"]).transpose(1, 0, 2, 3)
    values = np.concatenate([past, o["value"]], 2)[:, turns]
    return (o["probs"] @ values).transpose(0, 2, 1, 3).reshape(B, T, -1)


def _gelu(x: np.ndarray) -> np.ndarray:
    """Its tanh form."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# Other weights


def _weights(e: Evidence) -> Iterator[Hypothesis]:
    def read(change: Callable[[Operation], np.ndarray | None]) -> Callable:
        """By another matrix, if there is one."""

        def linear(o: Operation) -> np.ndarray | None:
            weight = change(o)
            return None if weight is None else o.linear(weight)

        return linear

    def coded(change: Callable[[np.ndarray, np.ndarray, int], np.ndarray | None]) -> Callable:
        """By other codes and steps, of codes about 0 (O, I), steps of rows or blocks (O, n), and bits."""
        return read(lambda o: change(o.codes, o.grid.steps.reshape(len(o.codes), -1), o.grid.bits) if o.grid else None)

    coding = {
        "the two codes of each byte are in the other order: the nibbles are exchanged":
            lambda c, s, bits: _valued(c.reshape(len(c), -1, 2)[..., ::-1].reshape(c.shape), s) if bits == 4 else None,
        "signed codes are read as unsigned": lambda c, s, bits: _valued(c & (2**bits - 1), s),
        "codes about the middle are read as signed, in two's complement":
            lambda c, s, bits: _valued(np.where(c < 0, c + 2 ** (bits - 1), c - 2 ** (bits - 1)), s),
        "the zero point of the weights is off by one: each is a step too high": lambda c, s, bits: _valued(c + 1, s),
        "the zero point of the weights is off by one: each is a step too low": lambda c, s, bits: _valued(c - 1, s),
        "the scales of blocks are taken along the other axis": _other_axis,
        "the scales of blocks are read transposed":
            lambda c, s, bits: _valued(c, s.reshape(s.shape[::-1]).T) if s.shape[1] > 1 else None,
        "the scales belong to the row before": lambda c, s, bits: _valued(c, np.roll(s, 1, 0)),
        "the scales belong to the row behind": lambda c, s, bits: _valued(c, np.roll(s, -1, 0)),
    }  # fmt: skip
    stored = {
        "the matrix is stored transposed": lambda o: o.weight.T if o.weight.shape[0] == o.weight.shape[1] else None,
        "the weights are cut to bfloat16, expected as they are": lambda o: _cut(o.weight),
        "the weights are rounded to bfloat16, expected as they are":
            lambda o: o.weight.astype(ml_dtypes.bfloat16).astype(np.float64),
    }  # fmt: skip
    for layer in _neighbours(e):
        stored[f"the weights are those of layer {layer}"] = partial(_of_layer, layer=layer)
    ways = {text: coded(change) for text, change in coding.items()} | {t: read(change) for t, change in stored.items()}
    ways |= {
        "the bias is not added": lambda o: o.right - o.bias if np.any(o.bias) else None,
        "the bias is added twice": lambda o: o.right + o.bias if np.any(o.bias) else None,
    }
    if not any(name.endswith(".bias") for name in e.references.parameters(e.kind)):
        ways = {text: change for text, change in ways.items() if "bias" not in text}
    suspected = [name for name in LINEARS if name in {last_name(tap) for tap in e.suspects}]
    for text, change in ways.items():
        for at in ([suspected] if len(suspected) > 1 else []) + [[name] for name in suspected]:
            of = f" (of {at[0]})" if len(at) == 1 else ""
            yield Hypothesis(text + of, tuple(at), change)
    for layer in _neighbours(e):  # and its gains, as if its file had this one's name
        yield Hypothesis(f"all weights are those of layer {layer}", (*LINEARS, *NORMS),
                         partial(_all_of_layer, layer=layer))  # fmt: skip
    if e.config.qkv_packed:
        for order in ("qvk", "kqv", "kvq", "vqk", "vkq"):
            yield Hypothesis(f"the rows of W_pack are in the order {', '.join(order)}, expected q, k, v", ("W_pack",),
                             partial(_thirds, order=order))  # fmt: skip
        H = e.config.num_attention_heads
        for text, shape in (("head by head, in the order", (3, H)), ("as if they were head by head, expected", (H, 3))):
            yield Hypothesis(f"the rows of W_pack are {text} q, k, v", ("W_pack",), partial(_by_heads, shape=shape))


def _thirds(o: Operation, order: str) -> np.ndarray:
    """q, k and v in another order."""
    thirds = o.right.reshape(*o.right.shape[:2], 3, -1)
    return thirds[..., ["qkv".index(x) for x in order], :].reshape(o.right.shape)


def _by_heads(o: Operation, shape: tuple[int, int]) -> np.ndarray:
    """q, k and v of each head side by side, or taken to be."""
    return o.right.reshape(*o.right.shape[:2], *shape, -1).swapaxes(2, 3).reshape(o.right.shape)


def _valued(codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Codes (O, I) by the steps (O, n) of n blocks in each row."""
    return (codes.reshape(*steps.shape, -1) * steps[..., None]).reshape(codes.shape)


def _other_axis(codes: np.ndarray, steps: np.ndarray, bits: int) -> np.ndarray | None:
    size = codes.shape[1] // steps.shape[1]
    if steps.shape[1] == 1 or len(codes) % size:
        return None
    return codes * np.repeat(steps.reshape(len(codes) // size, -1), size, 0)


def _cut(weight: np.ndarray) -> np.ndarray:
    bits = weight.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def _neighbours(e: Evidence) -> list[int]:
    """Layers whose weights may stand in the place of those of a suspect."""
    found = {int(tap.split(".")[2]) + by for tap in e.suspects if tap.startswith("model.layers.") for by in (-1, 1)}
    return sorted(layer for layer in found if 0 <= layer < e.config.num_hidden_layers)


def _of_layer(o: Operation, layer: int) -> np.ndarray | None:
    return None if "layers" not in o.tap else o.parameter(f"{_moved(o.tap, layer)}.weight")


def _moved(tap: str, layer: int) -> str:
    return ".".join([*tap.split(".")[:2], str(layer), *tap.split(".")[3:]])


def _all_of_layer(o: Operation, layer: int) -> np.ndarray | None:
    if "layers" not in o.tap:
        return None
    weight = o.parameter(f"{_moved(o.tap, layer)}.weight")
    if weight.ndim == 2:
        return o.linear(weight)
    return o.before / np.sqrt(np.square(o.before).mean(-1, keepdims=True) + o.evidence.config.rms_norm_eps) * weight


# Another row of the embedding


def _embedding(e: Evidence) -> Iterator[Hypothesis]:
    ids = e.inputs.get("input_ids")
    if ids is None:
        return
    for by in (1, -1):
        yield Hypothesis(f"each token has the embedding of the id one {'higher' if by > 0 else 'lower'}: the table is "
                         "off by one row", ("embed_tokens",),
                         partial(_rows, ids=ids + by))  # fmt: skip


def _rows(o: Operation, ids: np.ndarray) -> np.ndarray:
    return o.weight[ids % len(o.weight)]


# Another number format


def _dtype(e: Evidence) -> Iterator[Hypothesis]:
    for tap in e.suspects:
        name, grid = last_name(tap), e.references.grids.get(tap) if e.kind not in ("float", "ends") else None
        for dtype, called in ((np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16")) if grid is None else ():
            yield Hypothesis(f"{name} is rounded to {called}", (name,), partial(_narrow, dtype=dtype))
        if grid is not None and grid.bits > 8 and not grid.scale.ndim:
            narrow = from_range(grid.low, grid.high, 8)
            yield Hypothesis(f"{name} has 8 bits, expected {grid.bits}", (name,), partial(_coarse, grid=narrow))


def _narrow(o: Operation, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        return o.right.astype(dtype).astype(np.float64)


def _coarse(o: Operation, grid: Encoding) -> np.ndarray:
    return fake_quantize(np.asarray(o.right, np.float32), grid)
