"""The built book in a real browser, from a file: every chapter in both languages, on a desk and on a telephone."""

import pytest
from browser import browser

from refimpl.learn.quiz import FOLDER

CHAPTERS = sorted(path.parent.name for path in FOLDER.glob("*/en.md"))
# Nothing that a script or a picture does wrong stays unnoticed: errors are noted before the page's own script runs.
NOTES = "window.wrong = []; addEventListener('error', e => wrong.push(String(e.message || e.target.outerHTML)), true);"


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    for package in ("markdown_it", "pygments", "latex2mathml"):
        pytest.importorskip(package)
    from refimpl.learn.book import write

    return write(tmp_path_factory.mktemp("book") / "book").parent


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def opened(page, url: str, width: int):
    page.open("about:blank")
    page.tell("Page.enable")
    page.tell("Page.addScriptToEvaluateOnNewDocument", source=NOTES)
    page.tell("Network.enable")
    page.tell("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    page.tell("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    page.tell("Page.navigate", url=url)
    page.wait("document.readyState === 'complete' && location.protocol === 'file:'")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["index", *CHAPTERS])
def test_a_page_opens_offline_and_fits(book, page, name, width):
    opened(page, f"{(book / name).as_uri()}.html#en", width)
    for language, other in (("en", "zh"), ("zh", "en")):
        assert page.value("document.documentElement.lang") == language
        shown = f"getComputedStyle(document.querySelector('main.{language}')).display !== 'none'"
        hidden = f"getComputedStyle(document.querySelector('main.{other}')).display === 'none'"
        assert page.value(f"{shown} && {hidden}")
        assert page.value("document.documentElement.scrollWidth") <= width, "nothing makes the page scroll sideways"
        broken = (
            f"""[...document.querySelectorAll('main.{language} svg')].filter(s => !s.getBoundingClientRect().width)"""
        )
        assert page.value(f"{broken}.length") == 0
        page.value("document.getElementById('switch').click()")
    assert page.value("wrong") == []
