"""The simulator against the formulas, exact integers, and onnxruntime and AIMET-ONNX on the same graph."""

import itertools
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import write_checkpoint

import refimpl
from export import emit
from export.files.encodings import as_json
from export.folder.goldens import Goldens
from export.graphs.grids import graph_encodings
from export.graphs.runs import simulate_graph
from golden.cost.predict import decibel, outcome_table, predict, what_if
from golden.cost.quality import quality
from golden.cost.reading import Reading
from refimpl import InputError, names
from refimpl.checkpoint.weights import Weight
from refimpl.grids.calibrate import calibrate
from refimpl.grids.encodings import Encodings, Float16, feature_grids, grid_of
from refimpl.grids.recipe import Recipe
from refimpl.grids.simulate import on_grid, on_grids
from refimpl_kernels.affine import fake_quantize, from_range, integers, quantize

F32 = np.float32
IDS = [5, 17, 9, 3, 80, 44, 2, 61, 9, 9, 33, 20]
TEXT = np.random.default_rng(0).integers(0, 96, 200)


@pytest.fixture
def encoded(tiny_model):
    """family, recipe -> a small model and its encodings."""

    def make(family, **recipe):
        model = tiny_model(family)
        return model, calibrate(model, TEXT, Recipe(**recipe))

    return make


def test_without_encodings_it_is_the_model(family, tiny_model):
    model = tiny_model(family)
    assert np.array_equal(model.simulate(Encodings({}))(IDS), model(IDS))


@pytest.mark.parametrize("integer", [False, True])
def test_every_tensor_stands_on_its_grid(family, encoded, integer):
    model, encodings = encoded(family)
    trace = model.simulate(encodings, integer=integer).trace(IDS)
    assert list(trace) == list(names.taps(model.config))
    for name, x in trace.items():
        assert x.dtype == F32
        if name.endswith("W_pack"):  # has parts on three grids
            grids = feature_grids(encodings, model.config, name)
            assert np.array_equal(on_grids(x, grids, "away"), x) and len(grids) == 3
            continue
        grid = grid_of(encodings, model.config, name)
        if grid is None:
            assert name == "model.embed_tokens" or name.endswith("v_proj")
            grid = encodings["model.embed_tokens.weight"] if "embed" in name else None
        if grid is not None:
            assert np.array_equal(fake_quantize(x, grid), x), name


def test_the_recipe_is_the_zoos(family, encoded):
    """The table of the recipe, row by row (AI Hub Models 0.46: default_config_llama.json and its LLM model.py)."""
    model, encodings = encoded(family)
    config, got = model.config, encodings.activations
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        for what in ("key", "value"):
            e = got[f"{at}.self_attn.{what}"]
            assert (e.bits, e.offset, e.symmetric) == (8, -128, True)
        assert got[f"{at}.self_attn.probs"] == from_range(0, 1, 16)
        for parameter in ("self_attn.o_proj", "mlp.down_proj", f"self_attn.{config.qkv_modules[0]}"):
            e = encodings[f"{at}.{parameter}.weight"]
            rows = model.weights[f"{at}.{parameter}.weight"].shape[0]
            assert (e.bits, e.scale.shape, set(e.offset.tolist())) == (4, (rows,), {-8.0})
    head = encodings["lm_head.weight"]
    assert (head.bits, head.scale.shape, set(head.offset.tolist())) == (8, (96,), {-128.0})
    mask = got["attention_mask"]
    assert (mask.scale, mask.offset) == (50 / 65535, -65535)
    assert ("position_ids_cos" in got) == bool(config.rope_theta)
    assert "model.embed_tokens" not in got, "what a Gather gives has none"
    assert not any(name.endswith(".bias") for name in encodings)
    eights = {name for name, e in got.items() if e.bits == 8}
    assert all(name.endswith((".key", ".value")) for name in eights)
    assert {e.bits for name, e in got.items() if name not in eights} == {16}


def test_the_mlp_by_hand(encoded):
    """One MLP written out, in the float32 steps of the recorded arithmetic."""
    model, encodings = encoded("Baichuan2-7B")
    simulated = model.simulate(encodings)
    at, trace = "model.layers.1.mlp", simulated.trace(IDS)

    def grid(name, x):
        e = encodings[name]
        scale, offset = F32(e.scale), F32(e.offset)
        v = (x.astype(F32) / scale - offset).astype(F32)
        r = np.floor(v)
        return scale * (np.clip(r + (v - r >= 0.5), 0, 2**e.bits - 1).astype(F32) + offset)

    x = trace["model.layers.1.post_attention_layernorm"]
    gate, up = (
        grid(f"{at}.{n}", x @ simulated.weights[f"{at}.{n}.weight"].read(F32).T) for n in ("gate_proj", "up_proj")
    )
    unit = F32(1) / F32(65535)
    sigmoid = unit * np.floor((1 / (1 + np.exp(-gate, dtype=F32))) / unit + F32(0.5))
    product = grid(f"{at}.product", grid(f"{at}.act_fn", gate * sigmoid) * up)
    for name, found in (("gate_proj", gate), ("up_proj", up), ("product", product)):
        # sums in another order may cross a half: one code, rarely
        codes = (found - trace[f"{at}.{name}"]) / F32(encodings[f"{at}.{name}"].scale)
        assert np.abs(codes).max() < 1.5 and (np.abs(codes) > 0.5).mean() < 0.01, name


def test_weights_alone_are_a_model_with_those_weights(encoded):
    model, encodings = encoded("Qwen2-7B", block_size=16)
    only = Encodings({}, encodings.parameters)
    arrays = {
        name: Weight(fake_quantize(model.weights[name].read(np.dtype(F32)), e)) for name, e in only.parameters.items()
    }
    plain = refimpl.Model(model.config, model.weights.replace(arrays))
    assert np.array_equal(model.simulate(only)(IDS), plain(IDS))


@pytest.mark.parametrize("recipe", [{}, {"block_size": 16}, {"block_size": 16, "lpbq": True}])
def test_integer_sums_are_exact(encoded, recipe):
    """Against int64 sums of the codes, block by block."""
    model, encodings = encoded("Baichuan2-7B", **recipe)
    trace = model.simulate(encodings, integer=True).trace(IDS)
    at = "model.layers.0"
    inputs, weight = encodings[f"{at}.mlp.product"], encodings[f"{at}.mlp.down_proj.weight"]
    x = integers(trace[f"{at}.mlp.product"], inputs)[0].astype(np.int64)
    w = integers(model.weights[f"{at}.mlp.down_proj.weight"].read(np.dtype(F32)), weight).astype(np.int64)
    size = weight.block_size or w.shape[1]
    starts = range(0, w.shape[1], size)
    sums = np.stack([x[:, s : s + size] @ w[:, s : s + size].T for s in starts], -1)  # (T, O, blocks), exact
    real = (sums * weight.steps.reshape(len(w), -1)).sum(-1) * float(inputs.scale)
    expected = fake_quantize(real.astype(F32)[None], encodings[f"{at}.mlp.down_proj"])
    assert np.array_equal(trace[f"{at}.mlp.down_proj"], expected)


def test_integer_attention_is_exact(family, encoded):
    model, encodings = encoded(family)
    trace = model.simulate(encodings, integer=True).trace(IDS)
    at, config = "model.layers.0.self_attn", model.config
    kinds = ("query", "key", "probs", "value")
    grids = {n: grid_of(encodings, config, f"{at}.{n}") for n in kinds}
    if not config.rope_theta:  # then queries are cut from W_pack
        ops = model.simulate(encodings).operations()
        ops.quantizing()(f"{at}.query", trace[f"{at}.query"])
        assert ops.grids["query"] == grids["query"] == encodings[f"{at}.W_pack"]
    q, k, p, v = (integers(trace[f"{at}.{n}"], grids[n]).astype(np.int64) for n in kinds)
    k, v = (np.repeat(x, config.num_attention_heads // config.num_key_value_heads, 1) for x in (k, v))
    scale = {n: float(grid.scale) for n, grid in grids.items()}
    scores = ((q @ k.transpose(0, 1, 3, 2)) * (scale["query"] * scale["key"])).astype(F32) * config.head_dim**-0.5
    assert np.array_equal(trace[f"{at}.scores"], fake_quantize(scores, encodings[f"{at}.scores"]))
    context = ((p @ v) * (scale["probs"] * scale["value"])).astype(F32).transpose(0, 2, 1, 3).reshape(1, len(IDS), -1)
    assert np.array_equal(trace[f"{at}.context"], fake_quantize(context, encodings[f"{at}.context"]))


def test_exact_sums_do_not_depend_on_who_sums(tmp_path):
    """The same bits with other BLAS kernels and more threads. (On a BLAS that is not OpenBLAS this says less.)"""
    folder = write_checkpoint(tmp_path / "model", "Baichuan2-7B", hidden_size=256, intermediate_size=512)
    code = (
        "import sys, hashlib, numpy as np, refimpl; from refimpl.grids import encodings, recipe as recipes\n"
        "from refimpl_kernels.affine import from_range; from refimpl.names import taps\n"
        "model = refimpl.load(sys.argv[1]); recipe = recipes.Recipe(); grids = recipe.inputs(model.config)\n"
        "for name in taps(model.config):\n"
        "    grid = recipe.activation(model.config, name)\n"
        "    if grid: grids[name] = from_range(*(grid.fixed or (-8, 8)), grid.bits, grid.symmetric)\n"
        "both = encodings.Encodings(grids, recipe.parameters(model.config, model.weights))\n"
        "for integer in (True, False):\n"
        "    trace = model.simulate(both, integer=integer).trace(np.arange(60))\n"
        "    print(hashlib.sha256(b''.join(x.tobytes() for x in trace.values())).hexdigest())"
    )

    def hashes(kernel, threads):
        env = {**os.environ, "OPENBLAS_CORETYPE": kernel, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        run = subprocess.run([sys.executable, "-c", code, folder], env=env, capture_output=True, text=True, check=True)
        return run.stdout.split()

    one, other = hashes("Prescott", "1"), hashes("Haswell", "2")
    assert one[0] == other[0]


def test_exact_and_float_sums_agree(family, encoded):
    """Fed with the same inputs, every tensor is the same but for a code where a sum lies at half a step."""
    model, encodings = encoded(family)
    reference = model.simulate(encodings).trace(IDS)
    exact = model.simulate(encodings, integer=True).trace(IDS, feed=reference)
    for name, encoding in encodings.activations.items():
        if name in exact:
            lsb = np.abs(exact[name] - reference[name]) / F32(encoding.scale)
            assert lsb.max() < 1.5 and (lsb > 0.5).mean() < 0.01, name


def test_the_hosts_tensors_stand_on_their_grids(family, encoded):
    model, encodings = encoded(family)
    simulated, ones = model.simulate(encodings), np.ones((1, 6), np.int64)
    ones[0, :2] = 0
    bias = simulated.attention_bias(ones, 6, F32)
    assert bias.min() == -50 and np.array_equal(fake_quantize(bias, encodings["attention_mask"]), bias)
    assert np.abs(bias - np.maximum(model.attention_bias(ones, 6, F32), -50)).max() <= 50 / 65535 / 2 * 1.01
    exact = model.position_tables(np.arange(6)[None], F32)
    for x, y in zip(simulated.position_tables(np.arange(6)[None], F32), exact, strict=True):
        assert (x is None) == (y is None) == (not model.config.rope_theta)
        if x is not None:
            assert 0 < np.abs(x - y).max() <= 1.01 * 2 / 65535, "1 is 32767 steps of 2 / 65535, half a step short"


def test_padding_on_the_left_changes_no_more_than_a_last_bit(family, encoded):
    model, encodings = encoded(family)
    simulated = model.simulate(encodings, integer=True)
    alone = simulated(IDS)[0]
    padded = simulated([0, 0, 0, *IDS], attention_mask=[[0, 0, 0, *[1] * len(IDS)]])[0, 3:]
    assert decibel(np.square(alone).sum(), np.square(alone - padded).sum()) > 60


def test_a_prompt_in_pieces_is_the_prompt_at_once(family, encoded):
    """The past is kept on the grid of the new. Masked keys weigh e^-50 instead of nothing, a last bit of a sum."""
    model, encodings = encoded(family)
    simulated = model.simulate(encodings, integer=True)
    with pytest.raises(InputError, match="keeps keys and values on its grids"):
        simulated.new_cache(dtype="int8")
    cache = simulated.new_cache()
    pieces = [simulated(IDS[a:b], cache=cache) for a, b in itertools.pairwise([0, 5, 6, len(IDS)])]
    whole = simulated(IDS)
    lsb = (np.concatenate(pieces, 1) - whole) / F32(encodings["lm_head"].scale)
    assert (
        np.median(np.abs(lsb)) < 0.5
        and decibel(np.square(whole).sum(), np.square(np.concatenate(pieces, 1) - whole).sum()) > 60
    )
    key = cache[0][0]
    assert np.array_equal(fake_quantize(key, encodings["model.layers.0.self_attn.key"]), key)


def test_more_bits_are_better(family, encoded):
    model, encodings = encoded(family)
    cost = [
        quality(model.simulate(e), model, TEXT[:60]).sqnr
        for e in (
            encodings,
            encodings.raised("*.weight", 8, model.weights),
            encodings.raised("*", 16, model.weights),
        )
    ]
    assert cost[0] + 10 < cost[1] and cost[1] + 20 < cost[2], cost


def test_half_even_is_another_model_and_nearly_the_same(encoded):
    model, encodings = encoded("Baichuan2-7B")
    away, even = (model.simulate(encodings, rounding=r).trace(IDS) for r in ("away", "even"))
    weight = model.weights["lm_head.weight"].read(np.dtype(F32))
    assert np.array_equal(
        even["model.norm"], fake_quantize(even["model.norm"], encodings["model.norm"], "even")
    ) and not np.array_equal(away["lm_head"], even["lm_head"])
    assert (
        quantize(weight, encodings["lm_head.weight"], "even") != quantize(weight, encodings["lm_head.weight"])
    ).mean() < 1e-3


def test_sixteen_bit_floats_are_casts(encoded):
    model, _ = encoded("Baichuan2-7B")
    name = "model.layers.0.mlp.product"
    trace = model.simulate(Encodings({name: Float16()})).trace(IDS)
    expected = model.trace(IDS)[name].astype(np.float16).astype(F32)
    assert np.array_equal(trace[name], expected)


def test_float64_is_simulated_on_the_same_grids(encoded):
    model, encodings = encoded("Baichuan2-7B")
    wide, narrow = (model.simulate(encodings)(IDS, dtype) for dtype in ("float64", "float32"))
    assert wide.dtype == np.float64 and decibel(np.square(wide).sum(), np.square(wide - narrow).sum()) > 40


# --- the prediction ---------------------------------------------------------------------------------------------------


def test_the_prediction_is_the_traces(encoded):
    model, encodings = encoded("Qwen2-7B")
    found = predict(model, encodings, IDS)
    simulated, reference = model.simulate(encodings), model.trace(IDS)
    runs = {"own": simulated.trace(IDS, feed=reference), "total": simulated.trace(IDS)}
    assert [noise.name for noise in found.tensors] == list(reference)
    for noise in found.tensors:
        for which, trace in runs.items():
            b = reference[noise.name].astype(np.float64)
            expected = decibel(np.square(b).sum(), np.square(trace[noise.name] - b).sum())
            assert getattr(noise, which) == pytest.approx(expected, abs=1e-9)
    assert json.loads(found.to_json())["tokens"] == len(IDS)
    assert "predicted SQNR of lm_head" in str(found)


def test_a_prediction_holds_one_layer(tmp_path):
    """What it allocates hardly grows with the layers (by their weights), though a trace of them all does."""
    peaks = []
    for layers in (2, 8):
        changes = {"num_hidden_layers": layers, "max_position_embeddings": 256}
        model = refimpl.load(write_checkpoint(tmp_path / str(layers), "Baichuan2-7B", **changes))
        ids = np.resize(TEXT, 256)
        encodings = calibrate(model, ids)
        tracemalloc.start()
        predict(model, encodings, ids)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], peaks


def test_noise_of_a_grid_is_a_twelfth_of_its_step_squared(encoded):
    """Of a tensor whose input is fed and whose operation is exact, rounding is the only error: step² / 12."""
    model, encodings = encoded("Baichuan2-7B")
    reference = model.trace(TEXT[:60])
    own = model.simulate(encodings).trace(TEXT[:60], feed=reference)
    for name in ("model.layers.0.self_attn.value", "model.layers.1.attention_residual"):
        error = np.square(own[name].astype(np.float64) - reference[name]).mean()
        ratio = error / (float(encodings[name].scale) ** 2 / 12)
        # value is cut from W_pack, which was fed; both have some thousand elements: 10 % is five standard errors
        assert 0.9 < ratio < 1.1, (name, ratio)


def test_what_if_says_what_is_gained(encoded):
    model, encodings = encoded("Baichuan2-7B")
    outcomes = what_if(model, encodings, TEXT[:60], [("*.mlp.*.weight", 8), ("*.key", 16)])
    assert [o.changed for o in outcomes] == [0, 6, 2]
    assert outcomes[1].quality.sqnr > outcomes[0].quality.sqnr + 1
    assert len(outcome_table(outcomes).splitlines()) == 5
    again = quality(model.simulate(encodings.raised("*.key", 16, model.weights)), model, TEXT[:60])
    assert outcomes[2].quality == again
    assert encodings.raised("*", 8, model.weights)["model.norm"] == encodings["model.norm"], "nothing is lowered"


# --- engines ----------------------------------------------------------------------------------------------------------


def graph_of(model, encodings, number: int, tmp_path):
    """A part of an export with its golden inputs: the ONNX model, the plan of it, inputs, and its own encodings."""
    import onnx

    parts = emit(model, tokens=(8, 1), context=32, parts=2, prompt=IDS[:6], forms=["unpack"])
    parts.save(tmp_path / "parts")
    specs = [(spec, case["input"]) for spec, case in Goldens(model, parts.plan, parts.prompt)]
    spec, inputs = specs[number]
    proto = onnx.load(tmp_path / "parts" / spec.name / "model.onnx")
    return proto, spec, inputs, graph_encodings(encodings, spec, parts.graphs[spec.name])


def assert_same_codes(found, ours, own: Encodings):
    """Of 8-bit tensors, at most one code in a hundred differs, by one; 16-bit ones show the noise of that, no more.

    The order of float32 sums is each engine's and each processor's own, and now and then it decides a tie. A key whose
    code of 8 bits differs by one is off by 256 steps of 16 bits. With one key or value in a hundred off by one, and
    127 codes for three times the root mean square, the noise is 10 log10(100 * (127 / 3)^2) = 52 dB down.
    """
    assert set(found) == set(ours)
    for output, expected in ours.items():
        lsb = np.rint((found[output] - expected) / F32(own[output].scale))
        noise = decibel(np.square(expected).sum(), np.square(found[output] - expected).sum())
        if own[output].bits == 16:
            assert noise > 50 and np.abs(lsb).max() <= 256, (output, noise, lsb)
        else:
            assert np.abs(lsb).max() <= 1 and (lsb != 0).mean() < 0.01, (output, lsb)


@pytest.mark.parametrize("name", ["Baichuan2-7B", "Baichuan2-13B", "Qwen2-7B"])
@pytest.mark.parametrize("number", [1, 3])  # the prompt's and the token's second part
def test_aimet_computes_the_same_codes(name, number, encoded, tmp_path):
    """AIMET-ONNX loads our file onto our graph and runs it with its own quantizers.

    What is left is the order of float32 sums, which now and then crosses a half: one code of a key or value in a
    hundred at the most.
    """
    quantsim = pytest.importorskip("aimet_onnx.quantsim", reason="aimet-onnx is not installed")
    model, encodings = encoded(name)
    proto, spec, inputs, own = graph_of(model, encodings, number, tmp_path)
    simulator = quantsim.QuantizationSimModel(
        proto, param_type="int4", activation_type="int16", quant_scheme="min_max", providers=["CPUExecutionProvider"]
    )
    (tmp_path / "own.json").write_text(json.dumps(as_json(own)))
    quantsim.load_encodings_to_sim(simulator, str(tmp_path / "own.json"), strict=False)
    given = [output.name for output in simulator.session.get_outputs()]
    found = dict(zip((n.removesuffix("_updated") for n in given), simulator.session.run(given, inputs), strict=True))
    ours = simulate_graph(model.simulate(encodings), spec, inputs)
    assert_same_codes(found, ours, own)


def qdq(proto, own: Encodings):
    """The graph with a QuantizeLinear and a DequantizeLinear behind each value that has an encoding."""
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    new = ModelProto()
    new.CopyFrom(proto)
    graph = new.graph
    del graph.node[:], graph.value_info[:]
    kept = [i for i in graph.initializer if i.name not in own.parameters]
    matrices = [i for i in graph.initializer if i.name in own.parameters]
    kept += [numpy_helper.from_array(on_grid(numpy_helper.to_array(i), own[i.name], "even"), i.name) for i in matrices]
    del graph.initializer[:]
    graph.initializer.extend(kept)

    def pair(name, source, result):
        e = own[name]
        kind = TensorProto.UINT16 if e.bits == 16 else TensorProto.UINT8
        scale, zero, codes = (f"{name}.{part}" for part in ("scale", "zero", "codes"))
        graph.initializer.append(helper.make_tensor(scale, TensorProto.FLOAT, [], [float(F32(e.scale))]))
        graph.initializer.append(helper.make_tensor(zero, kind, [], [-int(e.offset)]))
        graph.node.append(helper.make_node("QuantizeLinear", [source, scale, zero], [codes]))
        graph.node.append(helper.make_node("DequantizeLinear", [codes, scale, zero], [result]))
        return result

    on = {i.name: pair(i.name, i.name, f"{i.name}.dq") for i in graph.input if i.name in own.activations}
    for node in proto.graph.node:
        raw = {name: f"{name}.raw" for name in node.output if name in own.activations}
        graph.node.add().CopyFrom(node)
        graph.node[-1].input[:] = [on.get(name, name) for name in node.input]
        graph.node[-1].output[:] = [raw.get(name, name) for name in node.output]
        for name in raw:
            pair(name, f"{name}.raw", name)
    return new


@pytest.mark.parametrize("name", ["Baichuan2-7B", "Baichuan2-13B", "Qwen2-7B"])
@pytest.mark.parametrize("number", [1, 3])
def test_onnxruntime_computes_the_same_codes(name, number, encoded, tmp_path):
    """The same graph with ONNX's own pairs, which round half to even; optimizations off, so that nothing is fused."""
    ort = pytest.importorskip("onnxruntime")
    model, encodings = encoded(name)
    proto, spec, inputs, own = graph_of(model, encodings, number, tmp_path)
    simulated = model.simulate(encodings, rounding="even")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(qdq(proto, own).SerializeToString(), options,
                                   providers=["CPUExecutionProvider"])  # fmt: skip
    ours = simulate_graph(simulated, spec, inputs)
    found = dict(zip(ours, session.run(list(ours), inputs), strict=True))
    assert_same_codes(found, ours, own)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, e: m.simulate(Encodings({"model.nrom": from_range(0, 1, 8)})), "near it are model.norm"),
        (
            lambda m, e: m.simulate(Encodings({}, {"lm_head.weight": replaced(e, scale=np.ones(3))})),
            "3 scales, expected 96",
        ),
        (
            lambda m, e: m.simulate(Encodings({}, {"lm_head.weight": replaced(e, offset=np.ones(3))})),
            "3 offsets, expec",
        ),
        (lambda m, e: m.simulate(Encodings({"model.norm": e["lm_head.weight"]})), "96 scales, expected 1 for a tensor"),
        (lambda m, e: m.simulate(Encodings({}, {"model.norm.weight": replaced(e, scale=np.ones(64))})), "expected 1"),
        (lambda m, e: m.simulate(Encodings({"model.norm": from_range(0, 1, 20)})), "20 bits, expected 2 to 16"),
        (lambda m, e: m.simulate(e, rounding="up"), "rounding is 'up', expected away or even"),
        (lambda m, e: m.simulate(e).quantize("int4"), "take the model that it was made of"),
        (lambda m, e: m.simulate(e).simulate(e), "take the model that it was made of"),
        (lambda m, e: m.simulate(e).with_backend("numba"), "is computed by 'numpy'"),
        (lambda m, e: e.raised("*.nothing", 8, m.weights), "no encoding is called"),
        (lambda m, e: e.raised("*", 32, m.weights), "bits is 32, expected 2 to 16"),
        (lambda m, e: predict(m, e, IDS, Reading(-1)), "window is -1"),
        (lambda m, e: Recipe(lpbq=True), "give a block_size"),
        (lambda m, e: Recipe(kv_bits=40), "kv_bits is 40"),
        (lambda m, e: calibrate(m, TEXT, Recipe(block_size=48)), "row length 64 is not a multiple of block_size 48"),
        (lambda m, e: calibrate(m, TEXT, method="best"), "the method is 'best'"),
        (lambda m, e: calibrate(m, TEXT, method="percentile", percent=40), "the percentile is 40"),
    ],
)
def test_bad_input_gets_one_line(encoded, call, message):
    model, encodings = encoded("Baichuan2-7B")
    with pytest.raises(InputError, match=message) as error:
        call(model, encodings)
    assert "\n" not in str(error.value)


def replaced(encodings, **changes):
    from dataclasses import replace

    return replace(encodings["lm_head.weight"], **changes)


def test_weights_and_activations_must_be_finite(tmp_path):
    folder = write_checkpoint(tmp_path, "Baichuan2-7B")
    model = refimpl.load(folder)
    array = model.weights["model.layers.0.mlp.up_proj.weight"].array.copy()
    array[3, 5] = np.nan
    bad = refimpl.Model(model.config, model.weights.replace({"model.layers.0.mlp.up_proj.weight": Weight(array)}))
    with pytest.raises(InputError, match="makes this NaN or infinite"):
        calibrate(bad, IDS)
    with pytest.raises(InputError, match=r"up_proj\.weight: the range is not finite"):
        Recipe().parameters(bad.config, bad.weights)
