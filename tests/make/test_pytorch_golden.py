"""Goldens from PyTorch: by transformers' classes, by code that must be trusted, and against the recorded ones."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import write_checkpoint
from safetensors.numpy import load_file, save_file
from trusted_code import CODE, no_shared_cache, with_code  # noqa: F401  (the fixture holds for all tests here)

import refimpl
from golden import Tolerance, check, compare, read
from golden.bundle import Case, sha256
from golden.tolerance import largest_scores, tolerances
from refimpl import InputError, names
from refimpl.config import FAMILIES

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from golden.make.pytorch import make  # noqa: E402  (it needs what was just asked for)

IDS = [5, 17, 9, 3, 80, 44, 2, 61, 9, 9, 33, 20]
PADDED = Case(np.array([[0, 0, 0, 5, 17, 9], [4, 8, 3, 9, 2, 7]]), np.array([[0, 0, 0, 1, 1, 1], [1] * 6]))
PROMPTS = {"one": IDS, "pad": PADDED}
ROPE = [family for family in FAMILIES if not family.endswith("13B")]
REMOTE = [family for family in FAMILIES if family.startswith("Baichuan")]


@pytest.mark.parametrize("family", ROPE)
def test_a_class_of_transformers_agrees_with_ours(family, tmp_path, tiny_folder):
    golden = make(tiny_folder(family), tmp_path / "g", PROMPTS, dtypes=("float32", "float64", "bfloat16"))
    report = check(tiny_folder(family), tmp_path / "g")
    assert report, report
    trace = golden.trace("one", "float64")
    model = refimpl.load(tiny_folder(family))
    assert list(trace) == list(names.taps(model.config)), "every tap, in computing order"
    derived = {name.rsplit(".")[-1] for name, origin in trace.meta["origin"].items() if origin != "observed"}
    assert derived == {"scores"} | ({"W_pack"} if model.config.qkv_packed else set())
    for name, tap in names.taps(model.config).items():
        assert trace[name].shape == names.shape(tap, model.config, 1, len(IDS), len(IDS)), name
        assert trace[name].dtype == np.float64, name


def test_tolerances_know_how_large_the_scores_are(tmp_path):
    """Stored with the golden: rounding is amplified where attention scores are hundreds."""
    folder = write_checkpoint(tmp_path / "loud", "Baichuan2-7B")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("W_pack.weight"):
            tensors[name][:128] *= np.float32(8)
    save_file(tensors, folder / "model.safetensors")
    truth = make(folder, tmp_path / "g", {"one": IDS}, dtypes=("float32",)).trace()
    rules = tolerances(refimpl.load(folder).config, "float32", len(IDS), scores=largest_scores(truth))
    assert {n: Tolerance(**stored) for n, stored in truth.meta["tolerance"].items()} == rules
    assert "amplified" in rules["lm_head"].reason
    assert check(folder, tmp_path / "g")


@pytest.mark.parametrize("family", REMOTE)
def test_trusted_code_agrees_with_ours(family, tmp_path, capsys):
    folder = with_code(tmp_path / "m", family)
    golden = make(folder, tmp_path / "g", PROMPTS, implementation="remote", trust_remote_code=True)
    report = check(folder, tmp_path / "g")
    assert report, report
    assert len(golden.trace("one", "float64")) == len(names.taps(golden.config))
    origins = {name.rsplit(".")[-1]: origin for name, origin in golden.trace("one", "float64").meta["origin"].items()}
    fused = ["probs"] if family.endswith("7B") else []
    assert [name for name, origin in origins.items() if origin != "observed"] == ["scores", *fused]
    files = {name: sha256(CODE / name) for name in ("configuration_baichuan.py", "modeling_baichuan.py")}
    assert golden.provenance["code"] == files
    said = capsys.readouterr().err
    assert all(f"{name} (sha256 {digest})" in said for name, digest in files.items())


def test_heads_that_are_no_power_of_two(tmp_path):
    folder = with_code(tmp_path / "m", "Baichuan2-13B", hidden_size=60, num_attention_heads=10)
    make(folder, tmp_path / "g", [IDS], trust_remote_code=True)  # "auto": nothing else fits
    assert check(folder, tmp_path / "g")


def test_both_implementations_agree(tmp_path):
    folder = with_code(tmp_path / "m", "Baichuan2-7B")
    one = make(folder, tmp_path / "one", PROMPTS)
    two = make(folder, tmp_path / "two", PROMPTS, implementation="remote", trust_remote_code=True)
    for dtype in one.dtypes:
        assert compare(one.trace("one", dtype), two.trace("one", dtype))


def test_untrusted_code_is_named_and_not_executed(tmp_path):
    folder = with_code(tmp_path / "m", "Baichuan2-13B")
    for name in ("configuration_baichuan.py", "modeling_baichuan.py"):
        with open(folder / name, "a", encoding="utf-8") as file:
            file.write(f"\nopen({str(tmp_path / 'executed')!r}, 'w').close()\n")
    with pytest.raises(InputError) as caught:
        make(folder, tmp_path / "g", [IDS])
    for name in ("configuration_baichuan.py", "modeling_baichuan.py"):
        assert f"{name} (sha256 {sha256(folder / name)})" in str(caught.value)
    assert "--trust-remote-code" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "g").exists()
    make(folder, tmp_path / "g", [IDS], dtypes=("float32",), trust_remote_code=True)
    assert (tmp_path / "executed").exists(), "the test can tell"


@pytest.mark.parametrize("reference", [None, 3, "somebody/else--modeling.Model", "../evil.Model", "a.b.C", "evil"])
def test_code_from_elsewhere_is_refused(tmp_path, reference):
    folder = with_code(tmp_path / "m", "Baichuan2-13B")
    keys = json.loads((folder / "config.json").read_text())
    keys["auto_map"]["AutoModelForCausalLM"] = reference
    (folder / "config.json").write_text(json.dumps(keys))
    with pytest.raises(InputError, match="for AutoModelForCausalLM, expected module"):
        make(folder, tmp_path / "g", [IDS], trust_remote_code=True)


def test_a_golden_is_made_of_numbers(tmp_path):
    """NaN in a weight, even one that no prompt reads, and logits that overflow in a format."""
    folder = write_checkpoint(tmp_path / "m", "Baichuan2-7B")
    tensors = load_file(folder / "model.safetensors")
    bad = {name: x.copy() for name, x in tensors.items()}
    bad["model.embed_tokens.weight"][-1, 0] = np.nan
    save_file(bad, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model.embed_tokens.weight of .* holds NaN or infinity"):
        make(folder, tmp_path / "g", [IDS])
    save_file(
        tensors | {"model.norm.weight": tensors["model.norm.weight"] * np.float32(1e6)}, folder / "model.safetensors"
    )
    with pytest.raises(InputError, match="the logits of p0 in float16 are NaN or infinite"):
        make(folder, tmp_path / "g", [IDS], dtypes=("float32", "float16"))
    assert not (tmp_path / "g").exists()
    assert make(folder, tmp_path / "g", [IDS], dtypes=("float32",))


def test_code_that_is_missing_or_broken_is_an_input_error(tmp_path):
    folder = with_code(tmp_path / "m", "Baichuan2-13B")
    text = (folder / "modeling_baichuan.py").read_text()
    for broken in ("raise RuntimeError('no')", "def (", text.replace("self.W_pack(x)", "self.nothing(x)")):
        (folder / "modeling_baichuan.py").write_text(broken)
        with pytest.raises(InputError, match=r"RuntimeError: no|SyntaxError|no attribute 'nothing'"):
            make(folder, tmp_path / "g", [IDS], trust_remote_code=True)
    (folder / "modeling_baichuan.py").unlink()
    with pytest.raises(InputError, match="is not there, but auto_map"):
        make(folder, tmp_path / "g", [IDS], trust_remote_code=True)


def test_alibi_needs_the_models_own_code(tmp_path, tiny_folder):
    with pytest.raises(InputError, match=r"no class of transformers computes Baichuan2-13B \(ALiBi"):
        make(tiny_folder("Baichuan2-13B"), tmp_path / "g", [IDS], implementation="transformers")
    with pytest.raises(InputError, match="needs the model's own code"):
        make(tiny_folder("Baichuan2-13B"), tmp_path / "g", [IDS])


@pytest.mark.parametrize("fault", ["W_pack", "norm", "head", "rope"])
def test_a_golden_catches_a_wrong_model(fault, tmp_path, tiny_folder, monkeypatch):
    """The verdict does fall: our side, broken in one place, fails at that place first."""
    make(tiny_folder("Baichuan2-7B"), tmp_path / "g", {"one": IDS}, dtypes=("float64", "float32"))
    at = {"W_pack": "model.layers.1.self_attn.W_pack.weight", "norm": "model.layers.0.input_layernorm.weight",
          "head": "lm_head.weight"}  # fmt: skip
    model = refimpl.load(tiny_folder("Baichuan2-7B"))
    if fault == "rope":
        right = refimpl.Model.position_tables
        monkeypatch.setattr(refimpl.Model, "position_tables", lambda self, p, dtype: right(self, p * 1.001, dtype))
    else:
        changed = model.weights[at[fault]].array.copy()
        changed[1] += 0.01
        weight = type(model.weights[at[fault]])(changed)
        model = refimpl.Model(model.config, model.weights.replace({at[fault]: weight}), model.folder)
    report = check(model, tmp_path / "g")
    first = at.get(fault, "model.layers.0.self_attn.query.weight").removesuffix(".weight")
    assert not report and report.failures[0].name == f"one/float64/{first}"


def test_the_same_call_makes_the_same_bytes(tmp_path, tiny_folder):
    for name in ("one", "two"):
        make(tiny_folder("Qwen2-7B"), tmp_path / name, PROMPTS)
    for file in ("manifest.json", "tensors.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_provenance(tmp_path, tiny_folder):
    folder = tiny_folder("Baichuan2-7B")
    golden = make(folder, tmp_path / "g", PROMPTS, seed=7, dtypes=("float32",))
    assert golden.provenance["versions"]["torch"] == torch.__version__ and golden.provenance["seed"] == 7
    assert golden.provenance["weights"] == {"model.safetensors": sha256(folder / "model.safetensors")}
    assert "LlamaForCausalLM" in golden.provenance["implementation"]
    assert np.array_equal(golden.cases["pad"].attention_mask, PADDED.attention_mask)
    assert "LlamaForCausalLM" in read(tmp_path / "g").describe()


def test_some_taps_alone(tmp_path, tiny_folder):
    golden = make(tiny_folder("Qwen2-7B"), tmp_path / "g", [IDS], taps="*.probs")
    found = ["model.layers.0.self_attn.probs", "model.layers.1.self_attn.probs"]
    assert list(golden.trace("p0", "float32")) == found
    with pytest.raises(InputError, match="no tensor that was seen is called 'nothing'"):
        make(tiny_folder("Qwen2-7B"), tmp_path / "h", [IDS], taps="nothing")


def test_all_ways_to_store_weights(tmp_path):
    """One safetensors, shards of it, a .bin, bfloat16, and a head that is the embedding."""
    folder = write_checkpoint(tmp_path / "m", "Qwen2-7B")
    expected = make(folder, tmp_path / "one", [IDS]).trace("p0", "float64")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, folder / "pytorch_model.bin")
    found = make(folder, tmp_path / "bin", [IDS])
    assert list(found.provenance["weights"]) == ["pytorch_model.bin"]
    assert compare(found.trace("p0", "float64"), expected, Tolerance(0, "the same weights"))
    places = {name: ("a.safetensors", "b.safetensors")[k % 2] for k, name in enumerate(tensors)}
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({name: x for name, x in tensors.items() if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = make(folder, tmp_path / "shards", [IDS])
    assert list(found.provenance["weights"]) == ["a.safetensors", "b.safetensors"]
    assert compare(found.trace("p0", "float64"), expected, Tolerance(0, "the same weights"))

    import ml_dtypes

    tied = write_checkpoint(tmp_path / "tied", "Qwen2-7B", dtype=ml_dtypes.bfloat16, tie_word_embeddings=True)
    make(tied, tmp_path / "g", [IDS])
    assert check(tied, tmp_path / "g")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_bad_input_is_one_clear_line(tmp_path, tiny_folder, monkeypatch):
    good, out = tiny_folder("Baichuan2-7B"), tmp_path / "g"
    monkeypatch.chdir(tmp_path)
    broken = write_checkpoint(tmp_path / "broken", "Baichuan2-7B")
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    evil = write_checkpoint(tmp_path / "evil", "Baichuan2-7B")
    (evil / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, evil / "pytorch_model.bin")
    short = write_checkpoint(tmp_path / "short", "Baichuan2-7B")
    tensors = load_file(short / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if "lm_head" not in name}, short / "model.safetensors")
    empty = write_checkpoint(tmp_path / "empty", "Baichuan2-7B")
    (empty / "model.safetensors").unlink()
    cases = [
        ((tmp_path / "nowhere", out, [IDS]), {}, r"cannot read .*config\.json"),
        ((broken, out, [IDS]), {}, "cannot read"),
        ((evil, out, [IDS]), {}, "cannot read .*pytorch_model.bin"),
        ((short, out, [IDS]), {}, "cannot be built"),
        ((empty, out, [IDS]), {}, "expected weights"),
        ((good, out, []), {}, "there is no prompt"),
        ((good, out, [[]]), {}, "empty"),
        ((good, out, [[5, 96]]), {}, "token id 96 is outside the vocabulary"),
        ((good, out, [[1] * 65]), {}, "exceed the context of 64"),
        ((good, out, ["text"]), {}, "tokenizer"),
        ((good, out, [Case(np.array([IDS]), np.ones((1, 3)))]), {}, "attention_mask"),
        ((good, out, [IDS]), {"dtypes": ("float8",)}, "dtype is 'float8'"),
        ((good, out, [IDS]), {"implementation": "jax"}, "implementation is 'jax'"),
    ]
    for arguments, options, says in cases:
        with pytest.raises(InputError, match=says) as caught:
            make(*arguments, **options)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists() and not out.exists()

    monkeypatch.setattr("golden.make.pytorch._build", pytest.fail)  # what would fail an hour later fails at once
    with pytest.raises(InputError, match="is there already"):
        make(good, good, [IDS])
    with pytest.raises(InputError, match="not a name"):
        make(good, out, {"../x": IDS})


def test_one_thread_and_its_settings_put_back(tmp_path, tiny_folder, monkeypatch):
    import golden.make.pytorch as at

    during, right = [], at._record

    def settings():
        return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()

    def record(*arguments):
        during.append(settings())
        return right(*arguments)

    monkeypatch.setattr(at, "_record", record)
    torch.set_num_threads(2)
    before = settings()
    make(tiny_folder("Qwen2-7B"), tmp_path / "g", [IDS])
    assert during == [(1, True, torch.float32), (1, True, torch.float64)]
    assert settings() == before == (2, False, torch.float32)


@pytest.mark.parametrize("kind", ["bool", "added", "causal", "none"])
def test_a_fused_attention_is_taken_apart(kind):
    from golden.make.pytorch import Watch, _attention

    config = refimpl.config.Config(family="Qwen2-7B", hidden_size=16, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5, 4, dtype=torch.float64) for heads in (4, 2, 2))
    allowed = torch.ones(5, 5, dtype=torch.bool)
    options = {}
    if kind != "none":
        allowed = allowed.tril()
        added = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
        options = {"bool": {"attn_mask": allowed}, "added": {"attn_mask": added}, "causal": {"is_causal": True}}[kind]
    with Watch() as watch:
        watch.layer = 0
        context = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    found = {name: x for name, (x, _) in _attention(config, watch, 0).items()}
    assert torch.equal(found["query"], q) and torch.equal(found["key"], k) and torch.equal(found["value"], v)
    assert not found["probs"].masked_select(~allowed).any()
    again = found["probs"] @ v.repeat_interleave(2, dim=1)
    assert torch.allclose(again, context, rtol=0, atol=1e-14)


def test_without_torch_it_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import golden\n"
        "from refimpl import InputError\n"
        "try:\n    import golden.make.pytorch\n"
        "except InputError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'refimpl[torch]'" in done.stdout


def test_golden_itself_does_not_need_torch():
    code = "import sys, golden, golden.check; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["baichuan2-7b-tiny", "baichuan-7b-v1-tiny", "qwen2-tiny"])
def test_the_recorded_goldens(name, shared, tmp_path):
    """The official code, recorded long ago under other versions: float32 to 1e-5, float64 to 1e-12."""
    from recorded import Recording

    recording = Recording(shared, name)
    cases = {case: Case(recording[f"input.{case}.input_ids"]) for case in ("p1", "p7", "p33", "p130")}
    golden = make(recording.folder, tmp_path / "g", cases, dtypes=("float32", "float64"))
    seen = set()
    for precision, dtype, bound in (("f32", "float32", 1e-5), ("f64x", "float64", 1e-12)):
        for case in cases:
            expected = {n: x for n, x in recording.tensors(precision, case).items() if not n.endswith(".scores")}
            if expected:
                report = compare(golden.trace(case, dtype), expected, Tolerance(bound, "as recorded"))
                assert report, report
            seen |= {(dtype, tap.rsplit(".")[-1]) for tap in expected}
    assert {what for dtype, what in seen if dtype == "float64"} >= {"lm_head", "query", "context", "down_proj"}


def test_the_recorded_golden_of_alibi(shared, tmp_path):
    """Code that is not the official one, but runs like it, against what the official one did."""
    from recorded import Recording

    recording = Recording(shared, "baichuan2-13b-tiny")
    folder = shutil.copytree(recording.folder, tmp_path / "m")
    for name in ("configuration_baichuan.py", "modeling_baichuan.py"):
        shutil.copy(CODE / name, folder / name)
    cases = {case: Case(recording[f"input.{case}.input_ids"]) for case in ("p1", "p7", "p33", "p130")}
    golden = make(folder, tmp_path / "g", cases, trust_remote_code=True)
    for precision, dtype, bound in (("f32", "float32", 1e-5), ("f64x", "float64", 1e-12)):
        for case in ("p7", "p33", "p130"):
            expected = {n: x for n, x in recording.tensors(precision, case).items() if not n.endswith(".scores")}
            if expected:
                report = compare(golden.trace(case, dtype), expected, Tolerance(bound, "as recorded"))
                assert report, report
    assert check(folder, tmp_path / "g")
