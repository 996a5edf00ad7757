"""The verb compare: runs that were written to disk, judged by each other and by goldens."""

import json

import numpy as np
import pytest

import golden
import refimpl
from golden.bundle import Case
from refimpl.cli import main

TEXT = "秋风"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Traces of one prompt on disk, by name, and a golden of it."""
    at, model = tmp_path_factory.mktemp("runs"), refimpl.load()
    for name, text, dtype in (("exact", TEXT, "float64"), ("mine", TEXT, "float32"), ("other", "春风", "float32")):
        assert main(["trace", "-p", text, "--dtype", dtype, "--out", str(at / name)]) == 0
    broken = model.trace(TEXT)
    broken["model.layers.1"] = broken["model.layers.1"] * np.float32(1.01)
    golden.write_trace(at / "broken", broken)
    fed = model.trace(TEXT, "bfloat16", feed=model.trace(TEXT, "float64"))
    golden.write_trace(at / "fed", fed)
    ids = model.token_ids(TEXT)
    traces = {("p0", dtype): model.trace(ids, dtype) for dtype in ("float64", "float32")}
    for trace in traces.values():
        trace.meta["origin"] = dict.fromkeys(trace, "observed")
    rules = {dtype: golden.tolerances(model.config, dtype, ids.shape[1]) for dtype in ("float64", "float32")}
    golden.write(at / "golden", model.config, {"p0": Case(ids)}, traces, {}, rules)
    return at


def compare(runs, capsys, a, b, *options):
    """Exit code, and what was printed and what was said."""
    capsys.readouterr()
    return main(["compare", str(runs / a), str(runs / b), *options]), *capsys.readouterr()


@pytest.mark.parametrize("a", ["mine", "exact", "golden", "fed"])
@pytest.mark.parametrize("b", ["exact", "golden"])
def test_runs_that_agree(runs, capsys, a, b):
    code, out, _ = compare(runs, capsys, a, b)
    assert code == 0 and out.startswith("agrees: 54 tensors")


def test_a_golden_judges_in_the_format_of_the_run(runs, capsys):
    report = json.loads(compare(runs, capsys, "mine", "golden", "--json")[1])
    assert report["agrees"] and report["tensors"][0]["needed"] == 0, "float32 by float32"


def test_a_run_that_differs(runs, capsys):
    code, out, _ = compare(runs, capsys, "broken", "exact")
    assert code == 1 and "first model.layers.1 in computing order" in out
    code, out, _ = compare(runs, capsys, "broken", "mine", "--json")
    assert code == 1 and json.loads(out)["tensors"][0]["name"] == "model.layers.1"


@pytest.mark.parametrize("a", ["other", "nowhere"])
def test_what_cannot_be_compared_gets_one_line(runs, capsys, a):
    code, out, said = compare(runs, capsys, a, "exact")
    assert code == 2 and not out and said.startswith("refimpl: ") and said.count("\n") == 1
    assert ("the same ids" if a == "other" else "holds no manifest.json") in said


def test_a_golden_of_many_prompts_is_refused(runs, capsys):
    many = golden.__path__[0] + "/data/qwen2-tiny/golden"
    code, _, said = compare(runs, capsys, "mine", many)
    assert code == 2 and "has 2 cases; say which one: p7, p33" in said


def test_a_golden_is_checked_fed_if_asked(capsys):
    folder = f"{golden.__path__[0]}/data/qwen2-tiny"
    arguments = ["golden", "check", f"{folder}/model", f"{folder}/golden", "--dtype", "float32", "--json"]
    allowed = []
    for options in ([], ["--fed"]):
        assert main(arguments + options) == 0
        tensors = json.loads(capsys.readouterr().out)["tensors"]
        allowed.append(next(t["allowed"] for t in tensors if t["name"] == "p7/float32/lm_head"))
    assert allowed[1] < allowed[0]
