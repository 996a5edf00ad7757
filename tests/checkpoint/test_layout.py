"""A Baichuan of 7B in LLaMA's layout, and back: the same numbers, by LLaMA's own code too."""

import json
import shutil

import numpy as np
import pytest
from conftest import write_checkpoint
from safetensors.numpy import load_file, save_file

import refimpl
from refimpl import InputError, cli
from refimpl.checkpoint.convert import convert

IDS = [[5, 17, 900, 64001, 3]]
SIZES = dict(vocab_size=125696, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("layout") / "model", "Baichuan2-7B", **SIZES)


@pytest.fixture(scope="module")
def llama(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("layout") / "llama"
    convert(folder, out, layout="llama")
    return out


def test_both_layouts_give_the_same_logits(folder, llama):
    model = refimpl.load(llama)
    assert model.config.family == "Baichuan2-7B" and not model.config.qkv_packed and not model.config.norm_head
    expected = refimpl.load(folder)(IDS, "float64")
    assert np.abs(model(IDS, "float64") - expected).max() < 2**-22 * np.abs(expected).max(), "lm_head is rounded once"


def test_llamas_own_code_agrees(llama):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    assert np.abs(refimpl.load(llama)(IDS) - expected).max() < 2**-18 * np.abs(expected).max()


def test_the_way_back(folder, llama, tmp_path):
    report = convert(llama, tmp_path / "back", layout="baichuan")
    found, before = load_file(tmp_path / "back" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == before.keys() and report["tensors"] == len(before)
    assert all(np.array_equal(found[name], before[name]) for name in before if name != "lm_head.weight")
    keys = json.loads((tmp_path / "back" / "config.json").read_text())
    assert keys["model_type"] == "baichuan" and keys["lm_head_normalized"] and "num_key_value_heads" not in keys
    assert np.array_equal(refimpl.load(tmp_path / "back")(IDS), refimpl.load(llama)(IDS))


def adapter(path, modules, rows):
    """An adapter of random numbers on some modules of attention, (rank 2, I) and (rows, 2) each."""
    rng, tensors = np.random.default_rng(1), {}
    for layer in range(2):
        for module in modules:
            at = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_"
            tensors[f"{at}A.weight"] = rng.normal(size=(2, 16)).astype(np.float32)
            tensors[f"{at}B.weight"] = rng.normal(size=(rows, 2)).astype(np.float32)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    keys = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(modules)}
    (path / "adapter_config.json").write_text(json.dumps(keys))
    return path


@pytest.mark.parametrize("modules", [["W_pack"], ["q_proj", "v_proj"]])
def test_an_adapter_of_one_layout_is_merged_into_the_other(modules, folder, llama, tmp_path):
    """Merged where it was trained and then converted, or converted on the way: the same."""
    packed = modules == ["W_pack"]
    made = adapter(tmp_path / "adapter", modules, 48 if packed else 16)
    home, away, there = (folder, llama, "llama") if packed else (llama, folder, "baichuan")
    convert(home, tmp_path / "merged", lora=made)
    convert(tmp_path / "merged", tmp_path / "first", layout=there)
    convert(away, tmp_path / "moved", layout="baichuan" if packed else "llama", lora=made)
    convert(tmp_path / "moved", tmp_path / "second", layout=there)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    layers = [name for name in first if name != "lm_head.weight"]
    assert layers and all(np.array_equal(first[name], second[name]) for name in layers)
    with pytest.raises(InputError, match="expected this model's linears"):
        convert(away, tmp_path / "wrong", lora=made)


def test_what_has_no_such_layout_is_refused(folder, llama, tiny_folder, tmp_path, capsys):
    for source, layout, said in (
        (tiny_folder("Baichuan2-13B"), "llama", "Baichuan2-13B has no layout of llama's"),
        (tiny_folder("Qwen2-7B"), "baichuan", "Qwen2-7B has no layout"),
        (llama, "llama", "is in the layout of llama already"),
        (folder, "baichuan", "is in the layout of baichuan already"),
    ):
        with pytest.raises(InputError, match=said):
            convert(source, tmp_path / "out", layout=layout)
    assert cli.main(["convert", str(llama), "--out", str(tmp_path / "back"), "--layout", "baichuan"]) == 0
    assert cli.main(["convert", str(folder), "--out", str(tmp_path / "there"), "--layout", "llama"]) == 0
    assert "the rows of lm_head have lengths" in capsys.readouterr().out


def test_a_head_without_normhead_is_refused(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "x")
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    tensors["lm_head.weight"] *= np.linspace(0.5, 2, len(tensors["lm_head.weight"]), dtype=np.float32)[:, None]
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    with pytest.raises(InputError, match="LLaMA's code has no NormHead"):
        refimpl.load(tmp_path / "x")


def test_a_llama_is_no_baichuan(llama, tmp_path):
    keys = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**keys, "vocab_size": 32000}))
    with pytest.raises(InputError, match="llama with a vocabulary of 32000"):
        refimpl.load(tmp_path)
