"""lm-eval's own client against the server: log-likelihoods and texts are the model's."""

import os
import sys

import numpy as np
import pytest
from serving import serving

import refimpl

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")  # of lm-eval[api]


@pytest.fixture(scope="module")
def harness():
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    with serving() as (address, _):
        yield LocalCompletionsAPI(base_url=f"{address}/v1/completions", model="embedded", batch_size=4, max_length=512)
    sys.modules.pop("lm_eval.models.openai_completions", None)


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_log_likelihoods(harness):
    asked = [
        ("登鹳雀楼->王之涣\n夜雨寄北->", "李商隐"),
        ("夜雨寄北->", "王之涣"),
        ("白日依山尽，", "黄河入海流"),
        ("春", "眠不觉晓"),
    ]
    found = harness.loglikelihood(instances("loglikelihood", asked))
    model = refimpl.load()
    for (context, said), (logprob, greedy) in zip(asked, found, strict=True):
        start, ids = len(model.tokenizer.encode(context)), model.tokenizer.encode(context + said)
        logits = model(ids, "float64")[0, start - 1 : -1]
        rows = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert logprob == pytest.approx(rows[np.arange(len(rows)), ids[start:]].sum(), abs=1e-4)
        assert greedy == bool((rows.argmax(-1) == ids[start:]).all())


def test_texts_until_a_stop_string(harness):
    asked = [("登鹳雀楼->王之涣\n夜雨寄北->", {"until": ["\n"], "max_gen_toks": 8})]
    assert harness.generate_until(instances("generate_until", asked)) == ["李商隐"]
