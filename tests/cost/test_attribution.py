"""One tensor at a time: the shares by their definition, and the picture of them."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from conftest import write_checkpoint

import refimpl
from golden.cost.attribution import attribute, differing
from golden.cost.picture import write_svg
from golden.cost.quality import quality
from golden.cost.reading import Reading
from refimpl import InputError
from refimpl.cli import main
from refimpl.sweep import workers

TEXT = [int(i) for i in np.random.default_rng(0).integers(3, 90, 150)]


def test_shares_by_their_definition(tiny_model, family):
    """Each tensor by itself, in an otherwise unchanged model that is run from its beginning."""
    model = tiny_model(family)
    small = model.quantize("int4")
    found = attribute(small, model, TEXT, Reading(dtype="float64"))
    modules = 7 if family == "Qwen2-7B" else 5
    assert len(found.shares) == 2 * modules + 1 and found.shares[-1].name == "lm_head"
    for share in found.shares:
        name = f"{share.name}.weight"
        weights = model.weights.replace({name: small.weights[name]})
        expected = quality(refimpl.Model(model.config, weights), model, TEXT, Reading(dtype="float64"))
        assert share.kl == pytest.approx(expected.kl_mean, rel=1e-9)
        assert share.kl_error == pytest.approx(expected.kl_error, rel=1e-6)
        assert share.same_top == expected.same_top
    assert found.whole == quality(small, model, TEXT, Reading(dtype="float64"))
    assert found.worst[0].kl == max(share.kl for share in found.shares)
    assert found.table(3).splitlines()[4] == f"and {len(found.shares) - 3} more of smaller KL"


def test_any_tensor_may_differ(tmp_path):
    """A norm, a bias and the embedding, of another checkpoint: what was fine-tuned, for example."""
    first = refimpl.load(write_checkpoint(tmp_path / "a", "Qwen2-7B"))
    second = refimpl.load(write_checkpoint(tmp_path / "b", "Qwen2-7B", seed=1))
    odd = [
        "model.embed_tokens.weight", "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.self_attn.q_proj.bias", "model.norm.weight",
    ]  # fmt: skip
    mixed = refimpl.Model(first.config, first.weights.replace({name: second.weights[name] for name in odd}))
    assert differing(mixed, first) == odd
    found = attribute(mixed, first, TEXT[:40], Reading(dtype="float64"))
    for name, share in zip(odd, found.shares, strict=True):
        weights = first.weights.replace({name: second.weights[name]})
        expected = quality(refimpl.Model(first.config, weights), first, TEXT[:40], Reading(dtype="float64"))
        assert share.kl == pytest.approx(expected.kl_mean, rel=1e-9) and share.kl > 0


def test_the_same_bits_elsewhere_and_resumed(tiny_folder, tmp_path):
    model = refimpl.load(tiny_folder("Baichuan2-7B"))
    small = model.quantize("q4_0")
    here = attribute(small, model, TEXT)
    with workers(2) as executor:
        assert attribute(small, model, TEXT, Reading(executor=executor, resume=tmp_path)) == here
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert attribute(small, model, TEXT, Reading(resume=tmp_path)) == here
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_the_picture(tiny_model, tmp_path):
    model = tiny_model("Baichuan2-7B")
    found = attribute(model.quantize("int4", keep=["*.o_proj"]), model, TEXT[:50])
    write_svg(found, tmp_path / "map.svg")
    root = ET.parse(tmp_path / "map.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    said = [title.text for title in root.iter(f"{space}title")]
    assert sorted(title.split(":")[0] for title in said) == sorted(share.name for share in found.shares)
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"W_pack", "gate_proj", "layer 0", "layer 1", "lm_head"} <= set(texts) and "o_proj" not in texts
    cells = {g.find(f"{space}title").text.split(":")[0]: g.find(f"{space}rect") for g in root.iter(f"{space}g")}
    assert cells[found.worst[0].name].get("fill") == "#5e0a3c" != cells[found.worst[-1].name].get("fill")
    down, gate = (cells[f"model.layers.1.mlp.{module}"] for module in ("down_proj", "gate_proj"))
    assert down.get("y") == gate.get("y") and down.get("x") != gate.get("x")


def test_the_verb(tmp_path, capsys):
    arguments = ["quality", "--format", "q4_0", "--attribution", "--tokens", "60"]
    assert main([*arguments, "--out", str(tmp_path / "map.svg"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["tensors"]) == 16 and said["quality"]["tokens"] == 59 and (tmp_path / "map.svg").exists()
    assert main([*arguments, "--top", "2"]) == 0
    assert "and 14 more of smaller KL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "q4_0", "--out", "map.png"], "ends in .svg"),
        (["--format", "q4_0,q8_0"], "give one --format"),
        (["--against", str(refimpl.model.EMBEDDED)], "nothing to attribute"),
        (["--format", "q4_0", "--out", "/no/such/folder/map.svg"], "/no/such/folder is not a folder; make it"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, capsys):
    assert main(["quality", "--attribution", "--tokens", "20", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_models_of_different_sizes(tiny_model, tmp_path):
    other = refimpl.load(write_checkpoint(tmp_path, "Baichuan2-7B", num_hidden_layers=1))
    with pytest.raises(InputError, match=r"differ in the shapes of model\.layers\.1"):
        attribute(other, tiny_model("Baichuan2-7B"), TEXT)
