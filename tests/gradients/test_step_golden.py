"""Goldens of a training step: classic mistakes, made in PyTorch, must be seen, placed and named."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import write_checkpoint
from trusted_code import no_shared_cache, with_code  # noqa: F401  (the fixture holds for all tests here)

import refimpl
from golden import write_trace
from golden.bundle import Case
from golden.step import Batch, Setting, Way, read_step, take
from golden.step_check import MISTAKES, check_step, judge
from refimpl import InputError
from refimpl.cli import main
from refimpl.gradients.optimizer import AdamW
from refimpl.gradients.tape import Tape

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from golden.make import gradients as at  # noqa: E402  (it needs both)

IDS = np.array([[5, 17, 9, 3, 80, 44, 2, 61], [4, 8, 3, 9, 2, 7, 1, 12], [3, 3, 5, 6, 90, 33, 20, 11]])
BATCHES = [Batch(Case(ids), np.where(np.arange(8) < cut, -100, ids)) for ids, cut in ((IDS[:2], 3), (IDS[2:], 4))]
SETTING = Setting(0.01, AdamW(learning_rate=1e-3, weight_decay=0.1))


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The folder of a small Baichuan2-7B, and the golden of a step of it."""
    folder = write_checkpoint(tmp_path_factory.mktemp("step") / "m", "Baichuan2-7B")
    return folder, at.make_step(folder, folder.parent / "golden", BATCHES, SETTING)


def test_the_step_of_every_family_is_pytorch_s(family, tmp_path):
    folder = with_code(tmp_path / "m", family)
    golden = at.make_step(folder, tmp_path / "g", BATCHES, SETTING, trust_remote_code=True)
    for dtype in golden.dtypes:
        found = check_step(refimpl.load(folder), golden, dtype)
        assert found, str(found)
        assert found.report.worst[0].excess < 0.5, str(found)
    assert read_step(tmp_path / "g").trace("float64").keys() == take(refimpl.load(folder), BATCHES, SETTING).keys()


def summed_loss(logits, target, ignore_index):
    return torch.nn.functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")


class InPyTorch:
    """The classic mistakes, each made where PyTorch takes the step."""

    def missing_mean(self, patch):
        patch.setattr(at, "cross_entropy", summed_loss)

    def mask_leaks(self, patch):
        right = at.Training.loss
        patch.setattr(at.Training, "loss", lambda self, case, labels, weight: right(self, case, case.ids, weight))

    def summed(self, patch):
        class One(list):  # divided by 1
            def __len__(self):
                return 1

        return One(BATCHES), SETTING

    def clipped_each(self, patch):
        """Gradient by gradient, as in a loop that clips before it has accumulated."""

        class Clipping(at.Training):
            def loss(self, case, labels, weight):
                loss = super().loss(case, labels, weight)
                leaves = list(self.leaves.values())
                gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
                norm = torch.sqrt(sum((g**2).sum() for g in gradients if g is not None))
                scale = (1.0 / (norm + 1e-6)).clamp(max=1.0)
                return loss.detach() + (loss - loss.detach()) * scale

        patch.setattr(at, "Training", Clipping)

    def not_clipped(self, patch):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda leaves, most: torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(x.grad) for x in leaves])))  # fmt: skip

    def no_z_loss(self, patch):
        return BATCHES, replace(SETTING, z_loss_weight=0.0)

    def norm_head_constant(self, patch):
        def normalize(weight):
            return weight / weight.detach().norm(dim=-1, keepdim=True)

        patch.setattr(at.pytorch, "normalize", normalize)

    def decayed_norms(self, patch):
        patch.setattr(at.Training, "optimizer", lambda self, adamw: torch.optim.AdamW(
            self.leaves.values(), adamw.learning_rate, (adamw.beta1, adamw.beta2), adamw.epsilon, adamw.weight_decay
        ))  # fmt: skip

    def beta2(self, patch):
        return BATCHES, replace(SETTING, adamw=replace(SETTING.adamw, beta2=0.999))


FIRST = {
    "missing-mean": "s0/b0/loss", "mask-leaks": "s0/b0/loss", "no-z-loss": "s0/b0/loss",
    "summed": "s0/gradient/lm_head.weight", "norm-head-constant": "s0/b0/gradient/lm_head.weight",
    "not-clipped": "s0/mean/lm_head.weight", "decayed-norms": "s0/after/model.norm.weight",
    "beta2": "s0/square/lm_head.weight", "clipped-each": "s0/b0/gradient/lm_head",
}  # fmt: skip


@pytest.mark.parametrize("mistake", FIRST)
def test_a_classic_mistake_is_named(mistake, golden, monkeypatch):
    folder, truth = golden
    with monkeypatch.context() as patch:
        batches, setting = getattr(InPyTorch(), mistake.replace("-", "_"))(patch) or (BATCHES, SETTING)
        training = at.Training(folder, "float64")
        with at.environment("float64"):
            wrong = at._steps(training, batches, setting, 2)
    if mistake == "clipped-each":  # what a hook on a tensor sees there is the scaled gradient: compare the sums alone
        wrong = {name: x for name, x in wrong.items() if "/b0/" not in name and "/b1/" not in name}
    found = judge(wrong, truth, "float64", refimpl.load(folder))
    assert not found and mistake in found.causes, str(found)
    assert MISTAKES[mistake][0] in str(found) and f"[{mistake}]" in str(found)
    if mistake != "clipped-each":
        assert found.causes == (mistake,) and found.first == FIRST[mistake], str(found)


def test_a_wrong_adjoint_is_born_where_it_was_made(golden, monkeypatch):
    """Our own engine, broken: what comes before the fault on the way to the embedding has inherited it."""
    folder, truth = golden
    monkeypatch.setattr(Tape, "sigmoid", lambda self, x: self.write(self.ops.sigmoid(x.array)))
    found = check_step(refimpl.load(folder), truth)
    gates = {f"s0/b{b}/gradient/model.layers.{i}.mlp.gate_proj" for b in (0, 1) for i in (0, 1)}
    assert not found and found.first in gates
    assert {name.removesuffix(".weight") for name in found.born} == gates
    assert "born there" in str(found) and "cause:" not in str(found)


def test_an_inherited_error_is_told_from_one_that_is_born(golden):
    """Somebody's device, whose third tensor on the way back is off: the rest follows from it."""
    folder, truth = golden
    model = refimpl.load(folder)
    right = take(model, BATCHES, SETTING)
    at_ = "s0/b0/gradient/model.layers.1.mlp.down_proj"
    wrong = take(model, BATCHES, SETTING, feed={at_: right[at_] * 1.5})
    wrong[at_] = right[at_] * 1.5
    found = judge(wrong, truth, "float64", model)
    assert found.first == at_ and found.born == (at_,)
    assert len(found.report.failures) > 20


def test_a_wrong_forward_comes_first_and_tensors_may_be_absent(golden):
    folder, truth = golden
    model = refimpl.load(folder)
    right = take(model, BATCHES, SETTING)
    at_ = "s0/b1/forward/model.layers.0.mlp.act_fn"
    assert list(right).index(at_) < list(right).index("s0/b1/loss")
    found = judge({**right, at_: right[at_] * 1.001}, truth, "float64", model)
    assert found.first == at_ and "before the way back has begun" in str(found)
    part = {name: x for name, x in right.items() if name.startswith("s0/gradient/")}
    found = judge(part, truth, "float64", model)
    assert found and f"{len(right) - len(part)} of the golden's tensors are not there" in str(found)
    assert not judge({}, truth, "float64", model)


def test_bad_folders(golden, tmp_path):
    folder, truth = golden
    with pytest.raises(InputError, match="holds no manifest"):
        read_step(tmp_path)
    with pytest.raises(InputError, match="is there already"):
        at.make_step(folder, truth.folder, BATCHES)
    with pytest.raises(InputError, match="has no step in bfloat16"):
        check_step(refimpl.load(folder), truth, "bfloat16")
    with pytest.raises(InputError, match="is it another"):
        check_step(refimpl.load(), truth)


def test_the_verbs(tmp_path, capsys):
    out = str(tmp_path / "g")
    assert main(["golden", "make", "--gradients", "-p", "床前明月光", "-p", "疑是地上霜。", "--out", out]) == 0
    assert main(["golden", "show", out]) == 0
    assert "a training step of a Baichuan2-7B in float64, float32" in capsys.readouterr().out
    folder = str(refimpl.load().folder)
    for dtype in ("float64", "float32"):
        assert main(["golden", "check", folder, out, "--dtype", dtype]) == 0
    truth = read_step(out)
    wrong = take(refimpl.load(), truth.batches, truth.setting, "float32", Way(average=False), 1)
    write_trace(tmp_path / "t", wrong)
    assert main(["golden", "check", folder, out, "--dtype", "float32", "--trace", str(tmp_path / "t")]) == 1
    said = capsys.readouterr().out
    assert "[summed]" in said and "the first wrong one on the way back is s0/gradient/lm_head.weight" in said
    assert main(["golden", "make", "--gradients", "--out", str(tmp_path / "h")]) == 2
    assert "there is nothing to predict" in capsys.readouterr().err
