"""Number formats side by side: what each costs one model, and how much memory it saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from golden.cost.quality import Quality, quality
from golden.cost.reading import AS_USUAL, Reading
from refimpl.errors import InputError
from refimpl.model import Model
from refimpl_kernels.formats.table import format_named


@dataclass(frozen=True)
class Row:
    """One format of a model: bits per weight that is in blocks, bytes of all parameters, and the quality.

    Where the format does not fit the model, `quality` is None and `why` says why.
    """

    format: str
    bits_per_weight: float
    nbytes: int
    quality: Quality | None
    why: str = ""


def side_by_side(
    reference: Model,
    names: Sequence[str],
    ids,
    block_size: int | None = None,
    keep: Sequence[str] = (),
    reading: Reading = AS_USUAL,
) -> list[Row]:
    """A row for each format: `reference` quantized to it, judged by `reference`.

    `keep`: modules that are not quantized. A format that does not fit the model's sizes gets a row that says so; if it
    is the only one, and for an unknown format, InputError is raised.
    """
    for name in names:
        try:
            format_named(name)
        except ValueError as error:
            raise InputError(str(error)) from None
    rows = []
    for name in names:
        try:
            model = reference.quantize(name, block_size, keep)
        except InputError as error:
            if len(names) == 1:
                raise
            rows.append(Row(name, math.nan, 0, None, str(error)))
            continue
        rows.append(Row(name, *memory(model), quality(model, reference, ids, reading)))
    return rows


def memory(model: Model) -> tuple[float, int]:
    """(bits per weight, bytes of all parameters), as the engines that define the formats store them.

    Bits are the mean over the weights that are in blocks; NaN if there are none.
    """
    blocks = [weight.blocks for weight in model.weights.values() if hasattr(weight, "blocks")]
    bits, count = sum(b.bits_per_weight * math.prod(b.shape) for b in blocks), sum(math.prod(b.shape) for b in blocks)
    rest = sum(weight.array.nbytes for weight in model.weights.values() if hasattr(weight, "array"))
    return bits / count if count else math.nan, round(bits / 8) + rest


def table(rows: Sequence[Row]) -> str:
    """A line for each format, and the reference in the last."""
    lines = [f"{'format':11}  bits     MB  {'perplexity':>10}  {'ratio':15}  {'KL, nats':19}  {'median':7}  "
             f"{'99 %':6}  {'same top-1':14}  RMS Δp"]  # fmt: skip
    lines += map(_line, rows)
    judged = [row.quality for row in rows if row.quality is not None]
    if judged:
        q = judged[0]
        own = f"{q.reference_perplexity:.3f} ± {q.reference_perplexity_error:.3f}"
        lines.append(f"the model without quantization has perplexity {own} on these {q.tokens} tokens")
    return "\n".join(lines)


def _line(row: Row) -> str:
    q = row.quality
    if q is None:
        return f"{row.format:11}  {row.why}"
    digits = 2 if row.nbytes < 1e8 else 0
    return (f"{row.format:11}  {row.bits_per_weight:4.2f}  {row.nbytes / 1e6:5.{digits}f}  "
            f"{q.perplexity:10.3f}  {q.ratio:.4f} ± {q.ratio_error:.4f}  {q.kl_mean:.5f} ± {q.kl_error:.5f}  "
            f"{q.kl_median:.5f}  {q.kl_99:.4f}  {q.same_top:6.2%} ± {q.same_top_error:.2%}  "
            f"{q.rms_dp:.2%}")  # fmt: skip


def to_dicts(rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """The rows for JSON."""
    return [
        {"format": row.format, "why": row.why} if row.quality is None else
        {"format": row.format, "bits_per_weight": row.bits_per_weight, "bytes": row.nbytes, **row.quality.to_dict()}
        for row in rows
    ]  # fmt: skip
