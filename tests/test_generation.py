"""Choosing tokens: each processor alone, draws, ends and limits. (The recorded sequences are in test_recorded.py.)"""

import json

import numpy as np
import pytest

import refimpl
from refimpl import InputError
from refimpl.errors import Remark
from refimpl.generation import Sampling, Span
from refimpl.loss import cross_entropy, loss, perplexity, predictions
from refimpl.processors import keep_top_k, keep_top_p, penalize_repetition

IDS = [5, 17, 9]


def test_a_penalty_counts_once_and_moves_down():
    scores = np.array([[2.0, -2.0, 1.0, 3.0]])
    out = penalize_repetition(scores, np.array([[0, 1, 1, 0]]), 2.0)
    assert out.tolist() == [[1.0, -4.0, 1.0, 3.0]]


def test_top_k_keeps_ties():
    assert keep_top_k(np.array([[1.0, 3.0, 2.0, 3.0, 2.0]]), 3).tolist() == [[-np.inf, 3.0, 2.0, 3.0, 2.0]]


def test_top_p_drops_what_reaches_the_rest_exactly():
    """As transformers: sorted upwards, tokens go while their sum is at most 1 - p, the bound included."""
    assert np.isinf(keep_top_p(np.zeros((1, 2)), 0.5)).sum() == 1


def test_the_penalty_comes_before_the_temperature():
    """A penalty on scores that a temperature has divided would be the same; one below zero, after top-k, would not."""
    scores = np.array([[4.0, 3.0, -1.0]])
    found = Sampling(repetition_penalty=2.0, top_k=1).process(scores, np.array([[0]]))
    assert np.isinf(found).tolist() == [[True, False, True]]


def test_top_p_keeps_the_likeliest_that_reach_it():
    scores = np.log(np.array([[0.5, 0.2, 0.2, 0.1]]))
    assert np.isinf(keep_top_p(scores, 0.6)).sum() == 2
    assert np.isinf(keep_top_p(scores, 1e-9)).sum() == 3


def test_the_order_of_processors_matters_and_is_transformers():
    """Temperature comes before top-p: a hot distribution keeps more tokens."""
    scores = np.array([[3.0, 2.0, 1.0, 0.0]])
    assert np.isinf(Sampling(temperature=10.0, top_p=0.8).process(scores, np.zeros((1, 0), int))).sum() == 0
    assert np.isinf(Sampling(top_p=0.8).process(scores, np.zeros((1, 0), int))).sum() == 2


def test_greedy_is_the_likeliest_of_a_full_forward(family, tiny_model):
    model = tiny_model(family)
    found = list(model.generate(IDS, max_new_tokens=8, dtype="float64"))
    ids = list(IDS)
    for token in found:
        assert token == int(model(ids, "float64")[0, -1].argmax())
        ids.append(token)


def test_a_long_prompt_is_read_in_pieces(family, tiny_model, monkeypatch):
    model = tiny_model(family)
    ids = np.array([[0, 0, *IDS, *IDS], [5, *IDS, *IDS, 7]])
    mask = np.array([[0, 0] + [1] * 6, [1] * 8])
    generate = lambda: np.array(list(model.generate(ids, attention_mask=mask, max_new_tokens=5, dtype="float64")))
    whole = generate()
    monkeypatch.setattr("refimpl.generation.PIECE", 3)
    assert np.array_equal(generate(), whole)


def test_a_seed_repeats_and_another_does_not(tiny_model):
    model = tiny_model("Baichuan2-7B")
    draw = lambda seed: list(model.generate(IDS, max_new_tokens=12, do_sample=True, temperature=3.0, seed=seed))
    assert draw(1) == draw(1) != draw(2)


def test_draws_follow_the_probabilities(tiny_model):
    model = tiny_model("Baichuan2-7B")
    scores = model(IDS, "float64")[0, -1]
    probs = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    rows = np.repeat([IDS], 400, axis=0)
    drawn = np.concatenate(list(model.generate(rows, max_new_tokens=1, do_sample=True, seed=0)))
    likeliest = int(probs.argmax())
    expected, spread = 400 * probs[likeliest], 4 * np.sqrt(400 * probs[likeliest])
    assert abs((drawn == likeliest).sum() - expected) < spread


def test_it_stops_at_the_end_of_sequence(tiny_model):
    model = tiny_model("Baichuan2-7B")
    free = list(model.generate(IDS, max_new_tokens=6))
    model.generation_config = {"eos_token_id": [free[2], 95]}
    stop = free.index(free[2]) + 1
    assert list(model.generate(IDS, max_new_tokens=6)) == free[:stop]
    both = list(model.generate([IDS, IDS[::-1]], max_new_tokens=6))
    assert [int(step[0]) for step in both] == free[:stop] + [0] * (len(both) - stop)


def test_what_generation_config_may_say(tiny_model):
    """Hugging Face files may hold null, which says nothing, and several ids that end a sequence."""
    model = tiny_model("Baichuan2-7B")
    plain = list(model.generate(IDS, max_new_tokens=4))
    model.generation_config = {"temperature": None, "top_p": None, "max_new_tokens": None, "eos_token_id": None}
    assert list(model.generate(IDS, max_new_tokens=4, do_sample=True, top_k=1, seed=0)) == plain
    model.generation_config = {"eos_token_id": "x"}
    with pytest.raises(InputError, match="eos_token_id is 'x'"):
        model.generate(IDS)


def test_keys_that_are_not_done_are_remarked(tiny_model):
    """Beams and the like give another text in transformers; who reads ours must know."""
    model = tiny_model("Baichuan2-7B")
    plain = list(model.generate(IDS, max_new_tokens=4))
    model.generation_config = {"num_beams": 1, "guidance_scale": 1.0, "top_h": 0.5, "stop_strings": None}
    assert list(model.generate(IDS, max_new_tokens=4)) == plain  # and no remark, which would be an error here
    model.generation_config = {"num_beams": 3, "guidance_scale": 1.5, "top_h": 0.5}
    with pytest.warns(Remark, match="says num_beams 3, guidance_scale 1.5, which is not done here"):
        assert list(model.generate(IDS, max_new_tokens=4)) == plain
    with pytest.warns(Remark, match="guidance_scale 1.5, top_h 0.5, which"):
        model.generate(IDS, do_sample=True)


def test_a_length_that_counts_the_prompt(tiny_model):
    """transformers' max_length counts the prompt, and yields to max_new_tokens."""
    model = tiny_model("Baichuan2-7B")
    model.generation_config = {"max_length": 8}
    assert len(list(model.generate(IDS))) == 5
    assert len(list(model.generate(IDS, max_new_tokens=7))) == 7
    with pytest.raises(InputError, match="the prompt has 8 tokens, and generation_config"):
        model.generate([5] * 8)


def test_where_no_token_is_left(tiny_model):
    model = tiny_model("Baichuan2-7B")
    with pytest.raises(InputError, match="no token may come next"):
        list(model.generate(IDS, suppress_tokens=list(range(96))))


def test_it_stops_at_the_end_of_the_context(tiny_model):
    assert len(list(tiny_model("Baichuan-13B").generate([5] * 60))) <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
        ({"do_sample": True, "top_p": 0.0}, "top_p is 0.0"),
        ({"do_sample": True, "top_k": 1.5}, "top_k is 1.5"),
        ({"do_sample": True, "top_k": "5"}, "top_k is '5'"),
        ({"do_sample": True, "seed": -1}, "seed is -1"),
        ({"do_sample": True, "temperature": 1e-46}, "temperature is 1e-46"),
        ({"max_new_tokens": float("inf")}, "max_new_tokens is inf"),
        ({"dtype": "int7"}, "dtype is 'int7'"),
        ({"attention_mask": [[1] * 9]}, r"attention_mask has shape \(1, 9\), expected \(1, 3\)"),
        ({"attention_mask": [1, 1, 1]}, r"attention_mask has shape \(3,\)"),
        ({"attention_mask": [[1, 1, 0]]}, "padding on the right.* put the padding on the left"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"suppress_tokens": [96]}, "suppress_tokens has the token id 96, but the vocabulary ends at 96"),
        ({"suppress_tokens": "all"}, "suppress_tokens is 'all', expected a list of token ids"),
        ({"sequence_bias": [[[97], 1.0]]}, "sequence_bias or bad_words_ids has the token id 97"),
        ({"sequence_bias": {"5": 1.0}}, "sequence_bias is .*, expected a list of pairs"),
        ({"bad_words_ids": [[]]}, "bad_words_ids is"),
        ({"exponential_decay_length_penalty": [3]}, "expected a pair"),
        ({"do_sample": True, "min_p": 2}, "min_p is 2"),
    ],
)
def test_options_out_of_range(tiny_model, options, message):
    with pytest.raises(InputError, match=message):
        tiny_model("Baichuan2-7B").generate(IDS, **options)


def test_options_may_be_numpy_s(tiny_model):
    model = tiny_model("Baichuan2-7B")
    plain = list(model.generate(IDS, max_new_tokens=3, do_sample=True, top_k=4, temperature=0.5, seed=1))
    options = dict(max_new_tokens=np.int64(3), top_k=np.float32(4), temperature=np.float32(0.5), seed=np.int64(1))
    assert list(model.generate(np.array(IDS), do_sample=True, **options)) == plain


def test_a_prompt_that_fills_the_context(tiny_model):
    with pytest.raises(InputError, match="leaves no room in the context of 64"):
        tiny_model("Baichuan2-7B").generate([5] * 64)


def test_loss_is_what_its_words_say(tiny_model):
    model = tiny_model("Baichuan2-7B")
    ids = np.array([[5, 17, 9, 3]])
    logits = model(ids, "float64")[0]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = np.array([[-100, -100, 9, 3]])
    expected = -(logp[1, 9] + logp[2, 3]) / 2
    assert loss(model, ids, labels, "float64") == pytest.approx(expected, rel=1e-12)
    z = 0.5 * np.mean(logits[:-1].max(-1) ** 2)
    assert loss(model, ids, labels, "float64", z_loss_weight=0.5) == pytest.approx(expected + z, rel=1e-12)
    everything = -(logp[0, 17] + logp[1, 9] + logp[2, 3]) / 3
    assert perplexity(model, ids[0], "float64") == pytest.approx(np.exp(everything), rel=1e-12)
    assert cross_entropy(logits[:1], np.array([-100])).tolist() == [0.0]


@pytest.mark.parametrize("labels", [[5, 9], [5, 9, -5], [5, 9, 96], [0.0, 1.0, 2.0], None])
def test_labels_that_do_not_fit(tiny_model, labels):
    with pytest.raises(InputError, match="the labels are"):
        loss(tiny_model("Baichuan2-7B"), [[5, 17, 9]], labels)


def test_perplexity_does_not_depend_on_the_pieces(family, tiny_model):
    model = tiny_model(family)
    ids = np.arange(3, 43)
    logits = model(ids, "float64")[0, :-1]
    expected = np.exp(cross_entropy(logits, ids[1:]).mean())
    for piece in (1, 7, 39, 64):
        found = np.concatenate([cross_entropy(x, y) for x, y in predictions(model, ids, "float64", piece=piece)])
        assert np.exp(found.mean()) == pytest.approx(expected, rel=1e-12)


def test_a_loss_of_nothing(tiny_model):
    with pytest.raises(InputError, match="no label counts"):
        loss(tiny_model("Baichuan2-7B"), [5], [5])


# What transformers' own processors give. Each case: our options, and the processors they stand for.
PROCESSORS = {
    "sequence_bias": ([[[3], -2.0], [[4, 5], 7.5], [[1, 6], -1.0]], lambda t, o, s: t.SequenceBiasLogitsProcessor(o)),
    "repetition_penalty": (1.3, lambda t, o, s: t.RepetitionPenaltyLogitsProcessor(o)),
    "no_repeat_ngram_size": (2, lambda t, o, s: t.NoRepeatNGramLogitsProcessor(o)),
    "bad_words_ids": ([[2], [4, 8], [11]], lambda t, o, s: t.NoBadWordsLogitsProcessor(o, list(s.ends))),
    "min_length": (12, lambda t, o, s: t.MinLengthLogitsProcessor(o, list(s.ends))),
    "min_new_tokens": (4, lambda t, o, s: t.MinNewTokensLengthLogitsProcessor(s.prompt, o, list(s.ends))),
    "forced_eos_token_id": ([2, 7], lambda t, o, s: t.ForcedEOSTokenLogitsProcessor(s.longest, o)),
    "exponential_decay_length_penalty": (
        [1, 1.5], lambda t, o, s: t.ExponentialDecayLengthPenalty(o, list(s.ends), s.prompt)),
    "suppress_tokens": ([9, 10], lambda t, o, s: t.SuppressTokensLogitsProcessor(o)),
    "begin_suppress_tokens": ([0, 1], lambda t, o, s: t.SuppressTokensAtBeginLogitsProcessor(o, s.prompt)),
    "temperature": (0.7, lambda t, o, s: t.TemperatureLogitsWarper(o)),
    "top_k": (9, lambda t, o, s: t.TopKLogitsWarper(o)),
    "top_p": (0.9, lambda t, o, s: t.TopPLogitsWarper(o)),
    "min_p": (0.15, lambda t, o, s: t.MinPLogitsWarper(o)),
    "typical_p": (0.8, lambda t, o, s: t.TypicalLogitsWarper(o)),
}  # fmt: skip


@pytest.mark.parametrize("chosen", [*[[name] for name in PROCESSORS], list(PROCESSORS)], ids=lambda names: names[-1])
def test_transformers_own_processors_agree(chosen):
    """Each alone and all together, in transformers' order, from the first new token to the last."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(1)
    span = Span(prompt=6, longest=14, ends=(2, 11))
    options = {name: PROCESSORS[name][0] for name in chosen}
    ours = Sampling(do_sample=True, **options)
    changed = 0
    for length in range(span.prompt, span.longest):
        scores = rng.standard_normal((50, 13)).astype(np.float32) * 3
        history = rng.integers(0, 13, (50, length))
        expected = torch.tensor(scores)
        for name in chosen:
            expected = PROCESSORS[name][1](theirs, PROCESSORS[name][0], span)(torch.tensor(history), expected)
        found = ours.process(scores, history, span)
        assert np.array_equal(np.isneginf(found), np.isneginf(expected.numpy()))
        assert np.allclose(found, expected.numpy(), rtol=1e-6, atol=0)
        changed += not np.array_equal(found, scores)
    assert changed


@pytest.mark.parametrize(
    "keys",
    [
        {"no_repeat_ngram_size": 2}, {"suppress_tokens": [17, 40]}, {"begin_suppress_tokens": [5]},
        {"sequence_bias": [[[5], -9.0], [[7, 9], 4.0]]}, {"exponential_decay_length_penalty": [3, 1.5]},
        {"min_new_tokens": 9},
        {"forced_eos_token_id": 2}, {"repetition_penalty": 1.2}, {"bad_words_ids": [[5, 6], [9]]}, {"max_length": 12},
    ],
    ids=lambda keys: next(iter(keys)),
)  # fmt: skip
def test_a_folder_s_generation_config_gives_transformers_text(tmp_path, keys):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=2, bos_token_id=1, pad_token_id=0, rope_theta=1e6, initializer_range=0.2,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    settings = {"eos_token_id": 2, "pad_token_id": 0, "do_sample": False, **keys}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    longest = {} if "max_length" in keys else {"max_new_tokens": 12}
    ids = [[5, 17, 9, 5, 17]]
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path)
    expected = theirs.generate(torch.tensor(ids), **longest)[0, 5:].tolist()
    assert list(refimpl.load(tmp_path).generate(ids[0], **longest)) == expected
