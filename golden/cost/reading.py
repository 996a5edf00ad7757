"""How a text is read to judge a model by: from a file to token ids, and then a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from refimpl.errors import InputError
from refimpl.files import read_text
from refimpl.model import Model
from refimpl.sweep import Pool, Result, sweep


@dataclass(frozen=True)
class Reading:
    """How a text is run through a model, and by whom.

    - `window`: tokens at a time; None leaves it to the function that reads
    - `dtype`: the number format that the model computes in
    - `executor`: who computes the windows; None computes them here (`refimpl.sweep`)
    - `resume`: a folder that keeps finished windows, so that an interrupted run goes on from there
    """

    window: int | None = None
    dtype: str = "float32"
    executor: Pool | None = None
    resume: str | Path | None = None

    def window_or(self, usual: int) -> int:
        """Tokens at a time: `usual`, unless something else was asked for."""
        return usual if self.window is None else self.window

    def each(self, function: Callable[..., Result], pieces: Sequence[tuple], what: str) -> Iterator[Result]:
        """`function(*piece)` for each piece, in order; `what` stands beside the progress bar."""
        return sweep(function, pieces, what, self.executor, self.resume)


AS_USUAL = Reading()


def read_documents(path: Path, model: Model, tokens: int | None = None) -> list[int]:
    """The token ids of a text file whose documents are separated by blank lines; an end-of-sequence id follows each.

    Baichuan's training data are laid out this way, and the embedded model's are, too. `tokens`: read no more than so
    many. Raises InputError for a file that cannot be read or holds no text.
    """
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens is {tokens}, expected how many to read, from 1")
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path} holds no text")
    ids: list[int] = []
    for document in text.strip().split("\n\n"):
        ids += [*model.tokenizer.encode(document.strip("\n") + "\n"), model.tokenizer.eos_token_id]
    return ids[:tokens]
