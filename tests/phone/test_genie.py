"""Genie on the emulation: what it says, what it feeds, and what is said when something is wrong."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_checkpoint

from export.graphs.borders import read_borders
from export.phone.accuracy import by_graphs, perplexity
from export.phone.bundle import bundle
from export.phone.fed import judge_calls
from export.phone.host import Host, in_codes
from export.phone.parting import parting
from export.run.engines import Engine
from export.run.genie import Call, Genie, called, configured
from refimpl import InputError, load
from refimpl.cli import main
from refimpl.model import EMBEDDED

pytest.importorskip("onnxruntime_qnn")
PROMPT = "登鹳雀楼->王之涣\n白日依山尽，黄河入海流。"  # more tokens than a prompt's graph takes at a time


@pytest.fixture(scope="module")
def bundled(coded_export, desk_binaries, tmp_path_factory) -> Path:
    return bundle(EMBEDDED, coded_export, tmp_path_factory.mktemp("genie") / "bundle", compiled=desk_binaries)


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def conversation(bundled, model):
    """Three tokens after a prompt: Genie's text, and its calls."""
    with Genie(bundled, capture=True) as genie:
        assert genie.encode([PROMPT])[0] == list(model.tokenizer.encode(PROMPT))
        return "".join(genie.say(PROMPT, 3)), list(genie.calls())


def changed(call: Call, name: str, change) -> Call:
    array = call.inputs[name].copy()
    change(array)
    return Call(call.graph, call.number, {**call.inputs, name: array}, call.outputs)


def test_every_code_that_genie_feeds_is_what_its_host_should_feed(conversation, coded_export, model):
    text, calls = conversation
    fed = judge_calls(Host(model, coded_export), calls, model.tokenizer.encode(PROMPT))
    assert fed and fed.calls == 2 * (2 + 2) and "equal in every code" in str(fed)
    assert model.tokenizer.decode(list(fed.tokens))[: len(text)] == text
    assert [call.graph for call in calls[:2]] == ["prompt_ar16_cl64_1_of_2", "prompt_ar16_cl64_2_of_2"]


def test_the_chained_graphs_say_the_same(conversation, coded_export, model):
    text, _ = conversation
    steps = list(Host(model, coded_export).generate(model.tokenizer.encode(PROMPT), 3, Engine()))
    assert model.tokenizer.decode([token for token, _ in steps]) == text


@pytest.mark.parametrize(
    "name, change, why",
    [
        ("attention_mask", lambda x: x.__setitem__((..., 3), 65535), "token 0 looks at slots 0, 3, 63, expected 0, 63"),
        ("attention_mask", lambda x: np.floor_divide(x, 2, out=x), "has the code 32767 where token 0 looks"),
        ("past_key_1_in", lambda x: x.__setitem__((..., 0), 0), r"past_key_1_in: slots 0 are not what came out before"),
        ("position_ids_cos", lambda x: np.subtract(x, 1, out=x), "codes are rounded in another way: up to 1 code"),
        ("model.embed_tokens", lambda x: x.fill(0), "is not what the part before gave"),
    ],
)  # fmt: skip
def test_what_is_fed_wrongly_is_named(coded_export, model, name, change, why):
    """In a conversation whose second token is fed wrongly, so that slot 0 alone is full."""
    host, calls = Host(model, coded_export), []
    ids = model.tokenizer.encode(PROMPT)[:2]
    for number, id in enumerate(ids):
        before: dict = {}
        for graph in host.graphs[1]:
            fed = host.inputs(graph, [id], before)
            outputs = in_codes(Engine(), graph, fed)
            calls.append(Call(graph.name, number, fed, outputs))
            host.take(outputs, 1)
            before |= outputs
        host.advance(1)
    calls = [changed(c, name, change) if c.number == 1 and name in c.inputs else c for c in calls]
    (line,) = judge_calls(Host(model, coded_export), calls, ids).lines
    assert re.search(why, line), line


def test_positions_of_another_theta_and_a_bos_are_named(bundled, coded_export, model):
    changes = {"engine.backend.QnnHtp.rope-theta": 20000, "context.bos-token": 1}
    with Genie(bundled, capture=True, changes=changes) as genie:
        list(genie.say(PROMPT, 1))
        fed = judge_calls(Host(model, coded_export), genie.calls(), model.tokenizer.encode(PROMPT))
    assert "input_ids begins with 1, which nobody asked for: set bos-token" in fed.lines[0]
    assert "stands at no position of this model (rope-theta?)" in fed.lines[1]


def test_perplexity_is_genies_by_its_protocol(bundled, coded_export, model):
    """From the logits that Genie itself had; and the graphs on another engine are near."""
    text = (EMBEDDED / "held_out.txt").read_text(encoding="utf-8")[:75]
    ids = model.tokenizer.encode(text)
    with Genie(bundled, capture=True) as genie:
        said, calls = genie.perplexity(text), list(genie.calls())
    border = read_borders(coded_export / "prompt_ar16_cl64_2_of_2" / "model.onnx")["logits"]
    rows = np.concatenate([border.floats(c.outputs["logits"]).reshape(16, -1) for c in calls if "logits" in c.outputs])
    assert perplexity(lambda run: rows, ids, 64, 16) == pytest.approx(said, rel=1e-6)
    ours = perplexity(by_graphs(Host(model, coded_export), Engine()), ids, 64, 16)
    assert ours == pytest.approx(said, rel=0.1)  # 8 bits' worth of noise on each logit
    with pytest.raises(InputError, match="Genie scores pieces of 64"):
        perplexity(lambda run: rows, ids[:60], 64, 16)


def test_partings():
    logits = [np.array([0.0, 1.0, 0.9]), np.array([3.0, 0.0, 0.0])]
    assert parting([1, 0], logits, [1, 0], [0.1, 0.1]) is None
    near = parting([1, 0], logits, [2, 0], [0.1, 0.1])
    assert near and near.near_tie and near.index == 0 and "a near tie" in str(near)
    far = parting([1, 0], logits, [1, 2], [0.1, 0.1])
    assert far and not far.near_tie and far.gap == 3.0


# What is wrong.


def refused(why, folder, **keywords):
    with pytest.raises(InputError, match=why) as caught, Genie(folder, **keywords) as genie:
        list(genie.say("白", 1))
    assert "\n" not in str(caught.value)


def test_bad_bundles_are_one_line(bundled, coded_export, tmp_path):
    folder = Path(shutil.copytree(bundled, tmp_path / "bundle"))
    refused("is not a folder", tmp_path / "nowhere")
    refused("context->size=128, but loaded max-CL=64", folder, changes={"context.size": 128})
    refused("additional property 'nonsense'", folder, changes={"nonsense": 1})
    refused("Please check your I/O", folder, changes={"engine.backend.QnnHtp.pos-id-dim": 16})
    binary = folder / "token_ar1_cl64_2_of_2.bin"
    data = binary.read_bytes()
    binary.write_bytes(data[:100_000])
    refused("Genie over .*GenieDialog_create says general error", folder)
    binary.unlink()
    refused("has no token_ar1_cl64_2_of_2.bin, which its genie_config.json names; put it there", folder)
    (folder / "tokenizer.json").unlink()
    refused("has no t", folder)
    (folder / "genie_config.json").write_text("{}")
    refused("is not a configuration of a dialog", folder)


def test_shared_binaries_do_not_load_here(bundled, coded_export, tmp_path):
    from export.phone.compiler import compile_graphs

    shared = compile_graphs(coded_export, tmp_path / "bin").folder
    folder = bundle(EMBEDDED, coded_export, tmp_path / "bundle", compiled=shared)
    assert configured(folder, {})["dialog"]["engine"]["model"]["binary"]["ctx-bins"] == [
        "part_1_of_2.bin", "part_2_of_2.bin",
    ]  # fmt: skip
    refused("do not load on this machine: refimpl compile --desk", folder)


def test_binaries_of_other_graphs_are_no_bundle(coded_export, desk_binaries, tmp_path):
    with pytest.raises(InputError, match="has binaries for 8-elite, not for 8-gen-3"):
        bundle(EMBEDDED, coded_export, tmp_path / "b", soc="8-gen-3", compiled=desk_binaries)
    only = Path(shutil.copytree(coded_export, tmp_path / "x"))
    for path in only.glob("token_*"):
        shutil.rmtree(path)
    with pytest.raises(InputError, match="compile this export"):
        bundle(EMBEDDED, only, tmp_path / "b", compiled=desk_binaries)


def test_graphs_names():
    assert called("token_ar1_cl64_2_of_2_token_ar1_cl64_2_of_2_17635_1_0") == "token_ar1_cl64_2_of_2"


def test_command_over_a_bundle(bundled, coded_export, capsys):
    words = ["genie", "-p", "白日依山尽，", "--max-new-tokens", "2", "--bundle", str(bundled), "--no-outputs", "--json"]
    assert main([*words, "--graphs", str(coded_export)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["agrees"] and said["text"] == "黄河" and said["fed"]["lines"] == []
    assert set(said["partings"]) == {"chained graphs", "oracle"}
    assert main(["genie", "-p", "白", "--bundle", str(bundled.parent)]) == 2
    assert main(["genie", "-p", "白", "--graphs", str(bundled)]) == 2
    assert main(["genie", "-p", "白", "--text", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 3


@pytest.mark.parametrize("family, why", [("Baichuan2-13B", "has ALiBi"), ("Baichuan2-7B", "there is no text")])
def test_what_cannot_become_a_bundle_is_said_at_once(family, why, tmp_path, capsys):
    out, folder = tmp_path / "out", write_checkpoint(tmp_path / "model", family)
    shutil.copyfile(EMBEDDED / "tokenizer.model", folder / "tokenizer.model")
    assert main(["genie", str(folder), "-p", "白", "--out", str(out)]) == 2
    assert why in capsys.readouterr().err and not out.exists()
