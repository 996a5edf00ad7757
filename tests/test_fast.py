"""Fast kernels against their NumPy twin, within bounds derived from how they sum; among themselves, to the bit."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import write_checkpoint

import refimpl
from kernels import fast_integer, formats
from kernels.fast import NumbaOps, stored
from kernels.ops import NumPyOps
from refimpl import InputError, bench
from refimpl.quantize import QuantizedWeight
from refimpl.weights import NormHead, Weight

UNIT = 2.0**-24
ROWS = [1, 2, 3, 5, 7, 31, 33, 127, 129]
# The formats that have kernels, and in which sizes and variants.
FORMATS = {
    "int4": {}, "q4_0": {}, "q8_0": {}, "lpbq": {"block_size": 32}, "nf4 double float16": {},
    "int4 asymmetric 64": {"symmetric": False, "block_size": 64}, "matmulnbits asymmetric": {"symmetric": False},
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


def roundings(columns: int) -> int:
    """How many a product takes part in: see fast_linear.py."""
    return min(-(-columns // 16), 32) + 4 + -(-columns // 512)


def activations(tokens: int, columns: int) -> np.ndarray:
    """Of very different sizes, as activations are."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal((tokens, columns)) * np.exp2(rng.integers(-6, 7, columns))).astype(np.float32)


@pytest.mark.parametrize("kind", [*KINDS, "lpbq"])
def test_products_keep_their_bound(kind):
    for columns in (64, 96, 128, 416, 1056):
        if columns % 64 and kind == "int4 asymmetric 64":
            continue
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
    weight = matrix(kind, 33, 704)
    x = activations(13, 704)
    whole = NumbaOps().linear(x, weight)
    for start, stop in ((0, 1), (3, 5), (5, 12), (12, 13)):
        assert np.array_equal(NumbaOps().linear(x[start:stop], weight), whole[start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_machines_without_special_instructions_give_the_same_bits(kind):
    weight = matrix(kind, 127, 384)
    for tokens in (1, 7):
        x = activations(tokens, 384)
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


def attention(keys: np.ndarray, queries: np.ndarray, probs: np.ndarray, **options) -> tuple[np.ndarray, np.ndarray]:
    ops = NumbaOps(**options)
    return ops.matmul(queries, keys.transpose(0, 1, 3, 2)), ops.weighted_sum(probs, keys)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_keeps_its_bound_over_a_view_of_a_cache(dtype, batch):
    rng = np.random.default_rng(4)
    room = rng.standard_normal((batch, 3, 300, 64)).astype(dtype)
    for size in [*ROWS, 65, 257, 300]:
        keys = room[:, :, :size]
        wide = keys.astype(np.float64)
        for rows in (1, 2, 7):
            queries = rng.standard_normal((batch, 3, rows, 64)).astype(np.float32)
            probs = rng.random((batch, 3, rows, size), np.float32)
            found = attention(keys, queries, probs)
            pairs = ((queries.astype(np.float64), wide.swapaxes(-1, -2)), (probs.astype(np.float64), wide))
            for out, (a, b), n in zip(found, pairs, (64 // 16 + 4, min(size, 64) + size // 64 + 1), strict=True):
                bound = n * UNIT / (1 - n * UNIT) * (np.abs(a) @ np.abs(b))
                assert out.dtype == np.float32 and (np.abs(out - a @ b) <= bound).all(), (size, rows)
            for other in (attention(keys, queries, probs, portable=True), attention(keys.copy(), queries, probs)):
                assert all(np.array_equal(a, b) for a, b in zip(found, other, strict=True))
            alone = attention(keys, queries[:, :, :1], probs[:, :, :1])
            assert all(np.array_equal(a[:, :, :1], b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_cache_may_keep_float16(family, tiny_folder, backend, tmp_path):
    model = refimpl.load(write_checkpoint(tmp_path, family, hidden_size=256), backend)
    exact = model(IDS, "float64")
    cache = model.new_cache(dtype="float16")
    found = np.concatenate([model(IDS[:7], cache=cache), model(IDS[7:8], cache=cache), model(IDS[8:], cache=cache)], 1)
    assert {array.dtype for pair in map(cache.__getitem__, range(2)) for array in pair} == {np.dtype(np.float16)}
    assert 1e-5 < np.abs(found - exact).max() / np.abs(exact).max() < 2e-3
    with pytest.raises(InputError, match="use one dtype"):
        model(IDS[:1], "bfloat16", cache=cache)
    with pytest.raises(InputError, match="expected 'float32' or 'float16'"):
        model.new_cache(dtype="int3")


PROGRAM = """
import hashlib, sys
sys.path.insert(0, {tests!r})
import numba, numpy as np
from test_fast import KINDS, activations, attention, matrix
from kernels.fast import NumbaOps
numba.set_num_threads({threads})
digest = hashlib.sha256()
for kind in KINDS:
    weight = matrix(kind, 129, 384)
    for tokens in (1, 13):
        for name in ("float32", "int8", "int16"):
            digest.update(NumbaOps(activations=name).linear(activations(tokens, 384), weight).tobytes())
        keys = activations(2 * 5 * 300, 64).reshape(2, 5, 300, 64)
        for out in attention(keys, keys[:, :, :tokens], activations(10 * tokens, 300).reshape(2, 5, tokens, 300)):
            digest.update(out.tobytes())
print(digest.hexdigest())
"""


def digest(threads: int, **environment: str) -> str:
    program = PROGRAM.format(tests=os.path.dirname(__file__), threads=threads)
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
        formats.quantize(np.ones((4, 96), np.float32), "int4", 16),
        formats.quantize(np.ones((4, 96), np.float32), "int4", 2, axis=0),
        formats.quantize(np.ones((4, 96), np.float32), "nf4", 64),
        formats.quantize(np.ones((4, 96), np.float32), "q4_1"),
    ],
    ids=repr,
)
def test_what_no_kernel_reads_goes_through_numpy(blocks):
    x = activations(3, 96)
    weight = QuantizedWeight(blocks)
    assert stored(weight) is None
    assert np.array_equal(NumbaOps().linear(x, weight), NumPyOps("float32").linear(x, weight))


def test_larger_blocks_repeat_their_scales():
    blocks = formats.quantize(np.random.default_rng(0).standard_normal((5, 256)).astype(np.float32), "int4", 256)
    x = activations(2, 256)
    found, twin = (ops.linear(x, QuantizedWeight(blocks)) for ops in (NumbaOps(), NumPyOps("float32")))
    assert stored(QuantizedWeight(blocks)).scales.view(np.float32).shape == (5, 2)
    assert np.abs(found - twin).max() < 1e-5 * np.abs(twin).max()


def test_weights_are_read_where_they_are():
    """No copy of what is mapped: not of arrays that may not be written, nor of such at an odd address."""
    raw = np.zeros(4 * 128 * 2 + 1, np.uint8)[1:]
    array = raw.view(np.float16).reshape(4, 128)
    array[:] = 1
    array.flags.writeable = False
    weight = Weight(array)
    assert np.shares_memory(stored(weight).codes, raw)
    assert (NumbaOps().linear(np.ones((1, 128), np.float32), weight) == 128).all()
    blocks = matrix("int4", 4, 128)
    assert np.shares_memory(stored(blocks).codes, blocks.blocks.packed)


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
    assert [row["engine"] for row in facts] == ["read", "float16", "float32"]
    assert facts[0]["times_read"] == 1 and all(row["slowest"] <= row["fastest"] for row in facts)
    assert "float16" in bench.show(facts) and "1 layers of Baichuan2-7B, attention" in capsys.readouterr().err
    with pytest.raises(InputError, match="the engine is 'gpu', expected some of read,float16,float32"):
        bench.run("attention", 1, 1, 1, ("gpu",), 64)
    with pytest.raises(InputError, match="numbers from 1"):
        bench.run("attention", 1, 0, 1, None, 64)
