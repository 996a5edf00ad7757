"""The search for scales: the order of its sums, and the same bytes from either backend."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest

from refimpl_kernels import formats
from refimpl_kernels.fast import search as fast_search
from refimpl_kernels.formats import int4, search

F32 = np.float32
WAYS = [
    ("int4", {}), ("int4", {"block_size": 4}), ("int4", {"block_size": 64, "symmetric": False}),
    ("int4", {"axis": 0, "block_size": "channel"}), ("int4", {"block_size": "tensor"}),
    ("nf4", {}), ("nf4", {"block_size": 100}), ("fp4", {}), ("q4_0", {}), ("q4_1", {}), ("q4_k", {}),
    ("matmulnbits", {}), ("matmulnbits", {"block_size": 16, "symmetric": False}), ("lpbq", {"block_size": 32}),
]  # fmt: skip
NAMES = ["-".join(map(str, (name, *options.values()))) for name, options in WAYS]


def difficult(rows: int, columns: int) -> np.ndarray:
    """Zeros of both signs, ties, outliers, numbers near the ends of float32 and float16, blocks of one sign."""
    rng = np.random.default_rng(rows)
    weight = (rng.standard_normal((rows, columns)) * rng.lognormal(sigma=3, size=(rows, 1))).astype(F32)
    kinds = [
        0.0, -0.0, 1e-45, 3e-39, 2.0, -1.5, np.arange(columns) % 2 * -0.0, np.linspace(-1, 1, columns),
        np.round(rng.uniform(-9, 9, columns)) / 2, np.abs(weight[0]), -np.abs(weight[0]), 1e-7 * weight[0],
        np.where(np.arange(columns) % 37, weight[0], 6e4), np.tile([2, -2], columns)[:columns],
    ]  # fmt: skip
    for row, kind in zip(weight[1:], kinds, strict=False):
        row[:] = kind
    return weight


@pytest.mark.parametrize(("name", "options"), WAYS, ids=NAMES)
def test_either_backend_gives_the_same_bytes(name, options):
    for rows, columns in ((30, 256), (1, 256), (129, 256), (3, 512)):
        weight = difficult(rows, columns)
        importance = np.random.default_rng(1).lognormal(size=columns).astype(F32)
        importance[::7] = 0
        importance[32:64] = 0
        for how in ({"search": 0}, {"search": 1}, {"search": 16}, {"search": 3, "importance": importance}):
            made = [formats.quantize(weight, name, **options, **how, backend=b) for b in (search, fast_search)]
            for part, found in made[1].arrays().items():
                assert found.tobytes() == made[0].arrays()[part].tobytes(), (rows, how.keys(), part)


@pytest.mark.parametrize("name", dict(WAYS))
def test_any_float32_is_rounded_or_refused_alike(name):
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 2**32, (40, 256), np.uint32)
    weight = np.where(np.isfinite(bits.view(F32)), bits.view(F32), 0)
    scales = np.ldexp(1.0, rng.integers(-140, 100, (40, 1)))
    for matrix in (weight, (rng.standard_normal((40, 256)) * scales).astype(F32)):
        for row in matrix:
            made = []
            for backend in (search, fast_search):
                try:
                    blocks = formats.quantize(row[None], name, search=5, backend=backend)
                    made.append({part: array.tobytes() for part, array in blocks.arrays().items()})
                except ValueError as error:
                    made.append(str(error))
            assert made[0] == made[1]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_either(bad):
    weight = difficult(3, 256)
    weight[2, 50] = bad
    for name in dict(WAYS):
        with pytest.raises(ValueError, match="a weight is NaN or infinite"):
            formats.quantize(weight, name, backend=fast_search)
    with pytest.raises(ValueError, match="a scale of q4_0 overflows for weights as large as"):
        formats.quantize(np.full((1, 32), 1e30, F32), "q4_0", backend=fast_search)


@pytest.mark.parametrize("blocks", [1, 2, 3, 40])
@pytest.mark.parametrize("size", [1, 2, 5, 32, 100, 4096])
def test_sums_go_from_the_first_weight_to_the_last(blocks, size):
    rng = np.random.default_rng(0)
    a, b, importance = (rng.standard_normal((blocks, size)).astype(F32) * 10.0 ** rng.integers(-9, 9) for _ in range(3))
    a, b, importance = (part.astype(F32) for part in (a, b, importance))
    for weigh in (None, importance):
        for order in (np.ascontiguousarray, np.asfortranarray):
            found = search._sum(order(a), order(b), None if weigh is None else order(weigh))
            for block in range(blocks):
                total = 0.0
                for i in range(size):
                    product = float(a[block, i]) if weigh is None else float(weigh[block, i]) * float(a[block, i])
                    total += product * float(b[block, i])
                assert found[block, 0] == total


@pytest.mark.parametrize("columns", [1, 5, 32, 256])
def test_the_first_of_the_ends_is_taken_by_either(columns):
    bits = np.random.default_rng(7).integers(0, 2**32, (300, columns), np.uint32).view(F32)
    few = np.random.default_rng(8).choice(F32([-1, -0.0, 0.0, 1]), (300, columns))
    for x in (np.where(np.isfinite(bits), bits, 0), few, -np.abs(few), np.abs(few) * F32(1e-45)):
        assert search.largest(x).tobytes() == fast_search.largest(x).tobytes()
        assert [end.tobytes() for end in search.ends(x)] == [end.tobytes() for end in fast_search.ends(x)]


def test_the_order_of_sums_is_the_same():
    @numba.njit
    def of_columns(a, b, weigh, total):
        fast_search._sum(a, b, weigh, total)

    rng = np.random.default_rng(6)
    a, b, weigh = (rng.lognormal(sigma=3, size=(fast_search.LANES, 100)).astype(F32) for _ in range(3))
    for importance in (None, weigh):
        total = np.empty(len(a))
        of_columns(a.T.copy(), b.T.copy(), np.empty((0, 0), F32) if importance is None else weigh.T.copy(), total)
        np.testing.assert_array_equal(total, search._sum(a, b, importance)[:, 0])


def test_the_words_of_rules_mean_the_same_for_numbers():
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(F32)
    near = (halves[:-1] + halves[1:]) / 2  # ties, and what is beside them
    x = np.concatenate([halves, near, np.nextafter(near, F32(9e9)), np.nextafter(near, F32(-9e9))])
    x = np.concatenate([x, -x, 1 / halves[1:]])
    up = np.concatenate([np.arange(-2, 18, 0.25), np.nextafter(np.arange(0.5, 17), 0)]).astype(F32)
    x = np.concatenate([x, up, F32([65519.996, 65520, -65520, 1e30, 1e-45])])

    @numba.njit(error_model="numpy")
    def of_numbers(x, out):
        for i in range(len(x)):
            out[0, i] = search.half(x[i])
            out[1, i] = search.half_up(x[i])
            out[2, i] = search.reciprocal(x[i])
            out[3, i] = search.nonzero(x[i])

    out = np.empty((4, len(x)), F32)
    of_numbers(x, out)
    with np.errstate(over="ignore", divide="ignore"):
        for found, word in zip(out, (search.half, search.half_up, search.reciprocal, search.nonzero), strict=True):
            np.testing.assert_array_equal(found, word(x), word.__name__)
    assert search.half_up(np.nextafter(F32(0.5), F32(0))[None]) == 0 and search.half_up(F32([0.5])) == 1


def test_the_first_of_equal_trials_is_kept_and_the_scales_start_from_the_first():
    x = np.random.default_rng(3).standard_normal((50, 32)).astype(F32)
    first = np.abs(search.largest(x)) / F32(7)
    scales = search.trials(first, 16)
    np.testing.assert_array_equal(scales[1:], first.T * np.linspace(0.55, 1.15, 16).astype(F32)[:, None])
    for backend in (search, fast_search):
        twice = backend.best_scales(x, np.concatenate([scales, scales]), int4.SYMMETRIC, fits=0)
        assert (twice.which < len(scales)).all() and len(np.unique(twice.which)) > 5
        np.testing.assert_array_equal(twice.scales.T, np.take_along_axis(scales, twice.which.T, 0))


def test_a_cold_compile_announces_itself(tmp_path):
    code = "import numpy as np; from refimpl_kernels import formats; from refimpl_kernels.fast import search; " \
        "formats.quantize(np.ones((2, 32), np.float32), 'q4_0', backend=search)"  # fmt: skip
    runs = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}, text=True,
                       capture_output=True, check=True).stderr
        for _ in range(2)
    ]  # fmt: skip
    module = "refimpl_kernels.fast.search"
    said = f"compiling {module}._largest, once", f"compiling {module}._best_scales for q4_0, once"
    assert all(text in line for text, line in zip(said, runs[0].splitlines(), strict=True)) and runs[1] == ""
