"""The goldens in the repository: the model agrees with every one, and they are what they say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import golden
import refimpl
from golden.bundle import sha256

DATA = Path(golden.__file__).parent / "data"
# Half of what a bound allows for is PyTorch's own rounding, and roundings add up as squares: without it, a run needs
# less than this share. With OpenBLAS's kernels for four processors, the worst tensor needs 0.36 to 0.46 of its bound.
ROOM = 0.5**0.5
NAMES = sorted(path.name for path in DATA.iterdir())


def parts(name):
    """The checkpoint and the golden of a name; the embedded model's weights are in the package."""
    if name == "embedded":
        return refimpl.model.EMBEDDED, DATA / name
    return DATA / name / "model", DATA / name / "golden"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_model_agrees(name, dtype):
    folder, truth = parts(name)
    report = golden.check(folder, truth, dtype)
    assert report and len(report.tensors) > 30
    assert report.worst[0].excess < ROOM, "the bound has room"


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits_are_judged_one_operation_at_a_time(name):
    folder, truth = parts(name)
    model = refimpl.load(folder)

    def first_layer(of, **options):
        report = golden.check(of, truth, "float16", **options)
        return [tensor for tensor in report.tensors if "/model.layers.0." in tensor.name]

    for fed, alone in zip(first_layer(model), first_layer(model, fed=False), strict=True):
        assert fed and fed.judged and fed.allowed <= alone.allowed
    assert fed.allowed < alone.allowed, "the last one inherits"
    at = "model.layers.0.input_layernorm.weight"
    gain = model.weights[at]
    bent = refimpl.Model(model.config, model.weights.replace({at: type(gain)(gain.read(np.float32) * 1.2)}))
    guilty = {tensor.name.rsplit(".", 1)[1] for tensor in first_layer(bent) if not tensor}
    assert guilty == {"input_layernorm"}, "and nothing that follows"


@pytest.mark.parametrize("name", ["baichuan-7b-v1-tiny", "qwen2-tiny"])
def test_bfloat16_is_pytorch_s_to_the_bit(name):
    """Every tensor but probs, which PyTorch shows in float32, before it rounds them to the model's format."""
    folder, truth = parts(name)
    recorded = golden.read(truth)
    model = refimpl.load(folder)
    for case in recorded.cases:
        expected = recorded.trace(case, "bfloat16")
        found = model.trace(recorded.cases[case].ids, "bfloat16")
        for tensor, array in expected.items():
            assert np.array_equal(found[tensor], array.astype(found[tensor].dtype)), tensor


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_is_of_the_weights_beside_it(name):
    folder, truth = parts(name)
    provenance = golden.read(truth).provenance
    assert provenance["weights"] == {"model.safetensors": sha256(folder / "model.safetensors")}


def test_baichuan_13b_is_the_second_with_its_head_normalised_offline(tmp_path):
    """As the official README says of Baichuan2 and 1: so PyTorch's golden of Baichuan2-13B is one of Baichuan-13B."""
    folder, truth = parts("baichuan2-13b-tiny")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    del config["tokenizer_class"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    head = tensors["lm_head.weight"].astype(np.float64)
    tensors["lm_head.weight"] = head / np.maximum(np.linalg.norm(head, axis=1, keepdims=True), 1e-12)
    save_file(tensors, tmp_path / "model.safetensors")
    model, recorded = refimpl.load(tmp_path), golden.read(truth)
    assert model.config.family == "Baichuan-13B"
    for name, case in recorded.cases.items():
        found = model(case.ids, "float64", case.attention_mask)
        expected = recorded.trace(name, "float64")["lm_head"]
        real = np.ones(case.ids.shape, bool) if case.attention_mask is None else case.attention_mask > 0
        assert np.abs(found - expected)[real].max() < 1e-12 * np.abs(expected).max()


def test_they_are_small_and_of_four_families():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 6_000_000
    families = {golden.read(parts(name)[1]).config.family for name in NAMES}
    assert families == {"Baichuan-7B", "Baichuan2-7B", "Baichuan2-13B", "Qwen2-7B"}
