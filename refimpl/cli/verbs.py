"""How a verb is written: a function, with its example and its options above it.

    @verb("refimpl info weights/Baichuan2-7B-Chat", MODEL, JSON)
    def info(arguments) -> int:
        '''Show what a checkpoint is, and what is wrong with it.'''

The function's name is the verb, its docstring is the help, and what it returns is the exit code. `golden_make` is the
verb `golden make`. The file that it stands in decides its group in the help: see `GROUPS`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

# file of this folder -> the group of its verbs, in the order of the help
GROUPS = {
    "start": "start here",
    "checkpoints": "checkpoints",
    "truth": "truth",
    "quantization": "quantization",
    "devices": "graphs and devices",
    "phone": "graphs and devices",
    "hub": "graphs and devices",
    "training": "training",
    "serving": "serving",
    "learning": "learning",
}
# first word of a verb of two words -> the help of that word alone
FAMILIES = {
    "golden": "Make, check and show goldens, which are recorded from PyTorch.",
    "hub": "Compile and run an export on devices of Qualcomm AI Hub.",
}


@dataclass(frozen=True)
class Option:
    """One option or argument of a verb, in argparse's words."""

    flags: tuple[str, ...]
    keywords: dict[str, Any]


@dataclass(frozen=True)
class Verb:
    """What the command line knows about a verb."""

    run: Callable[[argparse.Namespace], int]
    example: str
    options: list[Option]

    @property
    def words(self) -> list[str]:
        """Its name as it is typed: `["golden", "make"]`."""
        return self.run.__name__.split("_")

    @property
    def help(self) -> str:
        return self.run.__doc__ or ""

    @property
    def group(self) -> str:
        return GROUPS[self.run.__module__.rpartition(".")[2]]


_REGISTERED: list[Verb] = []


def verb(example: str, *options: Option | list[Option]) -> Callable:
    """Makes a function a verb."""
    flat = [one for some in options for one in (some if isinstance(some, list) else [some])]

    def register(run: Callable[[argparse.Namespace], int]) -> Callable:
        _REGISTERED.append(Verb(run, example, flat))
        return run

    return register


def option(*flags: str, **keywords: Any) -> Option:
    """An option of a verb; it takes what argparse's `add_argument` takes."""
    return Option(flags, keywords)


def all_verbs() -> list[Verb]:
    """Every verb, in the order of the help."""
    for file in GROUPS:
        import_module(f"{__package__}.{file}")
    order = list(GROUPS)
    return sorted(_REGISTERED, key=lambda one: order.index(one.run.__module__.rpartition(".")[2]))
