"""Fast kernels against their NumPy twin, within bounds derived from how they sum; among themselves, to the bit."""

import os
import subprocess
import sys

import ml_dtypes
import numba
import numpy as np
import pytest
from conftest import write_checkpoint
from numba import types

import refimpl
from refimpl import InputError
from refimpl.bench import race as bench
from refimpl.blocks.quantize import QuantizedWeight
from refimpl.cache import room
from refimpl.checkpoint.weights import NormHead, Weight
from refimpl.positions import LOWEST
from refimpl_kernels import formats
from refimpl_kernels.fast import integer as fast_integer
from refimpl_kernels.fast import ops as fast
from refimpl_kernels.fast import softmax
from refimpl_kernels.fast.ops import NumbaOps, _evenly, compiled, stored
from refimpl_kernels.ops import NumPyOps

UNIT = 2.0**-24
ROWS = [1, 2, 3, 5, 7, 31, 33, 127, 129]
# The formats that have kernels, and in which sizes and variants.
FORMATS = {
    "int4": {}, "q4_0": {}, "q8_0": {}, "lpbq": {"block_size": 32}, "nf4 double float16": {},
    "q4_1": {}, "q4_k": {}, "int4 asymmetric 64": {"symmetric": False, "block_size": 64},
    "matmulnbits asymmetric": {"symmetric": False},
}  # fmt: skip
KINDS = [kind for kind in FORMATS if kind != "lpbq"] + ["bfloat16", "float16", "float32"]
IDS = [5, 17, 9, 3, 80, 44, 2, 61, 9, 9, 33, 20]


def matrix(kind: str, rows: int, columns: int, seed: int = 0):
    """A weight that reads as any other."""
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    if kind not in FORMATS:
        return Weight(values.astype(getattr(ml_dtypes, kind, kind)))
    if kind == "nf4 double float16":  # as the official code has it
        return QuantizedWeight(formats.nest(formats.quantize(values, "nf4", 32)), np.dtype(np.float16))
    return QuantizedWeight(formats.quantize(values, kind.split()[0], **FORMATS[kind]))


def fitting(kind: str, columns: int) -> int:
    """As many, or more where the blocks ask for it."""
    size = {"q4_k": 256, "int4 asymmetric 64": 64}.get(kind, 32)
    return -(-columns // size) * size


def roundings(columns: int) -> int:
    """How many a product takes part in: see fast/linear.py."""
    return 32 + -(-columns // 512) + 4


def activations(tokens: int, columns: int) -> np.ndarray:
    """Of very different sizes, as activations are."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal((tokens, columns)) * np.exp2(rng.integers(-6, 7, columns))).astype(np.float32)


@pytest.mark.parametrize("kind", [*KINDS, "lpbq"])
def test_products_keep_their_bound(kind):
    for columns in sorted({fitting(kind, columns) for columns in (64, 96, 128, 416, 1056)}):
        for rows in ROWS:
            weight = matrix(kind, rows, columns)
            assert stored(weight) is not None
            exact = weight.read(np.dtype(np.float32)).astype(np.float64)
            for tokens in (1, 2, 7, 13):
                x = activations(tokens, columns)
                found = NumbaOps().linear(x, weight)
                assert found.shape == (tokens, rows) and found.dtype == np.float32
                n = roundings(columns)
                bound = n * UNIT / (1 - n * UNIT) * (np.abs(x).astype(np.float64) @ np.abs(exact).T)
                assert (np.abs(found - x.astype(np.float64) @ exact.T) <= bound).all(), (rows, columns, tokens)
                twin = NumPyOps("float32").linear(x, weight)
                # The twin adds the same products in an order of its own, at worst one after the other.
                assert (np.abs(found - twin) <= bound * (1 + columns / n)).all(), (rows, columns, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_pieces_is_the_prompt_at_once_to_the_bit(kind):
    weight = matrix(kind, 33, fitting(kind, 704))
    x = activations(13, weight.shape[1])
    whole = NumbaOps().linear(x, weight)
    for start, stop in ((0, 1), (3, 5), (5, 12), (12, 13)):
        assert np.array_equal(NumbaOps().linear(x[start:stop], weight), whole[start:stop])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("bfloat16", "float32")])  # have none
def test_machines_without_special_instructions_give_the_same_bits(kind):
    weight = matrix(kind, 127, fitting(kind, 384))
    for tokens in (1, 7):
        x = activations(tokens, weight.shape[1])
        assert np.array_equal(NumbaOps(portable=True).linear(x, weight), NumbaOps(portable=False).linear(x, weight))


def test_every_number_of_every_format_is_read_exactly():
    """All bit patterns of float16 and bfloat16, and all codes, times 1: both paths give the number itself."""
    patterns = np.arange(65536, dtype=np.uint16).reshape(-1, 1)
    one = np.zeros((1, 16), np.float32)
    one[0, 0] = 1
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = np.zeros((65536, 16), dtype)
        values[:, :1] = patterns.view(dtype)
        finite = np.isfinite(values[:, 0].astype(np.float32))
        for portable in (True, False):
            found = NumbaOps(portable).linear(one, Weight(values))[0]
            assert np.array_equal(found[finite], values[finite, 0].astype(np.float32))
            assert np.array_equal(np.isnan(found), np.isnan(values[:, 0].astype(np.float32)))
    codes = np.tile(np.arange(-8, 8, dtype=np.int8), (128, 8))
    packed = formats.FORMATS["int4"].module.pack(codes)
    weight = QuantizedWeight(formats.Blocks("int4", (128, 128), 32, 1, packed, np.ones((128, 4), np.float32)))
    for portable in (True, False):
        assert np.array_equal(NumbaOps(portable).linear(np.eye(128, dtype=np.float32), weight).T, codes)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("name", ["q4_1", "q4_k", "qlinear4", "qlinear8"])
def test_any_bytes_are_read_as_the_twin_reads_them(name, portable):
    """Any bytes that a file may have: scales of 0 and below, minima of any size, every code with every block."""
    rng = np.random.default_rng(7)
    header, layout = formats.layout(name, (33, 768))
    arrays = {}
    for part, (size, dtype) in layout.items():
        arrays[part] = rng.integers(0, 64 if "sub" in part else 256, size, np.uint8).astype(dtype)
        if dtype.kind == "f":
            arrays[part] = (rng.standard_normal(size) * np.exp2(rng.integers(-30, 9, size))).astype(dtype)
            arrays[part][::5] = 0
    weight = QuantizedWeight(formats.from_arrays(header, arrays))
    found = NumbaOps(portable).linear(np.eye(768, dtype=np.float32), weight)
    assert np.array_equal(found.T, formats.dequantize(weight.blocks))


INTEGER_KINDS = ["q4_0", "int4 asymmetric 64", "matmulnbits asymmetric"]


@pytest.mark.parametrize("kind", INTEGER_KINDS)
@pytest.mark.parametrize("activations_", ["int8", "int16"])
def test_products_with_rounded_activations_keep_their_bound(kind, activations_):
    size = {"int8": 1, "int16": 2}[activations_]
    for columns in (64, 96, 128, 416, 1056):
        if columns % 64 and kind == "int4 asymmetric 64":
            continue
        for rows in ROWS:
            weight = matrix(kind, rows, columns)
            exact = weight.read(np.dtype(np.float32)).astype(np.float64)
            for tokens in (1, 2, 7, 13):
                x = activations(tokens, columns)
                x[0, :32] = 0
                found = NumbaOps(activations=activations_).linear(x, weight)
                twin = fast_integer.rounded(x, size)
                # A scale for each block: two float32 factors for x, and one rounding in the twin's w = code * scale.
                n = columns / 32 + 2 + 4
                bound = n * UNIT / (1 - n * UNIT) * (np.abs(twin) @ np.abs(exact).T)
                assert (np.abs(found - twin @ exact.T) <= bound).all(), (rows, columns, tokens)
    step = np.abs(x).max() / fast_integer.LARGEST[size]
    assert 0 < np.abs(twin - x).max() <= step * (0.5 + 2**-8), "nothing was rounded, or more than half a unit"


@pytest.mark.parametrize("kind", INTEGER_KINDS)
def test_rounded_activations_give_the_same_bits_everywhere(kind):
    weight, x = matrix(kind, 33, 704 if kind == "q4_0" else 640), activations(13, 704 if kind == "q4_0" else 640)
    for name in ("int8", "int16"):
        whole = NumbaOps(activations=name).linear(x, weight)
        assert np.array_equal(NumbaOps(portable=True, activations=name).linear(x, weight), whole)
        for start, stop in ((0, 1), (3, 5), (5, 12)):
            assert np.array_equal(NumbaOps(activations=name).linear(x[start:stop], weight), whole[start:stop])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-38])
def test_rounding_takes_any_activation(value):
    weight, x = matrix("q4_0", 5, 128), np.ones((2, 128), np.float32)
    x[0, 32:64] = value
    found = NumbaOps(activations="int8").linear(x, weight)
    assert np.isnan(found[0]).all() == (not np.isfinite(value)) and np.isfinite(found[1]).all()


def attention(keys, queries: np.ndarray, probs: np.ndarray, **options) -> tuple[np.ndarray, np.ndarray]:
    ops = NumbaOps(**options)
    return ops.matmul(queries, keys.transpose(0, 1, 3, 2)), ops.weighted_sum(probs, keys)


def kept_as(dtype: str, values: np.ndarray):
    """What a cache of that dtype keeps of keys."""
    place = room(values.shape, dtype)
    place[:] = values
    return place


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("batch, dim", [(1, 64), (2, 128)])
def test_attention_keeps_its_bound_over_a_view_of_a_cache(dtype, batch, dim):
    rng = np.random.default_rng(4)
    place = kept_as(dtype, rng.standard_normal((batch, 3, 300, dim)).astype(np.float32))
    for size in [1, 2, 3, 5, 31, 33, 65, 129, 257, 300]:
        keys = place[:, :, :size]
        read = np.asarray(keys).astype(np.float32)
        wide = read.astype(np.float64)
        for rows in (1, 2, 7):
            queries = rng.standard_normal((batch, 3, rows, dim)).astype(np.float32)
            probs = rng.random((batch, 3, rows, size), np.float32)
            found = attention(keys, queries, probs)
            pairs = ((queries.astype(np.float64), wide.swapaxes(-1, -2)), (probs.astype(np.float64), wide))
            for out, (a, b), n in zip(found, pairs, (dim // 16 + 4, min(size, 64) + size // 64 + 1), strict=True):
                bound = n * UNIT / (1 - n * UNIT) * (np.abs(a) @ np.abs(b))
                assert out.dtype == np.float32 and (np.abs(out - a @ b) <= bound).all(), (size, rows)
            assert same(found, attention(keys, queries, probs, portable=True))
            assert same(found, attention(read, queries, probs)), "what is kept is read exactly"
            alone = attention(keys, queries[:, :, :1], probs[:, :, :1])
            assert same((out[:, :, :1] for out in found), alone)


def test_attention_of_what_does_not_fit_is_numpy_s():
    """Kernels look at no shape: they would read beyond the end."""
    ones = np.ones((1, 2, 3, 64), np.float32)
    with pytest.raises(ValueError, match="mismatch"):
        NumbaOps().weighted_sum(np.ones((1, 2, 3, 500), np.float32), np.ones((1, 2, 7, 64), np.float32))
    with pytest.raises(ValueError, match="mismatch"):
        NumbaOps().matmul(ones, np.ones((1, 2, 7, 96), np.float32).swapaxes(2, 3))
    assert NumbaOps().matmul(ones, ones[:, :, :0].swapaxes(2, 3)).shape == (1, 2, 3, 0)
    wide = np.ones((2, 2, 5, 64), np.float32)
    assert (NumbaOps().matmul(wide, ones.swapaxes(2, 3)) == 64).all(), "one sequence's keys for two, as NumPy has it"


def test_a_cache_is_its_process_s_own_and_fits_into_memory():
    place = room((1, 1, 4, 32), "float32")
    place[:] = 1
    child = os.fork() if hasattr(os, "fork") else None
    if child == 0:
        place[:] = 2
        os._exit(0)
    if child:
        os.waitpid(child, 0)
    assert (place == 1).all()
    with pytest.raises(InputError, match=r"there is no memory for a cache of .* GB: .*; ask for fewer tokens"):
        room((1, 32, 10**13, 128), "float16")


def test_attention_copies_no_cache():
    """Views of a cache go to the kernel as they are; heads in another order do not lie evenly, and are copied."""
    for dtype in ("float32", "float16", "int8"):
        place = kept_as(dtype, np.ones((2, 3, 300, 64), np.float32))
        arrays = [place.codes, place.scales] if dtype == "int8" else [place]
        parts, apart = _evenly(place[:, :, :257])
        assert apart == 300 and all(np.shares_memory(*pair) for pair in zip(parts, arrays, strict=False))
        parts, apart = _evenly(place[:, ::-1, :257])
        assert apart == 257 and not any(np.shares_memory(*pair) for pair in zip(parts, arrays, strict=False))


def test_rows_of_8_bits_are_the_blocks_of_gguf():
    quants = pytest.importorskip("gguf.quants")
    values = activations(7, 96)
    rows = kept_as("int8", values)
    codes, scales = rows.codes.reshape(7, 3, 32), rows.scales[..., None]
    ours = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], -1).reshape(7, -1)
    theirs = quants.quantize(values, quants.GGMLQuantizationType.Q8_0)
    assert np.array_equal(ours, theirs)
    assert np.array_equal(np.asarray(rows), quants.dequantize(theirs, quants.GGMLQuantizationType.Q8_0))
    assert np.array_equal(rows.swapaxes(0, 1).astype(np.float64), np.asarray(rows).T) and rows.nbytes == ours.nbytes


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e7])
def test_no_block_of_8_bits_hides_what_it_cannot_hold(value):
    values = np.ones((2, 64), np.float32)
    values[0, 40] = value
    found = np.asarray(kept_as("int8", values))
    assert not np.isfinite(found[0, 32:]).any() and np.isfinite(found[0, :32]).all() and np.isfinite(found[1]).all()


def test_softmax_keeps_its_bound():
    rng = np.random.default_rng(6)
    for size in [*ROWS, 511, 512, 513, 528, 545, 1100, 4097]:
        x = (5 * rng.standard_normal((3, 2, size))).astype(np.float32)
        exact = np.exp((x - x.max(-1, keepdims=True)).astype(np.float64))  # the twin rounds this difference, too
        exact /= exact.sum(-1, keepdims=True)
        found = NumbaOps().softmax(x)
        n = min(size // 16, 32) + size // 512 + 5 + 2 * 2 + 1  # of the sum, two exponentials, the quotient
        assert found.dtype == np.float32 and (np.abs(found - exact) <= n * UNIT * exact).all(), size
        masked = np.concatenate([x, np.full((3, 2, 600), LOWEST, np.float32)], -1)
        masked = NumbaOps().softmax(masked)
        assert np.array_equal(masked[..., :size], found) and not masked[..., size:].any()


def test_exponentials_are_within_their_bound_and_end_at_0():
    x = np.linspace(-90, 0, 1 << 19).astype(np.float32)
    assert len(x) > fast.MANY, "it is on one thread otherwise"
    rows = np.stack([np.zeros_like(x), x], -1)
    found = NumbaOps().softmax(rows).astype(np.float64)
    found, exact = found[:, 1] / found[:, 0], np.exp(x.astype(np.float64))
    normal = exact > 2.0**-125
    # Each of two quotients of float32 adds half a unit.
    assert (np.abs(found - exact)[normal] <= (2.0**-23 + 2 * UNIT) * exact[normal]).all()
    assert (found[exact < 2.0**-126] == 0).all()
    assert np.array_equal(NumbaOps().softmax(rows[:9]), NumbaOps().softmax(rows)[:9])


def test_softmax_of_what_is_not_finite_is_the_twin_s():
    inf, nan = np.inf, np.nan
    for row in ([1, nan, 2], [inf, 1, 2], [-inf] * 3, [-inf, 0, 1], [-inf] * 20 + [3], [nan] + [1] * 20):
        with np.errstate(invalid="ignore"):
            found, twin = (ops.softmax(np.array([row], np.float32)) for ops in (NumbaOps(), NumPyOps("float32")))
        assert np.allclose(found, twin, equal_nan=True), row


def test_sigmoid_keeps_its_bound():
    inf, nan = np.inf, np.nan
    x = np.concatenate([np.linspace(-87, 87, fast.MANY + 1000), [0, inf, -inf, nan, 1e-30, -1e-30, 3e38, -3e38]])
    x = x.astype(np.float32)[: len(x) // 16 * 16]
    found, exact = NumbaOps().sigmoid(x), NumPyOps("float64").sigmoid(x.astype(np.float64))
    # The exponential is within two units, at the top and at the bottom; their sum and quotient add one each.
    ends = np.isnan(exact) | (exact == 0)
    assert found.dtype == np.float32 and (np.abs(found - exact)[~ends] <= 6 * UNIT * exact[~ends] + 2.0**-126).all()
    assert np.array_equal(found[ends], exact[ends], equal_nan=True)
    assert np.array_equal(NumbaOps().sigmoid(x[-160:]), found[-160:], equal_nan=True), "threads change nothing"
    odd = x[:33].reshape(3, 11)
    assert np.array_equal(NumbaOps().sigmoid(odd), NumPyOps("float32").sigmoid(odd)), "NumPy has rows of another length"


def test_mean_is_the_twin_s():
    x = activations(5, 4097)
    assert np.array_equal(NumbaOps().mean(x), NumPyOps("float32").mean(x))


# What rounding may change in a number, relatively, and four times that for what follows from it. Of 8 bits it is half a
# step, where the largest of a block is 127 steps, and other numbers are about a third as large.
@pytest.mark.parametrize("dtype, step", [("float16", 2.0**-11), ("int8", 3 / 254)])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_cache_may_keep_less(family, backend, dtype, step, tmp_path):
    model = refimpl.load(write_checkpoint(tmp_path, family, hidden_size=256), backend)
    exact = model(IDS, "float64")
    cache, whole = model.new_cache(dtype=dtype), model.new_cache(capacity=40, dtype=dtype)
    found = np.concatenate([model(IDS[:7], cache=cache), model(IDS[7:8], cache=cache), model(IDS[8:], cache=cache)], 1)
    assert {array.dtype for pair in map(cache.__getitem__, range(2)) for array in pair} == {np.dtype(dtype)}
    at_once = model(IDS, cache=whole)
    for logits in (found, at_once):
        assert 0.02 * step < np.abs(logits - exact).max() / np.abs(exact).max() < 4 * step
    assert backend == "numpy" or np.array_equal(at_once, found), "in pieces, a prompt has other bits"
    with pytest.raises(InputError, match="use one dtype"):
        model(IDS[:1], "bfloat16", cache=cache)
    with pytest.raises(InputError, match="is 'int3', expected one of float32, float16, int8"):
        model.new_cache(dtype="int3")
    ids = list(model.generate(IDS, max_new_tokens=3, cache_dtype=dtype))
    assert ids == list(model.generate(IDS, max_new_tokens=3))


def test_an_int8_cache_needs_whole_blocks(tiny_model):
    model = tiny_model("Qwen2-7B")
    with pytest.raises(InputError, match=f"keeps blocks of 32, and head_dim {model.config.head_dim} is not a multiple"):
        model.generate(IDS, cache_dtype="int8")


def _one(out):
    for n in numba.prange(len(out)):
        out[n] = 1


def test_kernels_from_the_disk_are_those_of_these_sources(monkeypatch, tmp_path):
    """Instructions come from other files than the function's own: an edit there is seen, too."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    signature, found = types.void(types.Array(types.float32, 1, "C")), []
    for sources, parallel in (("these", False), ("these", False), ("others", False), ("these", True), ("these", True)):
        monkeypatch.setattr(fast, "SOURCES", sources)
        fast.compiled.__wrapped__(_one, signature, parallel)
        found.append(sum(fast._COMPILED[-1].stats.cache_hits.values()))
    assert found == [0, 1, 0, 0, 1], "nor is a kernel of one thread taken for that of all"


PROGRAM = """
import hashlib, sys
sys.path[:0] = {tests!r}
import numba, numpy as np
from test_fast import KINDS, activations, attention, fitting, kept_as, matrix
from refimpl_kernels.fast.ops import NumbaOps
numba.set_num_threads({threads})
digest = hashlib.sha256()
for kind in KINDS:
    weight = matrix(kind, 129, fitting(kind, 384))
    for tokens in (1, 13):
        for name in ("float32", "int8", "int16"):
            digest.update(NumbaOps(activations=name).linear(activations(tokens, weight.shape[1]), weight).tobytes())
        keys = activations(2 * 5 * 300, 64).reshape(2, 5, 300, 64)
        probs = NumbaOps().softmax(activations(10 * tokens, 300).reshape(2, 5, tokens, 300))
        for dtype in ("float32", "float16", "int8"):
            for out in (*attention(kept_as(dtype, keys), keys[:, :, :tokens], probs), probs):
                digest.update(out.tobytes())
print(digest.hexdigest())
"""


def digest(threads: int, **environment: str) -> str:
    here = os.path.dirname(__file__)
    program = PROGRAM.format(tests=[here, os.path.dirname(here)], threads=threads)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_number_of_threads_changes_no_bit():
    assert len({digest(threads, NUMBA_NUM_THREADS="4") for threads in (1, 2, 3, 4)}) == 1


def test_norm_head_divides_by_the_lengths_of_rows():
    array = np.random.default_rng(3).standard_normal((33, 64)).astype(ml_dtypes.bfloat16)
    array[7] = 0
    x = activations(3, 64)
    found, twin = NumbaOps().linear(x, NormHead(array)), NumPyOps("float32").linear(x, NormHead(array))
    values = NormHead(array).read(np.dtype(np.float64))
    bound = (64 + 8) * UNIT * (np.abs(x).astype(np.float64) @ np.abs(values).T)
    assert (found[:, 7] == 0).all() and (np.abs(found - twin) <= 2 * bound).all()


@pytest.mark.parametrize(
    "blocks",
    [
        formats.quantize(np.ones((4, 96), np.float32), "int4", 12),
        formats.quantize(np.ones((4, 96), np.float32), "int4", 2, axis=0),
        formats.quantize(np.ones((4, 96), np.float32), "nf4", 64),
        formats.quantize(np.ones((4, 96), np.float32), "int8"),
    ],
    ids=repr,
)
def test_what_no_kernel_reads_goes_through_numpy(blocks):
    x = activations(3, 96)
    weight = QuantizedWeight(blocks)
    assert stored(weight) is None
    assert np.array_equal(NumbaOps().linear(x, weight), NumPyOps("float32").linear(x, weight))


def test_activations_of_another_width_are_refused():
    for kind in ("q4_0", "float32"):
        for columns in (64, 96, 160):
            with pytest.raises(ValueError, match=r"mismatch|shape"):
                NumbaOps().linear(activations(2, columns), matrix(kind, 7, 128))


@pytest.mark.parametrize("kind", ["int4", "matmulnbits asymmetric", "nf4", "lpbq"])
def test_blocks_of_any_size_have_their_own_scales(kind):
    """A scale of a neighbour is off by a factor of up to 2^8: no rounding hides that."""
    name, *asymmetric = kind.split()
    # In pieces of 8, 32 or 64, as wide as a line and wider; each size of pieces is another kernel to compile.
    sizes = {"int4": (8, 24, 96, 160, 320, 384, 640)}.get(kind, (256,) if asymmetric else (96,))
    for size in sizes:
        columns = 640 if 640 % size == 0 else 3 * size
        rng = np.random.default_rng(size)
        spread = np.repeat(np.exp2(rng.integers(-4, 5, (5, columns // 8))), 8, axis=1)
        values = (rng.standard_normal((5, columns)) * spread).astype(np.float32)
        weight = QuantizedWeight(formats.quantize(values, name, size, **({"symmetric": False} if asymmetric else {})))
        assert stored(weight) is not None
        exact, x = weight.read(np.dtype(np.float64)), activations(3, columns)
        sums = np.abs(x).astype(np.float64) @ np.abs(exact).T
        n = roundings(columns)
        for rows in (x[:1], x):
            found = NumbaOps().linear(rows, weight)
            assert (
                np.abs(found - rows.astype(np.float64) @ exact.T) <= n * UNIT / (1 - n * UNIT) * sums[: len(rows)]
            ).all()
        found = NumbaOps(activations="int16").linear(x, weight)
        assert (np.abs(found - x.astype(np.float64) @ exact.T) <= 2**-9 * sums.max()).all(), size


def test_weights_are_read_where_they_are():
    """No copy of what is mapped: not of arrays that may not be written, nor of such at an odd address."""
    raw = np.zeros(4 * 128 * 2 + 1, np.uint8)[1:]
    array = raw.view(np.float16).reshape(4, 128)
    array[:] = 1
    array.flags.writeable = False
    weight = Weight(array)
    assert np.shares_memory(stored(weight).packed.codes, raw)
    assert (NumbaOps().linear(np.ones((1, 128), np.float32), weight) == 128).all()
    blocks = matrix("int4", 4, 128)
    assert np.shares_memory(stored(blocks).packed.codes, blocks.blocks.packed)


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_a_model_gives_what_numpy_gives(family, tiny_model, scheme):
    model = tiny_model(family) if scheme is None else tiny_model(family).quantize(scheme)
    slow, fast = model.with_backend("numpy"), model.with_backend("numba")
    exact = slow(IDS, "float64")
    assert np.abs(fast(IDS) - exact).max() < 2e-5 * np.abs(exact).max()
    assert not np.array_equal(fast(IDS), slow(IDS)), "both are the same code"
    assert np.array_equal(fast(IDS, "float64"), exact)
    assert np.array_equal(fast(IDS, "bfloat16"), slow(IDS, "bfloat16"))


def test_who_computes(tiny_model, monkeypatch):
    monkeypatch.delenv("REFIMPL_BACKEND", raising=False)
    model = tiny_model("Baichuan2-7B")
    assert model.backend == model.quantize().backend == "numpy", "small models are not worth the import"
    monkeypatch.setattr("refimpl.backends.LARGE", 1000)
    assert model.backend == "numpy"
    assert model.quantize().backend == "numba"
    assert model.with_backend("numpy").quantize().backend == "numpy"
    monkeypatch.setenv("REFIMPL_BACKEND", "numba")
    assert refimpl.Model(model.config, model.weights).backend == "numba"
    with pytest.raises(
        InputError, match="the backend is 'cuda', expected one of numpy, numba, numba-int16, numba-int8"
    ):
        model.with_backend("cuda")


def test_the_bench_of_attention(capsys):
    facts = bench.run("attention", 1, 2, 2, None, 64)
    names = ["float16", "int8", "float32"]
    assert [row["engine"] for row in facts] == [name for dtype in names for name in (f"read-{dtype}", dtype)]
    assert all(row[f"times_read-{row['engine'].removeprefix('read-')}"] > 0 for row in facts)
    assert facts[0]["times_read-float16"] == 1 and all(row["slowest"] <= row["fastest"] for row in facts)
    assert "float16" in bench.show(facts) and "1 layers of Baichuan2-7B, attention" in capsys.readouterr().err
    with pytest.raises(InputError, match="the engine is 'gpu', expected some of read-float16,float16,read-int8,int8"):
        bench.run("attention", 1, 1, 1, ("gpu",), 64)
    with pytest.raises(InputError, match="numbers from 1"):
        bench.run("attention", 1, 0, 1, None, 64)


@pytest.mark.parametrize("end", ["nbi", "nbc"])
def test_a_damaged_kernel_on_the_disk_is_compiled_anew(end, tmp_path, monkeypatch, capsys):
    """After a power cut, a file of Numba's cache may be cut. It must not break every later run."""
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    x = types.Array(types.float32, 1, "C")
    signature = types.void(types.Array(types.float32, 1, "C", readonly=True), x)

    def run():
        out = np.empty(16, np.float32)
        compiled.__wrapped__(softmax.sigmoid, signature, parallel=False)(np.zeros(16, np.float32), out)
        return set(out.tolist()), "compiling" in capsys.readouterr().err

    assert run() == ({0.5}, True) and run() == ({0.5}, False)
    for file in tmp_path.rglob(f"*.{end}"):
        file.write_bytes(file.read_bytes()[:99])
    assert run() == ({0.5}, True) and run() == ({0.5}, False)
