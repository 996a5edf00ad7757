"""KL divergence and perplexity by their definitions, on numbers small enough to do by hand."""

import numpy as np
import pytest

from golden.quality import quality
from refimpl import InputError
from refimpl.loss import perplexity

IDS = list(range(3, 40))


def test_a_model_is_itself(tiny_model):
    model = tiny_model("Qwen2-7B")
    same = quality(model, model, IDS)
    assert same.kl_mean == same.kl_max == 0 and same.same_top == 1 and same.tokens == 36
    assert same.perplexity == same.reference_perplexity == pytest.approx(perplexity(model, IDS), rel=1e-6)


def test_kl_by_its_definition(tiny_model):
    model = tiny_model("Baichuan2-7B")
    small = model.quantize("int4")
    found = quality(small, model, IDS, dtype="float64")
    p, q = (np.exp(m(IDS, "float64")[0, :-1]) for m in (model, small))
    p, q = (e / e.sum(-1, keepdims=True) for e in (p, q))
    kl = (p * np.log(p / q)).sum(-1)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-9) and found.kl_max == pytest.approx(kl.max(), rel=1e-9)
    assert found.same_top == (p.argmax(-1) == q.argmax(-1)).mean()
    assert 0 < found.kl_mean < 2


def test_windows_do_not_change_what_is_counted(tiny_model):
    model = tiny_model("Baichuan2-7B")
    found = quality(model, model, IDS, window=10)
    assert found.tokens == 9 * 3 + 6
    assert found.perplexity == pytest.approx(perplexity(model, IDS, window=10), rel=1e-6)


def test_nothing_to_predict(tiny_model):
    with pytest.raises(InputError, match="fewer than two"):
        quality(tiny_model("Qwen2-7B"), tiny_model("Qwen2-7B"), [5])
