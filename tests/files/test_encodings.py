"""Ranges from a text, and encodings files as AIMET has them: what is written, what is read, what is refused.

The expected entries are those of AIMET's specification, and AIMET-ONNX itself reads the files where it is installed.
"""

import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from export import emit
from export.files.encodings import VERSIONS, as_json, read_encodings, write_encodings
from export.graphs.grids import graph_encodings
from export.preflight.check import check
from refimpl import InputError, cli
from refimpl.checkpoint.weights import Weight
from refimpl.grids.calibrate import BINS, METHODS, Seen, calibrate, encode, lowest_mask, observe
from refimpl.grids.encodings import Encodings, Float16
from refimpl.grids.recipe import Recipe
from refimpl.model import EMBEDDED
from refimpl_kernels.affine import Encoding, from_range

TEXT = np.random.default_rng(0).integers(0, 96, 200)
ATTENTION = "model.layers.0.self_attn"
RECIPES = [{}, {"block_size": 16}, {"block_size": 16, "lpbq": True}]


@pytest.fixture
def model(tiny_model):
    return tiny_model("Qwen2-7B")


@pytest.fixture
def encodings(model):
    return calibrate(model, TEXT)


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ranges_are_those_of_the_traces(model, dtype):
    seen = observe(model, TEXT, window=64, dtype=dtype)
    with threadpool_limits(1, "blas"):  # as in a sweep: the last bits depend on it
        traces = [model.trace(TEXT[s : s + 64], dtype) for s in range(0, len(TEXT), 64)]
    assert seen.pop("attention_mask").count == len(traces) * model.config.num_hidden_layers
    assert list(seen) == list(traces[0])
    for name, tensor in seen.items():
        values = np.concatenate([trace[name].reshape(-1) for trace in traces]).astype(np.float64)
        assert (tensor.low, tensor.high, tensor.count) == (values.min(), values.max(), values.size)
        assert tensor.counts.sum() == values.size and len(tensor.counts) <= BINS
        edges = (tensor.first + np.arange(len(tensor.counts) + 1)) * tensor.width
        assert np.array_equal(
            tensor.counts, np.bincount(np.searchsorted(edges, values, "right") - 1, minlength=len(edges) - 1)
        )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.integers(1, 8))
@example([1 - 1e-9, 1 + 2.0**-41], 2)  # the second begins with wider bins than both together need
def test_a_histogram_does_not_depend_on_the_pieces(values, pieces):
    """Bins are made by doubling, so what was counted early lies where it would lie if all had come at once."""
    seen, merged = Seen(), Seen()
    for piece in np.array_split(np.array(values), pieces):
        if piece.size:
            seen.add(piece)
            alone = Seen()
            alone.add(piece)
            merged.merge(Seen.from_array(alone.to_array()))
    for one in (seen, merged):
        assert (one.low, one.high, one.count) == (min(values), max(values), len(values))
        assert one.counts.sum() == len(values) and 1 <= len(one.counts) <= BINS
        expected = np.bincount(np.floor(np.array(values) / one.width).astype(int) - one.first)
        assert np.array_equal(one.counts, np.pad(expected, (0, len(one.counts) - len(expected))))


def test_percentiles_are_numpys_to_a_bin():
    values = np.random.default_rng(1).standard_normal(100_000)
    seen = Seen()
    for piece in np.array_split(values, 7):
        seen.add(piece)
    for percent in (99.99, 99.0, 90.0):
        low, high = np.percentile(values, [100 - percent, percent])
        found = seen.percentile(percent)
        assert abs(found[0] - low) <= 2 * seen.width and abs(found[1] - high) <= 2 * seen.width
    assert seen.percentile(100) == (values.min(), values.max())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_mse_range_is_better_than_any_other_way(symmetric):
    """On values with a long tail, by quantizing the values themselves."""
    from refimpl_kernels.affine import fake_quantize

    values = np.random.default_rng(2).standard_t(3, 100_000).astype(np.float32)
    seen = Seen()
    seen.add(values)

    def error(low, high):
        grid = from_range(low, high, 8, symmetric)
        return float(np.square(fake_quantize(values, grid) - values, dtype=np.float64).mean())

    chosen = error(*seen.least_squares(8, symmetric))
    others = [error(seen.low * f, seen.high * f) for f in np.linspace(0.02, 1, 50)]
    # the candidates are 1/64 apart, and an error inside the range is taken for a twelfth of a step squared
    assert chosen < min(others) * 1.05 and chosen < 0.9 * error(seen.low, seen.high)


def test_methods_differ_as_they_should(model):
    seen = observe(model, TEXT)
    found = {method: encode(model, seen, method=method, percent=99.0) for method in METHODS}
    name = "model.layers.1.mlp.product"
    assert found["percentile"][name].high < found["minmax"][name].high
    assert float(found["mse"][f"{ATTENTION}.key"].scale) < float(found["minmax"][f"{ATTENTION}.key"].scale)
    assert found["mse"][f"{ATTENTION}.probs"] == found["minmax"][f"{ATTENTION}.probs"]


# --- what is written --------------------------------------------------------------------------------------------------


def test_entries_of_version_0_6_1(encodings):
    content = as_json(encodings, "0.6.1")
    assert set(content) == {"version", "producer", "quantizer_args", "activation_encodings", "param_encodings"}
    arguments = {"activation_bitwidth": 16, "dtype": "int", "is_symmetric": True, "param_bitwidth": 4,
                 "per_channel_quantization": True, "quant_scheme": "min_max"}  # fmt: skip
    assert content["quantizer_args"] == arguments
    (cos,) = content["activation_encodings"]["position_ids_cos"]
    step = 2 / 65535
    assert cos == {"bitwidth": 16, "dtype": "int", "is_symmetric": "False", "min": -32768 * step, "max": 32767 * step,
                   "scale": step, "offset": -32768}  # fmt: skip
    rows = content["param_encodings"][f"{ATTENTION}.o_proj.weight"]
    assert len(rows) == 64 and {(r["bitwidth"], r["offset"], r["is_symmetric"]) for r in rows} == {(4, -8, "True")}


def test_entries_of_version_1_0_0(encodings):
    content = as_json(encodings)
    assert content["version"] == "1.0.0"
    entries = {e["name"]: e for e in content["activation_encodings"] + content["param_encodings"]}
    assert entries["position_ids_cos"] == {
        "name": "position_ids_cos", "dtype": "INT", "bw": 16, "enc_type": "PER_TENSOR", "is_sym": False,
        "scale": [2 / 65535], "offset": [-32768],
    }  # fmt: skip
    key, weight = entries[f"{ATTENTION}.key"], entries["lm_head.weight"]
    assert (key["bw"], key["is_sym"], key["offset"]) == (8, True, [-128])
    assert (weight["bw"], weight["enc_type"], weight["offset"]) == (8, "PER_CHANNEL", [-128] * 96)


def test_entries_of_version_2_0_0(encodings):
    content = as_json(encodings, "2.0.0")
    assert set(content) == {"version", "producer", "encodings"}
    entries = {e["name"]: e for e in content["encodings"]}
    cos = {"name": "position_ids_cos", "output_dtype": "uint16", "y_scale": 2 / 65535, "y_zero_point": 32768}
    assert entries["position_ids_cos"] == cos
    assert entries["attention_mask"]["y_zero_point"] == 65535
    key, weight = entries[f"{ATTENTION}.key"], entries[f"{ATTENTION}.o_proj.weight"]
    assert (key["output_dtype"], key["y_zero_point"]) == ("uint8", 128), "activations are unsigned"
    assert (weight["output_dtype"], weight["axis"], len(weight["y_scale"])) == ("int4", 0, 64)
    assert "y_zero_point" not in weight


def test_entries_of_blocks(model):
    name = f"{ATTENTION}.o_proj.weight"
    blocks, lpbq = (calibrate(model, TEXT, Recipe(**recipe)) for recipe in RECIPES[1:])

    def entry(encodings, version):
        content = as_json(encodings, version)
        return next(e for e in content.get("param_encodings", content.get("encodings")) if e["name"] == name)

    old, new = entry(blocks, "1.0.0"), entry(blocks, "2.0.0")
    assert (old["enc_type"], old["block_size"], len(old["scale"]), set(old["offset"])) == ("PER_BLOCK", 16, 256, {-8})
    assert (new["axis"], new["block_size"], np.shape(new["y_scale"])) == (1, 16, (64, 4))
    assert np.array_equal(np.ravel(new["y_scale"]), old["scale"]), "row by row"
    old, new = entry(lpbq, "1.0.0"), entry(lpbq, "2.0.0")
    assert (old["enc_type"], old["compressed_bw"], old["bw"], old["is_sym"]) == ("LPBQ", 4, 8, True)
    assert old["offset"] == [-128] * 64 and len(old["per_block_int_scale"]) == 256
    assert set(old["per_block_int_scale"]) <= set(range(1, 17)) and 16 in old["per_block_int_scale"]
    assert (new["output_dtype"], new["axis"], np.shape(new["per_channel_float_scale"])) == ("int4", 1, (64, 1))
    assert np.shape(new["per_block_int_scale"]) == (64, 4)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_written_is_read(family, tiny_model, tmp_path, recipe, version):
    model = tiny_model(family)
    encodings = calibrate(model, TEXT, Recipe(**recipe))
    path = tmp_path / "model.encodings"
    if version == "0.6.1" and recipe:
        with pytest.raises(InputError, match=r"in blocks, which version 0\.6\.1 cannot say"):
            write_encodings(encodings, path, version)
        assert not list(tmp_path.iterdir())
        return
    write_encodings(encodings, path, version)
    found = read_encodings(path, model)
    assert {*found} == {*encodings}
    for name in encodings:
        assert found[name] == encodings[name], name
        assert version == "2.0.0" or found[name].symmetric == encodings[name].symmetric
    assert np.array_equal(model.simulate(found)(TEXT[:20]), model.simulate(encodings)(TEXT[:20]))


def test_floats_are_entries_or_none(model, tmp_path):
    encodings = Encodings({"model.norm": Float16()})
    assert as_json(encodings, "0.6.1")["activation_encodings"]["model.norm"] == [{"bitwidth": 16, "dtype": "float"}]
    for version in VERSIONS[:2]:
        write_encodings(encodings, tmp_path / "e", version)
        assert read_encodings(tmp_path / "e", model)["model.norm"] == Float16()
    assert as_json(encodings, "2.0.0")["encodings"] == []


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("version", VERSIONS)
def test_aimet_reads_the_same(model, recipe, version):
    """Every entry, through AIMET's own classes and back to its own words."""
    quantsim = pytest.importorskip("aimet_onnx.quantsim", reason="aimet-onnx is not installed")
    from aimet_onnx._encoding import EncodingBase

    if version == "0.6.1" and recipe:
        pytest.skip("has no blocks")
    encodings = calibrate(model, TEXT, Recipe(**recipe))
    content = json.loads(json.dumps(as_json(encodings, version)))
    quantsim._validate_encodings(content, version)
    entries, _ = quantsim._flatten_encodings(content)
    for name, entry in entries.items():
        shape = model.weights[name].shape if name in model.weights else None
        theirs = EncodingBase.from_qnn_encoding_dict(entry, shape, 0, 1)
        unsigned = theirs.to_unsigned()
        ours = encodings[name]
        assert np.array_equal(np.ravel(unsigned.scale), np.ravel(ours.steps)), name
        assert set(np.ravel(unsigned.offset)) == set(np.ravel(ours.offset)) and theirs.bitwidth == ours.bits, name
        again = theirs.to_qnn_encoding_dict("1.0.0" if version == "0.6.1" else version)
        assert again == {key: value for key, value in entry.items() if key != "name"}, name


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_a_graph_has_an_encoding_for_all_but_what_the_recipe_leaves_out(family, tiny_model):
    model = tiny_model(family)
    encodings = calibrate(model, TEXT)
    parts = emit(model, tokens=(8, 1), context=32, parts=3)
    for spec in (spec for run in parts.plan.runs for spec in run):
        proto = parts.graphs[spec.name].proto
        own = graph_encodings(encodings, spec, parts.graphs[spec.name])
        values = [*proto.graph.input, *proto.graph.value_info, *proto.graph.output]
        made = {name: node.op_type for node in proto.graph.node for name in node.output}
        floats = {value.name for value in values if value.type.tensor_type.elem_type == 1}
        assert {*own.activations} <= floats
        bare = [made[name] for name in floats - {*own.activations}]
        norms = 2 * len(spec.part.layers) + spec.part.heads  # x * x, mean, + eps, root, reciprocal, x * that
        inside = ["Add", "Mul", "Mul", "ReduceMean", "Reciprocal", "Sqrt"] * norms
        assert sorted(bare) == sorted(inside + ["Gather"] * spec.part.embeds), spec.name
        initializers = {i.name for i in proto.graph.initializer}
        assert {*own.parameters} == {name for name in initializers & {*encodings.parameters}}
        for layer in spec.part.layers:
            for what in ("key", "value"):
                grid = encodings[f"model.layers.{layer}.self_attn.{what}"]
                assert own[f"past_{what}_{layer}_in"] == own[f"past_{what}_{layer}_out"] == grid
        sigmoids = [name for name, op in made.items() if op == "Sigmoid"]
        assert all(own[name] == from_range(0, 1, 16) for name in sigmoids)
        turned = [own[name] for name, op in made.items() if op == "Sub"]  # half of what RoPE's Concat joins
        at = [f"model.layers.{i}.self_attn" for i in spec.part.layers if model.config.rope_theta]
        assert turned == [encodings[f"{a}.{what}"] for a in at for what in ("query", "key")]


def test_both_sides_of_a_split_agree(tiny_model):
    model = tiny_model("Baichuan2-7B")
    encodings = calibrate(model, TEXT)
    parts = emit(model, tokens=(8,), context=32, parts=3)
    first, second, third = (graph_encodings(encodings, spec, parts.graphs[spec.name]) for spec in parts.plan.runs[0])
    assert second["model.layers.0"] == third["model.layers.0"] == encodings["model.layers.0"]
    assert second["model.embed_tokens"] == first["model.embed_tokens.weight"], "a Gather gives rows of its table"
    assert third["logits"] == encodings["lm_head"] and "lm_head" not in third.activations


def test_the_names_of_a_graphs_ends_are_read(model, encodings, tmp_path):
    renamed = Encodings({"logits": encodings["lm_head"], "past_key_0_in": encodings[f"{ATTENTION}.key"],
                         "past_key_0_out": encodings[f"{ATTENTION}.key"]})  # fmt: skip
    write_encodings(renamed, tmp_path / "e")
    found = read_encodings(tmp_path / "e", model)
    assert {*found} == {"lm_head", f"{ATTENTION}.key"}
    write_encodings(Encodings({**renamed.activations, "past_key_0_in": encodings["lm_head"]}), tmp_path / "e")
    with pytest.raises(InputError, match="past_key_0_out has two encodings"):
        read_encodings(tmp_path / "e", model)


# --- what is refused --------------------------------------------------------------------------------------------------


def entry(**changes):
    """A 1.0.0 file with one entry of lm_head, changed."""
    good = {"name": "lm_head", "dtype": "INT", "bw": 16, "enc_type": "PER_TENSOR", "is_sym": False, "scale": [0.1],
            "offset": [-5]}  # fmt: skip
    changed = {key: value for key, value in {**good, **changes}.items() if value is not ...}
    return {"version": "1.0.0", "activation_encodings": [changed], "param_encodings": []}


def weight(**changes):
    rows = {"scale": [0.1] * 64, "offset": [-8] * 64}
    return entry(**{"name": f"{ATTENTION}.o_proj.weight", "enc_type": "PER_CHANNEL", "bw": 4, "is_sym": True, **rows,
                    **changes})  # fmt: skip


def lpbq(**changes):
    return weight(**{"enc_type": "LPBQ", "bw": 8, "compressed_bw": 4, "block_size": 16, "offset": [-128] * 64,
                     "per_block_int_scale": [3] * 256, **changes})  # fmt: skip


def second(**changes):
    good = {"name": "lm_head", "output_dtype": "uint16", "y_scale": 0.1, "y_zero_point": 3}
    return {"version": "2.0.0", "encodings": [{**good, **changes}]}


def old(*rows, name="lm_head"):
    good = {"bitwidth": 16, "dtype": "int", "is_symmetric": "False", "scale": 0.1, "offset": -5}
    return {
        "version": "0.6.1",
        "activation_encodings": {name: [{**good, **row} for row in rows]},
        "param_encodings": {},
    }


BAD = [
    ({}, "the version is None, expected one of 0.6.1, 1.0.0, 2.0.0"),
    ({"version": "2.1.0"}, "the version is '2.1.0'"),
    ({"version": ["1.0.0"]}, "the version is"),
    ({"version": "1.0.0"}, "activation_encodings is NoneType, but version 1.0.0 has a list there"),
    ({"version": "0.6.1", "activation_encodings": [], "param_encodings": {}}, "has a dict there"),
    ({"version": "1.0.0", "activation_encodings": [3], "param_encodings": []}, "not an object with a name"),
    (entry(name=5), "not an object with a name"),
    (entry(name="lm_heat"), "none has a name of this model"),
    ({**entry(), "param_encodings": entry(name="model.layers.0.mlp.down_porj")["activation_encodings"]},
     "near it are .*down_proj"),
    ({**entry(), "param_encodings": entry()["activation_encodings"]}, "lm_head has two encodings"),
    (entry(name="model.layers.9.mlp"), "none has a name of this model"),
    (entry(dtype="INT8"), "has dtype 'INT8'"),
    (entry(is_sym="False"), "is_sym 'False'"),
    (entry(enc_type="PER_HEAD"), "has the enc_type 'PER_HEAD'"),
    (entry(bw=True), "has True bits"),
    (entry(bw=17), "has 17 bits, expected 2 to 16"),
    (entry(bw=32), "has 32 bits, expected 2 to 16"),
    (entry(scale=[0.1, 0.2]), "has 2 numbers as scale, expected 1"),
    (entry(scale=[]), "has 0 numbers as scale"),
    (entry(scale=["0.1"]), "has a scale that is not a number"),
    (entry(scale=[float("nan")]), "has a scale that is not a number"),
    (entry(scale=[10**400]), "has a scale that is not a number"),
    (entry(scale=[-1.0]), "not a positive float32"),
    (entry(scale=[1e-60]), "not a positive float32"),
    (entry(scale=...), "has a scale that is not a number"),
    (entry(offset=[0.5]), "not a whole number within 65536"),
    (entry(offset=[1e9]), "not a whole number within 65536"),
    (entry(zero_point_shift=[0.5]), "zero_point_shift"),
    (entry(dtype="FLOAT", bw=8), "a float of 8 bits"),
    (weight(scale=[0.1] * 63), "has 63 numbers as scale, expected 64"),
    (weight(scale=[[0.1]] * 10**5), "expected 64"),
    (weight(enc_type="PER_BLOCK", block_size=48), "has block_size 48, which does not divide the rows"),
    (weight(enc_type="PER_BLOCK", block_size=0), "has block_size 0"),
    (weight(enc_type="PER_BLOCK", block_size=16), "has 64 numbers as scale, expected 64 x 4"),
    (weight(name="model.norm.weight"), "64 scales, expected 1"),
    (lpbq(compressed_bw=3), "expected a number and twice that"),
    (lpbq(per_block_int_scale=[0] * 256), "not a whole number from 1 to 16"),
    (lpbq(per_block_int_scale=[3] * 255), "255 numbers as per_block_int_scale, expected 64 x 4"),
    (second(output_dtype="float8"), "has the output_dtype 'float8'"),
    (second(y_scale={"x": 1}), "came with version 2.1.0"),
    (second(axis=0), "has axis 0"),
    (second(y_zero_point="3"), "has a y_zero_point that is not a number"),
    (second(name=f"{ATTENTION}.o_proj.weight", axis=1, y_scale=[0.1] * 64), "has axis 1, expected 0 for rows"),
    (old(), "is not a list of objects"),
    (old({}, {"bitwidth": 8}), "gives its rows different numbers of bits"),
    (old({}, {}), "has 2 scales, expected 1 for a tensor"),
    (old({"is_symmetric": "yes"}), "is_symmetric 'yes'"),
    (old({}, {}, name=f"{ATTENTION}.o_proj.weight"), "has 2 scales, expected 64"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD)
def test_a_bad_file_gets_one_line(model, tmp_path, content, message):
    path = tmp_path / "bad.encodings"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        read_encodings(path, model)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_files_that_are_no_encodings(model, tmp_path):
    for text in ("", "[]", "{", '{"version": "1.0.0", "activation_encodings": ' + "[" * 100_000):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(InputError):
            read_encodings(tmp_path / "bad", model)
    with pytest.raises(InputError, match="cannot read"):
        read_encodings(tmp_path / "missing", model)
    with pytest.raises(InputError, match="cannot write"):
        write_encodings(Encodings({}), tmp_path / "no" / "such" / "folder")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["1.0.0", "2.0.0", "0.6.1", "lm_head", "INT", "PER_TENSOR", "PER_CHANNEL", "uint16", "int4"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(base=st.sampled_from([entry(), weight(), lpbq(), second(), old({})]), data=st.data())
def test_whatever_is_in_a_file_is_read_or_refused(base, data, tmp_path_factory, tiny_folder):
    import refimpl

    model = refimpl.load(tiny_folder("Qwen2-7B"))
    content = json.loads(json.dumps(base))
    places = [content]
    for part in content.values():
        if not isinstance(part, str):
            places += part if isinstance(part, list) else part.get("lm_head", [])
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    path = tmp_path_factory.mktemp("fuzz") / "e"
    path.write_text(json.dumps(content))
    try:
        model.simulate(read_encodings(path, model))
    except InputError as error:
        assert "\n" not in str(error)


def test_encodings_of_another_model(tiny_model, tmp_path):
    write_encodings(calibrate(tiny_model("Qwen2-7B"), TEXT), tmp_path / "e")
    with pytest.raises(InputError, match=r"q_proj', which this model lacks"):
        read_encodings(tmp_path / "e", tiny_model("Baichuan2-7B"))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    text, out = str(EMBEDDED / "held_out.txt"), str(tmp_path / "e.json")
    assert cli.main(["calibrate", "--text", text, "--tokens", "300", "--out", out, "--method", "mse"]) == 0
    assert "from 300 tokens" in capsys.readouterr().out
    arguments = ["simulate", "--encodings", out, "--text", text, "--tokens", "200", "--what-if", "*.mlp.*.weight=8"]
    assert cli.main([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in content["noise"]["tensors"]]
    assert names[0] == "model.embed_tokens" and names[-1] == "lm_head"
    gained = [row["sqnr"] for row in content["outcomes"]]
    assert len(gained) == 2 and gained[1] > gained[0] + 3
    assert cli.main([*arguments, "--rounding", "even", "--integer"]) == 0
    assert re.search(r"\*\.mlp\.\*\.weight at 8 bits +9 +\d+\.\d dB +\+\d", capsys.readouterr().out)
    for bad in (["--what-if", "x"], ["--what-if", "*.nothing=8"], ["--encodings", text]):
        assert cli.main([*arguments, *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_equality_is_of_numbers():
    a = Encoding(8, np.float64(0.1), np.float64(-3))
    assert a == Encoding(8, np.float64(0.1), np.float64(-3), symmetric=True) and a != "a"
    assert a != Encoding(8, np.float64(0.1), np.float64(-4)) and a != Encoding(7, np.float64(0.1), np.float64(-3))


def test_the_mask_is_as_low_as_the_scores_need(tiny_model):
    """With projections thirty times as large, -50 leaves hidden keys a probability; what is chosen leaves none."""
    model = tiny_model("Baichuan2-7B")
    assert encode(model, observe(model, TEXT)).activations["attention_mask"].low == -50
    loud = {
        name: Weight(np.asarray(weight.read(np.float32)) * 30) if name.endswith("W_pack.weight") else weight
        for name, weight in model.weights.items()
    }
    model = type(model)(model.config, loud, model.folder)
    seen = observe(model, TEXT)
    above, low = seen["attention_mask"].high, float(encode(model, seen).activations["attention_mask"].low)
    assert above > 50 and low == pytest.approx(lowest_mask(above, model.config.max_position_embeddings))
    assert low < -above - 17 * np.log(2)
    assert encode(model, seen, Recipe(lowest_mask=-50.0)).activations["attention_mask"].low == -50


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_biases_are_on_32_bits_for_ai_hub(version, model, encodings, tmp_path):
    """In steps of the input's times the row's, so that they are added to sums of products as they are."""
    folder = emit(model, 4, 16, 2, "aihub", encodings=encodings, encodings_version=version).save(tmp_path / "x")
    content = json.loads((folder / "prompt_ar4_cl16_2_of_2" / "model.encodings").read_text())
    entries = content["encodings"] if version == "2.0.0" else content["param_encodings"]
    biases = {entry["name"]: entry for entry in entries if entry["name"].endswith(".bias")}
    config = model.config
    assert len(biases) == config.num_hidden_layers * (config.num_attention_heads + 2 * config.num_key_value_heads)
    name = f"{ATTENTION}.q_proj.1.bias"
    size, entry = config.head_dim, biases[name]
    scale = encodings.activations["model.layers.0.input_layernorm"].scale
    scale = scale * encodings.parameters[f"{ATTENTION}.q_proj.weight"].scale[size : 2 * size]
    if version == "2.0.0":
        assert entry == {"name": name, "output_dtype": "int32", "y_scale": scale.tolist(), "axis": 0}
    else:
        assert (entry["bw"], entry["enc_type"], entry["is_sym"]) == (32, "PER_CHANNEL", True)
        assert entry["scale"] == scale.tolist() and entry["offset"] == [-(2**31)] * size
    assert check(folder), check(folder)
