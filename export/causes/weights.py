"""Other weights: codes unpacked in another order, another layer's matrix, rows in another order, a missing bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import ml_dtypes
import numpy as np

from export.causes.evidence import Evidence, Guess
from export.causes.whatif import LINEARS, Hypothesis, Operation, WhatIf, last_name
from refimpl.checkpoint.weights import NormHead
from refimpl.names import NORMS


def weights(e: WhatIf) -> Iterator[Hypothesis]:
    """A matrix is unpacked in another way, is another layer's, or has its rows in another order."""
    suspected = [name for name in LINEARS if name in {last_name(tap) for tap in e.suspects}]
    for text, change in _ways(e).items():
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


def _ways(e: WhatIf) -> dict[str, Callable[[Operation], np.ndarray | None]]:
    """What may be wrong with one matrix, in words -> the change of its linear's result."""
    matrices = {text: partial(_by_codes, change=change) for text, change in CODED.items()}
    matrices |= {text: partial(_by_matrix, change=change) for text, change in STORED.items()}
    for layer in _neighbours(e):
        text, change = f"the weights are those of layer {layer}", partial(_of_layer, layer=layer)
        matrices[text] = partial(_by_matrix, change=change)
    biased = any(name.endswith(".bias") for name in e.references.parameters(e.kind))
    return {**matrices, **(BIASES if biased else {})}


def _by_matrix(o: Operation, change: Callable[[Operation], np.ndarray | None]) -> np.ndarray | None:
    """The result of the linear with another matrix, if there is one."""
    weight = change(o)
    return None if weight is None else o.linear(weight)


def _by_codes(o: Operation, change: Callable[[np.ndarray, np.ndarray, int], np.ndarray | None]) -> np.ndarray | None:
    """The linear's result with the matrix made of codes about 0 (O, I), steps of rows or blocks (O, n), and bits."""
    if o.grid is None:
        return None
    weight = change(o.codes, o.grid.steps.reshape(len(o.codes), -1), o.grid.bits)
    return None if weight is None else o.linear(weight)


def _thirds(o: Operation, order: str) -> np.ndarray:
    """q, k and v in another order."""
    thirds = o.right.reshape(*o.right.shape[:2], 3, -1)
    return thirds[..., ["qkv".index(x) for x in order], :].reshape(o.right.shape)


def _by_heads(o: Operation, shape: tuple[int, int]) -> np.ndarray:
    """q, k and v of each head side by side, or read as if they were."""
    return o.right.reshape(*o.right.shape[:2], *shape, -1).swapaxes(2, 3).reshape(o.right.shape)


def _valued(codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Codes (O, I) times the steps (O, n) of n blocks in each row."""
    return (codes.reshape(*steps.shape, -1) * steps[..., None]).reshape(codes.shape)


def _other_axis(codes: np.ndarray, steps: np.ndarray, bits: int) -> np.ndarray | None:
    size = codes.shape[1] // steps.shape[1]
    if steps.shape[1] == 1 or len(codes) % size:
        return None
    return codes * np.repeat(steps.reshape(len(codes) // size, -1), size, 0)


def _cut(weight: np.ndarray) -> np.ndarray:
    bits = weight.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def _neighbours(e: WhatIf) -> list[int]:
    """The layers next to a suspect's, whose weights the suspect may have instead of its own."""
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
    return o.before / np.sqrt(np.square(o.before).mean(-1, keepdims=True) + o.whatif.config.rms_norm_eps) * weight


def embedding(e: WhatIf) -> Iterator[Hypothesis]:
    """The rows of other ids."""
    ids = e.inputs.get("input_ids")
    if ids is None:
        return
    for by in (1, -1):
        yield Hypothesis(f"each token has the embedding of the id one {'higher' if by > 0 else 'lower'}: the table is "
                         "off by one row", ("embed_tokens",),
                         partial(_rows, ids=ids + by))  # fmt: skip


def _rows(o: Operation, ids: np.ndarray) -> np.ndarray:
    return o.weight[ids % len(o.weight)]


def norm_head(e: Evidence) -> Iterator[Guess]:
    """Logits of a head whose rows are not normalised."""
    if e.tap != "lm_head" or not e.config.norm_head:
        return
    model = e.references.model
    weight = model.weights["lm_head.weight"] if model is not None else None
    if isinstance(weight, NormHead):
        lengths = weight.lengths(np.dtype(np.float64))[:, 0]
    elif e.spec.real > 1:  # fitted to the tokens, which takes more than one
        lengths = (e.device * e.expected).sum((0, 1)) / np.maximum(np.square(e.expected).sum((0, 1)), 1e-300)
    else:
        return
    yield Guess(f"each word's logit is off by its own factor, {lengths.min():.3g} to {lengths.max():.3g}, the length "
                "of its row: NormHead is missing", e.expected * lengths)  # fmt: skip
    if isinstance(weight, NormHead):
        yield Guess("each word's logit is divided by the length of its row once more: NormHead is applied twice",
                    e.expected / lengths)  # fmt: skip


CODED: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray | None]] = {
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
    "the scales belong to the row after": lambda c, s, bits: _valued(c, np.roll(s, -1, 0)),
}  # fmt: skip
STORED: dict[str, Callable[[Operation], np.ndarray | None]] = {
    "the matrix is stored transposed": lambda o: o.weight.T if o.weight.shape[0] == o.weight.shape[1] else None,
    "the weights are cut to bfloat16, expected unchanged": lambda o: _cut(o.weight),
    "the weights are rounded to bfloat16, expected unchanged":
        lambda o: o.weight.astype(ml_dtypes.bfloat16).astype(np.float64),
}  # fmt: skip
BIASES: dict[str, Callable[[Operation], np.ndarray | None]] = {
    "the bias is not added": lambda o: o.right - o.bias if np.any(o.bias) else None,
    "the bias is added twice": lambda o: o.right + o.bias if np.any(o.bias) else None,
}
