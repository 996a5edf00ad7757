"""A golden on disk: it comes back as it was, appears whole or not at all, and nothing in it is believed."""

import json
import os
import sys
from dataclasses import asdict, replace

import ml_dtypes
import numpy as np
import pytest
from conftest import write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from golden import Tolerance, check, compare, read, tolerances, write
from golden.bundle import Case, read_trace, sha256, write_trace
from refimpl import InputError, Trace

IDS = np.array([[5, 17, 9, 3, 80, 44]])
PADDED = Case(np.array([[0, 0, 5, 17, 9], [4, 8, 3, 9, 2]]), np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
DTYPES = ("float64", "float32", "bfloat16")


def make(folder, model, cases=None, dtypes=DTYPES, taps=None):
    """A golden of a model; its truth is the model itself, which will do for everything but the truth."""
    cases = cases or {"p0": Case(IDS, None, "床前明月光"), "pad": PADDED}
    traces = {}
    for name, case in cases.items():
        for dtype in dtypes:
            trace = model.trace(case.ids, dtype, attention_mask=case.attention_mask, taps=taps)
            trace.meta["origin"] = dict.fromkeys(trace, "observed")
            traces[name, dtype] = trace
    rules = {dtype: tolerances(model.config, dtype, 6) for dtype in dtypes}
    write(folder, model.config, cases, traces, {"seed": 0, "weights": {"model.safetensors": "00"}}, rules)
    return traces


@pytest.fixture
def golden(tmp_path, tiny_model):
    make(tmp_path / "g", tiny_model("Baichuan2-7B"))
    return tmp_path / "g"


def test_what_is_written_comes_back(family, tmp_path, tiny_model):
    model = tiny_model(family)
    traces = make(tmp_path / "g", model)
    found = read(tmp_path / "g")
    assert found.config == model.config and found.dtypes == DTYPES and list(found.cases) == ["p0", "pad"]
    assert found.cases["p0"].text == "床前明月光" and found.cases["p0"].attention_mask is None
    assert np.array_equal(found.cases["pad"].attention_mask, PADDED.attention_mask)
    for key, trace in traces.items():
        again = found.trace(*key)
        assert list(again) == list(trace), "in computing order"
        for name, array in trace.items():
            assert again[name].dtype == array.dtype and np.array_equal(again[name], array), name
            assert not again[name].flags.owndata, "mapped, not read"
        assert again.meta["dtype"] == key[1] and again.meta["origin"]["lm_head"] == "observed"


def test_the_manifest_says_where_it_comes_from(golden):
    manifest = json.loads((golden / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["sha256"] == sha256(golden / "tensors.safetensors")
    entry = manifest["tensors"]["p0/float32/lm_head"]
    assert entry["shape"] == [1, 6, 96] and entry["dtype"] == "float32" and entry["origin"] == "observed"
    assert "float32 rounding" in entry["tolerance"]["reason"] and len(entry["sha256"]) == 64
    said = read(golden).describe()
    assert "Baichuan2-7B" in said and "p0: 1 x 6 tokens" in said and "seed: 0" in said


def test_scalars_empty_and_strided_tensors_survive(tmp_path):
    trace = Trace(
        {
            "a": np.asarray(np.float32(3)),
            "b": np.zeros((0, 3)),
            "c": np.arange(6.0).reshape(2, 3).T,
            "d": np.arange(4).astype(ml_dtypes.bfloat16)[::2],
        },
        {"engine": "a test"},
    )
    write_trace(tmp_path / "t", trace)
    again = read_trace(tmp_path / "t")
    assert list(again) == list(trace) and again.meta == trace.meta
    for name, x in trace.items():
        assert again[name].shape == x.shape and np.array_equal(again[name], x), name


# The verdict ---------------------------------------------------------------------------------------------------------


def test_check_agrees_with_itself_and_with_nothing_else(family, tmp_path, tiny_model):
    model = tiny_model(family)
    make(tmp_path / "g", model)
    report = check(model, tmp_path / "g")
    assert report and len(report.tensors) == 6 * len(model.trace(IDS))
    assert check(model.folder, tmp_path / "g", "float16"), "not recorded: judged by float64, with the rule for float16"
    right = type(model).trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "trace", lambda self, *args, **options: _bent(right(self, *args, **options)))
        report = check(model, tmp_path / "g")
    assert {tensor.name.split("/")[2] for tensor in report.failures} == {"model.layers.1"}
    assert report.failures[0].name == "p0/float64/model.layers.1"


def _bent(trace):
    trace["model.layers.1"] = trace["model.layers.1"] * 1.5
    return trace


def test_padding_does_not_count_and_the_rest_does(family, tmp_path, tiny_model):
    model = tiny_model(family)
    traces = make(tmp_path / "g", model, {"pad": PADDED}, ("float64",))

    def bent(place):
        def trace(*args, **options):
            changed = Trace({n: x.copy() for n, x in traces["pad", "float64"].items()}, {"dtype": "float64"})
            for name, x in changed.items():
                at = (0, ..., place, slice(None)) if name.endswith((".scores", ".probs")) else (0, place)
                at = (0, slice(None), place) if name.endswith((".query", ".key", ".value")) else at
                x[at] += 7.0
                if name.endswith(".scores"):
                    x[0, ..., place] -= 3.0  # as a key
            return changed

        return trace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "trace", lambda self, *args, **options: bent(1)())
        assert check(model, tmp_path / "g"), "place 1 of the first row is padding"
        patch.setattr(type(model), "trace", lambda self, *args, **options: bent(2)())
        assert len(check(model, tmp_path / "g").failures) == len(traces["pad", "float64"])


def test_some_taps_are_a_golden_too(tmp_path, tiny_model):
    model = tiny_model("Qwen2-7B")
    make(tmp_path / "g", model, taps="*.o_proj")
    report = check(model, tmp_path / "g")
    assert report and len(report.tensors) == 2 * 6 and not report.extra


def test_a_model_of_other_sizes_is_refused(golden, tiny_model):
    with pytest.raises(InputError, match="this model's family is Baichuan2-13B"):
        check(tiny_model("Baichuan2-13B"), golden)
    model = tiny_model("Baichuan2-7B")
    for name in ("rope_theta", "rms_norm_eps"):
        other = type(model)(replace(model.config, **{name: 1e-3}), model.weights)
        with pytest.raises(InputError, match=f"this model's {name} is 0.001"):
            check(other, golden)


def test_a_red_report_says_whether_the_weights_are_others(golden, tiny_model, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(sys.modules["golden.check"], "sha256", lambda path: hashed.append(path) or sha256(path))
    model = tiny_model("Baichuan2-7B")
    assert check(model, golden) and not hashed, "a green one needs no other evidence"
    other = write_checkpoint(tmp_path / "other", "Baichuan2-7B", seed=1)
    said = "these are not the weights that were recorded: model.safetensors"
    edit(
        golden,
        lambda m: m["provenance"].update(weights={"model.safetensors": sha256(model.folder / "model.safetensors")}),
    )
    report = check(other, golden)
    assert not report and said in report.summary and said in json.loads(report.to_json())["summary"]
    edit(golden, lambda m: m["provenance"].update(weights={"model.safetensors": sha256(other / "model.safetensors")}))
    assert said not in check(other, golden).summary
    for unknown in ({"../model.safetensors": "00"}, {"gone.bin": "00"}, "random", None):
        edit(golden, lambda m, unknown=unknown: m["provenance"].update(weights=unknown))
        assert said[:20] not in check(other, golden).summary


def test_compare_takes_a_golden_by_its_own_tolerance(golden, tiny_model):
    trace = tiny_model("Baichuan2-7B").trace(IDS)
    report = compare(trace, read(golden).trace("p0", "float32"))
    assert report and report.tensors[-1].reason == tolerances(read(golden).config, "float32", 6)["lm_head"].reason
    # a float32 run by the float64 truth: within float32's bound, which it says
    report = compare(trace, read(golden).trace("p0", "float64"))
    assert report and "float32 rounding" in report.tensors[-1].reason and report.worst[0].excess > 1e-3


# All or nothing ------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(golden):
    before = {path: path.read_bytes() for path in golden.iterdir()}
    with pytest.raises(InputError, match="is there already"):
        write_trace(golden, Trace({"x": np.ones(2)}))
    assert before == {path: path.read_bytes() for path in golden.iterdir()}


def test_a_half_written_one_never_appears(tmp_path, monkeypatch):
    def break_off(arrays, path, about):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", break_off)
    with pytest.raises(InputError, match="No space left"):
        write_trace(tmp_path / "t", Trace({"x": np.ones(2)}))
    assert list(tmp_path.iterdir()) == []


def test_the_same_run_writes_the_same_bytes(tmp_path, tiny_model):
    for name in ("one", "two"):
        make(tmp_path / name, tiny_model("Baichuan2-7B"))
    for file in ("manifest.json", "tensors.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("name", ["../x", "a b", "", "x\n", "/etc/passwd", "x" * 300])
def test_names_that_are_no_names_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="not a name for a tensor"):
        write_trace(tmp_path / "t", Trace({name: np.ones(2)}))
    assert list(tmp_path.iterdir()) == []


# Nothing in it is believed -------------------------------------------------------------------------------------------


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def _rename(manifest, new):
    manifest["cases"][new] = manifest["cases"].pop("p0")


LIES = [
    (lambda m: m.update(format="gguf"), "of format 'gguf', expected 'refimpl golden 1'"),
    (lambda m: m.update(tensors=[1]), "lists no tensors"),
    (lambda m: m["tensors"].popitem(), "disagree on"),
    (lambda m: m["tensors"].update(more={}), "disagree on more"),
    (lambda m: m["tensors"].update({"p0/float32/\x1b[2J": {}}), "not a name for a tensor"),
    (lambda m: m["tensors"].update({"p0/\n/x": {}}), "not a name for a tensor"),
    (lambda m: m["tensors"]["p0/float32/lm_head"].update(shape=[1, 2]), "its manifest says float32"),
    (lambda m: m["tensors"]["p0/float32/lm_head"].update(dtype="int8"), "its manifest says int8"),
    (lambda m: m["tensors"]["p0/float32/lm_head"].update(origin=3), "origin"),
    (lambda m: m["tensors"]["p0/float32/lm_head"].pop("tolerance"), "KeyError"),
    (lambda m: m["tensors"]["p0/float32/lm_head"]["tolerance"].update(relative=1e9), "expected a number from 0 to 1"),
    (lambda m: m["tensors"]["p0/float32/lm_head"]["tolerance"].update(relative=float("nan")), "from 0 to 1"),
    (lambda m: m["tensors"]["p0/float32/lm_head"]["tolerance"].update(relative="1"), "from 0 to 1"),
    (lambda m: m.update(dtypes=["float32", "float8"]), "number formats"),
    (lambda m: m.update(dtypes=[["float32"]]), "TypeError"),
    (lambda m: m.update(dtypes=["float64"]), "belongs to no case"),
    (lambda m: m.update(cases={}), "it has no cases"),
    (lambda m: m.update(provenance=None), "no provenance"),
    (lambda m: _rename(m, "../../etc"), "not a name for a case"),
    (lambda m: m["cases"]["p0"].update(ids=[[1, 2], [3]]), "ValueError"),
    (lambda m: m["cases"]["p0"].update(ids=[[1, 96]]), "numbers from 0 to 95"),
    (lambda m: m["cases"]["p0"].update(ids=[[-1]]), "numbers from 0 to 95"),
    (lambda m: m["cases"]["p0"].update(ids=[[1.5]]), "numbers from 0 to 95"),
    (lambda m: m["cases"]["p0"].update(ids=[[2**80]]), "numbers from 0 to 95"),
    (lambda m: m["cases"]["p0"].update(ids="abc"), "numbers from 0 to 95"),
    (lambda m: m["cases"]["p0"].update(attention_mask=[[1]]), "does not fit"),
    (lambda m: m["cases"]["p0"].update(text=[1]), "text of p0"),
    (lambda m: m["config"].update(hidden_size=-4), "hidden_size"),
    (lambda m: m["config"].update(hidden_size="4"), "hidden_size"),
    (lambda m: m["config"].update(surprise=1), "surprise"),
    (lambda m: m.pop("config"), "config"),
    (lambda m: m.update(sha256="00"), "another sha256"),
]


@pytest.mark.parametrize(("lie", "says"), LIES)
def test_a_manifest_that_lies_is_refused(golden, lie, says):
    edit(golden, lie)
    with pytest.raises(InputError) as caught:
        read(golden)
    assert says in str(caught.value) and str(caught.value).isprintable()


def test_a_name_that_moves_the_cursor_is_refused_wherever_it_stands(golden, tmp_path):
    write_trace(tmp_path / "t", Trace({"x": np.ones(2)}))
    for folder, key, again in ((golden, "p0/float32/\x1b[2J", read), (tmp_path / "t", "\x1b[2J", read_trace)):
        path = folder / "tensors.safetensors"
        tensors = load_file(path)
        tensors[key] = np.ones(2, np.float32)
        save_file(tensors, path)
        entry = {"dtype": "float32", "shape": [2], "origin": "", "tolerance": {"relative": 0.1, "reason": ""}}
        edit(folder, lambda m, key=key, entry=entry: m["tensors"].update({key: entry}))
        with pytest.raises(InputError, match="not a name for a tensor") as caught:
            again(folder, verify=False)
        assert str(caught.value).isprintable()


def test_provenance_is_shown_as_text(golden):
    edit(golden, lambda m: m["provenance"].update({"\x1b[2J": 1, "code": "\x1b[2J"}))
    assert all(line.isprintable() for line in read(golden).describe().splitlines())


def test_a_changed_tensor_is_named(golden):
    path = golden / "tensors.safetensors"
    tensors = load_file(path)
    tensors["p0/float32/lm_head"][0, 0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(InputError, match="these tensors changed: p0/float32/lm_head;"):
        read(golden)
    assert read(golden, verify=False).cases


def test_truncated_missing_and_foreign_files_are_refused(golden, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match=r"holds no manifest\.json"):
            read(path)
    whole = (golden / "tensors.safetensors").read_bytes()
    for content in (whole[:-1], whole[:100], b"", b"\xff" * 64, whole + b"x"):
        (golden / "tensors.safetensors").write_bytes(content)
        with pytest.raises(InputError):
            read(golden)
    os.remove(golden / "tensors.safetensors")
    with pytest.raises(InputError, match="is not there"):
        read(golden)
    for content in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        (golden / "manifest.json").write_bytes(content)
        with pytest.raises(InputError):
            read(golden)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_broken_byte_is_an_input_error_or_harmless(golden, data):
    manifest, tensors = golden / "manifest.json", golden / "tensors.safetensors"
    originals = {path: path.read_bytes() for path in (manifest, tensors)}
    path = data.draw(st.sampled_from([manifest, tensors]))
    content = bytearray(originals[path])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(len(content), 4000) - 1))] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(content)
        read(golden).describe()
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(originals[path])


def test_a_golden_of_one_case_is_a_trace_too(golden, tmp_path, tiny_model):
    with pytest.raises(InputError, match="has 2 cases; say which one: p0, pad"):
        read_trace(golden)
    with pytest.raises(InputError, match="has 3 formats; say which one: float64, float32, bfloat16"):
        read(golden).trace("p0")
    traces = make(tmp_path / "one", tiny_model("Baichuan2-7B"), {"p0": Case(IDS)})
    for asked, found_in in ((None, "float64"), ("float16", "float64"), ("bfloat16", "bfloat16")):
        found = read_trace(tmp_path / "one", dtype=asked)
        assert (
            found.meta["dtype"] == found_in and found.meta["ids"] == traces["p0", found_in].meta["ids"] == IDS.tolist()
        )
    make(tmp_path / "single", tiny_model("Baichuan2-7B"), {"p0": Case(IDS)}, ("float32",))
    assert read(tmp_path / "single").trace().meta["dtype"] == "float32"


def test_a_trace_is_no_golden_and_its_meta_is_checked(tmp_path, tiny_model):
    write_trace(tmp_path / "t", Trace({"x": np.ones(2)}))
    with pytest.raises(InputError, match=r"expected 'refimpl golden 1'; a trace is read by golden\.read_trace"):
        read(tmp_path / "t")
    config = asdict(tiny_model("Baichuan2-7B").config)
    bad = Tolerance(7, "")
    for number, meta in enumerate(({"config": {"x": 1}}, {"config": 3}, {"tolerance": {"x": asdict(bad)}})):
        write_trace(tmp_path / f"t{number}", Trace({"x": np.ones(2)}, meta))
        with pytest.raises(InputError, match="not a trace's"):
            read_trace(tmp_path / f"t{number}")
    write_trace(tmp_path / "good", Trace({"lm_head": np.ones((1, 2, 96))}, {"config": config}))
    good = read_trace(tmp_path / "good")
    assert "float64 rounding" in compare(good, good).tensors[0].reason
