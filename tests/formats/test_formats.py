"""Every format of weights: what it stands for, its bytes, its parts in memory and in files, and what it refuses.

Literal bytes below were made by the engine that defines the format; the recipe stands beside them.
"""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from refimpl_kernels import affine, formats
from refimpl_kernels.formats import dynamic8, fp4, gguf, int4, lpbq, matmulnbits, nf4, q4_k, qlinear8, search
from refimpl_kernels.formats.table import FORMATS

NAMES = list(FORMATS)
ROWS = [n for n in NAMES if FORMATS[n].axes[0] == 1]
FLAT = [n for n in NAMES if FORMATS[n].axes[0] is None]
SEARCHED = [n for n in NAMES if "search" in FORMATS[n].options]


def ramp(rows=1, columns=256):
    """Values that any engine makes to the bit: multiples of 1/32, of both signs, the same on every machine."""
    return (((np.arange(rows * columns) * 37 + 11) % 101 - 50) / 32).astype(np.float32).reshape(rows, columns)


def weights(seed=0, shape=(6, 512), scale=0.02):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


# What a format stands for --------------------------------------------------------------------------------------------


# The largest error of round-to-nearest, in terms of the largest weight that shares a scale: half the widest step
# between codes. For GGUF's, one float16 rounding of the scale (2^-11) more, at the far end of the codes.
WORST = {
    "int4": 0.5 / 7, "nf4": (1 - 0.6961928) / 2, "fp4": 1 / 6, "int8": 0.5 / 127 + 2**-11, "q8_0": 0.5 / 127 + 2**-11,
    "q4_0": 1 / 8 + 2**-11, "q4_1": 1 / 15 + 2**-10, "matmulnbits": 1 / 8, "qlinear8": 0.5 / 127, "qlinear4": 0.5 / 7,
    "mxfp4": 1 / 4,  # the largest weight lies between 4 and 8 scales; the values end at 6, and between 4 and 6 is none
}  # fmt: skip
finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(WORST)), st.integers(1, 3), st.integers(1, 3), st.data())
def test_no_weight_moves_further_than_half_a_step(name, rows, blocks, data):
    columns = blocks * (32 if FORMATS[name].block_sizes == (32,) else 16)
    values = data.draw(st.lists(finite, min_size=rows * columns, max_size=rows * columns))
    weight = np.array(values, np.float32).reshape(rows, columns)
    size = 16 if FORMATS[name].block_size in (32, 64) and FORMATS[name].block_sizes != (32,) else None
    made = formats.quantize(weight, name, size)
    back = formats.dequantize(made)
    unit = made.block_size
    largest = np.abs(weight.reshape(-1, unit)).max(-1, keepdims=True)
    error = np.abs(weight.astype(np.float64) - back).reshape(-1, unit)
    # below 2^-14 a float16 scale, and the float16 weight of int8, have absolute steps
    assert (error <= WORST[name] * largest * (1 + 1e-5) + 8 * 2.0**-24).all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_what_a_format_holds_stays(name):
    assert not formats.dequantize(formats.quantize(np.zeros((3, 256), np.float32), name)).any()
    once = formats.dequantize(formats.quantize(weights(), name))
    if name in ("int4", "nf4", "fp4", "matmulnbits", "int8", "qlinear4", "qlinear8", "q8_0"):
        twice = formats.dequantize(formats.quantize(once, name))
        np.testing.assert_allclose(twice, once, rtol=1e-3, atol=0)  # the same codes; scales one rounding apart


@pytest.mark.parametrize("name", NAMES)
def test_rows_read_alone_are_the_rows(name):
    blocks = formats.quantize(weights(shape=(7, 256)), name)
    whole = formats.dequantize(blocks)
    assert whole.dtype == np.float32 and whole.flags.c_contiguous
    for rows in (slice(2, 5), slice(0, 7, 2), slice(3, 3), np.array([6, 0, 3, 3]), np.array([], int)):
        np.testing.assert_array_equal(formats.dequantize(blocks, rows), whole[rows])
    assert blocks.codes.shape == blocks.shape


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (3, 31), (7, 129), (2, 33), (127, 3)])
@pytest.mark.parametrize("double", [False, True])
def test_blocks_run_on_from_row_to_row(name, shape, double):
    weight = weights(1, shape)
    blocks = formats.quantize(weight, name, 64, double=double)
    whole = formats.dequantize(blocks)
    scale = np.repeat(np.abs(np.pad(weight.reshape(-1), (0, -weight.size % 64)).reshape(-1, 64)).max(-1), 64)
    if not double:
        values = FORMATS[name].module.VALUES[blocks.codes.reshape(-1)] * scale[: weight.size]
        np.testing.assert_array_equal(whole, values.reshape(shape))
    for rows in (slice(1, None), slice(0, 1), np.array([shape[0] - 1, 0])):
        np.testing.assert_array_equal(formats.dequantize(blocks, rows), whole[rows])


@pytest.mark.parametrize("values", [nf4.VALUES, fp4.VALUES], ids=FLAT)
def test_the_nearest_value_is_that_of_a_binary_search(values):
    order = np.argsort(values, kind="stable")
    middles = (values[order[:-1]] + values[order[1:]]) / np.float32(2)
    hard = [middles, values, (np.arange(nf4.BINS + 1) / (nf4.BINS / 2) - 1).astype(np.float32), np.float32([0.0, -0.0])]
    hard += [np.nextafter(a, np.float32(to)).clip(-1, 1) for a in hard[:3] for to in (-2, 2)]
    x = np.concatenate([*hard, np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)])
    found = nf4._nearest(values.tobytes())(x)
    np.testing.assert_array_equal(found, order[np.searchsorted(middles, x)])
    with pytest.raises(ValueError, match="too near"):
        nf4._nearest(np.linspace(0, 1e-3, 16, dtype=np.float32).tobytes())


def test_nf4_midpoints_go_to_the_smaller_value():
    module = FORMATS["nf4"].module
    middles = (module.VALUES[:-1] + module.VALUES[1:]) / np.float32(2)
    beside = [middles, np.nextafter(middles, np.float32(2)), np.nextafter(middles, np.float32(-2))]
    codes = [module.quantize(np.append(m, np.float32(1))[None])["codes"][0, :-1] for m in beside]
    np.testing.assert_array_equal(codes[0], np.arange(15))
    np.testing.assert_array_equal(codes[1], np.arange(1, 16))
    np.testing.assert_array_equal(codes[2], np.arange(15))


@pytest.mark.parametrize("name", ["int4", "matmulnbits"])
def test_zero_points_hold_zero_exactly_and_serve_one_sided_blocks(name):
    weight = np.abs(weights()) + np.float32(0.001)
    weight[:, ::5] = 0
    symmetric, asymmetric = (formats.quantize(weight, name, 32, symmetric=s) for s in (True, False))
    assert not formats.dequantize(asymmetric)[:, ::5].any()
    errors = [formats.error_between(weight, formats.dequantize(b)).rms for b in (symmetric, asymmetric)]
    assert errors[1] < 0.6 * errors[0]
    assert asymmetric.bits_per_weight == symmetric.bits_per_weight + 4 / 32


def test_int4_axes_and_granularities():
    weight = weights(shape=(64, 96))
    down = formats.quantize(weight, "int4", 32, axis=0)
    along = formats.quantize(np.ascontiguousarray(weight.T), "int4", 32)
    np.testing.assert_array_equal(formats.dequantize(down), formats.dequantize(along).T)
    np.testing.assert_array_equal(formats.dequantize(down, slice(3, 9)), formats.dequantize(down)[3:9])
    assert down.packed.shape == (64, 48) and down.scales.shape == (2, 96)
    channel, tensor = formats.quantize(weight, "int4", "channel"), formats.quantize(weight, "int4", "tensor")
    assert channel.scales.shape == (64, 1) and tensor.scales.shape == (1,)
    for blocks, largest in ((channel, np.abs(weight).max(1, keepdims=True)), (tensor, np.abs(weight).max())):
        scale = largest / np.float32(7)
        np.testing.assert_array_equal(formats.dequantize(blocks), np.rint(weight / scale) * scale)


def test_lpbq_is_int4_whose_scales_are_multiples_of_the_rows():
    weight = weights(shape=(5, 256))
    weight[:, :64] *= np.float32(0.01)  # blocks that would need less than a sixteenth of the row's largest scale
    blocks = formats.quantize(weight, "lpbq", 64)
    integers = blocks.extra["block_scales"]
    assert integers.max(1).tolist() == [16] * 5 and (integers[:, 0] == 1).all()
    scale = np.repeat((integers * blocks.scales).astype(np.float32), 64, axis=1)
    np.testing.assert_array_equal(formats.dequantize(blocks), blocks.codes * scale)
    assert blocks.bits_per_weight == 4 + 4 / 64 + 64 / 256


def test_lpbq_rounds_as_aimet_does():
    # halves go up, after 8 was added in float32: which makes 8.5 of 8.49999997
    row = np.array([[7, -7.5, -0.5, 0.5, 0.49999997, 0.4999, -8.0, 0.0]], np.float32)
    parts = lpbq.quantize(row, 8)
    assert parts["codes"][0].tolist() == [7, -7, 0, 1, 1, 0, -8, 0]
    grid = affine.for_weight(row, 4, 8, lpbq=True)
    np.testing.assert_array_equal(lpbq.dequantize(**parts), affine.fake_quantize(row, grid))
    # the steps of many rows, to the last bit: a row's scale is not rounded before the block's integer multiplies it
    weight = weights(shape=(64, 512))
    blocks, grid = formats.quantize(weight, "lpbq", 64), affine.for_weight(weight, 4, 64, lpbq=True)
    steps = np.asarray(grid.block_scale, np.float32) * grid.scale.astype(np.float32)[:, None]
    assert (steps != grid.steps.astype(np.float32)).any(), "the order of the roundings shows on these rows"
    np.testing.assert_array_equal(formats.dequantize(blocks), affine.fake_quantize(weight, grid))
    np.testing.assert_array_equal(blocks.codes, affine.integers(weight, grid))


# Bytes of the engines ------------------------------------------------------------------------------------------------

# gguf 0.19.0: gguf.quants.quantize(ramp(), GGMLQuantizationType.<name>): the first 24 bytes, and sha256 of all
GGUF = {
    "q4_0": ("4032f258be1379df359bf147ac0268ce248a40b253fd9731", "c1ee4701bc191f09"),
    "q4_1": ("893240bef257bd1379cf358ae146ac0268bd24797732e0bd", "3a82b8b5559d77af"),
    "q8_0": ("4d229dfb59b61472d02e8be947a50361be1c7ad73593f14f", "5edb3f57af84520f"),
    "mxfp4": ("7d7ec056fe9267ec147fda35feb056ed937d46fea267ec14", "47a5c85220951050"),
}


@pytest.mark.parametrize("name", GGUF)
def test_bytes_of_gguf(name):
    raw = gguf.to_bytes(formats.quantize(ramp(), name))
    assert (raw.tobytes()[:24].hex(), sha(raw)) == GGUF[name]


def test_nvfp4_stands_for_what_gguf_reads():
    # gguf 0.19.0: gguf.quants.dequantize(raw, GGMLQuantizationType.NVFP4)
    raw = ((np.arange(72) * 89 + 7) % 127).astype(np.uint8)[None]
    blocks = gguf.from_bytes(raw, "nvfp4")
    values = formats.dequantize(blocks)
    np.testing.assert_array_equal(values[0, :4], np.array([-0.041015625, 0.08203125, 0.0068359375, -0.013671875]))
    assert sha(values) == "1f04ed2da6293680" and (gguf.to_bytes(blocks) == raw).all()


@pytest.mark.parametrize(
    "name, wrong, said",
    [("mxfp4", 255, "numbers from 255 to 255, expected 0 to 254"), ("nvfp4", 127, "expected 0 to 126")],
)
def test_a_scale_that_is_no_number_is_refused(name, wrong, said):
    blocks = formats.quantize(weights(), name)
    blocks.scales[:] = wrong
    with pytest.raises(ValueError, match=said):
        formats.from_arrays(blocks.header(), blocks.arrays())


def test_nvfp4_refuses_what_its_scales_do_not_reach():
    with pytest.raises(ValueError, match="nvfp4 reaches 2688"):
        formats.quantize(np.full((1, 16), 3000, np.float32), "nvfp4")
    largest = formats.quantize(np.full((1, 16), 2688, np.float32), "nvfp4")
    np.testing.assert_array_equal(formats.dequantize(largest), np.full((1, 16), 2688, np.float32))


def test_q4_k_stands_for_what_gguf_reads():
    # gguf 0.19.0: gguf.quants.dequantize(raw, GGMLQuantizationType.Q4_K)
    raw = ((np.arange(144) * 89 + 7) % 256).astype(np.uint8)
    raw[:4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    blocks = gguf.from_bytes(raw[None], "q4_k")
    values = formats.dequantize(blocks)
    np.testing.assert_array_equal(values[0, :4], np.array([2.710579, -0.3000641, 3.5707626, 0.5601196], np.float32))
    assert sha(values) == "248170172e466350"
    np.testing.assert_array_equal(gguf.to_bytes(blocks), raw[None])


# onnxruntime 1.31.1: quantize_matmul_4bits of 2 rows of 80, filled up to 96 with zeros, blocks of 32: the first block,
# sha256 of all blocks, the scales of the first row, and the packed zero points
MATMULNBITS = {
    True: ("823ef9b5712ce8a45f1bd7934f0ac682", "cdac1b16745cef54", [0.1953125, -0.1953125, 0.1875], None),
    False: (
        "824df9b5712ce8a46f1bd7934e0ac682", "3a30be0c5e273073", [0.20416667, 0.20208333, 0.19583334],
        [[120, 136], [120, 136]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("symmetric", MATMULNBITS)
def test_bytes_of_onnxruntime(symmetric):
    weight = ramp(2, 128)[:, :80]
    blocks = formats.quantize(weight, "matmulnbits", 32, symmetric=symmetric)
    made = matmulnbits.tensors(blocks.packed, blocks.scales, 32, blocks.zero_points)
    first, all_, scales, zero_points = MATMULNBITS[symmetric]
    assert made["B"].shape == (2, 3, 16) and (made["B"][0, 0].tobytes().hex(), sha(made["B"])) == (first, all_)
    np.testing.assert_array_equal(made["scales"][0], np.array(scales, np.float32))
    assert ("zero_points" in made) != symmetric
    if zero_points:
        assert made["zero_points"].tolist() == zero_points
    back = matmulnbits.from_tensors(**made)
    again = formats.from_arrays(blocks.header(), back)
    np.testing.assert_array_equal(formats.dequantize(again), formats.dequantize(blocks))


# bitsandbytes 0.50.2, CPU: quantize_4bit(ramp(1, 138).reshape(2, 69), blocksize=64, compress_statistics=True): the
# first 16 bytes and sha256 of the codes; both have the same scales
BITSANDBYTES = {
    "nf4": ("17e29f3b05d17e2af4c06d18e2a04c16", "67aecf314e7358be"),
    "fp4": ("a92d63c4be5a12d73c5be2a12d7bf5a9", "0598bdeb94acaca4"),
}


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bytes_of_bitsandbytes(name):
    weight = ramp(1, 138).reshape(2, 69)
    single, double = (formats.quantize(weight, name, 64, double=d) for d in (False, True))
    for blocks in (single, double):
        assert (blocks.packed.tobytes()[:16].hex(), sha(blocks.packed)) == BITSANDBYTES[name]
    assert single.scales.tolist() == [1.5625, 1.53125, 1.5625]
    assert double.scales.tolist() == [219, 0, 219]
    assert float(double.extra["offset"]) == 1.5520833730697632
    assert double.extra["nested_scales"].tolist() == [0.020833373069763184]
    assert sha(dynamic8.VALUES) == DYNAMIC8  # create_dynamic_map()


DYNAMIC8 = "e732639a65f497b4"


def test_an_incomplete_block_is_divided_by_its_scale():
    # bitsandbytes 0.50.2, CPU: of these numbers the reciprocal makes code 10, the division code 9
    pair = [0.109375, 0.022260137]
    weight = np.array([[*pair, *62 * [0], *pair, 0]], np.float32)
    blocks = formats.quantize(weight, "nf4", 64)
    assert blocks.packed[[0, 32, 33]].tolist() == [0xFA, 0xF9, 0x77]
    # and an incomplete block of zeros has a scale, a complete one has none
    zeros = formats.quantize(np.zeros((1, 67), np.float32), "nf4", 64)
    assert zeros.scales.tolist() == [0.0, 9.999999350456404e-39] and (zeros.packed == 0x77).all()
    assert not formats.quantize(np.zeros((1, 67), np.float32), "fp4", 64).packed.any()


def test_scales_of_scales_are_bitsandbytes_own():
    # bitsandbytes 0.50.2, CPU: quantize_blockwise(x, blocksize=256), x beside the midpoints of the values
    middles = (dynamic8.VALUES[:-1] + dynamic8.VALUES[1:]) / np.float32(2)
    shas = {-3e-5: "1174c17f48259ce6", -1e-5: "97f468f969896c14", 0.0: "b774a9171790b7a2", 1e-5: "97b9dc2d868c92ea"}
    for beside, expected in shas.items():
        x = np.append(middles + np.float32(beside), np.float32(1))
        assert sha(dynamic8.quantize(x[None])["codes"]) == expected
    assert dynamic8.quantize(np.zeros((1, 256), np.float32))["codes"].max() == 0
    # PyTorch 2.13.0, one thread: tensor.mean()
    means = {7: 0.3725665509700775, 33: 0.3439086675643921, 2500: 0.33386877179145813, 10000: 0.3333582878112793}
    for count, expected in means.items():
        x = ((np.arange(count) * 7919 % 10007).astype(np.float32) / np.float32(10007)) ** 2
        assert float(dynamic8.mean(x)) == expected


def test_halves_are_rounded_as_each_format_does():
    halves = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], np.float32)
    blocks = {n: np.concatenate([halves, np.full((1, 26), s, np.float32)], 1) for n, s in (("int4", 7), ("q8_0", 127))}
    assert int4.quantize(blocks["int4"])["codes"][0, :6].tolist() == [0, 2, 2, 0, -2, -2]
    assert FORMATS["q8_0"].module.quantize(blocks["q8_0"])["codes"][0, :6].tolist() == [1, 2, 3, -1, -2, -3]
    # a zero point of -8 + 2.5, with a scale of 1
    parts = int4.quantize(np.array([[-2.5, 12.5, 0, 1]], np.float32), symmetric=False)
    assert parts["scales"] == 1 and parts["zero_points"] == -6 and parts["codes"].tolist() == [[-8, 6, -6, -5]]


@pytest.mark.parametrize("weighed", [False, True])
def test_q4_k_takes_the_best_of_nine_pairs_of_six_bit_numbers(weighed):
    x = weights(shape=(4, 256))
    importance = np.random.default_rng(1).lognormal(size=x.shape).astype(np.float32) if weighed else None
    parts = q4_k.quantize(x, importance=importance)
    subs, weigh = x.reshape(-1, 32), None if importance is None else importance.reshape(-1, 32)
    low = np.minimum(subs.min(1, keepdims=True), 0)
    spans = search.trials((subs.max(1) - low[:, 0]) / np.float32(15), 8, *search.LINE_FACTORS)
    _, scales, mins, _ = search.best_lines(subs, spans, low.T, weigh, search.FITS, 0.0)
    moved = 0
    for i, block in enumerate(subs.astype(np.float64)):
        d, dmin = (float(parts[name][i // 8, 0]) for name in ("scales", "dmins"))
        near = round(float(scales[i, 0]) / d), round(-float(mins[i, 0]) / dmin)

        def error(pair, block=block, i=i, d=d, dmin=dmin):
            scale, least = (np.float64(np.float32(a * b)) for a, b in zip((d, dmin), pair, strict=True))
            codes = np.clip(np.rint((block + least) / scale), 0, 15)
            return float(np.sum((1 if weigh is None else weigh[i]) * (block - scale * codes + least) ** 2))

        around = [(near[0] + a, near[1] + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        around = [pair for pair in around if 0 < pair[0] <= 63 and 0 <= pair[1] <= 63]
        chosen = int(parts["sub_scales"].flat[i]), int(parts["sub_mins"].flat[i])
        # in float32 a distance w - w' is off by about 2^-24 |w|, and w is some 30 times as large
        assert error(chosen) <= min(map(error, around)) * (1 + 1e-5), (i, chosen, near)
        moved += chosen != near
    assert moved > len(subs) / 4, "a neighbour is often better than the rounded pair"


def test_q4_k_of_one_sided_weights():
    weight = np.abs(weights(7, (4, 512), 1.0))
    for sided in (weight + 5, -weight - 5, weight):
        blocks = formats.quantize(sided, "q4_k")
        plain = formats.dequantize(formats.quantize(sided, "q4_k", search=0))
        error = formats.error_between(sided, formats.dequantize(blocks))
        assert error.rms <= formats.error_between(sided, plain).rms


def test_int8_bytes_of_bitsandbytes():
    # bitsandbytes 0.50.2, CPU: int8_vectorwise_quant of the same matrix as float16
    parts = FORMATS["int8"].module.quantize(ramp(1, 138).reshape(2, 69))
    assert parts["codes"][0, :8].tolist() == [-99, -5, 89, -74, 20, 114, -48, 46]
    assert sha(parts["codes"]) == "b3f35ed147883b01" and parts["scales"].tolist() == [[1.5625], [1.5625]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_qlinear_reproduces_the_recording(shared, dtype):
    recorded = load_file(shared / "golden" / "quant-v1-qlinear.safetensors")
    short = {"float32": "f32", "float16": "fp16", "bfloat16": "bf16"}[dtype]
    eight, four = (formats.quantize(recorded["W"], f"qlinear{bits}", dtype=dtype) for bits in (8, 4))
    np.testing.assert_array_equal(eight.codes.T, recorded[f"int8.{short}.weight_T"])
    np.testing.assert_array_equal(four.packed.view("<i4"), recorded[f"int4.{short}.packed"])
    for blocks, bits in ((eight, 8), (four, 4)):
        np.testing.assert_array_equal(blocks.scales[:, 0], recorded[f"int{bits}.{short}.scale"])
    x = recorded["x"].astype(ml_dtypes.bfloat16 if short == "bf16" else dtype)
    out, want = qlinear8.linear(x, eight.codes, eight.scales), recorded[f"int8.{short}.out"]
    if short == "f32":
        np.testing.assert_allclose(out, want, rtol=0, atol=64 * 2.0**-24 * np.abs(want).max())  # another order of sums
    else:
        np.testing.assert_array_equal(out, want)


# Packing -------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(NAMES), st.integers(1, 4), st.integers(1, 3), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_packing_is_undone(name, rows, blocks, random):
    form = FORMATS[name]
    columns = blocks * (form.block_sizes[-1] if form.block_sizes else random.choice([1, 7, 32, 33]))
    signed = form.code_dtype == "int8" or name in ("int4", "lpbq", "qlinear4")
    low, high = ((-128, 128) if form.code_dtype == "int8" else (-8, 8)) if signed else (0, 16)
    rng = np.random.default_rng(random.randrange(1 << 32))
    codes = rng.integers(low, high, (rows, columns)).astype(np.int8 if signed else np.uint8)
    packed = form.module.pack(codes)
    assert packed.nbytes == rows * (columns if form.code_dtype == "int8" else -(-columns // 2))
    back = form.module.unpack(packed, columns)
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)


@given(st.lists(st.integers(0, 63), min_size=16, max_size=16))
@settings(max_examples=50, deadline=None)
def test_six_bit_numbers_are_undone(numbers):
    six = np.array(numbers, np.uint8).reshape(2, 1, 8)
    packed = q4_k.pack_six_bits(*six)
    assert packed.shape == (1, 12)
    np.testing.assert_array_equal(np.stack(q4_k.unpack_six_bits(packed)), six)


# In memory and in files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("double", [False, True])
def test_a_file_gives_back_the_same_blocks(name, double):
    if double and name not in FLAT:
        return
    blocks = formats.quantize(weights(shape=(4, 512)), name, double=double)
    header, arrays = json.loads(json.dumps(blocks.header())), blocks.arrays()
    again = formats.from_arrays(header, arrays)
    assert again.header() == blocks.header() and again.bits_per_weight == blocks.bits_per_weight
    np.testing.assert_array_equal(formats.dequantize(again), formats.dequantize(blocks))
    for part in arrays:
        if part in formats.TABLES or part == "offset":
            continue
        short = {**arrays, part: arrays[part][..., :-1]}
        with pytest.raises(ValueError, match=rf"^{part} of {name} .* expected .* cut short"):
            formats.from_arrays(header, short)
    with pytest.raises(ValueError, match="has no array 'scales'"):
        formats.from_arrays(header, {"packed": arrays["packed"]})
    with pytest.raises(ValueError, match="has no part called 'color'"):
        formats.from_arrays(header, {**arrays, "color": arrays["packed"]})


def placed(weight, step, name, *arguments, **options):
    """The arrays of a matrix that is quantized in tiles of `step` rows."""
    _, arrays = formats.layout(name, weight.shape, *arguments, **options)
    whole = {part: np.zeros(size, dtype) for part, (size, dtype) in arrays.items()}
    for row in range(0, len(weight), step):
        tile = formats.quantize(weight[row : row + step], name, *arguments, **options)
        formats.place(tile, whole, row, len(weight))
    return whole


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [256, 768])
def test_tiles_are_placed_in_the_matrix(name, columns):
    weight = weights(shape=(9, columns))
    whole = formats.quantize(weight, name)
    for part, array in placed(weight, 2 * formats.tile_rows(name, columns), name).items():
        np.testing.assert_array_equal(array, whole.arrays()[part])


def test_tiles_of_flattened_blocks_end_on_a_block():
    assert formats.tile_rows("nf4", 96, 64) == 2 and formats.tile_rows("nf4", 37) == 64
    weight = weights(shape=(7, 95))
    whole = formats.quantize(weight, "nf4", 19)
    assert formats.tile_rows("nf4", 95, 19) == 2
    for part, array in placed(weight, 2, "nf4", 19).items():
        np.testing.assert_array_equal(array, whole.arrays()[part])


def test_tiles_of_columns_end_on_a_block():
    weight, options = weights(shape=(24, 10)), dict(axis=0, symmetric=False)
    whole = formats.quantize(weight, "int4", 4, **options)
    assert formats.tile_rows("int4", 10, 4, axis=0) == 4
    for part, array in placed(weight, 8, "int4", 4, **options).items():
        np.testing.assert_array_equal(array, whole.arrays()[part])


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in NAMES]
    + [("int4", dict(block_size=16, symmetric=False)), ("int4", dict(block_size=3, axis=0, symmetric=False))]
    + [("int4", dict(block_size="tensor")), ("int4", dict(block_size="channel")), ("matmulnbits", dict(block_size=128))]
    + [("nf4", dict(block_size=100, double=True)), ("fp4", dict(double=True)), ("lpbq", dict(block_size=32))],
)
def test_a_layout_is_known_before_the_weights(name, options):
    blocks = formats.quantize(weights(shape=(9, 256)), name, **options)
    header, arrays = formats.layout(name, (9, 256), **options)
    assert header == blocks.header()
    assert arrays == {part: (array.shape, array.dtype) for part, array in blocks.arrays().items()}


@pytest.mark.parametrize("options", [dict(symmetric=False), dict(double=True), dict(axis=0), dict(block_size=48)])
def test_a_layout_refuses_what_the_quantizer_refuses(options):
    with pytest.raises(ValueError, match="q4_0") as one:
        formats.layout("q4_0", (6, 512), **options)
    with pytest.raises(ValueError, match="q4_0") as other:
        formats.quantize(weights(), "q4_0", **options)
    assert str(one.value).split(";")[0][-20:] == str(other.value).split(";")[0][-20:]


def test_bits_per_weight():
    weight = weights(shape=(32, 4096))
    table = {name: formats.quantize(weight, name).bits_per_weight for name in NAMES}
    row = 32 / 4096
    assert table == {
        "int4": 5, "nf4": 4.5, "fp4": 4.5, "int8": 8 + row, "q4_0": 4.5, "q4_1": 5, "q4_k": 4.5, "q8_0": 8.5,
        "matmulnbits": 5, "lpbq": 4 + 4 / 64 + 2 * row, "mxfp4": 4.25, "nvfp4": 4.5,
        "qlinear8": 8 + row, "qlinear4": 4 + row,
    }  # fmt: skip
    double = formats.quantize(weight, "nf4", double=True).bits_per_weight
    assert double == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    for name in gguf.FORMATS:
        assert gguf.to_bytes(formats.quantize(weight, name)).size * 8 == table[name] * weight.size


@pytest.mark.parametrize("name", ["q4_0", "q4_k"])
def test_transcoding_says_what_it_adds(name):
    first = formats.quantize(weights(), "nf4")
    second, error = formats.transcode(first, name)
    a, b = formats.dequantize(first).astype(np.float64), formats.dequantize(second).astype(np.float64)
    assert error.rms == np.sqrt(np.mean((a - b) ** 2)) and error.max_abs == np.abs(a - b).max()
    assert error.changed == np.mean(a != b) and error.relative == error.rms / np.sqrt(np.mean(a**2))
    _, none = formats.transcode(second, name) if name == "q4_0" else (None, formats.AddedError(0, 0, 0, 0))
    assert none.relative < 1e-3


def test_transcoding_int4_to_matmulnbits_loses_nothing_where_the_scales_are_given():
    blocks = formats.quantize(weights(), "int4", 32)
    codes = (blocks.codes + 8).astype(np.uint8)
    same = formats.from_arrays(
        {**blocks.header(), "format": "matmulnbits"}, {"packed": matmulnbits.pack(codes), "scales": blocks.scales}
    )
    np.testing.assert_array_equal(formats.dequantize(same), formats.dequantize(blocks))


# Better than rounding to nearest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_makes_no_block_worse_and_most_better(name):
    weight = np.random.default_rng(3).standard_t(4, (16, 512)).astype(np.float32)
    plain, searched = (formats.dequantize(formats.quantize(weight, name, search=s)) for s in (0, 16))
    unit = 512 if FORMATS[name].whole_row else 256
    errors = [((weight - back).astype(np.float64) ** 2).reshape(-1, unit).sum(1) for back in (plain, searched)]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < 0.97 * errors[0].sum()


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_error_that_matters(name):
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((16, 512)).astype(np.float32)
    x = rng.standard_normal((64, 512)).astype(np.float32) * np.exp(rng.standard_normal(512)).astype(np.float32)
    importance = search.importance_of(x)
    blind, aware = (formats.quantize(weight, name, search=16, importance=i) for i in (None, importance))
    cost = [float((np.square(weight - formats.dequantize(b)) * importance).sum()) for b in (blind, aware)]
    assert cost[1] < 0.95 * cost[0]
    outputs = [np.square(x @ (weight - formats.dequantize(b)).T).sum() for b in (blind, aware)]
    assert outputs[1] < outputs[0]


def test_the_search_of_one_scale_is_near_the_best_of_all():
    block = np.random.default_rng(5).standard_normal((1, 32)).astype(np.float32)
    found = formats.error_between(block, formats.dequantize(formats.quantize(block, "int4", search=24))).rms
    scales = np.linspace(0.5, 1.2, 20001, dtype=np.float32)[:, None] * np.abs(block).max() / np.float32(7)
    rounded = scales * np.rint(block / scales).clip(-8, 7)
    assert found <= np.sqrt(np.square(block - rounded).mean(-1).min()) * 1.01


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(format="int3"), "the format is 'int3', expected one of int4, nf4"),
        (
            dict(format="int4", block_size=48),
            "row length 512 is not a multiple of block_size 48; 16, 32, 64",
        ),
        (dict(format="int4", block_size=5, axis=0), "column length 6 is not a multiple of block_size 5"),
        (dict(format="int4", block_size=0), "block_size is 0, expected a positive number"),
        (dict(format="int4", block_size="rows"), "block_size is 'rows', expected a positive number"),
        (dict(format="int4", block_size=32.0), "block_size is 32.0, expected a positive number"),
        (dict(format="q4_0", block_size=64), "block_size 64 does not exist in q4_0; use 32"),
        (dict(format="q4_k", block_size=32), "block_size 32 does not exist in q4_k; use 256"),
        (dict(format="q4_0", block_size="tensor"), "block_size 'tensor' does not exist in q4_0"),
        (dict(format="int8", block_size=64), "int8 has one scale a row"),
        (dict(format="matmulnbits", block_size=24), "block_size 24 does not exist in matmulnbits"),
        (dict(format="nf4", block_size=4097), "block_size 4097 is more than the 3072 weights that there are; use 64"),
        (dict(format="lpbq", block_size=100), "row length 512 is not a multiple of block_size 100"),
        (dict(format="int4", axis="x"), "int4 has no axis 'x'; its axes: 1, 0"),
        (dict(format="int4", axis=1.0), "int4 has no axis 1.0"),
        (dict(format="q4_0", search=True), "search is True, expected how many scales to try"),
        (dict(format="int4", axis=2), "int4 has no axis 2; its axes: 1, 0"),
        (dict(format="q4_0", axis=0), "q4_0 has no axis 0; its axes: 1"),
        (dict(format="nf4", axis=1), "nf4 has no axis 1; its axes: none, its blocks run through the flattened matrix"),
        (dict(format="q8_0", search=4), "q8_0 has no option 'search'; its options: none"),
        (dict(format="q8_0", importance=np.ones(512)), "q8_0 has no option 'importance'"),
        (dict(format="q4_0", symmetric=False), "q4_0 has no option 'symmetric'; its options: search, importance"),
        (
            dict(format="q4_0", importance=np.ones(6), search=4),
            "shape .6,., expected one number for each of 512",
        ),
        (dict(format="q4_0", importance=-np.ones(512), search=4), "finite and not negative"),
        (dict(format="q4_0", search=-1), "search is -1, expected how many scales to try"),
        (dict(format="q4_0", search=2.5), "search is 2.5, expected how many scales to try"),
        (dict(format="q4_0", search=0, importance=np.ones(512)), "search is 0, expected .* above 0 for importance"),
        (dict(format="q4_0", double=True), "has no scales to quantize again"),
        (dict(format="qlinear8", dtype="float8"), "the weight's dtype is 'float8', expected one of float32"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        formats.quantize(weights(), **arguments)
    assert "\n" not in str(error.value)


def test_where_no_block_fits_another_way_is_said():
    message = "row length 13696 is not a multiple of block_size 256; use another format for this matrix, or keep it"
    with pytest.raises(ValueError, match=message):
        formats.layout("q4_k", (5120, 13696))


@pytest.mark.parametrize(
    ("options", "part", "limits"),
    [
        (dict(format="int4", symmetric=False), "zero_points", (-8, 7)),
        (dict(format="matmulnbits", symmetric=False), "zero_points", (0, 15)),
        (dict(format="lpbq"), "block_scales", (1, 16)),
        (dict(format="q4_k"), "sub_scales", (0, 63)),
        (dict(format="q4_k"), "sub_mins", (0, 63)),
    ],
)
def test_numbers_that_a_format_does_not_have_are_refused(options, part, limits):
    """They would wrap around in 8 bits, here in one way and there in another."""
    blocks = formats.quantize(weights(shape=(6, 512)), **options)
    arrays = blocks.arrays()
    for value in (*limits, limits[0] - 1, limits[1] + 1):
        changed = arrays[part].astype(int)
        changed[3, 1] = value
        changed = {**arrays, part: changed.astype(arrays[part].dtype)}
        if value in limits:
            formats.from_arrays(blocks.header(), changed)
            continue
        with pytest.raises(ValueError, match=f"{part} of .* expected {limits[0]} to {limits[1]}"):
            formats.from_arrays(blocks.header(), changed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(name, bad):
    weight = weights(shape=(2, 256))
    weight[1, 200] = bad
    with pytest.raises(ValueError, match="a weight is NaN or infinite"):
        formats.quantize(weight, name)
    with pytest.raises(ValueError, match="a weight is NaN or infinite"):
        formats.quantize(np.full((1, 256), 1e300), name)  # infinite as float32


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q4_k", "q8_0", "int8"])
def test_weights_too_large_for_a_float16_scale_are_refused(name):
    with pytest.raises(ValueError, match=r"overflows for weights as large as 1e\+30|beyond 65504"):
        formats.quantize(np.full((1, 256), 1e30, np.float32), name)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 32), (4, 0)])
def test_only_matrices_are_quantized(shape):
    with pytest.raises(ValueError, match="expected a matrix"):
        formats.quantize(np.zeros(shape, np.float32), "int4")


def test_numbers_with_an_imaginary_part_are_refused():
    with pytest.raises(ValueError, match="the weight is complex64 of shape"):
        formats.quantize(np.full((2, 64), 1 + 1j, np.complex64), "int4")


def test_bytes_that_are_not_whole_blocks_are_refused():
    raw = gguf.to_bytes(formats.quantize(ramp(), "q4_0"))
    with pytest.raises(ValueError, match="in blocks of 18 bytes; the tensor is cut short"):
        gguf.from_bytes(raw[:, :-1], "q4_0")
    with pytest.raises(ValueError, match="nf4 is not a format of GGUF"):
        gguf.from_bytes(raw, "nf4")
    with pytest.raises(ValueError, match="not made of whole rows"):
        formats.quantize(weights(), "nf4").rows(slice(0, 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_floats_are_taken_as_float32(name, dtype):
    weight = weights(shape=(2, 256)).astype(dtype)
    same = formats.quantize(weight.astype(np.float32), name)
    for part, array in formats.quantize(weight, name).arrays().items():
        np.testing.assert_array_equal(array, same.arrays()[part])
