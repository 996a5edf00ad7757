"""The catalogue of faults: each is found, localised, named; no healthy device is suspected. More: measure_faults.py."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from faults import FAULTS, SETTINGS, World, tried

pytest.importorskip("onnxruntime")


def made_once(tmp_path_factory, **options):
    """setting -> its world, made once."""
    made = {}

    def world(setting):
        if setting not in made:
            made[setting] = World(tmp_path_factory.mktemp("faults"), setting, **options)
        return made[setting]

    return world


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return made_once(tmp_path_factory)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Both layers in one graph."""
    return made_once(tmp_path_factory, parts=2)


@pytest.mark.parametrize("setting", SETTINGS)
def test_healthy_devices_are_not_suspected(worlds, setting):
    world = worlds(setting)
    for probes, way in product((True, False), ("isolated", "chained")):
        verdict = world.judged(world.healthy if way == "isolated" else world.chained(), probes, way)
        assert verdict and not verdict.causes, verdict


SOME = ["block axis", "GELU for SiLU", "zero point of keys + 1", "RoPE base 1e6", "one slot of the cache stale",
        "past not handed on", "heads of values exchanged", "mask off by one", "NormHead missing"]  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_a_fault_is_found_in_the_chain(worlds, name):
    """Where each graph is given what those before it gave: it is born there, and later graphs hand it on."""
    fault = next(fault for fault in FAULTS if fault.name == name)
    outcome = tried(worlds(fault.setting), fault, way="chained")
    assert outcome.detected and outcome.localised and outcome.named, outcome.verdict
    assert outcome.verdict.guilty.way == "chained" and outcome.verdict.guilty.born == "here"
    after = [t for t in outcome.verdict.failures if t.graph not in worlds(fault.setting).graphs(fault)]
    assert all(t.born == "inherited" for t in after)


@pytest.mark.parametrize("name", SOME)
def test_a_fault_is_found_in_onnx_s_own_evaluator(worlds, tmp_path, monkeypatch, name):
    fault = next(fault for fault in FAULTS if fault.name == name)
    world = worlds(fault.setting)
    monkeypatch.setattr(world, "engine", "reference")
    world.__dict__.pop("healthy", None)
    outcome = tried(world, fault)
    world.__dict__.pop("healthy")
    assert outcome.detected and outcome.localised and outcome.named, outcome.verdict


@pytest.mark.parametrize("name", ["GELU for SiLU", "gate and up exchanged", "block axis", "no mask", "RoPE base 1e6",
                                  "outputs of a stale call", "norm gain dropped"])  # fmt: skip
def test_a_fault_is_among_the_suspects_in_a_graph_of_several_layers(together, name):
    """From the outputs alone: what is accused holds the operation, and nothing that right keys and values clear."""
    fault = next(fault for fault in FAULTS if fault.name == name)
    world = together(fault.setting)
    outcome = tried(world, fault, probes=False)
    verdict = outcome.verdict
    assert outcome.detected and outcome.localised and outcome.named, verdict
    right = {t.tap for t in verdict.tensors if t.graph == outcome.graph and verdict.excess(t) <= 1}
    assert right.isdisjoint(verdict.suspects)
    if {"model.layers.0.self_attn.key", "model.layers.0.self_attn.value"} <= right:
        assert "model.layers.0.input_layernorm" not in verdict.suspects, "keys and values show that it is right"


def test_what_one_fault_does_is_not_called_several(together):
    world = together("float")
    fault = next(fault for fault in FAULTS if fault.name == "norm gain dropped")
    gain = "model.layers.0.input_layernorm.weight"
    first = replace(fault, runs=("prompt_ar12",), edit=lambda g: g.put(gain, np.ones(64, np.float32)))
    verdict = world.judged(world.faulty(first), probes=False)
    assert len(verdict.failures) > 3 and "Also" not in verdict.story
    assert [str(cause) for cause in verdict.causes.values()] == ["RMSNorm has no gain: its weight is not applied"]


@pytest.mark.parametrize("way", ["isolated", "chained"])
def test_healthy_devices_of_another_engine_are_not_suspected(worlds, monkeypatch, way):
    for setting in ("grids", "GQA"):
        world = worlds(setting)
        monkeypatch.setattr(world, "engine", "reference")
        world.__dict__.pop("healthy", None)
        verdict = world.judged(world.healthy if way == "isolated" else world.chained(), way=way)
        world.__dict__.pop("healthy", None)
        assert verdict and not verdict.causes, verdict


@pytest.mark.parametrize("seed, prompt", [(0, 2), (2, None)])
def test_large_attention_scores_are_no_fault(tmp_path, seed, prompt):
    """Where they are hundreds, rounding moves probabilities by more than a rule can allow that does not know that."""
    world = World(tmp_path, "firm", seed, prompt)
    assert min(world.references.scores.values()) > 100
    verdict = world.judged(world.healthy)
    assert verdict and verdict.excess(verdict.worst[0]) < 0.3, verdict
    path = tmp_path / "export" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["golden"]["scores"]
    path.write_text(json.dumps(manifest))
    assert not world.judged(world.healthy), "as it was without knowing"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found_localised_and_named(worlds, fault):
    outcome = tried(worlds(fault.setting), fault)
    assert outcome.detected
    assert outcome.localised, outcome.verdict
    assert outcome.named, outcome.verdict
