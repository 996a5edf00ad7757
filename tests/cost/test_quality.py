"""What a change costs, by the definitions: by hand, in plain NumPy, and in PyTorch."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from conftest import write_checkpoint

import refimpl
from golden.cost.quality import compared, quality, summary
from golden.cost.reading import Reading
from golden.cost.side_by_side import memory, side_by_side, table
from refimpl import InputError
from refimpl.cli import main
from refimpl.loss import perplexity

IDS = list(range(3, 40))
TEXT = [int(i) for i in np.random.default_rng(0).integers(3, 90, 200)]


def test_a_model_is_itself(tiny_model):
    model = tiny_model("Qwen2-7B")
    same = quality(model, model, IDS)
    assert same.kl_mean == same.kl_max == same.rms_dp == same.rms_dp_error == same.ratio_error == 0
    assert same.same_top == same.ratio == 1 and same.tokens == 36 and same.to_dict()["sqnr"] is None
    assert same.perplexity == same.reference_perplexity == pytest.approx(perplexity(model, IDS), rel=1e-6)


def test_two_words_by_hand():
    """Of two words the model gives the first 1/4 and 3/4, the reference 1/2 and 1/2; then both agree."""
    a, b = np.log([[0.25, 0.75], [0.5, 0.5]]), np.log([[0.5, 0.5], [0.5, 0.5]])
    found = summary([compared(a, b, np.array([1, 0]))])
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.kl_max == pytest.approx(kl) and found.kl_mean == found.kl_median == pytest.approx(kl / 2)
    assert found.kl_99 == pytest.approx(0.99 * kl)
    assert found.kl_error == pytest.approx(kl / 2)  # two values, kl and 0: deviation kl / 2 over the root of 2 - 1
    assert found.perplexity == pytest.approx(1 / math.sqrt(0.75 * 0.5)) and found.reference_perplexity == 2
    assert found.ratio == pytest.approx(math.sqrt(0.5 / 0.75)) and found.same_top == 0.5
    assert found.ratio_error == pytest.approx(found.ratio * math.log(1.5) / 2)
    assert found.same_top_error == pytest.approx(0.5)  # the root of p (1 - p) / (n - 1)
    assert found.mean_dp == pytest.approx(0.125) and found.rms_dp == pytest.approx(math.sqrt(0.25**2 / 2))
    assert found.rms_dp_error == pytest.approx(0.5 / found.rms_dp * 0.25**2 / 2)


def test_every_figure_by_its_definition(tiny_model):
    """All logits at once and one token after another, as nobody would do it at full size."""
    model = tiny_model("Baichuan2-7B")
    small = model.quantize("int4")
    found = quality(small, model, TEXT, Reading(dtype="float64"))
    kl, losses, top, dp = [], [], [], []
    for start in range(0, len(TEXT) - 1, 64):  # the context
        ids = TEXT[start : start + 64]
        p, q = (np.exp(m(ids, "float64")[0, :-1]) for m in (small, model))
        for one, other, right in zip(p, q, ids[1:], strict=True):
            one, other = one / one.sum(), other / other.sum()
            kl.append(sum(other * np.log(other / one)))
            losses.append((-math.log(one[right]), -math.log(other[right])))
            top.append(one.argmax() == other.argmax())
            dp.append(one[right] - other[right])
    n, (loss, reference) = len(kl), np.array(losses).T
    assert found.tokens == n == 196
    assert 0 < found.kl_mean < 2
    assert found.kl_mean == pytest.approx(np.mean(kl), rel=1e-9)
    assert found.kl_error == pytest.approx(np.std(kl, ddof=1) / math.sqrt(n), rel=1e-9)
    assert (found.kl_median, found.kl_99, found.kl_max) == pytest.approx(np.percentile(kl, (50, 99, 100)), rel=1e-9)
    assert (found.perplexity, found.reference_perplexity) == pytest.approx(np.exp([loss.mean(), reference.mean()]))
    assert found.perplexity_error == pytest.approx(np.exp(loss.mean()) * np.std(loss, ddof=1) / math.sqrt(n))
    # llama.cpp's way: variances of both means, less twice their covariance
    (a, c), (_, b) = np.cov(loss, reference) / n
    assert found.ratio == pytest.approx(np.exp(loss.mean() - reference.mean()))
    assert found.ratio_error == pytest.approx(found.ratio * math.sqrt(a + b - 2 * c), rel=1e-6)
    assert found.same_top == np.mean(top)
    assert found.rms_dp == pytest.approx(math.sqrt(np.mean(np.square(dp))))
    assert found.mean_dp == pytest.approx(np.mean(dp))


def test_the_same_in_pytorch(tiny_model):
    torch = pytest.importorskip("torch")
    model = tiny_model("Qwen2-7B")
    small = model.quantize("q4_0")
    found = quality(small, model, IDS)
    p, q = (torch.from_numpy(m(IDS)[0, :-1]).double().log_softmax(-1) for m in (small, model))
    kl = torch.nn.functional.kl_div(p, q, log_target=True, reduction="none").sum(-1)
    right = torch.tensor(IDS[1:])
    # both run in float32, one window at once here and there: rounding of logits of size 5, in 1e-7 of them
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_99 == pytest.approx(torch.quantile(kl, 0.99).item(), rel=1e-4)
    assert found.perplexity == pytest.approx(torch.nn.functional.nll_loss(p, right).exp().item(), rel=1e-6)


def test_windows_do_not_change_what_is_counted(tiny_model):
    model = tiny_model("Baichuan2-7B")
    found = quality(model, model, IDS, Reading(window=10))
    assert found.tokens == 9 * 3 + 6
    assert found.perplexity == pytest.approx(perplexity(model, IDS, window=10), rel=1e-6)


def test_logits_do_not_pile_up(tmp_path):
    """Three times as many tokens take the same memory: beyond a piece of 128, no logits are held."""
    folder = write_checkpoint(tmp_path, "Baichuan2-7B", vocab_size=30000, max_position_embeddings=1024)
    model = refimpl.load(folder)
    small, ids, peaks = model.quantize("int4"), np.resize(TEXT, 780), []
    quality(small, model, ids[:20])
    for tokens in (260, 780):
        tracemalloc.start()
        quality(small, model, ids[:tokens])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0], peaks


def test_formats_side_by_side(tiny_model):
    model = tiny_model("Baichuan2-7B")
    q4, q8, k, kept = side_by_side(model, ("q4_0", "q8_0", "q4_k", "q4_1"), IDS, keep=["lm_head"])
    assert (q4.bits_per_weight, q8.bits_per_weight) == (4.5, 8.5) and q4.nbytes < q8.nbytes
    assert q4.quality.kl_mean > q8.quality.kl_mean > 0
    assert k.quality is None and "256" in k.why
    assert kept.quality == quality(model.quantize("q4_1", keep=["lm_head"]), model, IDS)
    assert len(table([q4, q8, k, kept]).splitlines()) == 6
    blocks, rest = memory(model.quantize("q4_0"))[1], model.config.vocab_size * 64 * 4 + 5 * 64 * 4
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128) + 96 * 64
    assert blocks == rest + matrices * 4.5 / 8


def test_the_verb(capsys, tmp_path):
    arguments = ["quality", "--tokens", "300", "--window", "100"]
    assert main([*arguments, "--format", "q4_0", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    model = refimpl.load()
    assert 1 < card["ratio"] < 1.2 and 0 < card["kl_mean"] < 0.1 and card["tokens"] == 297
    (tmp_path / "recipe.json").write_text('{"*": "q4_0"}')
    assert main([*arguments, "--recipe", str(tmp_path / "recipe.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == card
    assert main([*arguments, "--format", "q4_0,q8_0", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["format"] for row in rows] == ["q4_0", "q8_0"] and rows[0]["kl_mean"] == card["kl_mean"]
    assert main([*arguments, "--against", str(model.folder)]) == 0
    assert "ratio          1.0000 ± 0.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare"),
        (["--format", "q4_0", "--recipe", "r.json"], "either --format or --recipe"),
        (["--format", "q5_0"], "the format is 'q5_0'"),
        (["--format", "q4_0,q5_0"], "the format is 'q5_0'"),
        (["--format", "all", "--against", "elsewhere"], "give one --format"),
        (["--format", "q4_0", "--against", "elsewhere"], "elsewhere is not a folder"),
        (["--format", "q4_0", "--jobs", "0"], "jobs is 0"),
        (["--format", "q4_0", "--jobs", "2", "--dask", "tcp://127.0.0.1:9"], "either jobs or a Dask"),
        (["--format", "q4_0", "--attribution", "--top", "0"], "top is 0"),
        (["--format", "q4_0", "--window", "1"], "fewer than two tokens"),
        (["--format", "q4_0", "--window", "0"], "fewer than two tokens"),
        (["--format", "q4_0", "--text", "no such file"], "cannot read"),
        (["--format", "q4_0", "--tokens", "-5"], "tokens is -5, expected how many to read"),
        (["--format", "q4_0", "--out", "x.svg"], "give --attribution, too"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, capsys):
    assert main(["quality", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_nan_is_not_judged():
    with pytest.raises(InputError, match="NaN or infinity"):
        compared(np.array([[1.0, np.inf]]), np.array([[0.0, np.inf]]), np.array([0]))


def test_models_of_different_vocabularies(tiny_model, tmp_path):
    other = refimpl.load(write_checkpoint(tmp_path / "other", "Qwen2-7B", vocab_size=128))
    with pytest.raises(InputError, match="128 and 96 words"):
        quality(other, tiny_model("Qwen2-7B"), IDS)
    with pytest.raises(InputError, match="fewer than two"):
        quality(tiny_model("Qwen2-7B"), tiny_model("Qwen2-7B"), [5])
