"""Pictures: well-formed, in both languages, with the right numbers, and nothing from outside becomes markup."""

from xml.etree import ElementTree

import numpy as np
import pytest

from refimpl.pages import figures
from refimpl.pages.figures import text

SVG = "{http://www.w3.org/2000/svg}"
TITLE = text(en="title", zh="标题")
KINDS = {
    "heatmap": lambda: figures.heatmap(np.arange(6.0).reshape(2, 3) - 2, ["a", "b"], ["x", "y", "z"], TITLE),
    "large heatmap": lambda: figures.heatmap(np.ones((40, 200)), title=TITLE),
    "attention": lambda: figures.attention(np.eye(4), ["李", "白", "<s>", "\x1b"], TITLE),
    "bars": lambda: figures.bars({"李商隐": 0.98, "韦庄": -0.1}, title=TITLE),
    "line": lambda: figures.line({"a": [1, 10, 1000], "b": [5, 5, 5]}, title=TITLE, across="x", up="y", log=True),
    "flat line": lambda: figures.line([3.0, 3.0, 3.0], title=TITLE),
    "clock": lambda: figures.clock([0.0, np.pi / 2], ["0", "1"], TITLE),
    "rulers": lambda: figures.rulers([-0.2, 0.7], {"int4": np.linspace(-1, 1, 16), "nf4": [-1, 0, 1]}, TITLE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_well_formed_in_both_languages(kind):
    picture = KINDS[kind]()
    for language, title in (("en", "title"), ("zh", "标题")):
        root = ElementTree.fromstring(picture.svg(language))
        assert root.find(f"{SVG}title").text == title and root.get("role") == "img"
        assert picture.svg(language) == KINDS[kind]().svg(language), "the same bytes"
        width, height = map(float, root.get("viewBox").split()[2:])
        for mark in root.iter(f"{SVG}rect"):
            right, low = (
                float(mark.get("x")) + float(mark.get("width")),
                float(mark.get("y")) + float(mark.get("height")),
            )
            assert float(mark.get("x")) >= -0.1 and right <= width + 0.2 and low <= height + 0.2


def test_names_are_no_markup():
    shown = KINDS["attention"]().svg()
    assert "<s>" not in shown.replace("&lt;s&gt;", "") and "\x1b" not in shown and "\\x1b" in shown


def test_colours_follow_the_numbers():
    root = ElementTree.fromstring(figures.heatmap(np.array([[-2.0, 0.0, 2.0, 1.0]])).svg())
    assert [mark.get("fill") for mark in root.iter(f"{SVG}rect")] == ["#2166ac", "#f7f7f7", "#c9580a", "#e0a880"]


def test_a_bar_is_as_long_as_its_number():
    root = ElementTree.fromstring(figures.bars([1.0, 2.0, -1.0], ["a", "b", "c"]).svg())
    one, two, minus = (mark for mark in root.iter(f"{SVG}rect"))
    assert float(two.get("width")) == pytest.approx(2 * float(one.get("width")), abs=0.2)
    assert float(minus.get("x")) + float(minus.get("width")) == pytest.approx(float(one.get("x")), abs=0.2)


def test_hands_point_where_their_angles_say():
    root = ElementTree.fromstring(figures.clock([0.0, np.pi / 2]).svg())
    right, up = root.iter(f"{SVG}line")
    assert right.get("y1") == right.get("y2") and float(right.get("x2")) > float(right.get("x1"))
    assert up.get("x1") == up.get("x2") and float(up.get("y2")) < float(up.get("y1"))
