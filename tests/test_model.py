"""The model against a second opinion, and every way of feeding it against every other."""

import itertools
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import plain_model
import pytest
from conftest import write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import refimpl
from refimpl import InputError, names
from refimpl.decoder import Decoder
from refimpl.grids.calibrate import calibrate

IDS = [5, 17, 9, 3, 80, 44, 2, 61, 9, 9, 33, 20]


def test_a_second_opinion_agrees(family, tiny_folder, tiny_model):
    expected = plain_model.logits(tiny_folder(family), family, IDS)
    found = tiny_model(family)(IDS, "float64")[0]
    assert np.abs(found - expected).max() < 1e-12 * np.abs(expected).max()


def test_heads_that_are_no_power_of_two_agree(tmp_path):
    folder = write_checkpoint(tmp_path, "Baichuan2-13B", hidden_size=60, num_attention_heads=10)
    expected = plain_model.logits(folder, "Baichuan2-13B", IDS)
    assert np.abs(refimpl.load(folder)(IDS, "float64")[0] - expected).max() < 1e-12 * np.abs(expected).max()


def test_a_tied_head_is_the_embedding(tmp_path):
    folder = write_checkpoint(tmp_path, "Qwen2-7B", tie_word_embeddings=True)
    model = refimpl.load(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    expected = plain_model.logits(folder, "Qwen2-7B", IDS)
    assert np.abs(model(IDS, "float64")[0] - expected).max() < 1e-12 * np.abs(expected).max()


def test_the_bound_on_float32_holds(family, tiny_model):
    model = tiny_model(family)
    exact = model(IDS, "float64")
    assert np.abs(model(IDS) - exact).max() < 2e-5 * np.abs(exact).max()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_table_of_taps_tells_the_truth(family, dtype, tiny_model):
    model = tiny_model(family)
    trace = model.trace(np.array([IDS, IDS[::-1]]), dtype)
    table = names.taps(model.config)
    assert list(trace) == list(table), "the order of the table is the computing order"
    fused = model.config.fused_attention and dtype in ("bfloat16", "float16")
    for name, array in trace.items():
        assert array.shape == names.shape(table[name], model.config, batch=2, tokens=len(IDS), keys=len(IDS)), name
        wide = fused and name.endswith((".scores", ".probs"))
        assert str(array.dtype) == ("float32" if wide else dtype), name


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, len(IDS) - 1)))
def test_a_prompt_in_pieces_is_the_prompt_at_once(family, tiny_model, cuts):
    model = tiny_model(family)
    cache = model.new_cache()
    edges = [0, *sorted(cuts), len(IDS)]
    pieces = [model(IDS[a:b], "float64", cache=cache) for a, b in itertools.pairwise(edges)]
    whole = model(IDS, "float64")
    assert np.abs(np.concatenate(pieces, axis=1) - whole).max() < 1e-12 * np.abs(whole).max()


def test_padding_on_the_left_changes_nothing(family, tiny_model):
    model = tiny_model(family)
    prompts = [IDS[:5], IDS, IDS[3:10]]
    ids = np.array([[0] * (len(IDS) - len(p)) + p for p in prompts])
    mask = np.array([[0] * (len(IDS) - len(p)) + [1] * len(p) for p in prompts])
    whole = model(ids, "float64", attention_mask=mask)
    cache = model.new_cache(batch=3)
    pieces = [model(ids[:, :7], "float64", mask[:, :7], cache), model(ids[:, 7:], "float64", mask, cache)]
    follow = model([[8], [8], [8]], "float64", cache=cache)  # the cache remembers who was padded
    for row, prompt in enumerate(prompts):
        alone = model([*prompt, 8], "float64")[0]
        scale = 1e-12 * np.abs(alone).max()
        assert np.abs(whole[row, -len(prompt) :] - alone[:-1]).max() < scale
        assert np.abs(np.concatenate(pieces, 1)[row, -len(prompt) :] - alone[:-1]).max() < scale
        assert np.abs(follow[row] - alone[-1]).max() < scale


def test_padding_between_past_and_new_tokens_changes_nothing(family, tiny_model):
    """As in a device's static cache, whose window pads each call's tokens on the left."""
    model = tiny_model(family)
    cache = model.new_cache()
    model(IDS[:5], "float64", cache=cache)
    found = model([0, 0, *IDS[5:]], "float64", [[1] * 5 + [0] * 2 + [1] * 7], cache)[0, 2:]
    expected = model(IDS, "float64")[0, 5:]
    assert np.abs(found - expected).max() < 1e-12 * np.abs(expected).max()


def test_a_mask_rounded_to_float16_still_masks(family, tiny_model, monkeypatch):
    """On a device that computes in float16, -inf would make a padded row NaN, and 0 * NaN the rest."""
    model = tiny_model(family)
    from refimpl import positions

    rounded = lambda *args: positions.attention_bias(*args).astype(np.float16).astype(np.float64)
    expected = model([[0, 0, *IDS]], "float64", [[0, 0] + [1] * 12])
    monkeypatch.setattr("refimpl.forward.attention_bias", rounded)
    found = model([[0, 0, *IDS]], "float64", [[0, 0] + [1] * 12])
    assert np.isfinite(found).all()
    assert np.abs(found - expected)[:, 2:].max() < (2e-3 if model.config.alibi else 1e-12) * np.abs(expected).max()


def test_packed_sequences_do_not_see_each_other(tiny_model):
    model = tiny_model("Baichuan2-13B")
    both = model(IDS, "float64", attention_mask=[[1] * 5 + [2] * 7])[0]
    apart = np.concatenate([model(IDS[:5], "float64")[0], model(IDS[5:], "float64")[0]])
    assert np.abs(both - apart).max() < 1e-12 * np.abs(apart).max()


def test_feeding_isolates_errors(family, tiny_model):
    """Of a model that is wrong in one place, a fed trace is wrong in that place alone."""
    model = tiny_model(family)
    reference = model.trace(IDS, "float64")
    broken = model.weights["model.layers.0.mlp.up_proj.weight"].array.copy()
    broken[3] *= 1.5
    weight = type(model.weights["model.layers.0.mlp.up_proj.weight"])(broken)
    wrong = refimpl.Model(model.config, model.weights.replace({"model.layers.0.mlp.up_proj.weight": weight}))
    guilty = [n for n, x in wrong.trace(IDS, "float64", feed=reference).items() if not np.array_equal(x, reference[n])]
    assert guilty == ["model.layers.0.mlp.up_proj"]
    inherited = [n for n, x in wrong.trace(IDS, "float64").items() if not np.array_equal(x, reference[n])]
    assert inherited[0] == guilty[0] and inherited[-1] == "lm_head" and len(inherited) > 10


def test_a_pattern_keeps_some_tensors(tiny_model):
    trace = tiny_model("Baichuan2-7B").trace(IDS, taps="*.o_proj")
    assert list(trace) == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]


def test_sixteen_bits_round_like_sixteen_bits(family, tiny_model):
    model = tiny_model(family)
    exact = model(IDS, "float64")
    for dtype, unit in (("bfloat16", 2**-8), ("float16", 2**-11)):
        error = np.abs(model(IDS, dtype).astype(np.float64) - exact).max() / np.abs(exact).max()
        assert 0.1 * unit < error < 30 * unit, f"{dtype}: {error:.2e}"


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_sixteen_bit_checkpoints_load(tmp_path, stored):
    dtype = np.dtype(getattr(ml_dtypes, stored, stored))
    model = refimpl.load(write_checkpoint(tmp_path, "Baichuan2-7B", dtype=dtype))
    assert {w.dtype for w in model.weights.values()} == {dtype}
    wide = {n: a.astype(np.float64) for n, a in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()  # the model has mapped it
    save_file(wide, tmp_path / "model.safetensors")
    assert np.array_equal(model(IDS, "float64"), refimpl.load(tmp_path)(IDS, "float64"))


def test_shards_load_as_one(tmp_path):
    folder = write_checkpoint(tmp_path, "Qwen2-7B")
    whole = refimpl.load(folder)(IDS)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: dict[str, dict] = {"a.safetensors": {}, "b.safetensors": {}}
    places = {name: ("a.safetensors", "b.safetensors")[k % 2] for k, name in enumerate(sorted(tensors))}
    for name, shard in places.items():
        shards[shard][name] = tensors[name]
    for shard, content in shards.items():
        save_file(content, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert np.array_equal(refimpl.load(folder)(IDS), whole)
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors is missing"):
        refimpl.load(folder)


def test_the_frequencies_that_v1_saves_are_not_parameters(tmp_path):
    folder = write_checkpoint(tmp_path, "Baichuan-7B")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    whole = refimpl.load(folder)(IDS)
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="inv_freq is not RoPE's"):
        assert np.array_equal(refimpl.load(folder)(IDS), whole)


def test_a_zero_row_of_the_head_gives_zero(tmp_path):
    folder = write_checkpoint(tmp_path, "Baichuan2-7B")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][7] = 0
    save_file(tensors, folder / "model.safetensors")
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        assert (refimpl.load(folder)(IDS, dtype)[..., 7] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.with_decoder("mine"), "decoder is 'mine', expected a subclass of refimpl.decoder.Decoder"),
        (lambda m: m.with_decoder(dict), "expected a subclass"),
        (lambda m: m([]), "the prompt is empty"),
        (lambda m: m([96]), "token id 96 is outside the vocabulary of 96"),
        (lambda m: m([-1]), "token id -1 is outside"),
        (lambda m: m([1.5]), "expected integers"),
        (lambda m: m([[1, 2], [3]]), "differ in length"),
        (lambda m: m([1] * 65), "65 tokens exceed the context of 64"),
        (lambda m: m("text"), "has no tokenizer"),
        (lambda m: m([1], "int8"), "dtype is 'int8'"),
        (lambda m: m([1, 2], attention_mask=[[1]]), "expected integers of shape"),
        (lambda m: m([1, 2], attention_mask=[[0.5, 1.0]]), "attention_mask is float64"),
        (lambda m: m([1, 2], cache=m.new_cache(capacity=1)), "exceed its capacity of 1"),
        (lambda m: m([[1], [2]], cache=m.new_cache()), "the cache is for 1 sequences"),
        (lambda m: m.trace([1], taps="nothing"), "no tensor is called 'nothing'"),
        (lambda m: m.trace([1, 2], feed=m.trace([1])), "run both on the same ids"),
        (lambda m: m.trace([1, 2], feed=m.trace([2, 1])), "run both on the same ids"),
        (lambda m: m.trace([1] * 40, feed=dict(m.trace([1]))), "feed a trace of the same ids"),
        (lambda m: m.trace([1, 2], feed={"lm_haed": 0.0}), "no tensor lm_haed"),
        (lambda m: [m([1], d, cache=c) for c in [m.new_cache()] for d in ("float32", "float64")], "use one dtype"),
        (lambda m: m.new_cache(capacity=0), "at least one of each"),
        (lambda m: m.quantize("int3"), "the format is 'int3'"),
        (lambda m: m.quantize(block_size=48), "row length 64 is not a multiple of block_size 48; 16, 32"),
        (lambda m: m.quantize(keep=["no.such"]), "matches no matrix"),
    ],
)
def test_bad_input_gets_one_line(tiny_model, call, message):
    with pytest.raises(InputError, match=message) as error:
        call(tiny_model("Baichuan2-7B"))
    assert "\n" not in str(error.value)


def test_logits_are_computed_of_the_last_tokens_alone(tiny_model):
    model = tiny_model("Baichuan2-7B")
    ids = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    for count in (1, 3):
        assert np.allclose(model(ids, "float64", logits_to_keep=count), model(ids, "float64")[:, -count:])
    with pytest.raises(InputError, match="logits_to_keep is -1, expected a number of tokens, or 0 for all"):
        model(ids, logits_to_keep=-1)


def test_a_failed_call_leaves_the_cache_as_it_was(tiny_model):
    model = tiny_model("Baichuan2-7B")
    cache = model.new_cache(capacity=8)
    model(IDS[:6], cache=cache)
    untouched = model.new_cache()
    model(IDS[:6], cache=untouched)
    for wrong in (
        lambda: model(IDS[6:], cache=cache),
        lambda: model(IDS[6:8], "float64", cache=cache),
        lambda: model(IDS[6:8], "float64", [[0] * 6 + [1] * 2], cache),
    ):
        with pytest.raises(InputError):
            wrong()
    assert np.array_equal(model(IDS[6:8], cache=cache), model(IDS[6:8], cache=untouched))


def test_a_cache_that_was_interrupted_can_be_used(tiny_model):
    model = tiny_model("Baichuan2-7B")
    cache = model.new_cache()

    def interrupt(name, x):
        if name == "model.layers.1.self_attn.scores":
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        model.forward(IDS, "float64", None, cache, interrupt)
    assert np.array_equal(model(IDS, cache=cache), model(IDS))


class Blind(Decoder):
    """Attention sees nothing: the residual stream goes on as it was."""

    def attention(self, i, x, cos, sin, mask):
        return 0 * x


def test_a_decoder_goes_wherever_its_model_goes(family, tiny_model):
    """What is blind does not see other tokens: the last token alone gives its logits, whatever stands before it."""
    model, ids = tiny_model(family), np.arange(12)
    blind = model.with_decoder(Blind)
    encodings = calibrate(model, ids)
    made = {
        "itself": blind, "quantized": blind.quantize("q4_0"), "truncated": blind.truncated(1),
        "numba": blind.with_backend("numba"), "simulated": blind.simulate(encodings),
        "decoded after": model.simulate(encodings).with_decoder(Blind),
        "all of it": blind.with_backend("numpy").quantize("q4_0").truncated(1).simulate(
            encodings.of(blind.truncated(1).config, blind.truncated(1).weights)),
    }  # fmt: skip
    near = dict(rtol=0, atol=0.01)  # another order of sums may end on the next step of a grid; logits are near 1
    for name, other in made.items():
        assert other.decoder_class is Blind, name
        np.testing.assert_allclose(other(ids)[:, -1], other(ids[-1:])[:, -1], **near, err_msg=name)
        trace = other.trace(ids)
        assert not any("self_attn" in tap for tap in trace) and "lm_head" in trace, name
        batch = other([ids, ids[::-1]], attention_mask=[[1] * 12, [0] * 3 + [1] * 9])
        np.testing.assert_allclose(batch[1, -1], other(ids[:1])[0, -1], **near, err_msg=name)
    cache = blind.new_cache()
    pieces = [blind(piece, cache=cache) for piece in (ids[:5], ids[5:])]
    np.testing.assert_allclose(np.concatenate(pieces, 1), blind(ids), rtol=1e-5, atol=1e-5)
    likeliest = lambda *prompt: next(blind.generate(list(prompt), max_new_tokens=1))
    assert likeliest(1, 2, 7) == likeliest(7) == int(blind([7])[0, -1].argmax())
    assert np.array_equal(list(blind.stages(ids))[-1], blind(ids))


def test_a_simulation_of_some_layers_is_one_of_all(family, tiny_model):
    """Its activations stand on the grids that they stood on before."""
    model, ids = tiny_model(family), np.arange(12)
    encodings = calibrate(model, ids)
    whole, cut = model.simulate(encodings).trace(ids), model.simulate(encodings).truncated(1).trace(ids)
    for tap, value in cut.items():
        if tap.startswith(("model.embed", "model.layers")):
            assert np.array_equal(value, whole[tap]), tap


def test_importing_is_light():
    """Only what is used is imported: each of these takes longer than all the rest."""
    code = "import refimpl, sys; print([m for m in ('numba', 'onnx', 'qai_hub', 'torch', 'h5py') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_cache_belongs_to_one_model():
    """Keys and values of another model are numbers like any others, so nothing else would tell."""
    model = refimpl.load()
    other = model.quantize("int4")
    cache = model.new_cache()
    model([5, 6], cache=cache)
    model([7], cache=cache)
    with pytest.raises(InputError, match="filled by another model"):
        other([7], cache=cache)
    other([5, 6], cache=other.new_cache())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: model([5], cache=3), "the cache is a int, expected a KVCache"),
        (lambda model: model([5], logits_to_keep="x"), "logits_to_keep is 'x'"),
        (lambda model: model.trace([5], taps=["model.norm"]), "expected one glob"),
        (lambda model: model.trace([5], feed=[1]), "feed is a list, expected a trace"),
        (lambda model: model.generate([5], do_sample=True, seed="x"), "seed is 'x', expected a whole number"),
        (lambda model: refimpl.load(3), "the path is 3, expected a str or a Path"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(call, said):
    with pytest.raises(InputError, match=said):
        call(refimpl.load())
