"""The book: the same structure and cells in both languages, computed numbers, kept terms, the same bytes twice."""

import re

import pytest

from refimpl.errors import InputError
from refimpl.learn.quiz import FOLDER, ask, questions, read_question

CHAPTERS = sorted(path.parent for path in FOLDER.glob("*/en.md"))
TYPED = re.compile(  # numbers in prose that nobody computes
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December) 20\d\d|20\d\d ?年"
    r"|(?:pull request|issue|PR|Issue) ?\d+"  # where a case was told
    r"|^\d+\. .*$|^(?:Answers|答案).*$"  # exercises by hand, and their answers, which cells of the chapter assert
    r"|(?:By hand|动手算).*$"  # small examples, which the reader computes along
    r"|\b\d+(?:-bit| bits)|\d+ 位|\b(?:256|128)\b"  # number formats; bytes of UTF-8
    r"|\b(?:28|32|40)(?: heads|\b)|chapter \d+|第 \d+ 章"  # heads of the families; other chapters
    r"|\b(?:Baichuan\s?2?|Qwen2|[Ii]nt\s?\d+|float\d+|bfloat16|NF4|MXFP4|Q\d_\w+|w4a16|UTF-8|\d+B|1e-\d+)\b",  # names
    re.M,
)


def plain(text: str) -> str:
    """A chapter's prose, without blocks, code, formulas, expressions and links."""
    for pattern in (r"^```.*?^```\s*$", r"`[^`\n]+`", r"\{\{.*?\}\}", r"\$\$.+?\$\$", r"\$[^$\n]+\$", r"\]\([^)]*\)"):
        text = re.sub(pattern, " ", text, flags=re.M | re.S)
    return text


@pytest.fixture(scope="module")
def chapters():
    for package in ("markdown_it", "pygments", "latex2mathml"):
        pytest.importorskip(package)
    from refimpl.learn.chapter import chapters

    return chapters()


def test_both_languages_have_the_same_structure(chapters):
    for chapter in chapters:
        assert chapter.structure("en") == chapter.structure("zh"), chapter.name


def test_built_twice_the_book_has_the_same_bytes(chapters, tmp_path):
    from refimpl.learn.book import write

    books = [write(tmp_path / name).parent for name in ("one", "two")]
    files = sorted(path.name for path in books[0].iterdir())
    assert {f"{chapter.name}.html" for chapter in chapters} | {"index.html", "book.css"} <= set(files)
    for name in files:
        one, two = ((book / name).read_bytes() for book in books)
        assert one == two, name
        assert not re.search(rb"(?:src|href)=.https?:", one) or b"<link" not in one.split(b"http")[0][-40:], name
    assert write(tmp_path / "one").is_file(), "a book that is there is replaced"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="other files"):
        write(tmp_path / "mine")


def test_each_figure_shows_both_languages(chapters):
    for chapter in chapters:
        english, chinese = (chapter.html(language) for language in ("en", "zh"))
        for piece in ("<figure>", "<section class='quiz'>", "<section class='exercise'", "<div class='live'"):
            assert english.count(piece) == chinese.count(piece), (chapter.name, piece)


@pytest.mark.parametrize("folder", CHAPTERS, ids=lambda path: path.name)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_numbers_in_prose_are_computed(folder, language):
    prose = TYPED.sub(" ", plain((folder / f"{language}.md").read_text(encoding="utf-8")))
    typed = re.findall(r"(?<![\w-])\d[\d.,]*\d(?!\w)", prose)  # single digits count things of the text itself
    assert not typed, typed


@pytest.mark.parametrize("folder", CHAPTERS, ids=lambda path: path.name)
def test_questions_have_the_same_right_answer_in_both_languages(folder):
    english, chinese = (questions((folder / f"{language}.md").read_text(encoding="utf-8")) for language in ("en", "zh"))
    assert [[a.right for a in q.answers] for q in english] == [[a.right for a in q.answers] for q in chinese]
    for question in english + chinese:
        (right,) = [len(answer.text) for answer in question.answers if answer.right]
        longest = max(len(answer.text) for answer in question.answers if not answer.right)
        assert right <= max(1.6 * longest, longest + 12), question.text  # its length would betray it


def test_the_glossary_is_kept():
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", (FOLDER.parent / "glossary.md").read_text("utf-8"), re.M
    )
    banned = [word for _, _, never in rows[1:] for word in never.split("、")]
    assert len(banned) > 10
    for folder in CHAPTERS:
        text = (folder / "zh.md").read_text(encoding="utf-8")
        assert not [word for word in banned if word in text], folder.name


def test_the_quiz_counts_right_answers(capsys):
    folder = FOLDER / "03_rmsnorm"
    asked = questions((folder / "en.md").read_text(encoding="utf-8"))
    right = [next(str(i) for i, a in enumerate(q.answers, 1) if a.right) for q in asked]
    said = iter(right)
    assert ask([folder], "en", lambda prompt: next(said)) == (len(asked), len(asked))
    assert ask([folder], "en", lambda prompt: "x") == (0, len(asked))
    assert asked[0].text in capsys.readouterr().out


@pytest.mark.parametrize("block", ["Why?\n- [ ] so :: no", "Why?\n- [x] so", "Why?\n- [x] a :: b\n- [x] c :: d"])
def test_a_question_needs_one_right_answer(block):
    with pytest.raises(InputError):
        read_question(block)
