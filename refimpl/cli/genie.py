"""The steps of `refimpl genie` by which a model becomes a bundle that Genie runs here.

calibrate -> export, codes at the border -> compile, a binary for each graph -> bundle
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export import emit
from export.files.encodings import read_encodings, write_encodings
from export.phone.bundle import bundle, expect_no_alibi
from export.phone.compiler import compile_graphs
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
