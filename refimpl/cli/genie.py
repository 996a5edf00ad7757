"""The steps of `refimpl genie`: a model becomes a bundle, Genie answers, and the answer is compared with the right one.

calibrate -> export, codes at the border -> compile, a binary for each graph -> bundle -> Genie -> judge
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export import emit
from export.files.encodings import read_encodings, write_encodings
from export.phone.accuracy import by_graphs, by_model, perplexity
from export.phone.bundle import bundle, expect_no_alibi
from export.phone.compiler import compile_graphs
from export.phone.fed import Fed, Parting, judge_calls, parting
from export.phone.host import Host
from export.run.engines import Engine
from export.run.genie import Genie
from export.run.htp import Htp
from golden.cost.reading import read_documents
from refimpl.errors import InputError
from refimpl.files import read_json
from refimpl.grids.calibrate import calibrate
from refimpl.model import EMBEDDED, Model

CALIBRATION = 512  # tokens of a text, if there are so many
SETTINGS = "genie.json"  # in the folder of `--out`: what its steps were made with


@dataclass(frozen=True)
class Sizes:
    """What the graphs are made for: tokens of a prompt at a time, tokens of the context, parts, SoC."""

    tokens: int
    context: int
    parts: int
    soc: str


def build(model: Model, folder: Path, sizes: Sizes, text: Path | None) -> tuple[Path, Path]:
    """The export and the bundle of a model, in `folder`. Steps that were done there with the same settings are kept.

    Raises InputError for a folder that was made with other settings, and whatever each step raises.
    """
    expect_no_alibi(model.config)
    if text is None and model.folder != EMBEDDED:
        raise InputError("there is no text to calibrate the model on; give one with --text FILE")
    settings = {**vars(sizes), "model": str(model.folder), "text": str(text or "")}
    kept = folder / SETTINGS
    if folder.exists() and any(folder.iterdir()) and (not kept.exists() or read_json(kept) != settings):
        raise InputError(f"{folder} holds something else, or was made with other settings; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    encodings, export, binaries, out = (folder / name for name in ("encodings.json", "export", "bin", "bundle"))
    steps: list[tuple[str, Path, Callable[[], Any]]] = [
        ("calibrate", encodings, lambda: _calibrate(model, encodings, text, sizes)),
        ("export", export, lambda: _export(model, encodings, export, sizes)),
        ("compile", out, lambda: compile_graphs(export, binaries, sizes.soc, shared=False)),
        ("bundle", out, lambda: bundle(model.folder or EMBEDDED, export, out, soc=sizes.soc, compiled=binaries)),
    ]
    with tqdm(steps, unit="step", disable=None, leave=False) as progress:
        for name, result, step in progress:
            progress.set_description(name)
            if not result.exists():
                step()
    return export, out


def _calibrate(model: Model, path: Path, text: Path | None, sizes: Sizes) -> None:
    ids = read_documents(text or EMBEDDED / "held_out.txt", model, CALIBRATION)
    window = min(sizes.context, len(ids))
    write_encodings(calibrate(model, np.asarray(ids), window=window), path)


def _export(model: Model, encodings: Path, folder: Path, sizes: Sizes) -> None:
    known = read_encodings(encodings, model)
    parts = emit(model, (sizes.tokens, 1), sizes.context, sizes.parts, "qdq", encodings=known, border="codes")
    parts.save(folder, golden=False)


def chat_prompt(model: Model, message: str) -> str:
    """A user's message in the model's own layout: a text that encodes to the ids of `tokenizer.chat`.

    Raises InputError for a model without roles.
    """
    ids = model.tokenizer.chat([{"role": "user", "content": message}], 0)
    text = model.tokenizer.decode(ids)
    if list(model.tokenizer.encode(text)) != list(ids):
        raise InputError(f"{model.config.family} marks roles with ids that no text becomes; ask without --chat")
    return text


@dataclass
class Told:
    """Genie's answer, and those of the graphs and the oracle."""

    version: str
    text: str
    tokens: tuple[int, ...]
    seconds: float
    same_ids: bool
    fed: Fed | None = None
    partings: dict[str, Parting | None] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    perplexities: dict[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether all is explained: inputs, ids, and each token by which Genie parts from the others."""
        apart = [one for one in self.partings.values() if one is not None and not one.near_tie]
        return self.same_ids and not apart and (self.fed is None or bool(self.fed))

    def __str__(self) -> str:
        rate = self.seconds / max(1, len(self.tokens))
        lines = ["", f"Genie {self.version}: {len(self.tokens)} tokens, {rate:.2f} s each"]
        lines += [] if self.same_ids else ["Genie's tokenizer gives other ids for the prompt; see bundle --check"]
        lines += [] if self.fed is None else [str(self.fed)]
        for who, one in self.partings.items():
            said = f"the same {len(self.tokens)} tokens" if one is None else str(one)
            lines.append(f"{who}: {said}" + ("" if one is None else f": {self.texts[who]!r}"))
        if not self.partings:
            lines += [f"{who}: {text!r}" for who, text in self.texts.items()]
        if self.perplexities:
            said = ", ".join(f"{who} {value:.5g}" for who, value in self.perplexities.items())
            lines.append(f"perplexity by GenieAccuracy's protocol: {said}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The same, for a machine."""
        found = {
            "genie": self.version, "text": self.text, "tokens": self.tokens, "seconds": self.seconds,
            "same_ids": self.same_ids, "agrees": bool(self),
            "fed": self.fed and {"lines": self.fed.lines, "inputs": self.fed.inputs, "outputs": self.fed.outputs,
                                 "calls": self.fed.calls},
            "partings": {
                who: one and {**vars(one), "near_tie": bool(one.near_tie)} for who, one in self.partings.items()
            },
            "texts": self.texts, "perplexity": self.perplexities,
        }  # fmt: skip
        return json.dumps(found, ensure_ascii=False)


def ask(
    model: Model,
    bundled: Path,
    export: Path | None,
    prompt: str,
    limit: int,
    say: Callable[[str], Any],
    soc: str = "8-elite",
    judged: bool = True,
    text: Path | None = None,
) -> Told:
    """Asks Genie over a bundle, hands on each piece of its answer, and holds it against the oracle.

    `export`: the graphs of the bundle's binaries; with them, every input that Genie feeds is judged, and the chained
    graphs answer, too. `judged`: whether every output is judged as well. `text`: a file whose perplexity is computed.
    """
    ids = model.tokenizer.encode(prompt)
    host = None if export is None else Host(model, export)
    with Genie(bundled, capture=export is not None) as genie:
        same_ids, started, pieces = genie.encode([prompt])[0] == list(ids), time.perf_counter(), []
        for piece in genie.say(prompt, limit):
            pieces.append(piece)
            say(piece)
        told = Told(genie.version, "".join(pieces), (), time.perf_counter() - started, same_ids)
        if host is None or export is None:
            told.tokens = tuple(model.tokenizer.encode(told.text))
        else:
            with Htp(soc) as htp:
                told.fed = judge_calls(host, genie.calls(), ids, htp if judged else None)
            told.tokens = told.fed.tokens[:limit]
            _compare(told, model, export, ids)
        if text is not None:
            genie.reset()
            told.perplexities = _perplexities(genie, model, export, text)
    if host is None:
        expected = _greedy(model, ids, len(told.tokens))
        told.texts["oracle"] = model.tokenizer.decode(expected)
    return told


def _compare(told: Told, model: Model, export: Path, ids: Sequence[int]) -> None:
    """What the chained graphs and the oracle answer, and where Genie parts from them."""
    assert told.fed
    limit = len(told.tokens)
    steps = list(Host(model, export).generate(ids, limit, Engine()))
    told.texts["graphs"] = model.tokenizer.decode([token for token, _ in steps])
    noise = [_rms(a - b) for (_, a), b in zip(steps, told.fed.logits, strict=False)]
    told.partings["chained graphs"] = parting([t for t, _ in steps], [row for _, row in steps], told.tokens, noise)
    told.texts["chained graphs"] = told.texts.pop("graphs")

    tokens = _greedy(model, ids, limit)
    told.texts["oracle"] = model.tokenizer.decode(tokens)
    index = next((i for i, (a, b) in enumerate(zip(tokens, told.tokens, strict=False)) if a != b), None)
    if index is None:
        told.partings["oracle"] = None
        return
    prefix = np.array([[*ids, *tokens[:index]]])
    exact = np.asarray(model(prefix))[0, -1]
    encodings = read_encodings(export / "encodings.json", model)
    simulated = np.asarray(model.simulate(encodings, rounding="even")(prefix))[0, -1]
    rows = [exact] * (index + 1)
    told.partings["oracle"] = parting(tokens, rows, told.tokens, [_rms(simulated - exact)] * (index + 1))


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
    """The perplexity of Genie, and by its protocol those of the chained graphs and the oracle."""
    content = path.read_text(encoding="utf-8")
    ids = model.tokenizer.encode(content)
    context = genie.config["dialog"]["context"]["size"]
    host = None if export is None else Host(model, export)
    tokens = max(host.graphs) if host else 128
    found = {"oracle": perplexity(by_model(model), ids, context, tokens)}
    if host:
        found["chained graphs"] = perplexity(by_graphs(host, Engine()), ids, context, tokens)
    return {"Genie": genie.perplexity(content), **found}


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
