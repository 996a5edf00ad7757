"""Options that several verbs share, and what the words given for them stand for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.cli.verbs import option
from refimpl.errors import InputError
from refimpl.files import read_text

if TYPE_CHECKING:
    from export.preflight.check import Preflight
    from export.search.finding import Finding
    from export.verdict.verdict import Verdict
    from golden.compare import Report
    from golden.step_check import StepReport
    from refimpl.model import Model

MODEL = option("model", nargs="?", metavar="MODEL", help="folder of a checkpoint (default: the embedded model)")
JSON = option("--json", action="store_true", help="print JSON instead of text")
DTYPE = option("--dtype", default="float32", help="float64, float32 (default), bfloat16 or float16")
CACHE_DTYPE = option(
    "--cache-dtype", metavar="NAME", help="keep keys and values in float16, or in int8 (Q8_0); for float32 runs only"
)
PROMPT = [
    option("--prompt", "-p", default="", metavar="TEXT", help=r"a text; \n stands for a new line"),
    option("--ids", help="token ids instead of a text, such as 5,17,9"),
]
SAMPLING = [
    option("--max-new-tokens", type=int, metavar="N", help="stop after N new tokens"),
    option("--sample", action="store_true", help="draw tokens at random instead of taking the likeliest"),
    option("--seed", type=int, help="the same seed repeats the same draws"),
    option("--temperature", type=float, metavar="T", help="divide logits by T: below 1 is more certain"),
    option("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only"),
    option("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that have probability P together"),
    option(
        "--repetition-penalty", type=float, metavar="R", help="above 1: tokens that have occurred become less likely"
    ),
]
TEXT = [
    option("--text", required=True, metavar="FILE", help="UTF-8 text with blank lines between documents"),
    option("--tokens", type=int, metavar="N", help="read only the first N tokens (default: all)"),
    option("--window", type=int, default=512, metavar="N", help="tokens that are run at a time (default: 512)"),
]
SWEEP = [
    option("--jobs", type=int, default=1, metavar="N", help="share the work among N processes (default: 1)"),
    option("--dask", metavar="ADDRESS", help="compute on the Dask cluster at this address (extra: dask)"),
    option("--resume", metavar="DIR", help="keep finished pieces in DIR, and reuse those that are there"),
]


def load_model(arguments) -> Model:
    """The model that the argument MODEL names."""
    from refimpl.model import load

    return load(arguments.model)


def model_folder(arguments) -> Path:
    """The folder that the argument MODEL names: the embedded model's, if there is no such argument."""
    from refimpl.model import EMBEDDED

    return Path(arguments.model) if arguments.model else EMBEDDED


def text_ids(arguments, model: Model) -> list[int]:
    """The token ids of --text. The embedded model has a text of its own: poems that it was not trained on."""
    from golden.cost.reading import read_documents
    from refimpl.model import EMBEDDED

    if arguments.text is None and model.folder != EMBEDDED:
        raise InputError("there is no text to judge the model by; give one with --text FILE")
    return read_documents(Path(arguments.text or EMBEDDED / "held_out.txt"), model, arguments.tokens)


def listed_ids(given: str, tokens: int | None) -> list[int]:
    """The token ids of a list such as 5,17,9, or of a file that holds such a list; `tokens`: no more than so many."""
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens is {tokens}, expected how many to read, from 1")
    path = Path(given)
    if not path.is_file():
        return list(integers(given))[:tokens]
    return list(integers(",".join(read_text(path).replace(",", " ").split())))[:tokens]


def size_of_blocks(text: str) -> int | str:
    """A number of weights, or a word such as "channel" or "tensor", which each format accepts or refuses."""
    return int(text) if text.lstrip("-").isdecimal() else text


def integers(text: str) -> tuple[int, ...]:
    """The numbers of a list such as 128,1."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"{text!r} is not a list of whole numbers such as 128,1") from None


def prompt_ids(arguments, model: Model) -> list[int]:
    """The token ids of --ids, or of --prompt."""
    if arguments.ids:
        return list(integers(arguments.ids))
    if not arguments.prompt:
        raise InputError("the prompt is empty; give a text with --prompt, or token ids with --ids")
    return model.tokenizer.encode(typed_text(arguments.prompt))


def typed_text(argument: str) -> str:
    """A text from the command line, read as UTF-8 whatever the terminal's encoding is; `\\n` stands for a new line."""
    try:
        return os.fsencode(argument).decode("utf-8").replace("\\n", "\n")
    except UnicodeDecodeError:
        raise InputError("the text is not UTF-8; type it in a UTF-8 terminal, or give token ids") from None


def report(arguments, verdict: Report | Preflight | Verdict | Finding | StepReport) -> int:
    """Prints a verdict and returns its exit code, which stays the same if the reader of the output leaves early."""
    try:
        print(verdict.to_json() if arguments.json else verdict, flush=True)
    except BrokenPipeError:
        stop_printing()
    return 0 if verdict else 1


def stop_printing() -> None:
    """Discards what Python still flushes at exit, because nobody reads standard output any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
