"""The recipe for the grids of a w4a16 model, as Qualcomm's model zoo quantizes its language models:

    weights of linears      int4, symmetric, a step for each output row (or block of a row, or LPBQ)
    lm_head                 int8, symmetric, a step for each row: the words' logits
    embedding, gains        uint16, one step: constants at the precision of activations
    keys and values         int8, symmetric. Past and new ones are the same tensor, so they share the grid
    probs, sigmoid          uint16 on [0, 1], whatever was seen
    mask, cos, sin          uint16 on [-50, 0], lower if scores need it, and [-1, 1]: the host writes them
    all other tensors       uint16 on the range that was seen
    no grid                 a Gather's output (its table has one), outputs that are only moved, the inside of an RMSNorm

Keys and values have 8 bits because they are the second operands of attention's products, and a device multiplies 16 by
8 bits, but not 16 by 16.

**Source**: AI Hub Models 0.46, `models/_shared/llm` and `utils/aimet/default_config_llama.json`.
"""

from __future__ import annotations

from dataclasses import dataclass

from refimpl.checkpoint.weights import Weights
from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.grids.encodings import COS, EMBED, HEAD, MASK, SIN, matrix_encoding, moves_data, weight_range
from refimpl_kernels.affine import Encoding, from_range


@dataclass(frozen=True)
class Recipe:
    """The numbers of the recipe above. `block_size`: int4 weights have a step for each block; `lpbq`: in two levels.

    `lowest_mask`: the mask on hidden keys. None makes it as low as the scores need that were seen, and -50 or lower.
    """

    weight_bits: int = 4
    head_bits: int = 8
    activation_bits: int = 16
    kv_bits: int = 8
    block_size: int | None = None
    lpbq: bool = False
    lowest_mask: float | None = None

    def __post_init__(self) -> None:
        for name in ("weight_bits", "head_bits", "activation_bits", "kv_bits"):
            bits = getattr(self, name)
            if type(bits) is not int or not 2 <= bits <= 16:
                raise InputError(f"{name} is {bits!r}, expected a whole number from 2 to 16")
        if self.lpbq and not self.block_size:
            raise InputError("LPBQ is made of blocks; give a block_size, such as 64")

    def activation(self, config: Config, tap: str) -> GridSpec | None:
        """What the recipe asks for a tap, or None if the tap gets no encoding of its own."""
        kind = tap.rpartition(".")[2]
        if tap == "model.embed_tokens" or moves_data(config, kind):
            return None
        if kind in ("key", "value"):
            return GridSpec(self.kv_bits, symmetric=True)
        return GridSpec(self.activation_bits, fixed=(0.0, 1.0) if kind == "probs" else None)

    def inputs(self, config: Config) -> dict[str, Encoding]:
        """The grids of what the host computes."""
        found = {MASK: from_range(-50.0 if self.lowest_mask is None else self.lowest_mask, 0.0, self.activation_bits)}
        if config.rope_theta:
            found |= dict.fromkeys((COS, SIN), from_range(-1.0, 1.0, self.activation_bits))
        return found

    def parameters(self, config: Config, weights: Weights) -> dict[str, Encoding]:
        """The grids of all weights. Biases have none: a device adds them as 32-bit integers, which costs nothing.

        Raises InputError for a weight that is not finite, or not made of whole blocks.
        """
        found = {}
        for name in weights:
            if name.endswith(".bias"):
                continue
            if name == EMBED or len(weights[name].shape) == 1:
                low, high = weight_range(name, weights[name])
                found[name] = from_range(low, high, self.activation_bits)
            elif name == HEAD:
                found[name] = matrix_encoding(name, weights[name], self.head_bits)
            else:
                found[name] = matrix_encoding(name, weights[name], self.weight_bits, self.block_size, self.lpbq)
        return found


@dataclass(frozen=True)
class GridSpec:
    """What a recipe asks for a tensor: bits, symmetry, and a fixed range if every model has the same."""

    bits: int
    symmetric: bool = False
    fixed: tuple[float, float] | None = None
