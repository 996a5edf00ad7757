"""Checkpoints that bitsandbytes has quantized, and quantizing as it does, against what it recorded."""

import json
import tracemalloc
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch_bytes as tb
from conftest import write_checkpoint
from safetensors.numpy import load_file, save_file

import refimpl
from refimpl import InputError
from refimpl.checkpoint.bitsandbytes import collect
from refimpl.checkpoint.resolve import resolve
from refimpl.checkpoint.safetensors_files import map_safetensors
from refimpl.checkpoint.torch_files import map_torch
from refimpl.checkpoint.weights import Int8Weight, QuantizedWeight
from refimpl_kernels import formats
from refimpl_kernels.formats.int8 import outlier_columns
from refimpl_kernels.ops import NumPyOps

FLOAT16, FLOAT32, FLOAT64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
IDS = [5, 17, 9]
# The prompts of the recording, which does not tell them: the only ids whose logits are the recorded ones.
PROMPTS = {
    "p7": [195, 59, 32, 55, 300, 253, 196],
    "p33": [195, 85, 34, 104, 234, 222, 194, 314, 281, 142, 120, 0, 1, 156, 18, 78, 211, 168, 308, 138, 316, 289, 94, 
            309, 124, 303, 298, 117, 245, 61, 274, 114, 196],
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(shared):
    return load_file(shared / "golden" / "baichuan2-7b-tiny-odd-4bits.safetensors")


@pytest.fixture(scope="module")
def official(shared):
    return refimpl.load(shared / "models" / "baichuan2-7b-tiny-odd-4bits")


def test_the_official_checkpoint_reads_as_bitsandbytes_reads_it(official, recorded):
    keys = [key for key in recorded if key.startswith("deq_fp16.")]
    assert len(keys) == 5
    for key in keys:
        weight = official.weights[key.removeprefix("deq_fp16.")]
        assert np.array_equal(weight.read(FLOAT16), recorded[key])
        assert np.array_equal(weight.read(FLOAT32, slice(5, 9)), recorded[key][5:9].astype(np.float32))
        some = np.array([7, 3])
        assert np.array_equal(weight.read(FLOAT32, some), recorded[key][some].astype(np.float32))


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize(("dtype", "short", "bound"), [("float64", "f64", 1e-6), ("float32", "f32", 5e-5)])
@pytest.mark.parametrize("read", ["deq16", "deq32"])
def test_the_recorded_logits(official, recorded, case, dtype, short, bound, read):
    """Read back as float16, as the official code does it, and unrounded. float64 keeps float32's RoPE tables."""
    model = official
    if read == "deq32":
        unrounded = {n: QuantizedWeight(w.blocks) for n, w in model.weights.items() if isinstance(w, QuantizedWeight)}
        model = refimpl.Model(model.config, model.weights.replace(unrounded))
    difference = model(PROMPTS[case], dtype) - recorded[f"{short}.{read}.{case}.logits"]
    assert np.abs(difference).max() < bound


def test_nf4_of_what_nf4_stands_for_is_itself(official):
    """The codes exactly: the table's values are their own nearest. Rounding the scales again changes them a little."""
    again = official.quantize("nf4")
    for name, weight in official.weights.items():
        if isinstance(weight, QuantizedWeight):
            assert np.array_equal(again.weights[name].blocks.packed, weight.blocks.packed)
            before, after = weight.read(FLOAT32), again.weights[name].read(FLOAT32)
            assert np.abs(after - before).max() < 0.02 * np.abs(before).max()


# Both layouts that transformers writes, made of a random checkpoint


def serialized(name, blocks, dtype="bfloat16", **changed) -> dict[str, np.ndarray]:
    """A matrix as transformers saves bitsandbytes' Linear4bit."""
    state = {"quant_type": blocks.format, "blocksize": blocks.block_size, "dtype": dtype, "shape": list(blocks.shape)}
    parts = {"": blocks.packed.reshape(-1, 1), ".absmax": blocks.scales, ".quant_map": formats.nf4.VALUES}
    if "offset" in blocks.extra:
        state |= dict(nested_blocksize=256, nested_dtype="float32", nested_offset=float(blocks.extra["offset"]))
        parts[".nested_absmax"], parts[".nested_quant_map"] = blocks.extra["nested_scales"], blocks.extra["nested_code"]
    text = json.dumps(state | changed).encode()
    parts[f".quant_state.bitsandbytes__{blocks.format}"] = np.frombuffer(text, np.uint8)
    return {f"{name}{part}": array for part, array in parts.items()}


def quantized_folder(folder, make, **config):
    """A checkpoint whose layers' matrices are what `make(name, array)` gives, and a model of the same matrices."""
    write_checkpoint(folder, "Baichuan2-7B")
    tensors = load_file(folder / "model.safetensors")
    matrices = [n for n, a in tensors.items() if a.ndim == 2 and n.startswith("model.layers.")]
    parts = {key: part for n in matrices for key, part in make(n, tensors[n]).items()}
    save_file({n: a for n, a in tensors.items() if n not in matrices} | parts, folder / "model.safetensors")
    keys = json.loads((folder / "config.json").read_text())
    keys["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, **config}
    (folder / "config.json").write_text(json.dumps(keys))
    return folder, tensors


@pytest.mark.parametrize("double", [False, True])
def test_what_transformers_saves_in_4_bits(tmp_path, double):
    made = {}

    def make(name, array):
        made[name] = formats.quantize(array, "nf4", double=double)
        return serialized(name, made[name])

    model = refimpl.load(quantized_folder(tmp_path / "x", make)[0])
    for name, blocks in made.items():
        expected = formats.dequantize(blocks).astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(model.weights[name].read(FLOAT32), expected)
    assert model(IDS).shape == (1, 3, 96)


def test_what_transformers_saves_in_8_bits(tmp_path):
    def make(name, array):
        blocks = formats.quantize(array, "int8")
        at = name.removesuffix(".weight")
        extra = {f"{at}.SCB": blocks.scales.reshape(-1), f"{at}.weight_format": np.array(0, np.uint8)}
        return {name: blocks.packed, **extra}

    folder, tensors = quantized_folder(tmp_path / "x", make, load_in_8bit=True)
    write_checkpoint(tmp_path / "plain", "Baichuan2-7B")
    assert np.array_equal(refimpl.load(folder)(IDS), refimpl.load(tmp_path / "plain").quantize("int8")(IDS))
    assert len(tensors) == 17


def test_bitsandbytes_own_serialization(tmp_path):
    """Written by the library itself, where it is installed."""
    functional, torch = pytest.importorskip("bitsandbytes.functional"), pytest.importorskip("torch")
    made = {}

    def make(name, array):
        tensor = torch.from_numpy(array).to(torch.bfloat16)
        packed, state = functional.quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
        made[name] = functional.dequantize_4bit(packed, state).float().numpy()
        parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        return {key: value.numpy() for key, value in {name: packed, **parts}.items()}

    model = refimpl.load(quantized_folder(tmp_path / "x", make)[0])
    for name, values in made.items():
        assert np.array_equal(model.weights[name].read(FLOAT32), values)


def test_quantizing_as_the_official_code_does(tiny_model):
    model = tiny_model("Baichuan2-7B")
    for scheme, bits in (("nf4", 4), ("int8", 8)):
        small = model.quantize(scheme)
        changed = {n for n in model.weights if small.weights[n] is not model.weights[n]}
        assert changed == {n for n in model.weights if n.startswith("model.layers.") and "norm" not in n}
        for name in changed:
            weight = small.weights[name]
            half = model.weights[name].read(FLOAT16)
            expected = formats.quantize(half, scheme, double=True) if bits == 4 else formats.quantize(half, scheme)
            found = weight.blocks.arrays()
            assert found.keys() == expected.arrays().keys()
            assert all(np.array_equal(found[part], array) for part, array in expected.arrays().items())
            assert np.array_equal(weight.read(FLOAT64), formats.dequantize(expected).astype(np.float16))
    kept = model.quantize("nf4", keep=["*.down_proj"])
    assert not isinstance(kept.weights["model.layers.0.mlp.down_proj.weight"], QuantizedWeight)


def test_llm_int8_goldens(shared):
    """The recorded linears, through the weight that a model multiplies with."""
    recorded = load_file(shared / "golden" / "quant-int8.safetensors")
    names = {"f32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    blocks = formats.quantize(recorded["W_nozero"], "int8")
    assert np.array_equal(blocks.packed, recorded["CB_nozero"])
    weight = Int8Weight(blocks, FLOAT16)
    for short, dtype in names.items():
        x = recorded["x"].astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
        out = NumPyOps(dtype).linear(x, weight).astype(np.float64)
        expected = recorded[f"{short}.t6.out"].astype(np.float64)
        unit = {"f32": 2**-22, "bf16": 2**-7, "fp16": 2**-10}[short]
        assert np.abs(out - expected).max() <= unit * np.abs(expected).max()


def weights_before_nf4() -> dict[str, np.ndarray]:
    """The float32 weights that the 4-bit checkpoint was made of, which is not recorded: drawn once more, seed 102."""
    hidden, intermediate, vocabulary, layers = 96, 200, 317, 3
    rng = np.random.default_rng(102)
    outliers = rng.choice(hidden, 2, replace=False)

    def drawn(shape, scale, axis=None):
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        if axis is not None:
            np.moveaxis(values, axis, 0)[outliers] *= 20
        return values

    def gains(scale):
        values = (scale * (1 + 0.15 * rng.standard_normal(hidden))).astype(np.float32)
        values[outliers] *= 0.12
        values[rng.integers(hidden)] *= -1
        return values

    made = {"model.embed_tokens.weight": drawn((vocabulary, hidden), 0.08, 1)}
    for i in range(layers):
        root = np.sqrt(hidden)
        made |= {
            f"model.layers.{i}.self_attn.W_pack.weight": drawn((3 * hidden, hidden), 1.15 / root),
            f"model.layers.{i}.self_attn.o_proj.weight": drawn((hidden, hidden), 0.69 / root, 0),
            f"model.layers.{i}.mlp.gate_proj.weight": drawn((intermediate, hidden), 1.15 / root),
            f"model.layers.{i}.mlp.down_proj.weight": drawn((hidden, intermediate), 0.6 / np.sqrt(intermediate), 0),
            f"model.layers.{i}.mlp.up_proj.weight": drawn((intermediate, hidden), 1.15 / root),
            f"model.layers.{i}.input_layernorm.weight": gains(1),
            f"model.layers.{i}.post_attention_layernorm.weight": gains(1),
        }
    head = {"model.norm.weight": gains(2.5), "lm_head.weight": drawn((vocabulary, hidden), 0.1)}
    head["lm_head.weight"] *= np.exp(rng.uniform(-1.5, 1.5, (vocabulary, 1))).astype(np.float32)
    return made | head


@pytest.fixture(scope="module")
def before_nf4(official):
    """The model of these weights; that they are the ones is seen from the checkpoint, code by code."""
    tensors = weights_before_nf4()
    for name, weight in official.weights.items():
        half = tensors[name].astype(np.float16)
        if isinstance(weight, QuantizedWeight):
            expected = formats.quantize(half, "nf4", double=True).arrays()
            assert all(
                np.array_equal(array, expected[part])
                for part, array in weight.blocks.arrays().items()
                if part in expected
            )
        else:
            assert np.array_equal(weight.array, half)
    config = replace(official.config, quantized=False)
    return refimpl.Model(config, resolve(config, tensors))


@pytest.mark.parametrize("case", PROMPTS)
def test_the_recorded_logits_in_int8(before_nf4, recorded, case):
    """A model in LLM.int8 against bitsandbytes'. In float16 a last bit turns codes: no farther than from float32."""
    small = before_nf4.quantize("int8")
    exact, half = (recorded[f"int8_t6.{short}.{case}.logits"].astype(np.float64) for short in ("f32", "fp16"))
    assert np.abs(small(PROMPTS[case]) - exact).max() < 1e-5
    assert np.linalg.norm(small(PROMPTS[case], "float16") - half) < np.linalg.norm(half - exact)
    assert np.abs(before_nf4(PROMPTS[case]) - exact).max() > 0.05, "without quantizing it is another model"


def test_quantizing_online_gives_the_official_checkpoint(before_nf4, official, recorded):
    """`quantize("nf4")` of the float16 model: the checkpoint's bits, and so its recorded logits."""
    halves = {name: weight.array.astype(np.float16) for name, weight in before_nf4.weights.items()}
    small = refimpl.Model(before_nf4.config, resolve(before_nf4.config, halves)).quantize("nf4")
    for case, ids in PROMPTS.items():
        assert np.array_equal(small(ids), official(ids))
        assert np.abs(small(ids) - recorded[f"f32.deq16.{case}.logits"]).max() < 5e-5


def test_the_recorded_outliers(before_nf4, recorded):
    """How many columns of each linear's input reach 6.0."""
    trace = before_nf4.quantize("int8").trace(PROMPTS["p33"])
    taps = (
        "input_layernorm",
        "self_attn.context",
        "post_attention_layernorm",
        "post_attention_layernorm",
        "mlp.product",
    )
    inputs = [trace[f"model.layers.{i}.{tap}"].astype(np.float16) for i in range(3) for tap in taps]
    counts = [len(outlier_columns(x.reshape(-1, x.shape[-1]))) for x in inputs]
    assert counts == recorded["int8_t6.f32.outlier_columns_p33"].tolist() and sum(counts) > 0


def test_a_model_in_int8_quantizes_activations(tiny_model):
    """Its linear is not that of its values; without the rounding of activations it would be."""
    model = tiny_model("Qwen2-7B").quantize("int8")
    name = "model.layers.0.self_attn.q_proj"
    weight, bias = model.weights[f"{name}.weight"], model.weights[f"{name}.bias"]
    x = np.random.default_rng(0).standard_normal((1, 4, 64)).astype(np.float32)
    x[0, 2, 9] = 20  # an outlier, which is multiplied in full precision
    out = NumPyOps("float32").linear(x, weight, bias)
    plain = x @ weight.read(FLOAT32).T + bias.read(FLOAT32)
    error = np.abs(out - plain).max() / np.abs(plain).max()
    assert 1e-5 < error < 0.02
    model(IDS, "bfloat16"), model(IDS, "float64")


# What is refused


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("", None, "is not what bitsandbytes writes"),
        (".absmax", None, "scales"),
        (".absmax", np.zeros(3, np.uint8), "scales"),
        (".absmax", np.zeros((), np.uint8), "scales"),
        (".nested_absmax", np.zeros(9, np.float32), "nested_scales"),
        (".quant_map", np.zeros(15, np.float32), r"code of nf4 .* is float32"),
        (".nested_quant_map", np.zeros(100, np.float32), r"nested_code of nf4 .* is"),
        (".quant_state.bitsandbytes__nf4", np.frombuffer(b"{", np.uint8), "is not what bitsandbytes writes"),
        (".quant_state.bitsandbytes__nf4", np.frombuffer(b"{}", np.uint8), "lacks quant_type"),
        (".quant_state.bitsandbytes__nf4", np.frombuffer(b"[" * 4000, np.uint8), "lacks quant_type"),
        (".quant_state.bitsandbytes__nf4", np.frombuffer(b"\xff", np.uint8), "is not what bitsandbytes writes"),
        (".quant_state.bitsandbytes__nf4", np.broadcast_to(np.uint8(32), 1 << 24), "not JSON in 4096 bytes"),
        (".quant_state.bitsandbytes__nf4", np.zeros(4, np.float32), "not JSON in 4096 bytes"),
        ("", np.zeros((5, 1), np.uint8), "packed"),
    ],
)
def test_damaged_parts(tmp_path, part, value, message):
    victim = "model.layers.1.mlp.up_proj.weight"
    folder, _ = quantized_folder(tmp_path / "x", lambda n, a: serialized(n, formats.quantize(a, "nf4", double=True)))
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[victim + part]
    else:
        tensors[victim + part] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=message) as error:
        refimpl.load(folder)
    assert victim in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(shape=[64, 63]), "packed"),
        (dict(shape=[1, 2, 3]), "is not known"),
        (dict(shape=[-1, -2]), "is not known"),
        (dict(blocksize=0), "is not known"),
        (dict(blocksize="64"), "is not known"),
        (dict(nested_blocksize=128), r"nested_offset are \(128, "),
        (dict(nested_offset=None), "expected 256, 0.5"),
        (dict(nested_offset=10**400), "expected 256, 0.5"),
        (dict(nested_offset=1e300), "expected 256, 0.5"),
        (dict(shape=[2**23, 2**23]), "too few or too many"),
        (dict(shape=None), "lacks quant_type, shape"),
        (dict(quant_type=4), "lacks quant_type, shape"),
        (dict(note="x" * 5000), "not JSON in 4096 bytes"),
        (dict(quant_type="fp4"), "expected 'nf4'"),
        (dict(dtype="int8"), "'int8'"),
        (dict(shape=[128, 32]), r"has shape \(128, 32\), config.json"),
    ],
)
def test_states_that_lie(tmp_path, changed, message):
    def make(name, array):
        wrong = changed if name == "model.layers.0.self_attn.o_proj.weight" else {}
        return serialized(name, formats.quantize(array, "nf4", double=True), **wrong)

    with pytest.raises(InputError, match=message):
        refimpl.load(quantized_folder(tmp_path / "x", make)[0])


ONE, TABLE, HALF = np.ones(1, np.float32), np.zeros(16, np.float32), np.dtype(np.float16)
STATES = {  # of a matrix of 2 x 2
    "right": [ONE, (2, 2), HALF, 64, None, "nf4", TABLE],
    "nothing": [], "numbers": [1, 2, 3, 4, 5, 6, 7], "text": "text", "arrays": [np.zeros(1)] * 7, "none": [None] * 7,
    "scales of text": ["x", (2, 2), HALF, 64, None, "nf4", TABLE],
    "a size of text": [ONE, ("2", 2), HALF, 64, None, "nf4", TABLE],
    "made of flags": [ONE, (2, 2), np.dtype(bool), 64, None, "nf4", TABLE],
    "a kind of arrays": [ONE, (2, 2), HALF, 64, None, TABLE, TABLE],
    "a table of text": [ONE, (2, 2), HALF, 64, None, "nf4", "code"],
    "nested by text": [ONE, (2, 2), HALF, 64, ["x", [ONE, TABLE, 256]], "nf4", TABLE],
    "nested by an array": [ONE, (2, 2), HALF, 64, [ONE, [ONE, TABLE, np.ones(3)]], "nf4", TABLE],
    "nested otherwise": [ONE, (2, 2), HALF, 64, [ONE, [ONE, TABLE, 128]], "nf4", TABLE],
}  # fmt: skip


SMALL = refimpl.config.config_from_keys({
    "model_type": "baichuan", "vocab_size": 4, "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1,
    "num_attention_heads": 1, "max_position_embeddings": 4,
})  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_lists_that_are_no_quant_state(state):
    key = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InputError, match="lacks" if state == "right" else "is not what bitsandbytes writes"):
        resolve(SMALL, {f"{key}.data": np.zeros((2, 1), np.uint8), f"{key}.quant_state": STATES[state]})


@pytest.mark.parametrize(
    "parts",
    [
        {"": "text"}, {"": [1]}, {"": np.zeros((2, 2), np.uint8)}, {"": np.zeros(4, np.int8)}, {".SCB": "text"},
        {".SCB": np.ones((2, 1), np.float32)}, {".SCB": np.ones(3, np.float32)}, {".weight_format": np.array(2)},
        {"": np.zeros((2, 0), np.int8)},
    ],
)  # fmt: skip
def test_damaged_8_bits(parts):
    key = "model.layers.0.mlp.up_proj"
    right = {f"{key}.weight": np.zeros((2, 2), np.int8), f"{key}.SCB": np.ones(2, np.float32)}
    assert collect(right)[1].keys() == {f"{key}.weight"}
    with pytest.raises(InputError, match="is not what bitsandbytes writes"):
        collect(right | {f"{key}{part or '.weight'}": value for part, value in parts.items()})


@pytest.mark.parametrize(
    "names",
    [
        ("m.quant_state.bitsandbytes__nf4.data", "m.quant_state.bitsandbytes__nf4.quant_state"),
        ("m.SCB.data", "m.SCB.quant_state", "m.weight"),
        ("m.data", "m.quant_state", "m"),
        ("m.data", "m.quant_state", "m.data.data", "m.data.quant_state"),
    ],
)
def test_names_that_claim_each_other(names):
    """A name can be a part of two matrices; whichever takes it, there is no traceback."""
    values = {".data": np.zeros((2, 1), np.uint8), ".quant_state": STATES["right"]}
    for order in (names, names[::-1]):
        tensors = {name: values.get(name[name.rfind(".") :], np.zeros(2, np.float32)) for name in order}
        with pytest.raises(InputError):
            resolve(SMALL, tensors)


def test_a_few_bytes_that_stand_for_gigabytes(tmp_path):
    """Expanded codes are refused before they are written out."""
    size = tb.call(tb.name("torch", "Size"), (2**15, 2**16))
    state = [tb.tensor(), size, tb.name("torch", "float16"), 64, None, "nf4", tb.tensor()]
    codes = tb.tensor(tb.storage("1", "uint8", 1), 0, (2**30, 1), (0, 0))
    content = tb.saved(tb.pickled({"m.data": codes, "m.quant_state": state}), {"0": bytes(16), "1": b"x"})
    (tmp_path / "x.bin").write_bytes(content)
    tensors = map_torch(tmp_path / "x.bin")
    wide = {"m.weight": np.broadcast_to(np.int8(1), (2, 2)), "m.SCB": np.ones(2, np.float32)}
    wide["m.weight_format"] = np.broadcast_to(np.uint8(0), (2**30,))
    tracemalloc.start()
    with pytest.raises(InputError, match="its packed codes do not lie one after the other"):
        collect(tensors)
    with pytest.raises(InputError, match="is not an int8 matrix"):
        collect(wide)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_list_in_the_place_of_a_tensor(tmp_path):
    folder = write_checkpoint(tmp_path / "x", "Baichuan2-7B")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    whole = tb.state_dict(tensors)
    entry = tb.value("model.norm.weight") + tb.value([1])
    start = whole.index(tb.PROTO)
    pickle = whole[start : whole.index(tb.STOP + b"PK", start) + 1]
    storages = {str(k): a.tobytes() for k, a in enumerate(tensors.values())}
    changed = pickle.replace(tb.value("model.norm.weight"), entry + tb.value("x"))
    (folder / "pytorch_model.bin").write_bytes(tb.saved(changed, storages))
    with pytest.raises(InputError, match=r"model\.norm\.weight is a list, expected a tensor of shape \(64,\)"):
        refimpl.load(folder)


def test_config_and_weights_must_agree(tmp_path):
    folder, tensors = quantized_folder(tmp_path / "x", lambda n, a: serialized(n, formats.quantize(a, "nf4")))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="no matrix is quantized"):
        refimpl.load(folder)
    keys = json.loads((folder / "config.json").read_text())
    other = "quantization_config is not of bitsandbytes"
    four = {"load_in_4bit": True, "llm_int8_threshold": 4.0}
    for wrong, said in (({"quant_method": "gptq"}, "quantized by GPTQ"), (four, other), ({}, other), ([], other)):
        (folder / "config.json").write_text(json.dumps(keys | {"quantization_config": wrong}))
        with pytest.raises(InputError, match=said):
            refimpl.load(folder)


def test_a_quantized_head_is_refused(tmp_path):
    folder, _ = quantized_folder(tmp_path / "x", lambda n, a: serialized(n, formats.quantize(a, "nf4")))
    tensors = load_file(folder / "model.safetensors")
    tensors |= serialized("lm_head.weight", formats.quantize(tensors.pop("lm_head.weight"), "nf4"))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="expected the matrices of the layers alone"):
        refimpl.load(folder)
    assert map_safetensors(folder / "model.safetensors")["lm_head.weight"].dtype == np.uint8
