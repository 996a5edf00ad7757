"""What gradients are good for: importance, costs of formats, and scales that learn."""

import math

import numpy as np
import pytest
from conftest import write_checkpoint

import refimpl
from golden.cost.quality import quality
from refimpl import InputError
from refimpl.blocks.importance import read_importance, write_importance
from refimpl.checkpoint.weights import Weight
from refimpl.cli import main
from refimpl.gradients.adapters import Lora
from refimpl.gradients.backward import backward
from refimpl.gradients.objective import NextToken
from refimpl.gradients.optimizer import AdamW
from refimpl.gradients.repair import Scaled, _factors, _weights, repair
from refimpl.gradients.sensitivity import allocate, costs, matrices_of, observe_sensitivity, signals

TEXT = "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n"


@pytest.fixture(scope="module")
def model():
    return refimpl.load()


def rows_of(model, size=32):
    ids = model.token_ids(TEXT * 4)[0]
    return [ids[i : i + size] for i in range(0, len(ids) - size, size)]


def test_importance_by_gradients_is_used_and_stored_as_that_of_activations(model, tmp_path):
    found = observe_sensitivity(model, TEXT)
    assert list(found) == matrices_of(model.weights) and found.meta["by"] == "gradients"
    assert found["lm_head"].shape == (256,) and (found["lm_head"] > 0).all()
    write_importance(tmp_path / "i", found)
    assert read_importance(tmp_path / "i").sha256 == found.sha256
    model.quantize({"*": {"format": "q4_0", "search": "mse"}}, importance=found)


def test_a_signal_says_what_an_error_does_to_the_loss(model):
    """g · E x, summed over tokens, is what the loss changes by: checked against the loss itself."""
    ids = model.token_ids(TEXT)[0]
    name = "model.layers.1.mlp.up_proj"
    x, g = signals(model, ids, 0)[name]
    weight = model.weights[f"{name}.weight"].read(np.dtype(np.float64))
    error = np.random.default_rng(0).standard_normal(weight.shape) * 1e-5

    def loss(values):
        weights = model.weights.replace({f"{name}.weight": Weight(values)})
        logits = model.forward(ids, "float32", None, None, lambda _, x: x)[0].astype(np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        drawn = (p.cumsum(-1) > np.random.default_rng(0).random((len(p), 1))).argmax(-1)
        labels = np.concatenate([[0], drawn[:-1]])[None]
        objective = NextToken(labels, counts=(1, 1))
        return backward(model, ids, objective, lambda name: False, "float64", weights=weights)[0]

    change = (loss(weight + error) - loss(weight - error)) / 2
    assert (g * (x @ error.T)).sum() == pytest.approx(change, rel=1e-2)


def test_costs_foretell_the_kl(model):
    """Summed over the matrices, within a third of what is measured; the order of formats is the measured one."""
    ids = model.token_ids(TEXT * 3)[0]
    some = {name: model.quantize(name) for name in ("q4_0", "q4_k", "q8_0")}
    found = costs(model, {name: one.weights for name, one in some.items()}, ids)
    foretold = {name: sum(of[name][0] for of in found.values()) for name in some}
    measured = {name: quality(one, model, ids).kl_mean for name, one in some.items()}
    assert sorted(foretold, key=foretold.get) == sorted(measured, key=measured.get) == ["q8_0", "q4_k", "q4_0"]
    for name in some:
        assert 0.67 < foretold[name] / measured[name] < 1.5, (name, foretold, measured)


def test_allocate_keeps_the_budget():
    rng = np.random.default_rng(0)
    bits = {f"m{i}": {"q4": 4.0 * size, "q8": 8.0 * size} for i, size in enumerate((1, 2, 3, 4))}
    cost = {name: {"q4": float(rng.random() + 1), "q8": float(rng.random() / 9)} for name in bits}
    for budget in (40, 50, 60, 80):
        chosen = allocate(cost, bits, budget)
        assert sum(bits[name][c] for name, c in chosen.items()) <= budget
    assert set(allocate(cost, bits, 80).values()) == {"q8"} and set(allocate(cost, bits, 40).values()) == {"q4"}
    with pytest.raises(InputError, match="the smallest formats need 40 bits, more than 39"):
        allocate(cost, bits, 39)


@pytest.mark.parametrize("recipe", ["q4_0", "int4", {"*": {"format": "nf4", "double": False}}])
def test_the_gradient_of_a_scale(recipe, tmp_path):
    """Against differences of the loss, one block of one matrix."""
    model = refimpl.load(write_checkpoint(tmp_path / "m", "Baichuan2-7B")).quantize(recipe)
    ids, parameters = np.arange(5, 17)[None], _factors(model)
    name = "model.layers.0.mlp.gate_proj.scales"

    def loss(change):
        changed = {**parameters, name: parameters[name].astype(np.float64)}
        changed[name][3, -1] += change
        return backward(model, ids, NextToken(ids), name.__eq__, "float64", weights=_weights(model, changed, None))

    (up, _), (down, _), (_, found) = loss(1e-4), loss(-1e-4), loss(0.0)
    assert found[name].shape == parameters[name].shape
    assert (up - down) / 2e-4 == pytest.approx(found[name][3, -1], rel=1e-5)


def test_scales_that_learn_bring_loss_back_and_stay_in_their_format(model, tmp_path):
    small = model.quantize("q4_0")
    weights, losses = repair(small, model, rows_of(model), steps=30, batch=4, optimizer=AdamW(2e-3, weight_decay=0.0))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    better = refimpl.Model(model.config, weights, model.folder)
    text = model.token_ids(TEXT)[0]
    assert quality(better, model, text).kl_mean < 0.8 * quality(small, model, text).kl_mean
    for name, weight in weights.items():
        assert not isinstance(weight, Scaled)
        if hasattr(weight, "blocks"):
            before = small.weights[name].blocks
            assert (
                np.array_equal(weight.blocks.packed, before.packed)
                and weight.blocks.scales.dtype == before.scales.dtype
            )
    better.save(tmp_path / "out")
    assert np.array_equal(refimpl.load(tmp_path / "out")(text), better(text))


def test_corrections_over_blocks_learn_from_a_teacher(model):
    small = model.quantize("q4_0")
    lora = Lora(rank=4, alpha=8, targets=("down_proj", "o_proj"))
    _, losses = repair(small, model, rows_of(model), lora, AdamW(2e-3, weight_decay=0.0), steps=20, batch=4)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_what_cannot_learn_is_refused(model):
    with pytest.raises(InputError, match="no matrix is in blocks whose scales can learn"):
        repair(model, model, rows_of(model))
    with pytest.raises(InputError, match="some of one length"):
        repair(model.quantize("q4_0"), model, [np.ones(4, int), np.ones(5, int)])
    assert math.isfinite(quality(model, model, TEXT).kl_mean)


def test_the_verbs(model, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(TEXT * 3, encoding="utf-8")
    text = ["--text", str(tmp_path / "t.txt")]
    assert main(["importance", *text, "--gradients", "--out", str(tmp_path / "i")]) == 0
    assert read_importance(tmp_path / "i").meta["by"] == "gradients"
    model.quantize("q4_0").save(tmp_path / "q")
    arguments = ["repair", str(tmp_path / "q"), *text, "--window", "32", "--steps", "3"]
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "3 steps: the KL divergence went from" in capsys.readouterr().out
    assert refimpl.load(tmp_path / "out").weights["lm_head.weight"].blocks.format == "q4_0"
    for more, says in (
        (["--out", str(tmp_path / "out")], "is there already"),
        (["--window", "9999"], "fewer than one"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "new"), *more]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()
