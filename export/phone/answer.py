"""`ask`: Genie answers over a bundle, and its answer is held against those of the same graphs and of the oracle.

    answer = ask(model, Bundled("genie", "build/x"), Question("白日依山尽，", limit=24), say=print)

Two answers may part where two tokens are nearly as likely. So a parting is judged by the noise of the arithmetic: that
of the emulation, against the same graphs on ONNX Runtime; that of quantization, against the oracle.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.files.encodings import read_encodings
from export.phone.accuracy import by_graphs, by_model, perplexity
from export.phone.check import Fault, expect_runs
from export.phone.fed import Fed, judge_calls
from export.phone.host import Host
from export.phone.parting import Parting, parting
from export.run.engines import Engine
from export.run.genie import Genie
from export.run.htp import Htp
from refimpl.files import read_text
from refimpl.model import Model


@dataclass(frozen=True)
class Bundled:
    """A bundle's folder, and the export that its binaries come from, if that is at hand: then inputs can be judged."""

    folder: Path
    export: Path | None = None


@dataclass(frozen=True)
class Question:
    """What Genie is asked, and how closely its answer is looked at.

    `limit`: tokens of the answer, at most. `scored`: a UTF-8 text whose perplexity is computed as well. `outputs`:
    whether each output is judged, which takes as long as the answer. `soc`: the NPU that judges them.
    """

    prompt: str
    limit: int
    scored: Path | None = None
    outputs: bool = True
    soc: str = "8-elite"


@dataclass(frozen=True)
class Answer:
    """What Genie said, and what the chained graphs and the oracle say; true if all of it is explained.

    `texts`: who -> their answer. `partings`: who -> where Genie's answer leaves theirs, None if nowhere. `faults`: what
    is wrong with the bundle, and yet accepted by Genie.
    """

    version: str
    text: str
    tokens: tuple[int, ...]
    seconds: float
    same_ids: bool
    fed: Fed | None
    partings: dict[str, Parting | None]
    texts: dict[str, str]
    perplexities: dict[str, float] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()

    def __bool__(self) -> bool:
        apart = [one for one in self.partings.values() if one is not None and not one.near_tie]
        return self.same_ids and not apart and not self.faults and (self.fed is None or bool(self.fed))

    def __str__(self) -> str:
        rate = self.seconds / max(1, len(self.tokens))
        lines = ["", f"Genie {self.version}: {len(self.tokens)} tokens, {rate:.2f} s each"]
        lines += [f"the bundle has a fault that Genie accepts: {fault}" for fault in self.faults]
        lines += [] if self.same_ids else ["Genie's tokenizer gives other ids for the prompt; see bundle --check"]
        lines += [] if self.fed is None else [str(self.fed)]
        for who, one in self.partings.items():
            said = f"the same {len(self.tokens)} tokens" if one is None else f"{one}: {self.texts[who]!r}"
            lines.append(f"{who}: {said}")
        lines += [f"{who}: {text!r}" for who, text in self.texts.items() if who not in self.partings]
        if self.perplexities:
            said = ", ".join(f"{who} {value:.5g}" for who, value in self.perplexities.items())
            lines.append(f"perplexity by GenieAccuracy's protocol: {said}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The same, for a machine."""
        fed = self.fed and {"lines": self.fed.lines, "inputs": self.fed.inputs, "outputs": self.fed.outputs,
                            "calls": self.fed.calls}  # fmt: skip
        partings = {who: one and {**vars(one), "near_tie": bool(one.near_tie)} for who, one in self.partings.items()}
        found = {
            "genie": self.version, "text": self.text, "tokens": self.tokens, "seconds": self.seconds,
            "same_ids": self.same_ids, "agrees": bool(self), "fed": fed, "partings": partings, "texts": self.texts,
            "perplexity": self.perplexities, "faults": [vars(fault) for fault in self.faults],
        }  # fmt: skip
        return json.dumps(found, ensure_ascii=False)


def ask(model: Model, bundled: Bundled, question: Question, say: Callable[[str], Any]) -> Answer:
    """Asks Genie over a bundle, hands each piece of its answer to `say`, and holds it against the oracle.

    Raises InputError for a bundle with which Genie cannot run, and with its own words if it fails.
    """
    faults = expect_runs(bundled.folder)
    ids = model.tokenizer.encode(question.prompt)
    host = None if bundled.export is None else Host(model, bundled.export)
    with Genie(bundled.folder, capture=host is not None) as genie:
        same_ids, started, pieces = genie.encode([question.prompt])[0] == list(ids), time.perf_counter(), []
        for piece in genie.say(question.prompt, question.limit):
            pieces.append(piece)
            say(piece)
        seconds, text, fed = time.perf_counter() - started, "".join(pieces), None
        if host is None or bundled.export is None:
            tokens, partings = tuple(model.tokenizer.encode(text)), dict[str, Parting | None]()
            texts = {"oracle": model.tokenizer.decode(_greedy(model, ids, len(tokens)))}
        else:
            with Htp(question.soc) as htp:
                fed = judge_calls(host, genie.calls(), ids, htp if question.outputs else None)
            tokens = fed.tokens[: question.limit]
            texts, partings = _compared(model, bundled.export, ids, tokens, fed.logits)
        perplexities = {}
        if question.scored:
            genie.reset()
            perplexities = _perplexities(genie, model, bundled.export, question.scored)
    return Answer(genie.version, text, tokens, seconds, same_ids, fed, partings, texts, perplexities, faults)


def _compared(
    model: Model, export: Path, ids: Sequence[int], answer: Sequence[int], got: Sequence[np.ndarray]
) -> tuple[dict[str, str], dict[str, Parting | None]]:
    """What the chained graphs and the oracle answer, and where Genie's answer, with the logits `got`, leaves theirs."""
    steps = list(Host(model, export).generate(ids, len(answer), Engine()))
    by_them, rows = [token for token, _ in steps], [row for _, row in steps]
    noise = [_rms(a - b) for a, b in zip(rows, got, strict=False)]
    exact = _greedy(model, ids, len(answer))
    texts = {"chained graphs": model.tokenizer.decode(by_them), "oracle": model.tokenizer.decode(exact)}
    partings = {"chained graphs": parting(by_them, rows, answer, noise), "oracle": None}
    if (index := next((i for i, (a, b) in enumerate(zip(exact, answer, strict=False)) if a != b), None)) is not None:
        prefix = np.array([[*ids, *exact[:index]]])
        right = np.asarray(model(prefix))[0, -1]
        simulation = model.simulate(read_encodings(export / "encodings.json", model), rounding="even")
        off = _rms(np.asarray(simulation(prefix))[0, -1] - right)
        partings["oracle"] = parting(exact, [right] * (index + 1), answer, [off] * (index + 1))
    return texts, partings


def _greedy(model: Model, ids: Sequence[int], limit: int) -> list[int]:
    """The oracle's likeliest tokens, without the penalties that a generation config may have."""
    found: list[int] = []
    cache = model.new_cache()
    logits = np.asarray(model(np.array([list(ids)]), cache=cache))[0, -1]
    for _ in range(limit):
        found.append(int(logits.argmax()))
        logits = np.asarray(model(np.array([[found[-1]]]), cache=cache))[0, -1]
    return found


def _perplexities(genie: Genie, model: Model, export: Path | None, path: Path) -> dict[str, float]:
    """The perplexity of a text by Genie, and by its protocol those of the chained graphs and the oracle."""
    content = read_text(path)
    ids = model.tokenizer.encode(content)
    context = genie.config["dialog"]["context"]["size"]
    host = None if export is None else Host(model, export)
    tokens = max(host.graphs) if host else 128
    found = {"oracle": perplexity(by_model(model), ids, context, tokens)}  # first, because it refuses a short text
    if host:
        found["chained graphs"] = perplexity(by_graphs(host, Engine()), ids, context, tokens)
    return {"Genie": genie.perplexity(content), **found}


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
