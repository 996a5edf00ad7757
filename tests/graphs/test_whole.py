"""The NPU takes a graph on grids whole: with the extra htp, for every family and form that the profile offers."""

from importlib.util import find_spec

import numpy as np
import pytest

from export import emit
from export.graphs.profiles import FORMS
from export.run.htp import Htp
from refimpl.grids.calibrate import calibrate

pytestmark = pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="needs the extra htp")
ALONE = [[form.replace("N", "2")] for form in FORMS if form != "fused"]


@pytest.fixture(scope="module")
def device():
    with Htp() as device:
        yield device


@pytest.mark.parametrize("forms", [None, *ALONE, ["conv", "heads", "scale-on-key", "rank4"]], ids=str)
def test_nothing_but_the_embedding_is_computed_by_the_cpu(forms, family, device, tiny_model, tmp_path):
    if forms == ["heads=2"] and "Qwen" in family:
        return  # whose heads share keys
    encodings = calibrate(tiny_model(family), np.random.default_rng(0).integers(3, 90, (1, 60)))
    parts = emit(tiny_model(family), (8, 1), 24, 3, "qdq", encodings=encodings, forms=forms)
    folder = parts.save(tmp_path / "x", golden=False)
    for name in parts:
        device.compile(folder / name)
        placement = device.placements[name]
        if name.endswith("1_of_3"):
            assert [one.op for one in placement.elsewhere] == ["Gather"]
        else:
            assert not placement.elsewhere and placement.on_npu > 100, placement
