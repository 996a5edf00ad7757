"""What an export is for: one row each.

    plain         to read, and for any runtime: float32 weights; from opset 23 on norms, RoPE and attention are one node
    aihub         for AI Hub's compiler: float32 weights and `model.encodings`, in the form that Hexagon likes
    qdq           4-bit weights as INT4 blocks and DequantizeLinear, which onnxruntime runs without a conversion
    matmulnbits   4-bit weights in onnxruntime's own operator, MatMulNBits

The defaults of `aihub` are those of the language models in Qualcomm's model zoo: opset 17, IR 8, a mask of -50.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import onnx
from onnx import helper

from refimpl.errors import InputError, at_most
from refimpl.positions import LOWEST

_GROUPS = re.compile(r"heads=([1-9]\d{0,3})")
LOWEST_OPSET = 17  # the lowest that AI Hub takes
INT4_OPSET = 21  # the first with INT4 and 16-bit codes, and with DequantizeLinear in blocks
NORM_OPSET = 23  # the first with RMSNormalization

FORMS = {
    "conv": "a linear is a 1x1 Conv over (1, C, 1, T), but for gate and up",
    "unpack": "W_pack is three linears, for queries, keys and values",
    "heads": "attention is single heads: a projection and two products each",
    "heads=N": "attention is groups of N heads: a projection and two products each, which an NPU's memory holds",
    "scale-on-key": "keys, not scores, are divided by the root of D, so that float16 does not overflow",
    "rank4": "RMSNorm is computed on (1, 1, T, C)",
    "norm": "RMSNorm is one node, RMSNormalization (opset 23)",
    "fused": "RMSNormalization, RotaryEmbedding and Attention, each one node (opset 23)",
}


@dataclass(frozen=True)
class Profile:
    """One kind of export.

    `weights`: "float32"; "int4", blocks and DequantizeLinear where the model has them; "matmulnbits", the same blocks
    in that operator. `encodings`: each graph has a `model.encodings`. `on_grids`: it rounds by itself, in pairs of
    QuantizeLinear and DequantizeLinear, as qdq does with encodings. `lowest_mask`: what the host writes where a token
    may not look. `hub_names`: the hidden state has the names of Qualcomm's published Baichuan2 parts. `even`: all parts
    with layers have the same number of them, as Qualcomm's do. `coded`: inputs and outputs are codes.
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


def profile_for(name: str, blocks: bool, encodings: bool) -> Profile:
    """The row that fits the weights. `blocks`: some are in 4-bit blocks. `encodings`: their grids are given.

    With encodings, qdq takes float32 weights and puts them, and all else, on those grids. Raises InputError for weights
    that do not fit the profile.
    """
    row = profile_named(name)
    if encodings and row.weights != "float32":
        if blocks or name != "qdq":
            raise InputError(f"the encodings say which grids weights are on, and so do the 4-bit blocks of {name}; "
                             "give the unquantized model with the profile qdq, or no encodings")  # fmt: skip
        newest = NORM_OPSET if ("ai.onnx", NORM_OPSET) in helper.OP_SET_ID_VERSION_MAP else row.opset
        row = replace(row, weights="float32", opset=newest, on_grids=True)
    if row.weights != "float32" and not blocks:
        raise InputError(f"the profile {name} is for 4-bit weights, and the model has none; quantize it to int4 first")
    return row


def adapted(row: Profile, name: str, opset: int | None, ir_version: int | None, forms: Iterable[str] | None) -> Profile:
    """The row with another opset, IR version or forms, where they are given; plain is fused from opset 23 on.

    Raises InputError for an opset that lacks what the profile needs, and for an IR version that does not fit it.
    """
    if opset is not None:
        fused = {"fused"} if name == "plain" and opset >= 23 else set()
        row = replace(row, opset=opset, forms=row.forms | fused)
    if row.on_grids and row.opset < INT4_OPSET:
        raise InputError(f"opset is {row.opset}, but grids of 4 and 16 bits need {INT4_OPSET}")
    lowest = helper.OP_SET_ID_VERSION_MAP.get(("ai.onnx", row.opset), 0)
    if row.opset < LOWEST_OPSET or not lowest:
        raise InputError(f"opset is {row.opset}, expected {LOWEST_OPSET} to {onnx.defs.onnx_opset_version()}")
    chosen = checked_forms(row.forms if forms is None else forms, row.opset)
    chosen = on_grids(chosen, row.opset) if row.on_grids else chosen
    version = max(row.ir_version, lowest) if ir_version is None else ir_version
    row = replace(row, ir_version=version, forms=chosen)
    if not lowest <= version <= onnx.IR_VERSION:
        raise InputError(f"ir_version is {version}, expected {lowest} to {onnx.IR_VERSION} with opset {row.opset}")
    return row


def checked_forms(forms: Iterable[str], opset: int) -> frozenset[str]:
    """The forms. Raises InputError for an unknown one, and for one whose operators the opset lacks."""
    chosen = frozenset(forms)
    if unknown := sorted(f for f in chosen if f == "heads=N" or (f not in FORMS and not _GROUPS.fullmatch(f))):
        raise InputError(f"{at_most(unknown)} is not a form of a graph; expected some of {', '.join(FORMS)}")
    if (one_node := sorted(chosen & {"fused", "norm"})) and opset < NORM_OPSET:
        raise InputError(f"opset is {opset}, but the form {one_node[0]} needs 23, the first with RMSNormalization")
    if len(apart := sorted(form for form in chosen if form.startswith("heads"))) > 1:
        raise InputError(f"the forms {at_most(apart)} take heads apart in different ways; choose one of them")
    if "fused" in chosen and (apart := sorted({*apart, *chosen & {"rank4", "scale-on-key"}})):
        raise InputError(f"the form fused has in one node what {at_most(apart)} takes apart; choose one of the two")
    return chosen


def heads_together(forms: frozenset[str]) -> int:
    """How many heads are one piece of attention: 1 with the form heads, N with heads=N; 0 if all are in one."""
    return next((int(found[1]) for form in forms if (found := _GROUPS.fullmatch(form))), int("heads" in forms))


def expect_groups(forms: frozenset[str], heads: int, key_heads: int) -> None:
    """Raises InputError unless heads of a model fall into the groups of the form heads=N."""
    many = heads_together(forms)
    if many > 1 and heads != key_heads:
        raise InputError(f"{heads} heads share {key_heads} key heads, but in the form heads={many} each has its own; "
                         "use the form heads, or neither")  # fmt: skip
    if many and heads % many:
        raise InputError(f"{heads} heads do not divide into groups of {many}; choose a number that divides {heads}")


def on_grids(forms: frozenset[str], opset: int) -> frozenset[str]:
    """The forms of a graph that rounds by itself. Each part of W_pack has its own grid, so W_pack is three linears.

    From opset 23 on a norm is one node: an NPU computes a norm in small operations in float16, which cannot hold the
    squares of values beyond 256. Raises InputError for the form fused: scores and probabilities need grids, and are
    inside its nodes.
    """
    if "fused" in forms:
        raise InputError("the form fused has scores and probabilities inside of a node, where no grid can be; use norm")
    return forms | {"unpack"} | ({"norm"} if opset >= NORM_OPSET else set())
