"""How a verb is written: a function, with its example and its options above it.

    @verb("refimpl info weights/Baichuan2-7B-Chat", MODEL, JSON)
    def info(arguments) -> int:
        '''Say what a checkpoint is, and what is wrong with it.'''

Its name is the verb's, its docstring the help, what it returns the exit code. `golden_make` is the verb `golden make`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refimpl.errors import InputError

if TYPE_CHECKING:
    from export.preflight.check import Preflight
    from export.search.bisection import Finding
    from export.verdict.verdict import Verdict
    from golden.compare import Report
    from refimpl.model import Model

GROUPS = {
    "golden": "Make, check and show goldens from PyTorch.",
    "hub": "Compile and run an export on devices of AI Hub.",
}


@dataclass(frozen=True)
class Verb:
    """What the command line knows of a verb."""

    run: Callable[[argparse.Namespace], int]
    example: str
    options: list[Option]


@dataclass(frozen=True)
class Option:
    """One option, in argparse's words."""

    flags: tuple[str, ...]
    keywords: dict[str, Any]


VERBS: list[Verb] = []


def verb(example: str, *options: Option | list[Option]) -> Callable:
    """Makes a function a verb."""
    flat = [one for some in options for one in (some if isinstance(some, list) else [some])]

    def register(run: Callable[[argparse.Namespace], int]) -> Callable:
        VERBS.append(Verb(run, example, flat))
        return run

    return register


def option(*flags: str, **keywords: Any) -> Option:
    """An option of a verb: what argparse's `add_argument` takes."""
    return Option(flags, keywords)


MODEL = option("model", nargs="?", metavar="MODEL", help="a checkpoint (default: the embedded model)")
JSON = option("--json", action="store_true", help="print JSON instead of text")
DTYPE = option("--dtype", default="float32", help="float64, float32 (default), bfloat16 or float16")
CACHE_DTYPE = option(
    "--cache-dtype", metavar="NAME", help="round the keys and values of a float32 run: float16, or int8 (Q8_0)"
)
PROMPT = [
    option("--prompt", "-p", default="", help=r"a text; \n stands for a new line"),
    option("--ids", help="token ids instead, such as 5,17,9"),
]
SAMPLING = [
    option("--max-new-tokens", type=int, metavar="N"),
    option("--sample", action="store_true", help="draw tokens instead of taking the likeliest"),
    option("--seed", type=int, help="makes the draws repeatable"),
    option("--temperature", type=float),
    option("--top-k", type=int),
    option("--top-p", type=float),
    option("--repetition-penalty", type=float),
]
TEXT = [
    option("--text", required=True, metavar="FILE", help="UTF-8 text, blank lines between documents"),
    option("--tokens", type=int, metavar="N", help="read no more than so many (default: all)"),
    option("--window", type=int, default=512, metavar="N", help="tokens at a time (default: 512)"),
]
SWEEP = [
    option("--jobs", type=int, default=1, metavar="N", help="processes that share the work (default: 1)"),
    option("--dask", metavar="ADDRESS", help="compute on the Dask cluster at this address (extra: dask)"),
    option("--resume", metavar="DIR", help="keep finished pieces there, and take up those that it has"),
]


class VerbParser(argparse.ArgumentParser):
    """A verb's arguments, between which options may stand: `verify DIR --max-lsb 3 OUTPUTS`."""

    _mixed = False

    def parse_known_args(self, args=None, namespace=None):
        if self._mixed or self._subparsers:  # of a group, whose verbs are such parsers
            return super().parse_known_args(args, namespace)
        self._mixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixed = False


def parser(version: str) -> argparse.ArgumentParser:
    """The command line of all verbs."""
    top = argparse.ArgumentParser(prog="refimpl", description="The numerical oracle for Baichuan2.")
    top.add_argument("--version", action="version", version=f"refimpl {version}")
    under = {"": top.add_subparsers(metavar="VERB", required=True, parser_class=VerbParser)}
    for one in VERBS:
        group, _, name = one.run.__name__.rpartition("_")
        if group not in under:
            described = under[""].add_parser(group, help=GROUPS[group], description=GROUPS[group])
            under[group] = described.add_subparsers(metavar="VERB", required=True)
        sub = under[group].add_parser(name, help=one.run.__doc__, description=one.run.__doc__,
                                      epilog=f"example: {one.example}",
                                      formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        sub.set_defaults(run=one.run)
        for each in one.options:
            sub.add_argument(*each.flags, **each.keywords)
    return top


def load_model(arguments) -> Model:
    """The model that the option MODEL names."""
    from refimpl.model import load

    arguments.loaded = load(arguments.model)
    return arguments.loaded


def model_folder(arguments) -> Path:
    """Its folder: the embedded model's, if none is named."""
    from refimpl.model import EMBEDDED

    return Path(arguments.model) if arguments.model else EMBEDDED


def size_of_blocks(text: str) -> int | str:
    """A number of weights, or "channel" or "tensor" as formats have it; they refuse other words."""
    return int(text) if text.lstrip("-").isdecimal() else text


def integers(text: str) -> tuple[int, ...]:
    """The numbers of a list such as 128,1."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"{text!r} is not a list of whole numbers such as 128,1") from None


def prompt_ids(arguments, model: Model):
    """The prompt's token ids, from text (in which `\\n` stands for a new line) or from --ids."""
    if arguments.ids:
        return list(integers(arguments.ids))
    if not arguments.prompt:
        raise InputError("the prompt is empty; give a text, or token ids with --ids")
    return model.tokenizer.encode(typed_text(arguments.prompt))


def typed_text(argument: str) -> str:
    """A text from the command line, which is UTF-8 whatever the terminal is; `\\n` stands for a new line."""
    try:
        return os.fsencode(argument).decode("utf-8").replace("\\n", "\n")
    except UnicodeDecodeError:
        raise InputError("the text is not UTF-8; type it in a UTF-8 terminal, or give token ids") from None


def report(arguments, report: Report | Preflight | Verdict | Finding) -> int:
    """Prints the verdict; its exit code holds however much of the report is read."""
    try:
        print(report.to_json() if arguments.json else report, flush=True)
    except BrokenPipeError:
        stop_printing()
    return 0 if report else 1


def stop_printing() -> None:
    """Nobody reads on: what Python still flushes at its end goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
