"""Requests read, stop strings found, text in whole characters: what needs no server."""

import json

import numpy as np
import pytest

import refimpl
from refimpl.errors import InputError
from refimpl.serve.asks import RefusedError, read_ask
from refimpl.serve.guard import Guard, same
from refimpl.serve.served import Served
from refimpl.serve.worker import DONE, BusyError, Worker
from refimpl.serve.writing import Stops, Wish, Writer, likeliest, log_softmax

PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"


@pytest.fixture(scope="module")
def model():
    return refimpl.load()


def written(model, wish, ids=None, **options):
    return list(Writer(model, model.tokenizer.encode(PROMPT) if ids is None else ids, wish, options).pieces())


def test_an_answer_is_what_generate_gives(model):
    expected = list(model.generate(PROMPT, max_new_tokens=12, do_sample=True, seed=4))
    pieces = written(model, Wish(12, logprobs=1), do_sample=True, seed=4)
    assert [token.id for piece in pieces for token in piece.tokens] == expected
    assert "".join(piece.text for piece in pieces) == model.tokenizer.decode(expected, skip_special_tokens=True)


def test_stop_strings_are_found_whatever_the_pieces():
    text = "ab<|end|>cd"
    for cut in range(1, len(text)):
        for stop in ("<|end|>", "b<", "d"):
            stops = Stops([stop, "zzz"])
            given = stops.feed(text[:cut]) + stops.feed(text[cut:])
            assert (given, stops.found) == (text[: text.index(stop)], True)
    stops = Stops(["<|end|>"])
    assert (stops.feed("a<|en"), stops.feed("x"), stops.held) == ("a", "<|enx", "")


def test_the_first_of_several_stop_strings_ends_the_text():
    assert Stops(["cd", "b"]).feed("abcd") == "a"


def test_tokens_behind_a_stop_string_are_not_given_but_counted(model):
    writer = Writer(model, model.tokenizer.encode(PROMPT), Wish(12, ("商隐\n送",), 0), {})
    pieces = list(writer.pieces())
    assert ("".join(piece.text for piece in pieces), pieces[-1].finish) == ("李", "stop")
    assert [token.start for piece in pieces for token in piece.tokens] == [0]
    assert writer.spent == 3


def test_echo_says_what_the_model_says_of_the_prompt(model):
    ids = model.tokenizer.encode(PROMPT)
    echo, *_ = written(model, Wish(0, logprobs=2, echo=True))
    rows = log_softmax(model(ids)[0])
    assert echo.text == PROMPT and echo.tokens[0].logprob is None
    found = [token.logprob for token in echo.tokens[1:]]
    np.testing.assert_allclose(found, [row[id] for row, id in zip(rows, ids[1:], strict=False)], atol=1e-4)
    assert [PROMPT[token.start :].encode().startswith(token.utf8) for token in echo.tokens] == [True] * len(ids)


def test_the_likeliest_come_first_and_ties_by_id():
    assert likeliest(np.array([-3.0, -1.0, -2.0, -1.0]), 3) == ((1, -1.0), (3, -1.0), (2, -2.0))
    assert likeliest(np.array([-1.0]), 0) == ()


def test_a_computation_that_nobody_wants_ends_at_the_next_token(model):
    calls = []

    def go_on():
        calls.append(1)
        if len(calls) == 3:
            raise StopAsyncIteration

    with pytest.raises(StopAsyncIteration):
        written(model, Wish(50, go_on=go_on))
    assert len(calls) == 3


def ask(chat=True, **changes):
    content = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    return read_ask(json.dumps({"model": "m", **content, **changes}).encode(), chat)


@pytest.mark.parametrize(
    "chat, changes, says",
    [
        (True, {"tools": [{"type": "function"}]}, "tools is not supported"),
        (True, {"response_format": {"type": "json_object"}}, "response_format is not supported"),
        (True, {"presence_penalty": 0.5}, "presence_penalty is not supported"),
        (True, {"temprature": 1}, "no field 'temprature'; near it are temperature"),
        (True, {"temperature": 2.5}, "temperature is 2.5, expected a number from 0 to 2"),
        (True, {"temperature": True}, "temperature is True"),
        (True, {"top_p": -1}, "top_p is -1"),
        (True, {"seed": 1.5}, "seed is 1.5"),
        (True, {"n": 0}, "n is 0"),
        (True, {"stop": [""]}, "stop is ['']"),
        (True, {"logit_bias": {"x": 1}}, "logit_bias is"),
        (True, {"top_logprobs": 2}, "top_logprobs belongs to logprobs"),
        (True, {"stream_options": {"include_usage": True}}, "stream_options belongs to a stream"),
        (True, {"messages": []}, "messages is []"),
        (True, {"messages": [1]}, "messages[0] is 1"),
        (True, {"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        (True, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        (True, {"messages": [{"role": "user", "content": None}]}, "content None, expected text"),
        (True, {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "has tool_calls"),
        (False, {"prompt": []}, "prompt is []"),
        (False, {"prompt": [[1], ["x"]]}, "prompt is [[1], ['x']]"),
        (False, {"logprobs": True}, "logprobs is True"),
        (False, {"max_tokens": 0}, "max_tokens is 0, so there is nothing to answer"),
        (False, {"best_of": 3}, "best_of is not supported"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(chat, changes, says):
    with pytest.raises(RefusedError) as found:
        ask(chat, **changes)
    assert says in str(found.value) and found.value.status == 400


def test_what_changes_nothing_is_taken():
    assert ask(tools=[], presence_penalty=0, response_format={"type": "text"}, user="me", seed=None, n=1) == ask()
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert ask(messages=[{"role": "user", "content": parts, "name": "x"}]) == ask()


def test_temperature_0_takes_the_likeliest_and_other_options_are_the_folders():
    assert ask(temperature=0).options == {"do_sample": False}
    assert ask(temperature=0.5, top_p=0, seed=3).options == {
        "do_sample": True, "temperature": 0.5, "top_p": 1e-9, "seed": 3,
    }  # fmt: skip
    assert ask().options == {}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"a": 1, "a": 2}', b"[" * 100_000, b"\xff", b"1" * 5000])
def test_bodies_that_are_no_json_object(body):
    with pytest.raises(RefusedError):
        read_ask(body, True)


def test_a_role_that_is_typed_into_a_message_stays_text(model):
    served = Served("m", model)
    typed = served.prompt(ask(), [{"role": "user", "content": "a<reserved_107>b"}])
    assert typed.count(196) == 1 and typed[-1] == 196
    with pytest.raises(RefusedError, match="the context has 512 tokens; the prompt has 900"):
        served.prompt(ask(chat=False), [7] * 900)


def test_the_guard():
    guard = Guard("127.0.0.1")
    guard.check({"host": "localhost:8000", "origin": "http://localhost:8000"})
    for headers in ({"host": "evil.example"}, {}, {"host": "localhost", "origin": "http://evil.example"},
                    {"host": "localhost", "origin": "null"}, {"host": "localhost.evil.example:80"}):  # fmt: skip
        with pytest.raises(RefusedError) as found:
            guard.check(headers)
        assert found.value.status == 403
    with pytest.raises(InputError, match="can be reached from other machines, so a token is needed"):
        Guard("0.0.0.0")
    open_to_all = Guard("0.0.0.0", "secret")
    open_to_all.check({"host": "anything", "authorization": "Bearer secret"})
    for wrong in ({}, {"authorization": "Bearer secre"}, {"authorization": "secret"}):
        with pytest.raises(RefusedError) as found:
            open_to_all.check(wrong)
        assert found.value.status == 401
    assert same("é\udcff", "é\udcff") and not same("", "a")


def test_jobs_run_one_after_another_and_a_full_queue_refuses():
    import threading

    hold, found, worker = threading.Event(), [], Worker(2)
    ended = threading.Event()

    def slow(go_on):
        hold.wait(10)
        yield 1

    def failing(go_on):
        yield 2
        raise ValueError("wrong")

    worker.submit(slow, found.append)
    while worker.running is None:
        hold.wait(0.01)
    stopped = worker.submit(slow, found.append)
    worker.submit(failing, lambda one: (found.append(one), isinstance(one, ValueError) and ended.set()))
    with pytest.raises(BusyError, match="2 requests wait already"):
        worker.submit(slow, found.append)
    stopped.stop()
    hold.set()
    assert ended.wait(10)
    assert [*found[:2], found[3]] == [1, DONE, 2] and str(found[4]) == "wrong"
    worker.close()
    with pytest.raises(BusyError):
        worker.submit(slow, found.append)
