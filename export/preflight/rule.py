"""What a rule is: one thing that AI Hub, the NPU or Genie is known to refuse, and the function that finds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One known reason to be refused, named after what is wrong.

    `breaches` gets one graph and yields each breach: the name of a tensor, or "", and why. In of_all.py it gets all
    graphs, and yields the graph before these two. `wrong` is an example. `hub`: it is about float graphs for AI Hub,
    and does not hold for graphs that round by themselves, which Qualcomm's compiler takes.
    """

    id: str
    severity: str
    means: str
    wrong: str
    source: str
    remedy: str
    breaches: Callable[[Any], Iterator[Any]]
    hub: bool = False


def rule(
    id: str, severity: str, *, wrong: str, source: str, remedy: str, hub: bool = False
) -> Callable[[Callable], Rule]:
    """Makes a rule of a function, whose docstring is what the rule means. `severity`: "error" or "warning"."""

    def made(breaches: Callable[[Any], Iterator[Any]]) -> Rule:
        return Rule(id, severity, " ".join((breaches.__doc__ or "").split()), wrong, source, remedy, breaches, hub)

    return made


def rules_of(*families: ModuleType) -> tuple[Rule, ...]:
    """The rules of these modules, in the order in which they are written."""
    return tuple(one for family in families for one in vars(family).values() if isinstance(one, Rule))


def readable(name: str) -> str:
    """A name that a terminal may show."""
    return (name if name.isprintable() else ascii(name))[:200]
