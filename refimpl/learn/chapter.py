"""One chapter: Markdown in two languages, whose Python cells run once, and whose numbers are expressions.

A chapter is a folder with `en.md` and `zh.md` of the same structure. What a fenced block means is in README.md. The
cells of a chapter share one namespace; what it begins with is `namespace`. A Figure is anything with `.svg(language)`.
"""

from __future__ import annotations

import ast
import contextlib
import html
import importlib
import inspect
import io
import re
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from refimpl.errors import InputError
from refimpl.learn.check import PROMPT
from refimpl.learn.exercise import find
from refimpl.learn.quiz import FOLDER, read_question

LANGUAGES = ("en", "zh")
EXPRESSION = re.compile(r"\{\{(.+?)\}\}", re.S)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.S)
BLOCKS = ("python", "source", "exercise", "quiz", "live")
SAYS = {
    "code": ("code", "代码"), "hint": ("hint", "提示"), "solution": ("solution", "参考答案"), "why": ("why", "为什么"),
    "exercise": ("Exercise", "习题"), "right": ("right", "对"), "wrong": ("no", "不对"),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A Python cell that has run: its code, what it printed, and its last expression's value."""

    code: str
    printed: str
    value: Any


@dataclass
class Chapter:
    """`name` is its folder's, such as 03_rmsnorm. Raises InputError where the two languages differ in structure."""

    folder: Path
    space: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def texts(self) -> dict[str, str]:
        return {language: (self.folder / f"{language}.md").read_text(encoding="utf-8") for language in LANGUAGES}

    @cached_property
    def tokens(self) -> dict[str, list]:
        """The Markdown of each language, parsed."""
        return {language: _markdown().parse(_protected(text)) for language, text in self.texts.items()}

    def title(self, language: str) -> str:
        return self.texts[language].partition("\n")[0].removeprefix("# ").strip()

    def structure(self, language: str) -> list[tuple[str, str]]:
        """What both languages must have in common: levels of headings, kinds of blocks, and the text of cells."""
        found = []
        for token in self.tokens[language]:
            if token.type == "heading_open":
                found.append(("heading", token.tag))
            elif token.type == "fence":
                kind = token.info.split()[0] if token.info else ""
                same = token.content if kind in ("python", "source", "exercise", "live") else ""
                found.append((token.info, same))
        return found

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells, run in order."""
        if self.structure("en") != self.structure("zh"):
            pairs = zip(self.structure("en"), self.structure("zh"), strict=False)
            first = next((pair for pair in pairs if pair[0] != pair[1]), "one is longer")
            raise InputError(f"{self.folder}: the languages differ in headings, blocks or cells: {first!s:.200}")
        self.space.update(namespace())
        found = []
        for token in self.tokens["en"]:
            if token.type == "fence" and token.info.split()[:1] == ["python"]:
                found.append(self._run(token.content, (token.map or [0])[0] + 2))
        return found

    def _run(self, code: str, line: int) -> Cell:
        tree = ast.parse(code)
        end = tree.body[-1] if tree.body else None
        last = end if isinstance(end, ast.Expr) else None
        tree.body = tree.body if last is None else tree.body[:-1]
        printed, value = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(tree, f"<{self.name}>", "exec"), self.space)
                if last is not None:
                    value = eval(compile(ast.Expression(last.value), f"<{self.name}>", "eval"), self.space)
        except Exception as error:
            raise InputError(
                f"{self.folder}/en.md, the cell at line {line}: {type(error).__name__}: {error}"
            ) from error
        return Cell(code, printed.getvalue(), value)

    def html(self, language: str) -> str:
        """The chapter's body in one language."""
        left = iter(self.cells)
        markdown, tokens = _markdown(), self.tokens[language]
        pieces, start = [], 0
        for i, token in enumerate(tokens):
            if token.type == "fence" and token.info.split()[:1] and token.info.split()[0] in BLOCKS:
                pieces.append(self._prose(markdown.renderer.render(tokens[start:i], markdown.options, {}), language))
                pieces.append(self._block(token, language, left))
                start = i + 1
        pieces.append(self._prose(markdown.renderer.render(tokens[start:], markdown.options, {}), language))
        return "".join(pieces)

    def _prose(self, text: str, language: str) -> str:
        """Rendered prose with its expressions computed and its formulas as MathML."""
        return re.sub(r"\x02(.+?)\x03", lambda hit: self._hidden(bytes.fromhex(hit[1]).decode(), language), text)

    def _hidden(self, text: str, language: str) -> str:
        if text.startswith("$"):
            from latex2mathml.converter import convert

            shown = text.startswith("$$")
            return convert(text.strip("$").strip(), display="block" if shown else "inline")
        try:
            return html.escape(str(eval(f"f{'{' + text + '}'!r}", self.space)))
        except Exception as error:
            raise InputError(f"{self.folder}/{language}.md, {{{{{text}}}}}: {type(error).__name__}: {error}") from error

    def _block(self, token: Any, language: str, left: Any) -> str:
        kind, *how = token.info.split()
        if kind == "python":
            return self._cell(next(left), how, language)
        return {"source": _source, "exercise": _exercise, "quiz": _quiz, "live": _live}[kind](token.content, language)

    def _cell(self, cell: Cell, how: list[str], language: str) -> str:
        if "hidden" in how:
            return ""
        svg = getattr(cell.value, "svg", None)
        code = _code(cell.code)
        if "figure" in how:
            code = f"<details><summary>{_say('code', language)}</summary>{code}</details>"
        out = f"<pre class='printed'>{html.escape(cell.printed.rstrip())}</pre>" if cell.printed.strip() else ""
        if callable(svg):
            picture = f"<figure>{svg(language)}</figure>"
            return f"<div class='cell'>{picture}{out}{code}</div>" if "figure" in how else f"<div class='cell'>{code}{out}{picture}</div>"  # fmt: skip # noqa: E501
        if cell.value is not None:
            out += f"<pre class='printed'>{html.escape(repr(cell.value))}</pre>"
        return f"<div class='cell'>{code}{out}</div>"


def chapters() -> list[Chapter]:
    """All chapters of the book, in order."""
    return [Chapter(path.parent) for path in sorted(FOLDER.glob("*/en.md"))]


def namespace() -> dict[str, Any]:
    """What the cells of a chapter begin with."""
    import numpy as np

    import export
    import golden
    import refimpl
    from refimpl.pages import figures

    model = refimpl.load(backend="numpy")
    space: dict[str, Any] = {"np": np, "refimpl": refimpl, "golden": golden, "export": export, "model": model,
                             "prompt": PROMPT, "trace": model.trace(PROMPT, "float64"),
                             "figures": figures, "text": figures.text}  # fmt: skip
    return space


def expect_extra() -> None:
    """Raises InputError without the packages that building needs."""
    if missing := [name for name in ("markdown_it", "pygments", "latex2mathml") if find_spec(name) is None]:
        raise InputError(f"building the book needs {', '.join(missing)}; pip install 'refimpl[learn]'")


def _markdown() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("table")


def _protected(text: str) -> str:
    """Markdown with expressions and formulas outside of code hidden from the parser."""

    def hide(hit: re.Match) -> str:
        return "\x02" + hit.group().encode().hex() + "\x03"

    def hide_expression(hit: re.Match) -> str:
        return "\x02" + hit[1].strip().encode().hex() + "\x03"

    parts = re.split(r"(^```.*?^```[ ]*$|`[^`\n]+`)", text, flags=re.M | re.S)
    for i in range(0, len(parts), 2):
        parts[i] = FORMULA.sub(hide, EXPRESSION.sub(hide_expression, parts[i]))
    return "".join(parts)


def _say(word: str, language: str) -> str:
    return SAYS[word][LANGUAGES.index(language)]


def _code(code: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return str(highlight(code, PythonLexer(), HtmlFormatter()))


def _source(content: str, language: str) -> str:
    """The lines of the repository that a dotted name stands for."""
    name = content.strip()
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found: Any = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:]:
                found = getattr(found, part, None)
            if found is not None:
                break
    else:
        raise InputError(f"there is no {name} to show the source of")
    code = inspect.cleandoc("\n" + inspect.getsource(found))
    return f"<div class='source'><p class='where'><code>{html.escape(name)}</code></p>{_code(code)}</div>"


def _exercise(content: str, language: str) -> str:
    exercise = find(content.strip())
    task = "".join(f"<p>{html.escape(line)}</p>" for line in getattr(exercise.task, language).splitlines())
    folded = "".join(
        f"<details><summary>{_say('hint', language)} {i}</summary>"
        f"<p>{html.escape(getattr(hint, language))}</p></details>"
        for i, hint in enumerate(exercise.hints, 1)
    )
    solution = (
        f"<details><summary>{_say('solution', language)}</summary>{_code(exercise.source(exercise.solution))}</details>"
    )
    command = f"refimpl learn start {exercise.name}\nrefimpl learn check {exercise.name}.py"
    title = f"{_say('exercise', language)} · {html.escape(getattr(exercise.title, language))}"
    return (f"<section class='exercise' id='exercise-{exercise.name}'><h3>{title}</h3>{task}"
            f"{_code(exercise.source(exercise.starter))}<pre class='command'>{command}</pre>{folded}{solution}</section>")  # fmt: skip # noqa: E501


def _quiz(content: str, language: str) -> str:
    question = read_question(content)
    answers = "".join(
        f"<details class='{'right' if one.right else 'wrong'}'><summary>{html.escape(one.text)}</summary>"
        f"<p><b>{_say('right' if one.right else 'wrong', language)}.</b> {html.escape(one.why)}</p></details>"
        for one in question.answers
    )
    return f"<section class='quiz'><p class='question'>{html.escape(question.text)}</p>{answers}</section>"


def _live(content: str, language: str) -> str:
    """The place where the page's explorer starts, with what it is preset on."""
    pairs = dict(line.split(":", 1) for line in content.strip().splitlines() if ":" in line)
    data = "".join(f" data-{key.strip()}='{html.escape(value.strip(), quote=True)}'" for key, value in pairs.items())
    return f"<div class='live' lang='{language}'{data}></div>"
