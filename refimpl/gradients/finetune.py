"""Fine-tuning as the official script does it: all parameters, or adapters of low rank, on a 4-bit base as well.

A run is laid out before it begins: which examples each step sees follows from the seed alone. A step depends on
nothing but the steps before it, and a killed run goes on from its last state to the same bits.

A batch is cut into pieces of some rows, by their lengths alone. Whoever computes a piece, in this process, in another
or on a cluster, gives the sum of its gradients; these are added in the order of the pieces. So the bits do not depend
on how many workers there are.

    OUT.part/state.safetensors      parameters, AdamW's moments, the losses so far: written whole, then renamed
    OUT/                            a checkpoint, or an adapter as peft has it; losses.json and loss.svg

Defaults are those of fine-tune.py in baichuan-inc/Baichuan2: 4 epochs, 16 examples a step, AdamW. Deviations: the loss
of a step is the mean over the batch's labels as there, but padding is left out of what is computed; float32, not bf16.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from refimpl.blocks.save import save
from refimpl.checkpoint.folder import Checkpoint
from refimpl.checkpoint.weights import NormHead, Weight, Weights
from refimpl.errors import InputError, at_most
from refimpl.files import whole_folder, write_safetensors, write_whole
from refimpl.forward import Forward
from refimpl.gradients.adapters import Lora
from refimpl.gradients.backward import backward
from refimpl.gradients.curve import curve
from refimpl.gradients.data import Example
from refimpl.gradients.objective import NextToken
from refimpl.gradients.optimizer import AdamW, Moments
from refimpl.gradients.products import keep_freed_memory
from refimpl.loss import IGNORE
from refimpl.sweep import Pool, Result, sweep

PIECE_TOKENS = 2048  # tokens, padding included, that are computed at a time
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Options:
    """The options that decide the outcome, besides the model and the data.

    `steps`: how many to take, instead of all that the epochs have. `accumulation`: batches of `batch_size` that a step
    averages. `lora`: None trains every parameter. `recompute`: see `backward`.
    """

    optimizer: AdamW = field(default_factory=AdamW)
    lora: Lora | None = None
    epochs: int = 4
    batch_size: int = 16
    accumulation: int = 1
    steps: int | None = None
    seed: int = 42
    z_loss_weight: float | None = None
    recompute: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "steps"):
            value = getattr(self, name)
            if not (name == "steps" and value is None) and (type(value) is not int or not 1 <= value < 1 << 31):
                raise InputError(f"{name} is {value!r:.40}, expected a whole number from 1")
        if type(self.seed) is not int or self.seed < 0:
            raise InputError(f"the seed is {self.seed!r:.40}, expected a whole number from 0")


def order(count: int, options: Options) -> list[list[list[int]]]:
    """The examples, of `count`, that each step's batches hold: every epoch has its own order, from the seed."""
    steps: list[list[list[int]]] = []
    for epoch in range(options.epochs):
        shuffled = np.random.default_rng((options.seed, epoch)).permutation(count).tolist()
        batches = [shuffled[i : i + options.batch_size] for i in range(0, count, options.batch_size)]
        steps += [batches[i : i + options.accumulation] for i in range(0, len(batches), options.accumulation)]
    return steps if options.steps is None else steps[: options.steps]


class Tuning:
    """A run in progress: a frozen model, the `parameters` that learn, AdamW's `moments`, the `losses` so far."""

    def __init__(self, model: Forward, examples: Sequence[Example], options: Options):
        self.model, self.examples, self.options = model, examples, options
        self.plan = order(len(examples), options)
        _expect_fit(model, examples, options)
        self.parameters = options.lora.begin(model.weights, options.seed) if options.lora else _masters(model)
        self.moments, self.losses, self.norms = Moments(), [], []  # type: ignore[var-annotated]

    @property
    def weights(self) -> Mapping[str, Any]:
        """The model's weights after the steps so far."""
        return trained(self.model, self.parameters, self.options.lora)

    def step(self, executor: Pool | None = None) -> float:
        """Takes the next step; returns the loss before it. Raises InputError if it or a gradient is NaN or infinite."""
        batches = self.plan[len(self.losses)]
        loss, total = 0.0, {}  # type: float, dict[str, np.ndarray]
        pieces = []
        for batch in batches:
            pieces += self._pieces([self.examples[i] for i in batch], len(batches))
        for found in sweep(piece_gradients, pieces, None, executor):
            loss += float(found["loss"])
            for name in self.parameters:
                total[name] = total[name] + found[name] if name in total else found[name]
        scale, norm = self.options.optimizer.clip(total)
        if not np.isfinite(norm):
            bad = next(name for name, g in total.items() if not np.isfinite(g).all())
            raise InputError(f"the gradient of {bad} has a NaN or infinity at step {len(self.losses)}; lower the rate")
        self.options.optimizer.step(self.parameters, total, self.moments, scale)
        self.losses.append(loss)
        self.norms.append(norm)
        return loss

    def _pieces(self, rows: list[Example], batches: int) -> list[tuple]:
        """A batch cut into pieces of rows that are padded to one length, with the counts that its means are over."""
        counts = (sum(int((row.labels[1:] != IGNORE).sum()) for row in rows), sum(len(row.ids) - 1 for row in rows))
        if not counts[0]:
            raise InputError(f"no label counts in the batch of step {len(self.losses)}; leave out such conversations")
        counts = counts[0] * batches, counts[1] * batches
        weight = self.options.z_loss_weight
        weight = self.model.config.z_loss_weight if weight is None else weight
        cut: list[list[Example]] = [[]]
        for row in rows:
            longest = max(len(other.ids) for other in [*cut[-1], row])
            if cut[-1] and longest * (len(cut[-1]) + 1) > PIECE_TOKENS:
                cut.append([])
            cut[-1].append(row)
        pieces = []
        for part in cut:
            ids, labels, real = _padded(part)
            objective = NextToken(labels, weight, real, counts)
            pieces.append((self.model, self.parameters, self.options.lora, ids, objective, self.options.recompute))
        return pieces

    # --- on disk ---

    def save_state(self, folder: Path, identity: str) -> None:
        """Writes what the next step depends on, whole or not at all."""
        tensors = {f"parameter/{name}": x for name, x in self.parameters.items()}
        tensors |= {f"mean/{name}": x for name, x in self.moments.mean.items()}
        tensors |= {f"square/{name}": x for name, x in self.moments.square.items()}
        about = {"identity": identity, "losses": self.losses, "norms": self.norms}
        write_safetensors(folder / "state.safetensors", tensors, {"about": json.dumps(about)})

    def load_state(self, folder: Path, identity: str) -> None:
        """Takes up what `save_state` wrote. Raises InputError for another run's."""
        from safetensors import SafetensorError, safe_open

        path = folder / "state.safetensors"
        try:
            with safe_open(path, framework="numpy") as file:
                about = json.loads((file.metadata() or {}).get("about", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}; delete {folder} to begin anew") from None
        if about.get("identity") != identity:
            raise InputError(f"{folder} holds another run (data, model or options differ); choose another --out")
        self.losses, self.norms = about["losses"], about["norms"]
        of = {kind: {n.removeprefix(kind): x for n, x in tensors.items() if n.startswith(kind)}
              for kind in ("parameter/", "mean/", "square/")}  # fmt: skip
        self.parameters = of["parameter/"]
        self.moments = Moments(len(self.losses), of["mean/"], of["square/"])


def finetune(
    model: Forward,
    examples: Sequence[Example],
    out: str | Path,
    options: Options | None = None,
    executor: Pool | None = None,
    save_seconds: float = SAVE_SECONDS,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Tuning:
    """Fine-tunes a model on examples into the new folder `out`; takes up what an interrupted call has left.

    Raises InputError for options that do not fit, an `out` that exists, a full disk, and a loss that is not finite.
    """
    out, options = Path(os.path.realpath(out)), options or Options()
    if out.exists():
        raise InputError(f"{out} is there already; choose another place or delete it")
    if model.folder is None:
        raise InputError("the model comes from no folder, so there is no config.json to save with it")
    tuning, work = Tuning(model, examples, options), out.with_name(out.name + ".part")
    identity = _identity(model, examples, options)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {work}: {error.strerror}; choose another place") from None
    if (work / "state.safetensors").exists():
        tuning.load_state(work, identity)
    saved = time.monotonic()
    with tqdm(total=len(tuning.plan), initial=len(tuning.losses), unit="step", disable=None) as bar:
        try:
            while len(tuning.losses) < len(tuning.plan):
                loss = tuning.step(executor)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                on_step(len(tuning.losses), loss)
                if time.monotonic() - saved >= save_seconds:
                    tuning.save_state(work, identity)
                    saved = time.monotonic()
        except (KeyboardInterrupt, SystemExit):
            tuning.save_state(work, identity)
            raise
    _finish(tuning, out)
    shutil.rmtree(work, ignore_errors=True)
    return tuning


def piece_gradients(
    model: Forward, parameters: Mapping[str, np.ndarray], lora: Lora | None, ids: np.ndarray, objective: NextToken,
    recompute: bool,
) -> Result:  # fmt: skip
    """The share of some rows in a batch's loss, and in its gradients by the parameters."""
    keep_freed_memory()
    weights = trained(model, parameters, lora)
    wanted = parameters.keys().__contains__
    loss, found = backward(model, ids, objective, wanted, "float32", objective.real, recompute, weights=weights)
    return {"loss": np.array(loss), **{name: found.get(name, np.zeros_like(x)) for name, x in parameters.items()}}


def trained(model: Forward, parameters: Mapping[str, np.ndarray], lora: Lora | None) -> Weights:
    """A model's weights with what has been learned: in their place, or as a correction."""
    if lora is not None:
        return model.weights.replace(lora.over(model.weights, parameters))
    entries: dict[str, Any] = {name: Weight(x) for name, x in parameters.items()}
    head = "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    kind = NormHead if isinstance(model.weights["lm_head.weight"], NormHead) else Weight
    return model.weights.replace({**entries, "lm_head.weight": kind(parameters[head])})


def memory(model: Forward, options: Options) -> int:
    """Bytes that a run needs for what learns: parameters, their gradients twice, and AdamW's two moments."""
    learning = (
        sum(x.size for x in options.lora.begin(model.weights, 0).values()) if options.lora
        else sum(int(np.prod(weight.shape)) for weight in model.weights.values())
    )  # fmt: skip
    return 5 * 4 * learning


def _masters(model: Forward) -> dict[str, np.ndarray]:
    """A float32 copy of each parameter, as stored. Raises InputError where one is in blocks."""
    if blocks := [name for name, weight in model.weights.items() if not isinstance(weight, Weight)]:
        raise InputError(f"{at_most(blocks, 2)}: weights in 4-bit blocks cannot learn; train adapters, with lora")
    tied = model.config.tie_word_embeddings
    return {
        name: weight.array.astype(np.float32) for name, weight in model.weights.items()
        if not (tied and name == "lm_head.weight")
    }  # fmt: skip


def _padded(rows: list[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, labels and mask (B, T) of rows that are padded on the right, which the mask hides."""
    length = max(len(row.ids) for row in rows)
    ids, labels = np.zeros((len(rows), length), np.int64), np.full((len(rows), length), IGNORE)
    real = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], labels[i, : len(row.ids)], real[i, : len(row.ids)] = row.ids, row.labels, 1
    return ids, labels, real


def _expect_fit(model: Forward, examples: Sequence[Example], options: Options) -> None:
    if not examples:
        raise InputError("there is no example; expected at least one conversation")
    longest = max(len(example.ids) for example in examples)
    if longest > model.config.max_position_embeddings:
        most = model.config.max_position_embeddings
        raise InputError(f"an example has {longest} tokens, more than the context of {most}; use a smaller max_length")
    needed, there = memory(model, options), _physical_memory()
    if needed > there:
        raise InputError(
            f"what learns needs {needed / 1e9:.0f} GB of memory, and this machine has {there / 1e9:.0f}; "
            "train adapters of low rank (lora)"
        )


def _physical_memory() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return float("inf")


def _identity(model: Forward, examples: Sequence[Example], options: Options) -> str:
    """A digest of what decides the outcome; it reads the bytes of a model that was put together in memory."""
    loaded = getattr(model, "made", None) is not None
    digest = hashlib.sha256(repr((asdict(options), model.identity if loaded else None)).encode())  # type: ignore[attr-defined]
    for name, weight in ({} if loaded else model.weights).items():
        digest.update(name.encode() + getattr(weight, "array", np.empty(0)).tobytes())
    for example in examples:
        digest.update(example.ids.astype("<i8").tobytes() + example.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _finish(tuning: Tuning, out: Path) -> None:
    """Writes the result into its folder."""
    model, options = tuning.model, tuning.options
    assert model.folder is not None
    report = {"losses": tuning.losses, "gradient_norms": tuning.norms, "options": asdict(options)}
    with _full_disk_as_input_error(out), whole_folder(out) as partial:
        if options.lora:
            options.lora.save(partial, tuning.parameters, str(model.folder))
        else:
            rounded = {
                name: type(weight)(weight.array.astype(model.weights[name].array.dtype))
                for name, weight in tuning.weights.items() if isinstance(weight, Weight)
            }  # fmt: skip
            partial.rmdir()  # `save` makes it
            save(Checkpoint(model.folder, model.config, model.weights.replace(rounded)), partial)
        write_whole(partial / "losses.json", json.dumps(report, indent=1) + "\n")
        write_whole(partial / "loss.svg", curve(tuning.losses))


@contextmanager
def _full_disk_as_input_error(out: Path) -> Iterator[None]:
    """Turns the exception that safetensors has for a full disk into an InputError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise InputError(f"cannot write {out}: {error}; free some space, and the run goes on") from None
