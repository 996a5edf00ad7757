"""Comparing: the figures by hand, the verdict on everything that can be wrong, and the rules it is judged by."""

import json
import math
import sys
import tracemalloc
from dataclasses import asdict, replace
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from golden import Report, Tolerance, compare, tolerances
from golden.compare import TINY, row_length
from golden.tolerance import ROUNDINGS, SAFETY, largest_scores, stated
from refimpl import InputError, Trace
from refimpl.checkpoint.weights import Weight
from refimpl.config import Config
from refimpl.decoder import Decoder
from refimpl_kernels.ops import NumPyOps

IDS = [5, 17, 9, 3, 80, 44, 2, 61, 9, 9, 33, 20]
ANY = Tolerance(math.inf, "anything goes")


def only(report: Report):
    (tensor,) = report.tensors
    return tensor


@settings(max_examples=60, deadline=None)
@given(
    shape=array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=9),
    formats=st.tuples(*[st.sampled_from(["float64", "float32", "float16", "bfloat16"])] * 2),
    seed=st.integers(0, 1000),
    flip=st.booleans(),
    chunk=st.sampled_from([1, 7, 16, 1 << 16]),
)
def test_the_figures_are_their_definitions(shape, formats, seed, flip, chunk):
    rng = np.random.default_rng(seed)
    a, b = (np.asarray(rng.standard_normal(shape)).astype(np.dtype(f)) for f in formats)
    if flip:  # strides that are not C order
        a, b, shape = a.T, b.T[...], shape[::-1]
    with pytest.MonkeyPatch.context() as patch:  # by its full name, since golden.compare is the function
        patch.setattr(sys.modules["golden.compare"], "CHUNK", chunk)
        found = only(compare({"x": a}, {"x": b}, ANY))
    x, y = a.astype(np.float64), b.astype(np.float64)
    error = np.abs(x - y)
    assert found.max_abs == error.max() and found.scale == np.abs(y).max()
    assert found.rel_to_max == error.max() / np.abs(y).max()
    rows = (-1, row_length(shape))
    needed = error.reshape(rows).max(1) / np.abs(y).reshape(rows).max(1)
    assert found.needed == needed.max()
    place = needed.argmax() * rows[1] + error.reshape(rows)[needed.argmax()].argmax()
    assert found.index == np.unravel_index(place, x.shape)
    assert (found.value, found.reference) == (x[found.index], y[found.index])
    assert found.rmse == pytest.approx(np.sqrt((error**2).mean()), rel=1e-12)
    assert found.sqnr == pytest.approx(10 * np.log10((y**2).sum() / (error**2).sum()) if error.any() else math.inf)
    assert found.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_neighbours_are_one_ulp_apart(dtype):
    for value in (1.0, -3.5, 0.1, 6e4, 0.0):
        b = np.array([value], dtype)
        a = np.nextafter(b, np.array([np.inf], dtype))
        assert only(compare({"x": a}, {"x": b}, ANY)).ulp == 1, value
    wide = np.array([1.0 + 2**-7])  # counted in the coarser format of the two
    assert only(compare({"x": wide}, {"x": np.array([1.0], ml_dtypes.bfloat16)}, ANY)).ulp == 1


def test_the_verdict_is_needed_against_allowed():
    b = {"x": np.array([2.0, -4.0])}
    assert compare({"x": np.array([2.0, -4.4])}, b, Tolerance(0.1001, ""))
    assert not compare({"x": np.array([2.0, -4.4])}, b, Tolerance(0.0999, ""))
    assert compare(b, b, Tolerance(0, ""))
    zeros = {"x": np.zeros(3)}
    assert compare(zeros, zeros, Tolerance(0, ""))
    assert not compare({"x": np.array([0, 0, 1e-30])}, zeros, Tolerance(0.5, ""))  # nothing to be relative to


def test_one_massive_activation_hides_no_other_token():
    """The residual of a language model: one value of 3000 at the first token, others of about 1, and 30 % noise."""
    rng = np.random.default_rng(0)
    b = rng.standard_normal((1, 128, 4096)).astype(np.float32)
    b[0, 0, 1415] = 3000.0
    a = b.copy()
    a[0, 1:] += 0.3 * rng.standard_normal((127, 4096)).astype(np.float32)
    widest = tolerances(Config(), "float32", 128)["lm_head"]
    found = only(compare({"x": a}, {"x": b}, widest))
    assert not found and found.excess > 100
    assert found.rel_to_max < widest.relative, "measured by the largest value, it would pass"
    assert found.index[1] > 0 and abs(found.value - found.reference) > 0.5
    assert compare({"x": b * np.float32(1 + 1e-6)}, {"x": b}, widest)


def test_a_row_of_zeros_is_measured_by_the_tensor():
    b = np.random.default_rng(0).standard_normal((4, 64))
    for small in (0.0, TINY / 4):
        b[2] = small
        a = b.copy()
        a[2, 5] += 1e-9
        found = only(compare({"x": a}, {"x": b}, Tolerance(1e-8, "")))
        assert found and found.index == (2, 5) and found.needed == pytest.approx(1e-9 / np.abs(b).max(), rel=1e-3)
    b[2] = 1e-3
    assert only(compare({"x": b + 1e-9}, {"x": b}, ANY)).needed == pytest.approx(1e-6)


def test_a_row_has_numbers_enough_for_a_scale():
    lengths = {(): 1, (5,): 5, (70,): 70, (2, 128, 4096): 4096, (1, 8, 7, 7): 49, (1, 8, 1, 1): 8, (3, 2, 16): 32}
    assert {shape: row_length(shape) for shape in lengths} == lengths


def test_memory_is_that_of_a_piece_and_of_two_numbers_a_row():
    a = np.broadcast_to(np.float32(1), (1 << 13, 1 << 10))  # 32 MB, were it not one number
    tracemalloc.start()
    try:
        assert compare({"x": a}, {"x": a}, Tolerance(0, ""))
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()


def test_what_is_missing_fails_and_what_is_extra_does_not():
    x = np.ones(3)
    assert compare({"x": x, "more": x}, {"x": x}).extra == ("more",)
    assert compare({"x": x, "more": x}, {"x": x})
    report = compare({"x": x}, {"x": x, "y": x})
    assert not report and report.missing == ["y"] and report.worst[0].name == "y"
    assert "y" in str(report) and "missing" in str(report)


def test_nothing_in_common_fails():
    x = np.ones(3)
    for a, b in (({}, {}), ({"x": x}, {}), ({}, {"x": x}), ({"x": x}, {"y": x})):
        report = compare(a, b)
        assert not report and report.note and report.summary.startswith("differs")
    assert not Report(())


def test_another_shape_fails_and_is_no_exception():
    report = compare(
        {"x": np.ones((2, 3)), "y": np.ones(2)}, {"x": np.ones((3, 2)), "y": np.ones(2)}, Tolerance(0.1, "")
    )
    assert [bool(tensor) for tensor in report.tensors] == [False, True]
    assert "shape (2, 3), reference (3, 2)" in str(report)


def test_nan_and_infinity_agree_with_themselves_alone():
    b = np.array([1, np.nan, np.inf, -np.inf, 3])
    same = only(compare({"x": b.copy()}, {"x": b}, Tolerance(0, "")))
    assert same and same.scale == 3 and same.rmse == 0
    near = b.copy()
    near[4] = 3.5
    rmse = only(compare({"x": near}, {"x": b}, ANY)).rmse
    assert rmse == pytest.approx(math.sqrt(0.25 / 2)), "the mean over what is finite"
    for place, value in ((0, np.nan), (0, np.inf), (1, 1.0), (1, np.inf), (2, -np.inf), (3, 0.0)):
        a = b.copy()
        a[place] = value
        found = only(compare({"x": a}, {"x": b}, ANY))
        assert not found and found.needed == math.inf and found.index == (place,), (place, value)


def test_the_worst_comes_first_and_the_first_is_named():
    rng = np.random.default_rng(0)
    b = {f"t{k:02}": rng.standard_normal(50) for k in range(30)}
    a = {name: x * (1 + {"t07": 2e-3, "t13": 1e-2, "t20": 1e-3}.get(name, 0)) for name, x in b.items()}
    report = compare(a, b, Tolerance(1e-6, "for the test"))
    assert [tensor.name for tensor in report.worst[:3]] == ["t13", "t07", "t20"]
    assert [tensor.name for tensor in report.failures] == ["t07", "t13", "t20"]
    lines = str(report).splitlines()
    assert lines[0].startswith("differs: 3 of 30") and "first t07" in lines[0] and len(lines) <= 24
    assert lines[-1].strip() == "and 10 more, none of them beyond tolerance"


def test_json_says_everything_and_is_json():
    report = compare({"x": np.array([1.0, np.nan])}, {"x": np.ones(2), "y": np.ones(2)})
    content = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert content["agrees"] is False and content["missing"] == ["y"]
    assert {tensor["name"]: tensor["needed"] for tensor in content["tensors"]} == {"x": None, "y": None}
    good = json.loads(compare({"x": np.ones(2)}, {"x": np.ones(2)}).to_json())
    assert good["agrees"] is True and good["tensors"][0]["max_abs"] == 0


def test_reports_join():
    good = compare({"x": np.ones(2)}, {"x": np.ones(2)}).within("p0/")
    bad = compare({"x": np.ones(2)}, {"y": np.ones(2)}).within("p1/")
    assert good and not good + bad
    assert [tensor.name for tensor in (good + bad).tensors] == ["p0/x", "p1/y"]


def test_what_is_not_numbers_is_refused():
    for x in (np.array(["a"]), np.array([object()]), np.ones(2, complex)):
        with pytest.raises(InputError, match="expected real numbers"):
            compare({"x": x}, {"x": np.ones(2)})
    with pytest.raises(InputError, match="no tolerance for x"):
        compare({"x": np.ones(2)}, {"x": np.ones(2)}, {"y": ANY})


def test_whole_numbers_are_exact():
    ids = np.array([1, 2, 3])
    assert compare({"ids": ids}, {"ids": ids})
    assert not compare({"ids": ids + (ids == 2)}, {"ids": ids})


def test_what_cannot_be_judged_is_neither_agreement_nor_failure():
    b = {"x": np.array([1.0, 2.0]), "y": np.array([1.0, 2.0])}
    a = {"x": b["x"] + 0.01, "y": -b["y"]}
    wide, narrow = tolerances(Config(), "bfloat16", 16)["lm_head"], Tolerance(0.1, "")
    assert not wide.judges and narrow.judges
    report = compare(a, b, {"x": narrow, "y": wide})
    assert report and not report.failures and [t.verdict for t in report.worst] == ["ok", "not judged"]
    assert report.summary.startswith("agrees: 1 tensors") and "1 not judged" in report.summary
    assert str(report).splitlines()[-1].startswith("not judged  y")
    assert [t["judged"] for t in json.loads(report.to_json())["tensors"]] == [True, False]
    report = compare(a, b, {"x": Tolerance(1e-3, ""), "y": wide})
    assert not report and [t.name for t in report.failures] == ["x"]
    report = compare(b, b, wide)
    assert not report and not report.failures and report.summary.startswith("differs: nothing was judged")
    report = compare({"x": b["x"]}, b, {"x": narrow, "y": wide})
    assert not report and report.missing == ["y"], "what is not there needs no tolerance"


def test_traces_of_different_prompts_are_refused(tiny_model):
    model = tiny_model("Qwen2-7B")
    with pytest.raises(InputError, match="run both on the same ids"):
        compare(model.trace(IDS), model.trace(IDS[::-1], "float64"))


# What traces say about themselves ------------------------------------------------------------------------------------


def test_the_rule_is_that_of_the_coarser_format():
    config = Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    x = np.ones((1, 5, 96))
    b = Trace({"lm_head": x}, {"dtype": "float64", "config": asdict(config)})
    for dtype in ("float64", "float32", "bfloat16"):
        found = stated(Trace({"lm_head": x.astype(dtype)}), b)["lm_head"]
        assert found == tolerances(config, dtype, 5)["lm_head"]
    emulated = Trace({"lm_head": x.astype(np.float32)}, {"dtype": "bfloat16"})  # what its arrays hold is wider
    assert stated(emulated, b)["lm_head"] == tolerances(config, "bfloat16", 5)["lm_head"]


def test_a_stored_tolerance_holds_for_its_own_format():
    stored = {"relative": 1e-3, "reason": "measured"}
    b = Trace({"x": np.ones(2)}, {"dtype": "float64", "tolerance": {"x": stored}})
    assert stated(Trace({"x": np.ones(2)}), b)["x"] == Tolerance(1e-3, "measured")
    assert "Baichuan2-13B" in stated(Trace({"x": np.ones(2, np.float32)}), b)["x"].reason


def test_what_was_fed_is_judged_by_its_own_operations(tiny_model):
    model = tiny_model("Baichuan2-7B")
    exact = model.trace(IDS, "float64")
    few = Trace({name: exact[name] for name in ("model.norm", "lm_head")}, exact.meta)
    for feed, expected in ((exact, True), (few, few)):
        found = stated(model.trace(IDS, feed=feed), feed)
        rules = tolerances(model.config, "float32", len(IDS), fed=expected)
        assert found == {name: rules[name] for name in feed}
    own, rest, all_ = (tolerances(model.config, "float32", 12, fed)["lm_head"].relative for fed in (True, few, False))
    assert own < rest < all_, "it inherits from those that were not fed"
    stored = {"lm_head": {"relative": 0.1, "reason": "stored"}}
    truth = Trace(model.trace(IDS), {**model.trace(IDS).meta, "tolerance": stored})
    assert stated(model.trace(IDS), truth)["lm_head"].reason == "stored"
    assert stated(model.trace(IDS, feed=truth), truth)["lm_head"].relative < 1e-4


# The rules are honoured and can fail ---------------------------------------------------------------------------------


def judged(model, dtype, **options) -> Report:
    """A run in `dtype` of a model against its float64 run."""
    fed = "feed" in options
    rules = tolerances(model.config, dtype, len(IDS), fed=fed)
    return compare(model.trace(IDS, dtype, **options), model.trace(IDS, "float64"), rules)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_stays_within_its_rule(family, dtype, tiny_model):
    model = tiny_model(family)
    for options in ({}, {"feed": model.trace(IDS, "float64")}):
        report = judged(model, dtype, **options)
        assert report, report
        needs = [tensor.excess for tensor in report.worst]
        # At the lower end are sums that are exact and rounded once (the next test): no BLAS errs less.
        assert 0.045 < needs[0] < 0.4, f"{report.worst[0]}: the rule is not about this"
        assert 0.02 < np.median(needs) < 0.12


class Exactly(NumPyOps):
    """Sums in float64, rounded once: the least that a correct float32 implementation can err."""

    def linear(self, x, weight, bias=None):
        found = self.matmul(x, weight.read(self.dtype).T)
        return found if bias is None else found + bias.read(self.dtype)

    def matmul(self, a, b):
        return (a.astype(np.float64) @ b.astype(np.float64)).astype(self.dtype)

    def mean(self, x):
        return x.astype(np.float64).mean(-1, keepdims=True).astype(self.dtype)


def test_exact_sums_need_the_least_of_a_rule(family, tiny_model, monkeypatch):
    """A BLAS with wide registers adds many partial sums and comes near this, so it is the lower margin above."""
    model = tiny_model(family)
    usual = [tensor.excess for tensor in judged(model, "float32").worst]
    monkeypatch.setattr("refimpl.backends.NumPyOps", Exactly)
    exact = [tensor.excess for tensor in judged(model, "float32").worst]
    assert exact[0] > 0.045 and 0.02 < np.median(exact) < np.median(usual)


class OneByOne(NumPyOps):
    """Sums from one end to the other, rounded at each term: the worst order that a correct implementation has."""

    ran: ClassVar[set[str]] = set()  # that it was this class that computed

    def linear(self, x, weight, bias=None):
        self.ran.add("linear")
        found = self.matmul(x, weight.read(self.dtype).T)
        return found if bias is None else found + bias.read(self.dtype)

    def matmul(self, a, b):
        self.ran.add("matmul")
        return np.cumsum(a[..., :, :, None] * b[..., None, :, :], axis=-2, dtype=self.dtype)[..., -1, :]

    def mean(self, x):
        self.ran.add("mean")
        return np.cumsum(x, axis=-1, dtype=self.dtype)[..., -1:] / np.asarray(x.shape[-1], self.dtype)


def test_any_order_of_summation_passes(family, tiny_model, monkeypatch):
    model = tiny_model(family)
    reference = model.trace(IDS, "float64")
    monkeypatch.setattr("refimpl.backends.NumPyOps", OneByOne)
    OneByOne.ran.clear()
    trace = model.trace(IDS, "float32")
    assert OneByOne.ran == {"linear", "matmul", "mean"}
    report = compare(trace, reference, tolerances(model.config, "float32", len(IDS)))
    assert report and report.worst[0].excess < 0.4, report


def test_long_sums_one_by_one_pass():
    """The longest product of the five models, summed in the worst order, in float32."""
    config = Config(hidden_size=5120, intermediate_size=13696, num_attention_heads=40)
    bound = tolerances(config, "float32", 1, fed=True)["model.layers.0.mlp.down_proj"]
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 13696)), rng.standard_normal((13696, 64)) / 117
    x, w = x.astype(np.float32), w.astype(np.float32)
    report = compare({"y": OneByOne("float32").matmul(x, w)}, {"y": x.astype(np.float64) @ w.astype(np.float64)}, bound)
    assert report and 0.01 < report.worst[0].excess < 0.3, report


def without_norm_head(model, monkeypatch):
    raw = Weight(model.weights["lm_head.weight"].array)
    monkeypatch.setattr(model, "weights", model.weights.replace({"lm_head.weight": raw}))


def swapped_halves(model, monkeypatch):
    right = Decoder.rope
    monkeypatch.setattr(Decoder, "rope", lambda self, x, cos, sin: right(self, x, cos, -sin))


def interleaved_pairs(model, monkeypatch):
    def rope(self, x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)

    monkeypatch.setattr(Decoder, "rope", rope)


def eps_outside_the_root(model, monkeypatch):
    def rms_norm(self, name, x):
        root = np.sqrt((x * x).mean(-1, keepdims=True)) + self.config.rms_norm_eps
        return self.tap(name, x / root * self.ops.parameter(self.weights[f"{name}.weight"]))

    monkeypatch.setattr(Decoder, "rms_norm", rms_norm)


def mask_off_by_one(model, monkeypatch):
    import refimpl.forward as at

    right = at.attention_bias

    def bias(config, mask, tokens, dtype):
        return np.roll(right(config, mask, tokens, dtype), -1, axis=-2)  # every query sees one key too many

    monkeypatch.setattr(at, "attention_bias", bias)


def slopes_backwards(model, monkeypatch):
    import refimpl.positions as at

    right = at.alibi_slopes
    monkeypatch.setattr(at, "alibi_slopes", lambda heads: right(heads)[::-1])


def silu_without_its_gate(model, monkeypatch):
    monkeypatch.setattr(NumPyOps, "sigmoid", lambda self, x: np.ones_like(x))


BUGS = [
    (without_norm_head, ["Baichuan2-7B", "Baichuan2-13B"]),
    (swapped_halves, ["Baichuan-7B", "Baichuan2-7B", "Qwen2-7B"]),
    (interleaved_pairs, ["Baichuan-7B", "Baichuan2-7B", "Qwen2-7B"]),
    (mask_off_by_one, ["Baichuan2-7B", "Baichuan2-13B"]),
    (slopes_backwards, ["Baichuan-13B", "Baichuan2-13B"]),
    (silu_without_its_gate, ["Baichuan2-7B"]),
]


@pytest.mark.parametrize(("bug", "of"), [(bug, of) for bug, families in BUGS for of in families])
def test_a_classic_bug_is_far_outside(bug, of, tiny_model, monkeypatch):
    model = tiny_model(of)
    reference = model.trace(IDS, "float64")
    monkeypatch.setattr(model, "weights", model.weights)  # so that it is put back
    bug(model, monkeypatch)
    for dtype, fed, factor in (("float64", False, 1e9), ("float32", False, 1e3), ("bfloat16", True, 4)):
        trace = model.trace(IDS, dtype, feed=reference if fed else None)
        report = compare(trace, reference, tolerances(model.config, dtype, len(IDS), fed))
        assert report.worst[0].excess > factor, f"{dtype}: {report}"


@pytest.mark.parametrize(("bug", "of"), [(bug, of) for bug, families in BUGS for of in families])
def test_a_classic_bug_is_outside_at_full_size(bug, of, tiny_model, monkeypatch):
    """Judged, everywhere, by what float32 may do to the logits of 32 layers of 4096 after 4096 tokens."""
    model = tiny_model(of)
    reference = model.trace(IDS, "float64")
    widest = tolerances(replace(Config(), rope_theta=model.config.rope_theta), "float32", 4096)["lm_head"]
    assert compare(model.trace(IDS), reference, widest)
    monkeypatch.setattr(model, "weights", model.weights)  # so that it is put back
    bug(model, monkeypatch)
    report = compare(model.trace(IDS), reference, widest)
    assert not report and report.worst[0].excess > 30, report


def test_eps_outside_the_root_shows_in_float64(tiny_model, monkeypatch):
    """Beside activations of size 1 it moves the sixth digit, where float32 rounds: this is what the oracle is for."""
    model = tiny_model("Baichuan2-7B")
    reference = model.trace(IDS, "float64")
    eps_outside_the_root(model, monkeypatch)
    report = compare(model.trace(IDS, "float64"), reference, tolerances(model.config, "float64", len(IDS)))
    assert not report and report.worst[0].excess > 1e4


def test_four_bits_stay_within_their_rule_one_operation_at_a_time(family, tiny_model):
    model = tiny_model(family)
    reference = model.trace(IDS)
    small = model.quantize("int4", block_size=32)
    # the rms error of 15 steps in terms of a block's largest weight, times SAFETY: 20 dB, and normal weights have more
    steps = Tolerance(SAFETY / (14 * math.sqrt(3)), "4 bits")
    rules = {
        name: steps if hasattr(small.weights.get(f"{name}.weight"), "blocks") else Tolerance(1e-5, "")
        for name in reference
    }
    report = compare(small.trace(IDS, feed=reference), reference, rules)
    assert report and 0.1 < report.worst[0].excess < 0.7, report
    # a nibble in the wrong order
    name = "model.layers.0.mlp.up_proj"
    packed = small.weights[f"{name}.weight"].blocks.packed
    packed[:] = packed >> 4 | packed << 4
    broken = compare(small.trace(IDS, feed=reference), reference, rules)
    assert [tensor.name for tensor in broken.failures] == [name]


def test_the_bound_follows_the_model():
    """Deeper, wider, longer and coarser allow more; a tap allows no less than the one before."""
    small, wide = Config(num_hidden_layers=4, hidden_size=1024, num_attention_heads=8), Config(num_hidden_layers=4)
    head = {c: tolerances(c, "float32", 16)["lm_head"].relative for c in (small, wide, Config())}
    assert head[small] < head[wide] < head[Config()] < 1e-3
    for config in (Config(), Config(family="Baichuan2-13B", rope_theta=None)):
        bounds = [t.relative for t in tolerances(config, "float32", 16).values()]
        assert bounds == sorted(bounds)
        longer = tolerances(config, "float32", 4096)["lm_head"].relative
        assert bounds[-1] < longer < 5e-3
    finest_first = ("float64", "float32", "float16", "bfloat16")
    order = [tolerances(small, dtype, 16)["lm_head"].relative for dtype in finest_first]
    assert order == sorted(order) and order[0] < 1e-12
    assert not tolerances(Config(), "bfloat16", 16)["lm_head"].judges
    assert all(rule.judges for rule in tolerances(Config(), "bfloat16", 16, fed=True).values())
    with pytest.raises(InputError, match="no rounding rule for 'float8'"):
        tolerances(Config(), "float8", 16)


def loud(model, monkeypatch, factor):
    """Queries and keys are so many times larger."""
    changed = {}
    for name, weight in model.weights.items():
        if name.endswith("W_pack.weight"):
            rows = np.array(weight.array)
            rows[: len(rows) * 2 // 3] *= factor
            changed[name] = Weight(rows)
    monkeypatch.setattr(model, "weights", model.weights.replace(changed))


def test_scores_are_amplified_by_their_size(tiny_model, monkeypatch):
    """A softmax makes relative errors of absolute ones, so that scores of hundreds need more than a fixed rule."""
    model = tiny_model("Baichuan2-7B")
    loud(model, monkeypatch, np.float32(8))
    prompts = np.random.default_rng(0).integers(0, 96, (12, 12))
    excess, without = [], []
    for ids in prompts:
        trace, reference = model.trace(ids), model.trace(ids, "float64")
        sizes = largest_scores(reference)
        assert sizes.keys() == {f"model.layers.{i}.self_attn.scores" for i in (0, 1)} and min(sizes.values()) > 100
        report = compare(trace, reference)
        assert report, report
        excess.append(report.worst[0].excess)
        without.append(compare(trace, reference, tolerances(model.config, "float32", 12)).worst[0].excess)
        assert compare(trace, reference, tolerances(model.config, "float32", 12, scores=sizes)) and (
            stated(trace, reference) == tolerances(model.config, "float32", 12, scores=sizes)
        )
    assert max(without) > 1.5, "this is what the size is for"
    assert 0.05 < max(excess) < 0.5
    swapped_halves(model, monkeypatch)
    assert compare(model.trace(ids), reference).worst[0].excess > 1e3


def test_small_scores_change_no_bound():
    config = Config(num_hidden_layers=3)
    names = [f"model.layers.{i}.self_attn.scores" for i in range(3)]
    plain = tolerances(config, "float32", 16)
    assert plain == tolerances(config, "float32", 16, scores=dict.fromkeys(names, SAFETY * 0.7))
    large = tolerances(config, "float32", 16, scores=dict.fromkeys(names, 10.0 * SAFETY))
    assert plain["model.layers.0.self_attn.scores"] == large["model.layers.0.self_attn.scores"]
    for i, name in enumerate(n.replace("scores", "probs") for n in names):
        amplified = sum(199 * plain[n].relative ** 2 for n in names[: i + 1])  # each layer's once
        assert large[name].relative == pytest.approx(math.sqrt(plain[name].relative ** 2 + amplified))
    assert "amplified by large scores" in large["lm_head"].reason and large["lm_head"].judges
    fed = tolerances(config, "float32", 16, fed=True, scores=dict.fromkeys(names, 1e3))
    assert fed == tolerances(config, "float32", 16, fed=True), "scores that are given have no error to amplify"


def test_the_size_of_scores_is_of_what_is_finite():
    traces = [{"a.scores": np.array([[-3.0, np.nan]]), "a.probs": np.ones(2)}, {"a.scores": np.float32([[2, np.inf]])}]
    assert largest_scores(*traces) == {"a.scores": 3.0} and not largest_scores()


def test_a_position_is_bounded_by_its_worst_case():
    """In float32 an angle at position S is off by up to 2 S u, and so are the keys that it turns."""
    config = Config(hidden_size=64, num_attention_heads=1)
    bound = tolerances(config, "float32", 4096, fed=True)["model.layers.0.self_attn.key"]
    unit = ROUNDINGS["float32"].unit
    assert bound.relative == pytest.approx(2 * 4096 * unit, rel=0.01)
    from refimpl.positions import rope_tables

    positions = np.arange(4096)[None]
    narrow = np.concatenate(rope_tables(positions, 64, 1e4, np.float32))
    exact = np.concatenate(rope_tables(positions, 64, 1e4, np.float64))
    assert 0.05 < only(compare({"t": narrow}, {"t": exact}, bound)).excess < 1
    assert SAFETY == 8


def test_the_default_is_the_rule_of_the_deepest_model():
    x = np.random.default_rng(0).standard_normal((2, 3))
    assert compare({"x": x.astype(np.float32)}, {"x": x})
    assert not compare({"x": x * 1.01}, {"x": x})
