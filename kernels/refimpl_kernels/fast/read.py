"""How fast memory can be read: all threads together read each byte of an array once. Kernels are measured by this."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from refimpl_kernels.fast.ops import compiled
from refimpl_kernels.fast.vector import I32, I64, INTS, Emitter

STEP = 256  # bytes
PARTS = 16


@intrinsic
def _read(typingctx, array, start, steps):
    """The wrapping sum of lanes of `steps` times 256 bytes from byte `start` on."""

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder, portable=True)
        place = emit.address(signature.args[0], arguments[0], arguments[1])
        sums = [emit.variable(emit.ints(0)) for _ in range(4)]
        with emit.loop(arguments[2]) as step:
            here = emit.forward(place, emit.times(step, STEP))
            for n, total in enumerate(sums):
                total.set(builder.add(total.get(), emit.load(INTS, here, 64 * n)))
        one = sums[0].get()
        for total in sums[1:]:
            one = builder.add(one, total.get())
        lane = builder.extract_element(one, ir.Constant(I32, 0))
        for n in range(1, 16):
            lane = builder.add(lane, builder.extract_element(one, ir.Constant(I32, n)))
        return builder.sext(lane, I64)

    return types.int64(array, types.intp, types.intp), generate


def read_all(array, parts, steps):
    """Reads `parts` times `steps` times 256 bytes of a flat uint8 array; the sum proves it. For Numba."""
    total = 0
    for part in prange(parts):
        total += _read(array, part * steps * STEP, steps)
    return total


def read(array: np.ndarray) -> int:
    """Reads an array, except for up to 4 KiB at its end; returns how many bytes were read."""
    steps = array.nbytes // (PARTS * STEP)
    signature = types.int64(types.Array(types.uint8, 1, "C", readonly=True), types.intp, types.intp)
    compiled(read_all, signature)(array.reshape(-1).view(np.uint8), PARTS, steps)
    return PARTS * steps * STEP
