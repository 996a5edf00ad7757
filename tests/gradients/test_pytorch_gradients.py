"""Gradients against PyTorch's autograd: every parameter and every tap of the five families.

float64 agrees to 1e-9 of each tensor's largest value (1e-14 is what is found), float32 within the bound of
`golden.gradients`, of which a correct run needs a sixth.
"""

import numpy as np
import pytest
from conftest import write_checkpoint
from trusted_code import no_shared_cache, with_code  # noqa: F401  (the fixture holds for all tests here)

import refimpl
from golden import Tolerance
from golden.bundle import Case
from golden.check import without_padding
from golden.gradients import compare_gradients, gradient_tolerances
from refimpl.gradients import tape
from refimpl.gradients.tape import Tape
from refimpl.names import taps

pytest.importorskip("torch")
pytest.importorskip("transformers")
from golden.make.gradients import Training, environment, training_gradients

IDS = np.array([[5, 17, 9, 3, 80, 44, 2, 61, 9, 9, 33, 20], [4, 8, 3, 9, 2, 7, 1, 0, 3, 3, 5, 6]])
LABELS = np.where(np.arange(12) < 4, -100, IDS)
MASK = np.array([[0] * 4 + [1] * 8, [1] * 12])
PADDED = np.where(MASK, LABELS, -100)
PADDED[0, 4] = -100  # what the padding would predict
EXACT = Tolerance(1e-9, "float64 from two engines")
WAYS = [
    ("Baichuan-7B", "transformers", {}), ("Baichuan-7B", "remote", {}), ("Baichuan-13B", "remote", {}),
    ("Baichuan2-7B", "transformers", {}), ("Baichuan2-7B", "remote", {}), ("Baichuan2-13B", "remote", {}),
    ("Qwen2-7B", "transformers", {}), ("Qwen2-7B", "transformers", {"tie_word_embeddings": True}),
    ("Baichuan2-7B", "transformers", {"tie_word_embeddings": True}),
    ("Baichuan2-13B", "remote", {"hidden_size": 60, "num_attention_heads": 10}),
]  # fmt: skip


def written(folder, family, implementation, changes):
    return (
        with_code(folder, family, **changes)
        if implementation == "remote"
        else write_checkpoint(folder, family, **changes)
    )


@pytest.mark.parametrize("family, implementation, changes", WAYS)
def test_gradients_are_autograd_s(family, implementation, changes, tmp_path):
    folder = written(tmp_path / "m", family, implementation, changes)
    model = refimpl.load(folder)
    for mask, labels, weight in ((None, LABELS, 0.01), (MASK, PADDED, 0.0)):
        for dtype in ("float64", "float32"):
            loss, found = model.gradients(IDS, labels, dtype=dtype, attention_mask=mask, z_loss_weight=weight)
            their_loss, truth = training_gradients(
                folder, Case(IDS, mask), labels, dtype, weight, implementation, trust_remote_code=True
            )
            allowed = EXACT if dtype == "float64" else gradient_tolerances(model.config, dtype, *IDS.shape)
            # the gradient by a prob of padding is what padding's own value makes of it
            ours, theirs = (without_padding(side, model.config, Case(IDS, mask)) for side in (found, truth))
            report = compare_gradients(ours, theirs, allowed)
            assert report, str(report)
            assert report.worst[0].excess < 0.25, str(report)  # a bound that is nearly reached would soon be exceeded
            assert loss == pytest.approx(their_loss, rel=1e-14 if dtype == "float64" else 1e-6)
            parameters = {
                name for name in model.weights if not (changes.get("tie_word_embeddings") and "lm_head" in name)
            }
            assert set(truth) == set(taps(model.config)) | parameters == set(found), "all of them"


def without_a_token(self, x, weight, bias=None):
    """A bias's gradient that leaves out a token."""
    y = RIGHT["linear"](self, x, weight, bias)
    y.inputs = tuple(
        (to, (lambda g: np.delete(g.reshape(-1, g.shape[-1]), 5, 0).sum(0)) if to is bias else adjoint)
        for to, adjoint in y.inputs
    )
    return y


def of_half_the_queries(self, a, b):
    """A key's gradient from the first half of the query heads that share it."""
    y = RIGHT["matmul"](self, a, b)
    (_, of_a), (_, of_b) = y.inputs
    half = np.arange(y.shape[2])[:, None] < y.shape[2] // 2
    y.inputs = (a, of_a), (b, lambda g: of_b(g * half))
    return y


def turned_the_same_way(self, pieces, axis=-1):
    """RoPE's adjoint turns back; this one turns on."""
    y = RIGHT["concat"](self, pieces, axis)
    y.inputs = tuple((x, (lambda g, adjoint=adjoint: -adjoint(g))) for x, adjoint in y.inputs)
    return y


RIGHT = {name: getattr(Tape, name) for name in ("linear", "matmul", "concat")}
LAYER = "model.layers.1"
FAULTS = {
    "NormHead is a constant": ("Baichuan2-7B", "lm_head.weight",
                               {"through_lengths": lambda head, g: g}),
    "a mean is a constant": ("Baichuan2-7B", LAYER,
                             {"mean": lambda self, x: self.write(self.ops.mean(x.array))}),
    "a sigmoid is a constant": ("Baichuan2-7B", f"{LAYER}.mlp.gate_proj",
                                {"sigmoid": lambda self, x: self.write(self.ops.sigmoid(x.array))}),
    "a bias misses a token": ("Qwen2-7B", f"{LAYER}.self_attn.v_proj.bias", {"linear": without_a_token}),
    "a key misses heads": ("Qwen2-7B", f"{LAYER}.self_attn.key", {"matmul": of_half_the_queries}),
    "RoPE turns on": ("Baichuan2-7B", f"{LAYER}.self_attn.W_pack", {"concat": turned_the_same_way}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_adjoint_is_seen(fault, tmp_path, monkeypatch):
    """In float32, too, and first at the tensor where it was made."""
    family, first, changes = FAULTS[fault]
    for name, wrong in changes.items():
        monkeypatch.setattr(tape if name == "through_lengths" else Tape, name, wrong)
    folder = write_checkpoint(tmp_path / "m", family)
    model = refimpl.load(folder)
    _, found = model.gradients(IDS, LABELS, z_loss_weight=0.01)
    _, truth = training_gradients(folder, Case(IDS), LABELS, "float32", 0.01)
    report = compare_gradients(found, truth, gradient_tolerances(model.config, "float32", *IDS.shape))
    failures = {tensor.name for tensor in report.failures}
    assert next(name for name in found if name in failures) == first, str(report)


def test_gradients_of_several_batches_add_up(tmp_path):
    """Two calls of one `Training` are as independent as two processes."""
    folder = write_checkpoint(tmp_path / "m", "Baichuan2-7B")
    training = Training(folder, "float64")
    with environment("float64"):
        one = training.gradients(Case(IDS), LABELS)[1]
        training.gradients(Case(IDS[:1]), LABELS[:1])
        again = training.gradients(Case(IDS), LABELS)[1]
    assert all(np.array_equal(one[name], again[name]) for name in one)
