"""A matrix product in tasks of 32 rows, whichever way its sums are made: in floats, or in integers."""

from __future__ import annotations

from numba import prange, types
from numba.extending import overload

from refimpl_kernels.fast import integer, linear

TASK = 32  # rows that a thread takes at a time


def product(matrix, x, out):
    """out (T, O) = x by the transposed matrix, a `Packed`. For Numba.

    x decides how sums are made: an array of floats (see `linear.chunked`) as in linear.py, `integer.Integers` as in
    integer.py.
    """
    for task in prange((out.shape[1] + TASK - 1) // TASK):
        start, stop = task * TASK, min((task + 1) * TASK, out.shape[1])
        if len(out) == 1:
            one_token(matrix, x, start, out[0, start:stop])
        else:
            many_tokens(matrix, x, start, out[:, start:stop])


def one_token(matrix, x, start, out):
    """out (R): rows from `start` on by one token."""


def many_tokens(matrix, x, start, out):
    """out (T, R): rows from `start` on by T tokens."""


@overload(one_token)
def _one_token(matrix, x, start, out):
    summed = integer.one_token if isinstance(x, types.NamedTuple) else linear.one_token
    return lambda matrix, x, start, out: summed(matrix, x, start, out)


@overload(many_tokens)
def _many_tokens(matrix, x, start, out):
    summed = integer.many_tokens if isinstance(x, types.NamedTuple) else linear.many_tokens
    return lambda matrix, x, start, out: summed(matrix, x, start, out)
