"""Gradients from PyTorch's autograd: of every parameter under its checkpoint's name, and of every tap.

The model's parameters are made of the checkpoint's tensors by operations that autograd sees: W_pack cut into q, k and
v, a head's rows divided by their lengths, a head that is the embedding. So the gradients are those of the stored
tensors.

A hook gets the gradient of a tap. It is set on the tensor that shows the tap in the forward, before anything changes
that tensor in place. Gradients of tensors that no class of transformers has are "derived": W_pack's, from q, k and v; a
key's and a value's, summed over the query heads that share them; the scores', from the product of query and key before
it is divided by the root of the head dimension; and, in a fused attention, those of scores and probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from golden.bundle import Case, expect_new, sha256
from golden.make import pytorch
from golden.make.pytorch import Watch, observing, run
from golden.step import STEPS, Batch, Setting, StepGolden, read_step, write_step
from refimpl.checkpoint.resolve import expected_shapes
from refimpl.config import read_config
from refimpl.gradients.optimizer import AdamW
from refimpl.loss import IGNORE
from refimpl.names import taps
from refimpl.trace import Trace, prompt_of


class Training:
    """A model of PyTorch whose parameters are leaves under the checkpoint's names.

    Use its methods within `environment(dtype)`: sums then have one order, and float64 is float64 throughout.
    """

    def __init__(self, folder: Path, dtype: str, implementation: str = "auto", trusted: bool = False):
        self.config, self.dtype = read_config(folder), dtype
        self.source = pytorch._source(folder, self.config, implementation, trusted)
        number = getattr(torch, dtype)
        stored, self.files = pytorch._checkpoint(folder)
        # In training mode the official NormHead divides at each step; otherwise it divides only once.
        with environment(dtype):
            self.model = cast(Any, pytorch._build(self.source, self.config, stored, dtype)).train()
        self.model.get_input_embeddings().padding_idx = self.config.pad_token_id
        # in the order of the backward pass, without saved buffers and without a head that is the embedding
        known = [name for name in reversed(expected_shapes(self.config)) if name in stored]
        self.leaves = {name: stored[name].to(number, copy=True).requires_grad_() for name in known}

    def loss(self, case: Case, labels: np.ndarray, z_loss_weight: float = 0.0) -> torch.Tensor:
        """The training loss, as the official `BaichuanForCausalLM.forward` computes it."""
        logits = self._run(case)[:, :-1]
        target = torch.from_numpy(labels)[:, 1:].flatten()
        loss = cross_entropy(logits.flatten(0, 1), target, ignore_index=IGNORE)
        return loss + z_loss_weight * (logits.max(-1).values ** 2).mean() if z_loss_weight else loss

    def gradients(self, case: Case, labels: np.ndarray, z_loss_weight: float = 0.0) -> tuple[float, Trace]:
        """The loss, and its gradients: of the taps from last to first, then of the parameters.

        `meta["forward"]` of the trace is the trace of the forward.
        """
        seen: dict[str, torch.Tensor] = {}
        forward: dict[str, torch.Tensor] = {}
        watch = GradientWatch()

        def note(name: str, x: torch.Tensor) -> None:
            forward[name] = x.detach().clone()
            x.register_hook(lambda gradient: seen.update({name: gradient.clone()}))

        for leaf in self.leaves.values():
            leaf.grad = None
        with observing(self.model, self.config, note, watch):
            loss = self.loss(case, labels, z_loss_weight)
        loss.backward()
        found = {name: (pytorch._numpy(x), "observed") for name, x in seen.items()} | self._derived(seen, watch)
        order = [name for name in reversed(taps(self.config)) if name in found]
        trace = Trace(meta={
            "engine": "pytorch", "kind": "gradients", "dtype": self.dtype, "ids": prompt_of(case.ids),
            "origin": {name: found[name][1] for name in order} | dict.fromkeys(self.leaves, "observed"),
            "forward": pytorch._trace(self.config, forward, watch, self.dtype, None),
        })  # fmt: skip
        trace.update((name, found[name][0]) for name in order)
        trace.update((name, pytorch._numpy(leaf.grad)) for name, leaf in self.leaves.items() if leaf.grad is not None)
        return loss.detach().item(), trace

    def optimizer(self, adamw: AdamW) -> torch.optim.Optimizer:
        """PyTorch's AdamW over the leaves; only matrices decay."""
        groups = [
            {"params": [x for x in self.leaves.values() if (x.ndim == 2) == matrices],
             "weight_decay": adamw.weight_decay if matrices else 0.0}
            for matrices in (True, False)
        ]  # fmt: skip
        return torch.optim.AdamW(groups, adamw.learning_rate, (adamw.beta1, adamw.beta2), adamw.epsilon)

    def step(
        self, batches: Sequence[tuple[Case, np.ndarray]], optimizer: torch.optim.Optimizer, adamw: AdamW,
        z_loss_weight: float = 0.0,
    ) -> tuple[float, float]:  # fmt: skip
        """One step on the mean loss of some batches, as `Trainer` takes it; gives the loss and the norm."""
        optimizer.zero_grad()
        total = 0.0
        for case, labels in batches:
            loss = self.loss(case, labels, z_loss_weight) / len(batches)
            loss.backward()
            total += loss.detach().item()
        norm = torch.nn.utils.clip_grad_norm_(self.leaves.values(), adamw.max_grad_norm)
        optimizer.step()
        return total, norm.item()

    def _run(self, case: Case) -> torch.Tensor:
        parameters = self.source.convert(self.config, self.leaves)

        def call(*inputs: Any, **options: Any) -> Any:
            return functional_call(self.model, parameters, inputs, options)

        return run(self.model, self.config, case, call).logits

    def _derived(self, seen: Mapping, watch: GradientWatch) -> dict[str, tuple[np.ndarray, str]]:
        found: dict[str, tuple[torch.Tensor, str]] = {}
        config = self.config
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        for layer in range(config.num_hidden_layers):
            at, of = f"model.layers.{layer}.self_attn", watch.gradients.get(layer, {})
            pieces = pytorch._pieces(f"{at}.W_pack")
            if f"{at}.W_pack" not in seen and all(piece in seen for piece in pieces):
                joined = torch.cat([seen[piece] for piece in pieces], dim=-1)
                found[f"{at}.W_pack"] = joined, "derived: those of q_proj, k_proj and v_proj side by side"
            for name in ("query", "key", "value", "scores", "probs"):
                if name not in of:
                    continue
                x, origin = of[name].detach(), "observed"
                if name == "key" and not watch.fused.get(layer):
                    x = x.mT
                if name in ("key", "value") and x.shape[1] != kv:
                    x = x.unflatten(1, (kv, heads // kv)).sum(2)
                    origin = "derived: summed over the query heads that share it"
                if name == "scores":
                    x, origin = (
                        x * config.head_dim**0.5,
                        "derived: of the product, times the root of the head dimension",
                    )
                found[f"{at}.{name}"] = x, origin
            if layer in watch.fused and f"{at}.context" in seen:
                value = watch.fused[layer][0][2].detach()
                probs = pytorch._attention(config, watch, layer)["probs"][0].detach()
                context = seen[f"{at}.context"].unflatten(-1, (heads, -1)).transpose(1, 2)
                g = context @ value.mT
                found[f"{at}.probs"] = g, "derived: that of the context times value"
                found[f"{at}.scores"] = probs * (g - (g * probs).sum(-1, True)), "derived: softmax of that of probs"
        return {name: (pytorch._numpy(x), origin) for name, (x, origin) in found.items()}


class GradientWatch(Watch):
    """Keeps the gradients of operands and results of the products inside attention: layer -> name -> gradient."""

    NAMES = (("query", "key", "scores"), ("probs", "value", ""))

    def __init__(self) -> None:
        super().__init__()
        self.gradients: dict[int, dict[str, torch.Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        layer = self.layer
        if layer is None:
            return super().__torch_function__(func, types, args, kwargs)
        products, fused = len(self.products.get(layer, ())), layer in self.fused
        result = super().__torch_function__(func, types, args, kwargs)
        made = self.products.get(layer, [])
        if len(made) > products:
            self._hook(layer, (*made[-1], result), self.NAMES[products])
        elif layer in self.fused and not fused:
            self._hook(layer, self.fused[layer][0][:3], ("query", "key", "value"))
        return result

    def _hook(self, layer: int, tensors: tuple, names: tuple[str, ...]) -> None:
        of = self.gradients.setdefault(layer, {})
        for x, name in zip(tensors, names, strict=True):
            if name and x.requires_grad:
                x.register_hook(lambda gradient, name=name: of.update({name: gradient.clone()}))


@contextmanager
def environment(dtype: str, seed: int = 0) -> Iterator[None]:
    """One thread, deterministic algorithms, autograd, and float64 throughout if `dtype` is that."""
    with pytorch._deterministic(seed), pytorch._precision(dtype), torch.enable_grad():
        yield


def training_gradients(
    folder: str | Path, case: Case, labels: np.ndarray, dtype: str = "float64", z_loss_weight: float = 0.0,
    implementation: str = "auto", trust_remote_code: bool = False,
) -> tuple[float, Trace]:  # fmt: skip
    """PyTorch's loss and gradients on one batch: see `Training.gradients`."""
    training = Training(Path(folder), dtype, implementation, trust_remote_code)
    with environment(dtype):
        return training.gradients(case, labels, z_loss_weight)


def make_step(
    folder: str | Path, out: str | Path, batches: Sequence[Batch], setting: Setting | None = None,
    dtypes: Sequence[str] = ("float64", "float32"), implementation: str = "auto", trust_remote_code: bool = False,
) -> StepGolden:  # fmt: skip
    """Takes a training step in PyTorch, and stores its tensors in `out`, a new folder: see `golden.step`.

    Raises InputError if something is missing, does not fit or is not trusted.
    """
    folder, out, setting = Path(folder), Path(out), setting or Setting()
    expect_new(out)
    config, traces = read_config(folder), {}
    for dtype in dtypes:
        training = Training(folder, dtype, implementation, trust_remote_code)
        with environment(dtype):
            traces[dtype] = _steps(training, batches, setting, STEPS if dtype == "float64" else 1)
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    provenance = {
        "implementation": training.source.name, "code": training.source.files, "versions": versions,
        "weights": {path.name: sha256(path) for path in training.files},
    }  # fmt: skip
    write_step(out, config, batches, setting, traces, provenance)
    return read_step(out)


def _steps(training: Training, batches: Sequence[Batch], setting: Setting, steps: int) -> Trace:
    """The tensors of `golden.step`, computed by PyTorch's autograd, gradient clipping and AdamW."""
    found, origin = {}, {}  # type: dict[str, np.ndarray], dict[str, str]
    optimizer, leaves = training.optimizer(setting.adamw), training.leaves
    for s in range(steps):
        if s == 0:
            for b, batch in enumerate(batches):
                loss, trace = training.gradients(batch.case, batch.labels, setting.z_loss_weight)
                forward = trace.meta["forward"]
                found |= {f"s0/b{b}/forward/{name}": x for name, x in forward.items()}
                origin |= {f"s0/b{b}/forward/{name}": how for name, how in forward.meta["origin"].items()}
                found[f"s0/b{b}/loss"] = np.array([loss])
                found |= {f"s0/b{b}/gradient/{name}": x for name, x in trace.items()}
                origin |= {f"s0/b{b}/gradient/{name}": how for name, how in trace.meta["origin"].items()}
        optimizer.zero_grad()
        for b, batch in enumerate(batches):
            one = training.loss(batch.case, batch.labels, setting.z_loss_weight)
            found.setdefault(f"s{s}/b{b}/loss", np.array([one.detach().item()]))
            (one / len(batches)).backward()
        grads = {name: x.grad for name, x in leaves.items() if x.grad is not None}
        found |= {f"s{s}/gradient/{name}": pytorch._numpy(grad).copy() for name, grad in grads.items()}
        most = setting.adamw.max_grad_norm or float("inf")
        found[f"s{s}/norm"] = np.array([torch.nn.utils.clip_grad_norm_(leaves.values(), most).item()])
        optimizer.step()
        for kind, key in (("mean", "exp_avg"), ("square", "exp_avg_sq")):
            found |= {f"s{s}/{kind}/{n}": pytorch._numpy(optimizer.state[x][key]).copy() for n, x in leaves.items()}
        found |= {f"s{s}/after/{name}": pytorch._numpy(x).copy() for name, x in leaves.items()}
    return Trace(found, {"origin": origin})
