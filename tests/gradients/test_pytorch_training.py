"""Twenty steps beside PyTorch's, on the same batches in the same order."""

from dataclasses import replace

import numpy as np
import pytest
from test_finetune import some_examples
from trusted_code import no_shared_cache, with_code  # noqa: F401  (the fixture holds for all tests here)

import refimpl
from golden.bundle import Case
from golden.tolerance import tolerances
from refimpl.gradients.adapters import Lora
from refimpl.gradients.finetune import Options, Tuning, _padded, order
from refimpl.gradients.optimizer import AdamW

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from golden.make.gradients import Training, environment  # noqa: E402  (it needs both)

OPTIONS = Options(AdamW(learning_rate=1e-3), epochs=20, batch_size=4, accumulation=2, steps=20)


def run(training, examples, options):
    """PyTorch's losses and norms."""
    with environment("float32"):
        optimizer = training.optimizer(options.optimizer)
        steps = []
        for batches in order(len(examples), options):
            padded = [_padded([examples[i] for i in batch]) for batch in batches]
            pairs = [(Case(ids, real), labels) for ids, labels, real in padded]
            steps.append(training.step(pairs, optimizer, options.optimizer))
    losses, norms = zip(*steps, strict=True)
    return np.array(losses), np.array(norms)


def theirs(folder, examples, options):
    """PyTorch's losses and norms, and its parameters afterwards."""
    training = Training(folder, "float32", trusted=True)
    return *run(training, examples, options), {name: x.detach().numpy() for name, x in training.leaves.items()}


def bound(model, examples):
    """That of one forward in float32: a loss moves by twice what a logit does, at most."""
    largest = max(np.abs(model(example.ids)).max() for example in examples)
    return 2 * tolerances(model.config, "float32", 14)["lm_head"].relative * largest


def test_twenty_losses_are_pytorch_s(family, tmp_path):
    """To the bound of one forward, after twenty steps, too."""
    folder, examples = with_code(tmp_path / "m", family), some_examples()
    losses, norms, parameters = theirs(folder, examples, OPTIONS)
    model = refimpl.load(folder)
    tuning = Tuning(model, examples, OPTIONS)
    for _ in tuning.plan:
        tuning.step()
    allowed = bound(model, examples)
    assert len(tuning.losses) == 20 and losses[-1] < losses[0] - 0.5, "it learns"
    assert np.abs(np.array(tuning.losses) - losses).max() < allowed
    assert np.abs(np.array(tuning.norms) / norms - 1).max() < 1e-3
    for name, x in parameters.items():
        assert np.abs(tuning.parameters[name] - x).max() < 20 * OPTIONS.optimizer.learning_rate * 0.02, name


def test_twenty_losses_of_adapters_are_pytorch_s(tmp_path):
    """LoRA in PyTorch: the base is frozen, and W + scale * B A takes its place."""
    folder, examples = with_code(tmp_path / "m", "Baichuan2-13B"), some_examples()
    lora = Lora(rank=2, alpha=8, targets=("W_pack", "down_proj"))
    options = replace(OPTIONS, lora=lora, optimizer=AdamW(learning_rate=1e-2))
    model = refimpl.load(folder)
    tuning = Tuning(model, examples, options)
    training = Training(folder, "float32", trusted=True)
    base, convert = training.leaves, training.source.convert
    training.leaves = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in tuning.parameters.items()}

    def merged(config, leaves):
        found = {name: x.detach() for name, x in base.items()}
        for name in [name for name in leaves if ".lora_A." in name]:
            weight = name.replace("lora_A.", "")
            found[weight] = found[weight] + lora.scale * leaves[name.replace("_A.", "_B.")] @ leaves[name]
        return convert(config, found)

    training.source = replace(training.source, convert=merged)
    losses = run(training, examples, options)[0]
    for _ in tuning.plan:
        tuning.step()
    assert losses[-1] < losses[0] - 0.2, "it learns"
    assert np.abs(np.array(tuning.losses) - losses).max() < bound(model, examples)


@pytest.mark.parametrize("change", [
    dict(beta2=0.999), dict(weight_decay=0.1), dict(max_grad_norm=0.0), dict(epsilon=1e-3), dict(learning_rate=1.01e-3),
])  # fmt: skip
def test_another_optimizer_is_seen(change, tmp_path):
    folder, examples = with_code(tmp_path / "m", "Baichuan2-7B"), some_examples()
    losses, _, _ = theirs(folder, examples, OPTIONS)
    model = refimpl.load(folder)
    wrong = AdamW(**{"learning_rate": 1e-3, **change})
    tuning = Tuning(model, examples, Options(wrong, epochs=20, batch_size=4, accumulation=2, steps=20))
    for _ in tuning.plan:
        tuning.step()
    assert np.abs(np.array(tuning.losses) - losses).max() > bound(model, examples)


if __name__ == "__main__":  # the figures
    import tempfile
    from pathlib import Path

    from refimpl.config import FAMILIES

    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as place:
            folder, examples = with_code(Path(place, "m"), name), some_examples()
            losses, norms, parameters = theirs(folder, examples, OPTIONS)
            model = refimpl.load(folder)
            tuning = Tuning(model, examples, OPTIONS)
            for _ in tuning.plan:
                tuning.step()
            allowed = bound(model, examples)
            worst = max(np.abs(tuning.parameters[n] - x).max() for n, x in parameters.items())
            difference = np.abs(np.array(tuning.losses) - losses).max()
            print(f"{name:14} {losses[0]:.4f} … {losses[-1]:.4f}  a loss differs by {difference:.1e} of {allowed:.1e}, "
                  f"a parameter by {worst:.1e}")  # fmt: skip
