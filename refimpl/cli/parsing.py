"""From words to a verb and its options: the parser, the help by groups, and the nearest word to a mistyped one."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any, NoReturn

from refimpl.cli.verbs import FAMILIES, Verb, all_verbs
from refimpl.errors import one_line

ABOUT = (
    "The numerical oracle for Baichuan2: what every tensor should be, what 4 bits do to it, what a device did to it."
)
ENDING = """refimpl VERB --help shows the options of a verb and an example.
Exit codes: 0 done or agrees, 1 differs, 2 bad input, 130 or 143 interrupted."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error in one line.

    With `intermixed`, options may stand between arguments: `verify DIR --max-lsb 3 OUTPUTS`.
    """

    def __init__(self, intermixed: bool = False, **keywords: Any):
        super().__init__(**keywords)
        self.intermixed = intermixed

    def error(self, message: str, verb: Sequence[str] = ()) -> NoReturn:
        see = f"{' '.join((self.prog, *verb))} --help"
        self.exit(2, f"refimpl: {one_line(message)}{' See' if message[-1:] == '?' else '; see'} {see}\n")

    def parse_known_args(self, args=None, namespace=None):
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # argparse calls back here while it parses
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True


class CommandLine(Parser):
    """The parser of all verbs. `options`: the words of a verb -> its flags."""

    def __init__(self, verbs: Sequence[Verb], **keywords: Any):
        super().__init__(**keywords)
        self.verbs = verbs
        self.options: dict[tuple[str, ...], list[str]] = {}

    def format_help(self) -> str:
        return overview(self.verbs)

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        self.expect_known(words)
        return super().parse_args(words, namespace)

    def expect_known(self, words: Sequence[str]) -> None:
        """Ends with exit code 2 and the nearest name, if a verb or an option is mistyped."""
        at: tuple[str, ...] = ()
        while self._continues(at) and len(words) > len(at) and not words[len(at)].startswith("-"):
            longer = (*at, words[len(at)])
            known = {" ".join(verb[: len(longer)]) for verb in self.options if verb[: len(at)] == at}
            if " ".join(longer) not in known:
                self.error(f"there is no verb {' '.join(longer)!r}{did_you_mean(' '.join(longer), known)}")
            at = longer
        for word in words[len(at) :]:
            name = word.split("=")[0]
            if name == "--":
                break
            # argparse takes a word with a space for a value, and the beginning of an option for the option
            if at in self.options and name.startswith("--") and " " not in word:
                flags = self.options[at]
                if not any(flag.startswith(name) for flag in flags):
                    self.error(f"{' '.join(at)} has no option {name!r}{did_you_mean(name, flags)}", at)

    def _continues(self, at: tuple[str, ...]) -> bool:
        """Whether a longer verb begins with these words; `learn` is a verb, and so is `learn check`."""
        return any(verb[: len(at)] == at and len(verb) > len(at) for verb in self.options)


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The end of an error message: the known word that is nearest, if one is near."""
    near = difflib.get_close_matches(word, known, 1, 0.5) if len(word) < 100 else []
    return f"; did you mean {near[0]!r}?" if near else ""


def overview(verbs: Sequence[Verb]) -> str:
    """The help of the whole command: the verbs by groups, a line each."""
    width = max(len(" ".join(one.words)) for one in verbs)
    lines = ["usage: refimpl VERB ...", "", ABOUT]
    for group, members in groupby(verbs, key=lambda one: one.group):
        lines += ["", group]
        lines += [f"  {' '.join(one.words):{width}}  {one.help.splitlines()[0]}" for one in members]
    return "\n".join([*lines, "", ENDING, ""])


def command_line(version: str, completers: Mapping[str, Any] | None = None) -> CommandLine:
    """The parser of all verbs. `completers`: metavar -> what shtab completes such an argument with."""
    verbs = all_verbs()
    top = CommandLine(verbs, prog="refimpl")
    top.add_argument("--version", action="version", version=f"refimpl {version}", help="show the version")
    top.set_defaults(run=_helping(top))
    under: dict[tuple[str, ...], Any] = {(): top.add_subparsers(metavar="VERB", parser_class=Parser)}
    parsers: dict[tuple[str, ...], Any] = {}
    for one in verbs:
        *family, name = one.words
        parent = tuple(family)
        if parent not in under and parent in parsers:  # a verb that others begin with
            parsers[parent].intermixed = False  # argparse cannot mix options with further verbs
            under[parent] = parsers[parent].add_subparsers(metavar="VERB", parser_class=Parser)
        elif parent not in under:
            about = FAMILIES[parent[0]]
            middle = under[()].add_parser(parent[0], help=about, description=about)
            middle.set_defaults(run=_helping(middle))
            under[parent] = middle.add_subparsers(metavar="VERB", parser_class=Parser)
        parsers[tuple(one.words)] = _add(under[parent], name, one, completers or {})
        top.options[tuple(one.words)] = ["--help", *(flag for each in one.options for flag in each.flags)]
    return top


def _add(under: Any, name: str, one: Verb, completers: Mapping[str, Any]) -> Any:
    """Adds a verb to the words that may stand there; its parser."""
    sub = under.add_parser(name, intermixed=True, help=one.help, description=one.help,
                           epilog=f"example: {one.example}",
                           formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    sub.set_defaults(run=one.run)
    for each in one.options:
        action = sub.add_argument(*each.flags, **each.keywords)
        if each.keywords.get("metavar") in completers:
            action.complete = completers[each.keywords["metavar"]]
    return sub


def _helping(parser: argparse.ArgumentParser) -> Any:
    """A verb that shows the help of `parser`."""

    def run(arguments: argparse.Namespace) -> int:
        print(parser.format_help(), end="")
        return 0

    return run
