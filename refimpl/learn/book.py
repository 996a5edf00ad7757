"""The book as a folder of pages: one for each chapter, both languages in it, and a table of contents.

The same sources give the same bytes. A page needs nothing but its folder: no server, no fonts, no other site.
"""

from __future__ import annotations

import html
import shutil
from collections.abc import Callable
from pathlib import Path

from refimpl.errors import InputError
from refimpl.files import filling, replace_folder
from refimpl.learn.chapter import LANGUAGES, Chapter, chapters, expect_extra

TITLE = {"en": "The right poet from wrong tensors", "zh": "答案对了，张量错了"}
STYLE = Path(__file__).parent / "book.css"
CONTENTS = {"en": "Contents", "zh": "目录"}
SCRIPT = """
(function () {
  var root = document.documentElement, known = ['en', 'zh'];
  function show(language) {
    root.lang = language;
    try { localStorage.setItem('language', language); } catch (error) { /* a page from a file may have no storage */ }
    document.querySelectorAll('a[data-page]').forEach(function (a) { a.hash = language; });
  }
  var kept = null;
  try { kept = localStorage.getItem('language'); } catch (error) { kept = null; }
  var hash = location.hash.slice(1), own = (navigator.language || 'en').slice(0, 2);
  show([hash, kept, own, 'en'].filter(function (l) { return known.indexOf(l) >= 0; })[0]);
  document.getElementById('switch').addEventListener('click', function () { show(root.lang === 'en' ? 'zh' : 'en'); });
  document.addEventListener('keydown', function (event) {
    if (event.altKey || event.ctrlKey || event.metaKey || /INPUT|TEXTAREA|SELECT/.test(event.target.tagName)) return;
    var rel = {ArrowLeft: 'prev', ArrowRight: 'next'}[event.key];
    var a = rel && document.querySelector('a[rel=' + rel + ']');
    if (a) location.href = a.href;
  });
})();
"""


def write(out: Path, report: Callable[[str], None] = lambda name: None) -> Path:
    """Writes the book into the folder `out` and returns its first page. A book that is there is replaced.

    Raises InputError without the extra `learn`, for a folder that holds something else, and for a chapter that fails.
    """
    expect_extra()
    expect_free(out)
    every = chapters()
    with filling(out) as partial:
        shutil.copyfile(STYLE, partial / "book.css")
        for i, chapter in enumerate(every):
            report(chapter.name)
            before, after = (every[k].name if 0 <= k < len(every) else None for k in (i - 1, i + 1))
            body = {language: chapter.html(language) for language in LANGUAGES}
            titles = {language: chapter.title(language) for language in LANGUAGES}
            _save(partial / f"{chapter.name}.html", titles, body, before or "index", after)
        body = {language: _contents(every, language) for language in LANGUAGES}
        _save(partial / "index.html", TITLE, body, None, every[0].name if every else None)
        replace_folder(partial, out, (), lambda: expect_free(out))
    return out / "index.html"


def expect_free(out: Path) -> None:
    """Raises InputError if the folder holds anything but a book."""
    if (out.exists() and not out.is_dir()) or (
        out.is_dir() and any(out.iterdir()) and not (out / "book.css").is_file()
    ):
        raise InputError(f"{out} holds other files than a book; name a folder that is new or empty")


def _save(file: Path, title: dict[str, str], body: dict[str, str], before: str | None, after: str | None) -> None:
    file.write_text(_page(title, body, before, after), encoding="utf-8", newline="\n")


def _contents(every: list[Chapter], language: str) -> str:
    rows = "".join(
        f"<li><a data-page href='{chapter.name}.html'>{html.escape(chapter.title(language))}</a></li>"
        for chapter in every
    )
    return f"<h1>{TITLE[language]}</h1><ol class='contents'>{rows}</ol>"


def _page(title: dict[str, str], body: dict[str, str], before: str | None, after: str | None) -> str:
    links = "".join(
        f"<a data-page rel='{rel}' href='{name}.html' aria-label='{rel}'>{arrow}</a>"
        for rel, name, arrow in (("prev", before, "←"), ("next", after, "→")) if name
    )  # fmt: skip
    both = "".join(f"<main lang='{language}' class='{language}'>{body[language]}</main>" for language in LANGUAGES)
    name = html.escape(f"{title['en']} · {title['zh']}")
    home = " / ".join(f"<span class='{language}'>{CONTENTS[language]}</span>" for language in LANGUAGES)
    home = home.replace(" / ", "")
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{name}</title><link rel='icon' href='data:,'><link rel='stylesheet' href='book.css'></head><body>"
        f"<nav><a data-page href='index.html'>{home}</a><span class='turn'>{links}</span>"
        f"<button id='switch' type='button'>中文 / English</button></nav>{both}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
