"""The chat page in a real browser, against a server in a process of its own."""

from urllib.parse import quote

import pytest
from browser import browser
from serving import serving

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
httpx = pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def address():
    with serving("--beside", "q4_0") as (found, _):
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def texts(page, selector: str) -> list[str]:
    """What the elements of a selector say."""
    return page.value(f"[...document.querySelectorAll({selector!r})].map(one => one.textContent)")


def test_files_of_the_page(address):
    for path, kind in (("/", "text/html"), ("/chat.js", "text/javascript"), ("/style.css", "text/css")):
        said = httpx.get(address + path)
        assert said.status_code == 200 and said.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in said.headers["content-security-policy"]


def test_inside_is_the_trace_of_the_token(address):
    import numpy as np

    import refimpl

    body = {"model": "embedded", "messages": [{"role": "user", "content": "《静夜思》的作者是谁？"}], "answer": [527]}
    found = httpx.post(f"{address}/inside", json=body).json()
    model = refimpl.load()
    ids = [*model.tokenizer.chat(body["messages"]), 527]
    probs = model.trace(ids)["model.layers.1.self_attn.probs"][0, :, -1]
    assert len(found["tokens"]) == len(ids) and len(found["layers"]) == 3
    np.testing.assert_allclose(found["layers"][1]["heads"], probs, atol=1e-4)
    logits = model(ids)[0, -1]
    assert found["layers"][-1]["guesses"][0][0] == model.tokenizer.token_bytes(int(logits.argmax())).decode()
    for wrong in ({"answer": [99999]}, {"answer": "x"}, {"answer": [5] * 600}):
        assert httpx.post(f"{address}/inside", json=body | wrong).status_code == 400


def test_a_talk_with_its_alternatives_and_the_inside_of_a_token(page, address):
    page.open(f"{address}/")
    page.wait("document.querySelectorAll('#model option').length === 2")
    page.value("""
        if (document.documentElement.lang !== 'zh') document.getElementById('language').click();
        document.getElementById('said').value = '《静夜思》的作者是谁？';
        document.getElementById('form').requestSubmit();
    """)
    page.wait("document.body?.dataset.done === '1'")
    assert texts(page, "#send") == ["发送"] and texts(page, ".token") == ["李白", "</s>"]
    page.value("document.querySelector('.token').click()")
    assert texts(page, "#details h3") == ["embedded · 它还可能怎么说"]
    rows = texts(page, "#details tr")
    assert len(rows) == 5 and rows[0].startswith("李白") and rows[0].endswith("选中")
    page.value("document.getElementById('inside').click()")
    page.wait("document.getElementById('layers') !== null")
    assert texts(page, "#layers th")[3:] == ["0", "1", "2"]
    tokens = len(texts(page, "#layers .look")) // 3
    shares = "[...document.querySelectorAll('#layers .look')].map(one => parseFloat(one.title))"
    assert abs(sum(page.value(shares)[:tokens]) - 100) < 2


def test_a_second_message_goes_on_with_the_talk(page, address):
    page.open(f"{address}/#said={quote('静夜思')}&language=en")
    page.wait("document.body?.dataset.done === '1'")
    page.value("document.getElementById('said').value = 'again'; document.getElementById('form').requestSubmit()")
    page.wait("document.body?.dataset.done === '2'")
    assert texts(page, ".user") == ["静夜思", "again"] and texts(page, "#send") == ["send"]
    page.value("document.getElementById('clear').click()")
    assert not texts(page, ".token")


def test_two_models_side_by_side_from_the_first_token_at_which_they_part(page, address):
    said = "夜雨寄北的作者是谁？写一首诗"
    page.open(f"{address}/#said={quote(said)}&beside=embedded-q4_0&language=en")
    page.wait("document.body?.dataset.done === '1'")
    assert texts(page, ".answer h2") == ["embedded", "embedded-q4_0"]
    answers = []
    for model in ("embedded", "embedded-q4_0"):
        body = {"model": model, "messages": [{"role": "user", "content": said}], "temperature": 0, "max_tokens": 64,
                "logprobs": True}  # fmt: skip
        told = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
        answers.append([one["token"] for one in told["choices"][0]["logprobs"]["content"]])
    assert texts(page, ".token") == answers[0] + answers[1]
    part = next(i for i, (a, b) in enumerate(zip(*answers, strict=False)) if a != b)
    assert texts(page, ".parted") == [answers[0][part], answers[1][part]]
    assert texts(page, ".note") == ["Here the two answers part."]
    page.value("document.querySelector('.parted').click()")
    assert len(texts(page, "#details h3")) == 2  # what both might have said there


def test_what_goes_wrong_is_said_on_the_page(page, address):
    page.open(f"{address}/#said={quote('春眠' * 600)}")
    page.wait("document.body?.dataset.done === '1'")
    assert "the context has 512 tokens" in texts(page, ".error")[0]
