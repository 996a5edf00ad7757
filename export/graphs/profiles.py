"""What an export is for: one row each.

    plain         to read, and for any runtime: float32 weights; from opset 23 on norms, RoPE and attention are one node
    aihub         for AI Hub's compiler: float32 weights and `model.encodings`, in the form that Hexagon likes
    qdq           4-bit weights as INT4 blocks and DequantizeLinear, which onnxruntime runs as it stands
    matmulnbits   4-bit weights in onnxruntime's own operator, MatMulNBits

AI Hub's defaults are those with which Qualcomm's model zoo exports its language models: opset 17, IR 8, a mask of -50.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from refimpl.errors import InputError, at_most
from refimpl.positions import LOWEST

FORMS = {
    "conv": "a linear is a 1x1 Conv over (1, C, 1, T), but for gate and up",
    "unpack": "W_pack is three linears, for queries, keys and values",
    "heads": "attention is single heads: a projection and two products each",
    "scale-on-key": "keys, not scores, are divided by the root of D, so that float16 does not overflow",
    "rank4": "RMSNorm is computed on (1, 1, T, C)",
    "fused": "RMSNormalization, RotaryEmbedding and Attention, each one node (opset 23)",
}


@dataclass(frozen=True)
class Profile:
    """One kind of export.

    `weights`: "float32"; "int4", blocks and DequantizeLinear where the model has them; "matmulnbits", the same blocks
    in that operator. `encodings`: each graph has a `model.encodings`. `on_grids`: it rounds by itself, in pairs of
    QuantizeLinear and DequantizeLinear, which qdq does if it is given encodings. `lowest_mask`: what the host writes
    where nobody may look. `hub_names`: the hidden state has the names of Qualcomm's published Baichuan2 parts.
    `even`: parts have as many layers as each other, as those of Qualcomm do. `coded`: inputs and outputs are codes.
    """

    opset: int
    ir_version: int
    weights: str
    forms: frozenset[str] = frozenset()
    encodings: bool = False
    on_grids: bool = False
    lowest_mask: float = LOWEST
    hub_names: bool = False
    even: bool = False
    coded: bool = False


PROFILES = {
    "plain": Profile(21, 10, "float32"),
    "aihub": Profile(17, 8, "float32", frozenset(("conv", "unpack", "heads", "scale-on-key", "rank4")),
                     encodings=True, lowest_mask=-50.0, hub_names=True, even=True),
    "qdq": Profile(21, 10, "int4"),
    "matmulnbits": Profile(21, 10, "matmulnbits"),
}  # fmt: skip


def profile_named(name: str) -> Profile:
    """A row of the table. Raises InputError if there is none."""
    if name not in PROFILES:
        raise InputError(f"the profile is {name!a:.40}, expected one of {', '.join(PROFILES)}")
    return PROFILES[name]


def checked_forms(forms: Iterable[str], opset: int) -> frozenset[str]:
    """The forms, if there are such, and the opset has the operators. Raises InputError otherwise."""
    chosen = frozenset(forms)
    if unknown := sorted(chosen - set(FORMS)):
        raise InputError(f"{at_most(unknown)} is no form of a graph; expected some of {', '.join(FORMS)}")
    if "fused" in chosen and opset < 23:
        raise InputError(f"opset is {opset}, but the form fused needs 23, the first with RMSNormalization")
    if "fused" in chosen and (apart := sorted(chosen & {"heads", "rank4", "scale-on-key"})):
        raise InputError(f"the form fused has in one node what {at_most(apart)} takes apart; choose one of the two")
    return chosen
