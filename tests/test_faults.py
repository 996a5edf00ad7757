"""The catalogue of faults: each is found, localised, named; no healthy device is suspected. More: measure_faults.py."""

import json

import pytest
from faults import FAULTS, SETTINGS, World, tried

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """setting -> its world, made once."""
    made = {}

    def world(setting):
        if setting not in made:
            made[setting] = World(tmp_path_factory.mktemp("faults"), setting)
        return made[setting]

    return world


@pytest.mark.parametrize("setting", SETTINGS)
def test_healthy_devices_are_not_suspected(worlds, setting):
    world = worlds(setting)
    for probes in (True, False):
        verdict = world.judged(world.healthy, probes)
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
