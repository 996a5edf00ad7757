"""How far two correct runs of the same model may be apart: a bound for each tensor, from how computers round.

A bound follows from config, number format and tap. No bound is picked by hand:

    allowed = SAFETY * unit * sqrt(n_1 + n_2 + ... + n_k)         relative to the largest value of the row

- `unit` is the format's unit roundoff (`ROUNDINGS`): 2^-53 for float64, 2^-24 for float32, 2^-8 for bfloat16.
- n_i is what operation i contributes. The error of a sum of n products is, with high probability, below sqrt(n) * unit
  relative to its terms (Higham and Mary), so a matrix product contributes its length. In 16 bits, sums are computed in
  float32 and the result is rounded, so each tensor contributes 2: its own rounding, and that of the weights or of one
  step on the way.
- Roundings are independent, so their variances add up over all operations 1..k that lead to the tensor.
- Position S is a float, so the angle of RoPE and the bias of ALiBi are off by up to 2 * S * unit. This error is not
  random; it counts as the n for which SAFETY * sqrt(n) = 2 * S.
- SAFETY = 8, for three reasons: both sides round (a factor of 1.4); a row may be much smaller than the terms it is the
  sum of; a layer may amplify a relative error, as a SwiGLU does when it multiplies two outliers.
- A softmax amplifies, too. exp turns the absolute error of a score into the relative error of its probability: scores
  of size M with a relative error e give probabilities with the relative error sqrt(2) M e (two scores are subtracted).
  SAFETY covers M up to 8. Above that, `probs` and what follows have the variance of their `scores` once more, times
  2 (M / SAFETY)^2. Later layers do not amplify it again: attention is only a part of the residual stream, and a
  probability near 1 hardly moves. M is measured in the reference. (With scores of 50 in each of 16 random layers, a run
  needs about its bound. With scores of hundreds in more than a few layers the model is chaotic, and no bound holds.)

How wide the bounds are was measured (`tests/test_compare.py`, `tests/test_goldens.py`). In a correct run the median
tensor needs between 1/50 and 1/8 of its bound, and the worst less than half of it. The lower end belongs to sums
that are exact and rounded once; a BLAS with wider registers comes near it, because it adds more partial sums. A dropped
NormHead, swapped RoPE halves or a mask that is off by one exceed the bound of float32 a thousandfold. The bound of
float64 is about 1e-13, which implementations reach only if they compute positions in float64, too.

In bfloat16, rounding alone may change a whole network's output by more than any useful limit. A bound that reaches
LARGEST is cut there and judges nothing. Therefore 16-bit runs are judged `fed`: the run continues with the reference's
tensors, and a tensor counts only its own operations and those of tensors before it that were not fed.

Source: Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41 (2019).

>>> bound = tolerances(Config(), "float32", tokens=128)
>>> print(bound["model.layers.0.self_attn.W_pack"])
4.3e-05 (8 * 2^-24 * sqrt(8194): float32 rounding)
>>> print(bound["lm_head"])
5.3e-04 (8 * 2^-24 * sqrt(1229250): float32 rounding)
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.names import taps

SAFETY = 8
LARGEST = 0.5  # from here on a bound judges nothing; a tolerance of 1 would accept zeros


@dataclass(frozen=True)
class Tolerance:
    """|a - b| may be at most `relative` times the largest |b| of the row; `reason` says why."""

    relative: float
    reason: str

    @property
    def judges(self) -> bool:
        """Whether the bound is narrow enough to tell right from wrong."""
        return self.relative < LARGEST

    def __str__(self) -> str:
        return f"{self.relative:.1e} ({self.reason})"


@dataclass(frozen=True)
class Rounding:
    """How a number format rounds: its unit roundoff, as a number and as text.

    `sums`: sums are rounded at each term; else only at the end. `positions`: the unit roundoff of the position tables,
    which 16-bit models keep in float32.
    """

    unit: float
    text: str
    sums: bool = False
    positions: float = 2.0**-24


ROUNDINGS = {
    "float64": Rounding(2.0**-53, "2^-53", sums=True, positions=2.0**-53),
    "float32": Rounding(2.0**-24, "2^-24", sums=True),
    "float16": Rounding(2.0**-11, "2^-11"),
    "bfloat16": Rounding(2.0**-8, "2^-8"),
}


def tolerances(
    config: Config, dtype: str, tokens: int, fed: bool | Container[str] = False,
    scores: Mapping[str, float] | None = None,
) -> dict[str, Tolerance]:  # fmt: skip
    """The Tolerance of every tap of a model that computes in `dtype` over up to `tokens` tokens.

    `fed`: which of the reference's tensors replaced the run's own: all (True), or those with these names. A replaced
    tensor hands on no error. `scores`: tap -> the largest attention score of its layer, from `largest_scores`; scores
    that are not in it count as small. Raises InputError for a format that is not in `ROUNDINGS`.
    """
    replaced = taps(config) if fed is True else fed or ()
    if dtype not in ROUNDINGS:
        raise InputError(f"there is no rounding rule for {dtype!r}, expected one of {', '.join(ROUNDINGS)}")
    inherited, amplified, rules = 0.0, 0.0, {}
    for name in taps(config):
        at, _, module = name.rpartition(".")
        own = variance(module, config, dtype, tokens)
        largest = (scores or {}).get(f"{at}.scores", 0.0) if module == "probs" else 0.0
        more = inherited * max(2 * (largest / SAFETY) ** 2 - 1, 0.0)
        rules[name] = _rule(dtype, inherited + own, amplified + more)
        if name not in replaced:
            inherited, amplified = inherited + own, amplified + more
    return rules


def largest_scores(*traces: Mapping[str, Any]) -> dict[str, float]:
    """tap -> the largest finite |score| before the mask, for every tap `scores` of these traces."""
    sizes: dict[str, float] = {}
    for trace in traces:
        for name, x in trace.items():
            if name.endswith(".scores"):
                size = float(np.max(np.abs(x), where=np.isfinite(x), initial=0))
                sizes[name] = max(size, sizes.get(name, 0.0))
    return sizes


def stated(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Tolerance]:
    """The Tolerance of every tensor of the reference `b`, from what the traces say about themselves.

    The first of these applies:

    1. the tolerance stored with `b`, if `b` is a golden and `a` has the same number format or a finer one
    2. the rule for the config in the `meta` of `b` or of `a`
    3. the rule for Baichuan2-13B, the deepest of the five families

    The number format is the coarser one of the two. Whole numbers must be equal. If `a` was fed, it is taken to be fed
    with `b`; then stored tolerances do not apply, and the rules leave out what `b` replaced. The rules take the size of
    scores from `b`.
    """
    of_a, of_b = getattr(a, "meta", {}), getattr(b, "meta", {})
    fed = b if of_a.get("fed") else ()
    stored, keys = {} if fed else of_b.get("tolerance", {}), of_b.get("config") or of_a.get("config")
    tokens = max((np.shape(x)[1] for x in b.values() if np.ndim(x) == 3), default=0)
    config, tokens = (Config(**keys), tokens) if keys else (_DEEPEST, _DEEPEST.max_position_embeddings)
    rules: dict[str, dict[str, Tolerance]] = {}
    scores: dict[str, float] | None = None
    found = {}
    for name in b:
        own = _coarser(of_b.get("dtype"), b[name].dtype)
        dtype = _coarser(own, of_a.get("dtype"), a[name].dtype) if name in a else own
        if dtype not in ROUNDINGS:
            found[name] = Tolerance(0.0, f"{dtype} is exact")
        elif name in stored and dtype == own:
            found[name] = Tolerance(**stored[name])
        else:
            if dtype not in rules:
                scores = largest_scores(b) if scores is None else scores
                rules[dtype] = tolerances(config, dtype, tokens, fed, scores)
            rule = rules[dtype]
            found[name] = rule.get(name) or max(rule.values(), key=lambda tolerance: tolerance.relative)
            if not keys:
                reason = f"no config is known; {dtype} rounding in Baichuan2-13B over {tokens} tokens"
                found[name] = Tolerance(rule["lm_head"].relative, reason)
    return found


_DEEPEST = Config(
    family="Baichuan2-13B", hidden_size=5120, intermediate_size=13696, num_hidden_layers=40, num_attention_heads=40,
    rope_theta=None,
)  # fmt: skip


def _coarser(*dtypes: np.dtype | str | None) -> str:
    """The format with the largest unit."""
    names = [str(dtype) for dtype in dtypes if dtype is not None]
    return max(names, key=lambda name: ROUNDINGS[name].unit if name in ROUNDINGS else 0)


def _rule(dtype: str, variance: float, amplified: float) -> Tolerance:
    form = ROUNDINGS[dtype]
    relative = SAFETY * form.unit * math.sqrt(variance + amplified)
    by = f" + {amplified:.0f}): {dtype} rounding, amplified by large scores" if amplified else f"): {dtype} rounding"
    reason = f"{SAFETY} * {form.text} * sqrt({variance:.0f}{by}"
    return Tolerance(min(relative, LARGEST), reason if relative < LARGEST else f"{reason}, cut at {LARGEST}")


def variance(module: str, config: Config, dtype: str, tokens: int) -> float:
    """n of one tap: the length of its sum, plus the share of its positions."""
    where = ("query", "key") if config.rope_theta else ("probs",)
    positions = _positions(dtype, tokens) if module in where else 0.0
    if not ROUNDINGS[dtype].sums:
        return 2 + positions
    hidden, inter = config.hidden_size, config.intermediate_size
    length = {
        "input_layernorm": hidden, "W_pack": hidden, "q_proj": hidden, "k_proj": hidden, "v_proj": hidden,
        "scores": config.head_dim, "probs": tokens, "context": tokens, "o_proj": hidden,
        "post_attention_layernorm": hidden, "gate_proj": hidden, "up_proj": hidden, "down_proj": inter,
        "norm": hidden, "lm_head": hidden * (2 if config.norm_head else 1),
    }  # fmt: skip
    return length.get(module, 2) + positions


def _positions(dtype: str, tokens: int) -> float:
    form = ROUNDINGS[dtype]
    return (2 * tokens / SAFETY * form.positions / form.unit) ** 2
