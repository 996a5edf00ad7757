"""A training step: its golden on disk, and the same step taken by this package, correctly or with a known mistake.

A step runs some batches forward and backward, averages their gradients, clips them and lets AdamW update the
parameters. Its tensors are listed below in the order in which they are computed; b0, b1, … are the batches. There is a
second step (s1), because the first cannot show a wrong beta2: at AdamW's first step the moments cancel.

    s0/b0/forward/NAME  s0/b0/loss       every tap of the forward, and the loss
    s0/b0/gradient/NAME                  of every tap, last to first, and of every parameter
    s0/gradient/NAME  s0/norm            of the mean loss; the norm before clipping
    s0/mean/NAME  s0/square/NAME         AdamW's moments after the step, updated with the clipped gradient
    s0/after/NAME                        the parameters
    s1/…                                 the same, without taps
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from golden.bundle import Case, expect_tolerance, read_case, read_tensors, write_tensors
from golden.gradients import gradient_tolerances
from golden.tolerance import ROUNDINGS, SAFETY, Tolerance
from refimpl.checkpoint.weights import NormHead, Weight
from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.files import read_json
from refimpl.forward import Forward
from refimpl.gradients.backward import backward
from refimpl.gradients.finetune import trained
from refimpl.gradients.objective import NextToken
from refimpl.gradients.optimizer import AdamW, Moments, global_norm
from refimpl.loss import IGNORE
from refimpl.trace import Trace

STEP = "refimpl training step 1"
STEPS = 2
EXACT = 1e-9  # float64: two engines differ by 1e-14, and AdamW divides by a root that may be as small as 1e-8


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that run together: `case` has ids (B, T), perhaps a mask; `labels` (B, T) are the tokens to predict."""

    case: Case
    labels: np.ndarray


@dataclass(frozen=True)
class Setting:
    """The hyperparameters of a step: the weight of the z-loss, and AdamW's."""

    z_loss_weight: float = 0.0
    adamw: AdamW = field(default_factory=AdamW)


@dataclass(frozen=True)
class Way:
    """How a step is taken. The defaults are correct; every other value is a mistake that has been made somewhere."""

    divide: bool = True  # the loss is the mean over the labels that count, not the sum
    mask: bool = True  # labels of -100 do not count
    average: bool = True  # the gradients of accumulated batches are averaged, not summed
    clip: str = "after"  # the mean of all batches is clipped ("each": every batch, before the mean; "never")
    z_loss: bool = True
    row_lengths: bool = True  # NormHead's gradient includes that of the rows' lengths
    decay_norms: bool = False
    beta2: float | None = None  # replaces the setting's


@dataclass(frozen=True, eq=False)
class StepGolden:
    """What a folder holds: the batches, the setting, and for each number format the tensors and their tolerances."""

    folder: Path
    config: Config
    batches: tuple[Batch, ...]
    setting: Setting
    dtypes: tuple[str, ...]
    provenance: dict[str, Any]
    entries: dict[str, dict[str, Any]] = field(repr=False)
    tensors: dict[str, np.ndarray] = field(repr=False)

    def describe(self) -> str:
        """A few lines for a person about what is in it."""
        adamw = ", ".join(f"{name} {value:g}" for name, value in asdict(self.setting.adamw).items())
        counts = [int((batch.labels[:, 1:] != IGNORE).sum()) for batch in self.batches]
        shapes = ["{} x {}".format(*batch.case.ids.shape) for batch in self.batches]
        rows = [
            f"  {shape} tokens, of which {count} are predicted" for shape, count in zip(shapes, counts, strict=True)
        ]
        return "\n".join([
            f"{self.folder}: a training step of a {self.config.family} in {', '.join(self.dtypes)}, "
            f"{len(self.entries)} tensors by {self.provenance.get('implementation')}",
            *rows, f"  z-loss {self.setting.z_loss_weight:g}, {adamw}",
        ])  # fmt: skip

    def trace(self, dtype: str) -> Trace:
        """The tensors in a number format, in order. `meta` holds the tolerances that they are judged by."""
        names = [key.removeprefix(f"{dtype}/") for key in self.entries if key.startswith(f"{dtype}/")]
        meta = {"engine": "pytorch", "kind": "training step", "dtype": dtype, "config": asdict(self.config)}
        meta["tolerance"] = {name: self.entries[f"{dtype}/{name}"]["tolerance"] for name in names}
        return Trace(((name, self.tensors[f"{dtype}/{name}"]) for name in names), meta)


def take(
    model: Forward, batches: Sequence[Batch], setting: Setting, dtype: str = "float64", way: Way | None = None,
    steps: int = STEPS, feed: Mapping[str, np.ndarray] | None = None,
) -> Trace:  # fmt: skip
    """Takes the steps with this package. `feed`: gradients of taps (s0/b…) that replace the computed ones."""
    way = way or Way()
    adamw = setting.adamw if way.beta2 is None else replace(setting.adamw, beta2=way.beta2)
    if way.decay_norms:
        adamw = _DecaysAll(**asdict(adamw))
    tied = model.config.tie_word_embeddings
    parameters = {
        name: weight.array.astype(dtype) for name, weight in model.weights.items()
        if not (tied and name == "lm_head.weight")
    }  # fmt: skip
    found, moments = Trace(meta={"engine": "refimpl", "kind": "training step", "dtype": dtype}), Moments()
    for s in range(steps):
        total: dict[str, np.ndarray] = {}
        for b, batch in enumerate(batches):
            at = f"s{s}/b{b}"
            given = {n.removeprefix(f"{at}/gradient/"): x for n, x in (feed or {}).items() if n.startswith(f"{at}/g")}
            loss, gradients = _batch(model, batch, setting, dtype, way, parameters, s == 0, given)
            if s == 0:
                forward = model.trace(batch.case.ids, dtype, batch.case.attention_mask)
                found.update((f"{at}/forward/{name}", x) for name, x in forward.items())
            found[f"{at}/loss"] = np.array([loss])
            if s == 0:
                found.update((f"{at}/gradient/{name}", g) for name, g in gradients.items())
            own = {name: gradients[name] for name in parameters if name in gradients}
            if way.clip == "each":
                own, _ = adamw.clipped(own)
            share = len(batches) if way.average else 1
            total = {name: total[name] + g / share if name in total else g / share for name, g in own.items()}
        found.update((f"s{s}/gradient/{name}", g) for name, g in total.items())
        found[f"s{s}/norm"] = np.array([global_norm(total)])
        clipped, _ = adamw.clipped(total) if way.clip == "after" else (total, 0.0)
        adamw.step(parameters, clipped, moments)
        for kind, of in (("mean", moments.mean), ("square", moments.square), ("after", parameters)):
            found.update((f"s{s}/{kind}/{name}", of[name].copy()) for name in clipped)
    return found


def _batch(
    model: Forward, batch: Batch, setting: Setting, dtype: str, way: Way, parameters: Mapping[str, np.ndarray],
    taps_too: bool, feed: Mapping[str, np.ndarray],
) -> tuple[float, Trace]:  # fmt: skip
    labels = batch.labels if way.mask else np.where(batch.labels == IGNORE, batch.case.ids, batch.labels)
    weight = setting.z_loss_weight if way.z_loss else 0.0
    counts = None if way.divide else (1, labels[:, 1:].size)
    weights = trained(model, parameters, None)
    head, lengths = weights["lm_head.weight"], None
    if not way.row_lengths and isinstance(head, NormHead):
        rows = head.read(np.dtype(dtype))
        weights, lengths = weights.replace({"lm_head.weight": Weight(rows)}), head.lengths(np.dtype(dtype))
    wrt: str | Callable[[str], bool] = "*" if taps_too else parameters.keys().__contains__
    loss, found = backward(model, batch.case.ids, NextToken(labels, weight, counts=counts), wrt, dtype,
                           batch.case.attention_mask, feed=feed, weights=weights)  # fmt: skip
    if lengths is not None and "lm_head.weight" in found:
        found["lm_head.weight"] = found["lm_head.weight"] / lengths
    return loss, found


class _DecaysAll(AdamW):
    """AdamW with weight decay on norms and biases, too."""

    @staticmethod
    def decays(name: str, parameter: np.ndarray) -> bool:
        return True


# --- on disk ---


def write_step(
    folder: str | Path, config: Config, batches: Sequence[Batch], setting: Setting, traces: Mapping[str, Trace],
    provenance: Mapping[str, Any],
) -> None:  # fmt: skip
    """Stores a step's traces (by dtype) in a new folder, all or nothing. Raises InputError if the folder exists."""
    tensors = {f"{dtype}/{name}": x for dtype, trace in traces.items() for name, x in trace.items()}
    rules = {dtype: step_tolerances(config, dtype, batches, setting, trace) for dtype, trace in traces.items()}
    extra = {
        f"{dtype}/{name}": {
            "origin": trace.meta["origin"].get(name, "observed"),
            "tolerance": asdict(rules[dtype][name]),
        }
        for dtype, trace in traces.items()
        for name in trace
    }
    manifest = {
        "config": asdict(config), "dtypes": list(traces), "setting": asdict(setting), "provenance": dict(provenance),
        "batches": [
            {"text": None, "ids": batch.case.ids.tolist(), "labels": batch.labels.tolist(),
             "attention_mask": None if batch.case.attention_mask is None else batch.case.attention_mask.tolist()}
            for batch in batches
        ],
    }  # fmt: skip
    write_tensors(Path(folder), STEP, manifest, tensors, extra)


def is_step(folder: str | Path) -> bool:
    """Whether a folder says that it is the golden of a step."""
    path = Path(folder) / "manifest.json"
    return path.is_file() and read_json(path).get("format") == STEP


def read_step(folder: str | Path, verify: bool = True) -> StepGolden:
    """The golden of a step in a folder. Raises InputError if it is missing, truncated, changed or not a step's."""
    folder = Path(folder)
    manifest, tensors = read_tensors(folder, STEP, verify)
    try:
        config = Config(**manifest["config"])
        setting = Setting(manifest["setting"]["z_loss_weight"], AdamW(**manifest["setting"]["adamw"]))
        batches = []
        for number, stored in enumerate(manifest["batches"]):
            case, labels = read_case(f"b{number}", stored, config), np.array(stored["labels"])
            if labels.shape != case.ids.shape or labels.dtype.kind != "i":
                raise InputError(f"the labels of batch {number} do not fit its ids {case.ids.shape}")
            batches.append(Batch(case, labels))
        dtypes = tuple(manifest["dtypes"])
        if not batches or not dtypes or not set(dtypes) <= {"float64", "float32"}:
            raise InputError("it has no batches, or number formats other than float64 and float32")
        for key, entry in manifest["tensors"].items():
            expect_tolerance(key, entry["tolerance"])
        provenance = dict(manifest["provenance"])
    except InputError as error:
        raise InputError(f"{folder / 'manifest.json'}: {error}; record the golden again") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder / 'manifest.json'} is not a step's ({what}); record the golden again") from None
    return StepGolden(folder, config, tuple(batches), setting, dtypes, provenance, manifest["tensors"], tensors)


def step_tolerances(
    config: Config, dtype: str, batches: Sequence[Batch], setting: Setting, trace: Trace
) -> dict[str, Tolerance]:
    """The Tolerance of each tensor of a step.

    In float64 it is EXACT. In float32 it follows the rule of `golden.gradients`, doubled for squares. A parameter may
    end two learning rates apart: AdamW moves it by one learning rate however small its gradient is, and a gradient that
    is only rounding error may have either sign.
    """
    if dtype == "float64":
        return dict.fromkeys(trace, Tolerance(EXACT, "float64 from two engines"))
    size = max(batch.case.ids.shape[0] for batch in batches), max(batch.case.ids.shape[1] for batch in batches)
    rules = gradient_tolerances(config, dtype, *size)
    most, unit = max(rules.values(), key=lambda rule: rule.relative), ROUNDINGS[dtype].unit
    found = {}
    for name, x in trace.items():
        kind, _, of = name.split("/", 1)[1].rpartition("/")
        rule = rules.get(of, most)
        if kind == "square":
            rule = Tolerance(2 * rule.relative, f"twice {rule.reason}")
        elif kind == "after":
            scale = float(np.abs(x).max()) or 1.0
            apart = 2 * setting.adamw.learning_rate / scale + SAFETY * unit
            rule = Tolerance(min(apart, 1.0), f"2 learning rates of {scale:.2g} + {SAFETY} units")
        found[name] = rule
    return found
