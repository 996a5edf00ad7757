"""Learning: the textbook, its exercises and its quiz."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from refimpl.cli.verbs import option, verb
from refimpl.errors import InputError

LANGUAGE = option("--language", choices=("en", "zh"), default="en", help="of what is said (default: en)")


@verb(
    "refimpl learn --out book",
    option("--out", default="book", metavar="DIR", help="where to write it (default: book)"),
    option("--no-open", action="store_true", help="only write it; do not open it in a browser"),
)  # fmt: skip
def learn(arguments) -> int:
    """Write the textbook, in English and Chinese, and open it (extra: learn)."""
    from refimpl.learn.book import write

    page = write(Path(arguments.out), lambda name: print(name, flush=True))
    print(f"the book is {page}")
    if not arguments.no_open:
        webbrowser.open(page.resolve().as_uri())
    return 0


@verb(
    "refimpl learn start rope",
    option("exercise", metavar="NAME", help="of refimpl learn list"),
    option("--out", metavar="FILE", help="where to write it (default: NAME.py)"),
    LANGUAGE,
)
def learn_start(arguments) -> int:
    """Write the file of an exercise, with one function to fill in."""
    from refimpl.files import write_whole
    from refimpl.learn.exercise import find

    exercise = find(arguments.exercise)
    path = Path(arguments.out or f"{exercise.name}.py")
    if path.exists():
        raise InputError(f"{path} is there already; remove it, or name another with --out")
    write_whole(path, exercise.file(arguments.language))
    print(f"{path}: fill in {exercise.function}, then: refimpl learn check {path}")
    return 0


@verb(
    "refimpl learn check rope.py",
    option("file", metavar="FILE", help="what refimpl learn start wrote, filled in"),
    option("--hint", action="count", default=0, help="show a hint; twice for both"),
    option("--solution", action="store_true", help="show the solution"),
    LANGUAGE,
)
def learn_check(arguments) -> int:
    """Run an exercise's function inside real models, and name the first tensor that it gets wrong."""
    from refimpl.learn.say import verdict
    from refimpl.learn.worker import check

    exercise, grade, printed = check(arguments.file)
    print(verdict(exercise, grade, printed, arguments.language, arguments.hint, arguments.solution))
    return 0 if grade.right else 1


@verb(
    "refimpl learn quiz 03_rmsnorm",
    option("chapter", nargs="?", metavar="CHAPTER", help="its number or name (default: all)"),
    LANGUAGE,
)
def learn_quiz(arguments) -> int:
    """Answer the book's questions; each answer says why."""
    from refimpl.errors import near
    from refimpl.learn.quiz import FOLDER, ask

    folders = sorted(path.parent for path in FOLDER.glob("*/en.md"))
    if arguments.chapter is not None:
        wanted = [
            one for one in folders if arguments.chapter in (one.name, one.name.partition("_")[0].lstrip("0") or "0")
        ]
        if not wanted:
            names = {one.name for one in folders}
            raise InputError(f"there is no chapter {arguments.chapter!r:.60}{near(arguments.chapter, names)}")
        folders = wanted
    right, asked = ask(folders, arguments.language)
    print(f"\n{right} of {asked} right")
    return 0


@verb("refimpl learn list", LANGUAGE)
def learn_list(arguments) -> int:
    """List the exercises."""
    from refimpl.learn.exercise import find, names

    for name in names():
        print(f"{name:24} {getattr(find(name).title, arguments.language)}")
    return 0
