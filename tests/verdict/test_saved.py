"""Runs that were saved, also by versions before this one: they read, and say the same when they are saved again."""

import json
from pathlib import Path

import pytest

from export.measure.figures import Birth
from export.measure.limits import Thresholds
from export.verdict.saved import read_run

OLD = Path(__file__).parent / "run_of_version_0_1.json"  # chained, one zero point off by a code, one NaN in the logits


def test_a_run_of_an_older_version_reads():
    run = read_run(OLD)
    assert not run and run.kind.name == "simulation" and run.about["refimpl"] == "0.1.0"
    assert [tensor.name.split("/")[0] for tensor in run.failures] == [
        "prompt_ar12_cl16_2_of_3", "token_ar1_cl16_2_of_3", "token_ar1_cl16_3_of_3",
    ]  # fmt: skip
    key, _, logits = run.failures
    assert key is run.guilty and key.born == Birth.HERE and run.causes[key.name].name == "zero point"
    assert (key.device.sqnr, key.cost.sqnr, key.total.sqnr) == (28.937, 21.193, 20.428)
    assert (key.needs.rows, key.needs.typical, key.codes.largest, key.codes.step) == (2.7376, 2.4524, 1.0, 0.039586)
    assert logits.problem == "NaN or infinity on one side" and logits.logits is None
    assert "the zero point is off by that" in run.story and "Also token_ar1_cl16_3_of_3/chained/lm_head" in run.story


def test_what_is_saved_again_is_the_same():
    """All keys and figures, to the digit; the summary may be worded anew."""
    stored, again = json.loads(OLD.read_text()), json.loads(read_run(OLD).to_json())
    assert list(again) == list(stored)
    assert [list(tensor) for tensor in again["tensors"]] == [list(tensor) for tensor in stored["tensors"]]
    del stored["summary"], again["summary"]
    assert again == stored


@pytest.mark.parametrize("limits, failing", [
    (Thresholds(min_sqnr=28.0), 1), (Thresholds(min_sqnr=29.0), 2),
    (Thresholds(max_lsb=0), 9), (Thresholds(max_over=0.0), 4),
])  # fmt: skip
def test_it_is_judged_again_by_other_numbers(limits, failing):
    assert len(read_run(OLD).judged(limits).failures) == failing
