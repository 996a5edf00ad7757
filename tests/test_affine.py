"""Affine quantization against two engines, where they are installed, and against what was recorded from AIMET-ONNX.

The simulator's claim is about bits, so every tolerance here is zero.
"""

import numpy as np
import pytest

from refimpl_kernels.affine import Encoding, dequantize, fake_quantize, for_weight, from_range, quantize

F32 = np.float32
EPS = float(np.finfo(F32).eps)


def tensor(scale: float, offset: int, bits: int) -> Encoding:
    return Encoding(bits, np.float64(scale), np.float64(offset))


@pytest.fixture(scope="module")
def libpymo():
    """AIMET-ONNX's own kernel."""
    return pytest.importorskip("aimet_onnx.common.libpymo", reason="aimet-onnx is not installed")


def aimet(libpymo, encoding: Encoding, shape=()):
    """AIMET's quantizer with our encoding in it. A shape (O, 1) has one for each row."""
    steps = encoding.steps.reshape(-1)
    quantizer = libpymo.BlockTensorQuantizer(shape, encoding.bits, libpymo.QuantizationMode.QUANTIZATION_TF)
    theirs = []
    for scale in steps:
        one = libpymo.TfEncoding()
        offset = float(encoding.offset.reshape(-1)[0])
        one.delta, one.offset, one.bw = float(scale), offset, encoding.bits
        one.min, one.max = scale * offset, scale * (offset + 2**encoding.bits - 1)
        theirs.append(one)
    quantizer.setEncodings(theirs)
    return quantizer


# --- what was recorded: two properties and three examples, from AIMET-ONNX 2.42 ------------------------------------


def test_half_a_step_is_rounded_up():
    unit = tensor(1.0, -8, 4)
    x = np.array([-7.5, -1.5, -0.5, 0.5, 1.5, 6.5], F32)
    assert fake_quantize(x, unit).tolist() == [-7, -1, 0, 1, 2, 7]
    assert fake_quantize(x, unit, "even").tolist() == [-8, -2, 0, 0, 2, 6]


def test_adding_a_half_is_not_rounding():
    just_below = np.array([np.nextafter(F32(0.5), F32(0))])
    assert np.floor(just_below + F32(0.5)) == 1, "the trap is there"
    assert fake_quantize(just_below, tensor(1.0, 0, 8)) == 0


def test_ranges_of_the_recipe():
    assert from_range(-1, 1, 16).offset == -32768
    mask = from_range(-50, 0, 16)
    assert mask.offset == -65535 and mask.scale == 50 / 65535
    nothing = from_range(0, 0, 16)
    assert nothing.scale == EPS and nothing.offset == 0
    weight = from_range(np.array([-8.0, -1.0]), np.array([1.0, 7.0]), 4, symmetric=True)
    assert weight.scale.tolist() == [1, 1] and weight.offset.tolist() == [-8, -8], "-8 is a code of its own"


def test_a_common_shortcut_differs_as_often_as_was_recorded():
    """The recorded shares, of 2 000 000: rint 3972, float64 4039, reciprocal 480; a tenth as many values here.

    The values that were drawn are not on record, so the shares are compared within a factor of two.
    """
    x = (10 * np.random.default_rng(0).standard_normal(200_000)).astype(F32)
    s, o = F32(7.134e-4), F32(-40000)
    exact = fake_quantize(x, tensor(7.134e-4, -40000, 16))
    wide = np.floor(x.astype(np.float64) / 7.134e-4 + 40000 + 0.5)
    for name, code, expected in (
        ("rint", np.rint(x / s - o), 397),
        ("float64", wide, 404),
        ("reciprocal", np.floor(x * (F32(1) / s) - o + F32(0.5)), 48),
    ):
        share = int((s * (np.clip(code, 0, 65535).astype(F32) + o) != exact).sum())
        assert expected / 2 < share < expected * 2, f"{name}: {share}, recorded {expected}"


# --- AIMET-ONNX itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "offset", "bits"), [(7.134e-4, -40000, 16), (0.1, -128, 8), (1 / 3, -8, 4)])
def test_aimet_to_the_bit(libpymo, scale, offset, bits):
    encoding = tensor(scale, offset, bits)
    x = np.random.default_rng(1).uniform(encoding.low * 1.1, encoding.high * 1.1, 200_000).astype(F32)
    halves = (scale * (np.arange(offset, offset + min(2**bits, 4096)) + 0.5)).astype(F32)
    x = np.concatenate([x, halves, np.nextafter(halves, F32(0)), [F32("inf"), F32("-inf"), F32(0)]])
    assert np.array_equal(fake_quantize(x, encoding), aimet(libpymo, encoding).quantizeDequantize(x))


@pytest.mark.parametrize("block_size", [None, 16])
def test_aimets_rows_and_blocks_to_the_bit(libpymo, block_size):
    weight = np.random.default_rng(2).standard_normal((24, 64)).astype(F32)
    encoding = for_weight(weight, 4, block_size)
    quantizer = aimet(libpymo, encoding, (24, 64 // block_size if block_size else 1))
    assert np.array_equal(fake_quantize(weight, encoding), quantizer.quantizeDequantize(weight))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_aimets_encodings_of_ranges(libpymo, symmetric, bits):
    rng = np.random.default_rng(3)
    scale = 10 ** rng.uniform(-9, 4, 200)
    ranges = np.concatenate([rng.standard_normal((200, 2)) * scale[:, None], [[0, 0], [0, 1e-9], [-3, 0], [0, 5]]])
    for low, high in np.sort(ranges, axis=1).astype(F32):
        theirs = libpymo.BlockTensorQuantizer((), bits, libpymo.QuantizationMode.QUANTIZATION_TF)
        theirs.updateStats(np.array([low, high]))
        (expected,) = theirs.computeEncodings(symmetric)
        ours = from_range(low, high, bits, symmetric)
        assert (float(ours.scale), float(ours.offset)) == (expected.delta, expected.offset), (low, high)


def test_aimets_lpbq_scales():
    lpbq = pytest.importorskip("aimet_onnx.lpbq_utils", reason="aimet-onnx is not installed")
    weight = np.random.default_rng(4).standard_normal((24, 128)).astype(F32)
    fine, ours = for_weight(weight, 4, 32), for_weight(weight, 4, 32, lpbq=True)
    steps, scale = lpbq.grouped_dynamic_quantize(fine.scale, [1, -1], 4)
    assert np.array_equal(ours.block_scale, steps) and np.array_equal(ours.scale, scale.reshape(-1))
    assert np.array_equal(ours.steps, lpbq._compress_encoding_scales(fine.scale, [1, -1], 4))


# --- onnxruntime ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_half_even_is_onnxruntimes_rounding(kind):
    ort = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    bits = int(kind[4:])
    encoding = tensor(0.0371, -(3 * 2**bits // 8), bits)
    rng = np.random.default_rng(5)
    x = rng.uniform(encoding.low * 1.1, encoding.high * 1.1, 100_000).astype(F32)
    x[:4000] = (0.0371 * (np.arange(-50, 3950) / 2)).astype(F32)  # on codes and half-way between them
    dtype = getattr(TensorProto, kind.upper())
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "qdq", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(x)])],
        [helper.make_tensor_value_info(*o, [len(x)]) for o in (("q", dtype), ("y", TensorProto.FLOAT))],
        [helper.make_tensor("s", TensorProto.FLOAT, [], [0.0371]),
         helper.make_tensor("z", dtype, [], [-int(encoding.offset)])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    codes, values = session.run(["q", "y"], {"x": x})
    assert np.array_equal(quantize(x, encoding, "even"), codes)
    assert np.array_equal(fake_quantize(x, encoding, "even"), values)
    assert np.array_equal(dequantize(codes, encoding), values)
    assert (quantize(x, encoding) != codes).any(), "the modes differ on these values"


# --- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, True), (16, False), (16, True)])
def test_what_is_on_the_grid_stays(bits, symmetric):
    """Data that moves is quantized again with its own encoding, and must not change."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        encoding = from_range(-rng.exponential(), rng.exponential(), bits, symmetric)
        once = fake_quantize(rng.standard_normal(5000).astype(F32), encoding)
        assert np.array_equal(fake_quantize(once, encoding), once)
        assert np.array_equal(dequantize(quantize(once, encoding), encoding), once)


def test_nan_stays_nan():
    assert np.isnan(fake_quantize(np.array([np.nan], F32), tensor(1.0, 0, 8)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_range_must_be_finite(bad):
    with pytest.raises(ValueError, match="not finite"):
        from_range(0.0, bad, 8)


def test_blocks_must_fit():
    with pytest.raises(ValueError, match="row length 64 is not a multiple of block_size 48; 16, 32, 64 are"):
        for_weight(np.zeros((2, 64), F32), 4, 48)


def test_rows_alone_are_rows_of_the_whole():
    weight = np.random.default_rng(6).standard_normal((12, 64)).astype(F32)
    for encoding in (for_weight(weight, 4), for_weight(weight, 4, 16), for_weight(weight, 4, 16, lpbq=True)):
        whole = fake_quantize(weight, encoding)
        assert np.array_equal(fake_quantize(weight[3:7], encoding.rows(slice(3, 7))), whole[3:7])
        assert np.abs(whole - weight).max() <= encoding.steps.max() / 2 * (1 + 1e-6) or encoding.block_scale is not None
