"""The server in a process of its own, asked by OpenAI's client, by hostile clients and by slow ones."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from serving import serving

import refimpl
from refimpl.text.chat import LAYOUTS

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"
LONG = {"model": "embedded", "prompt": "春", "max_tokens": 500, "temperature": 1, "seed": 1, "logit_bias": {"2": -100}}


@pytest.fixture(scope="module")
def address():
    with serving("--beside", "q4_0") as (found, process):
        yield found
        assert process.poll() is None, "the server died of a request"


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model():
    return refimpl.load()


def post(address, path="/v1/completions", **keywords):
    return httpx.post(address + path, timeout=60, **keywords)


def test_models(client):
    assert [one.id for one in client.models.list()] == ["embedded", "embedded-q4_0"]
    assert client.models.retrieve("embedded").max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here"):
        client.models.retrieve("gpt-4")


def test_completions_are_those_of_generate(client, model):
    said = client.completions.create(model="embedded", prompt=PROMPT, max_tokens=12, temperature=0)
    ids = list(model.generate(PROMPT, max_new_tokens=12))
    assert said.choices[0].text == model.tokenizer.decode(ids, skip_special_tokens=True)
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (len(model.tokenizer.encode(PROMPT)), len(ids))
    small = client.completions.create(
        model="embedded-q4_0", prompt=model.tokenizer.encode(PROMPT), max_tokens=12, temperature=0
    )
    ids = list(model.quantize("q4_0").generate(PROMPT, max_new_tokens=12))
    assert small.choices[0].text == model.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_reproduces_refimpl_generate(client, seed, capsys):
    from refimpl.cli import main

    main(["generate", "-p", PROMPT.replace("\n", r"\n"), "--sample", "--seed", str(seed), "--temperature", "0.9",
          "--top-p", "0.9", "--max-new-tokens", "20", "--json"])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    said = client.completions.create(
        model="embedded", prompt=PROMPT, max_tokens=20, temperature=0.9, top_p=0.9, seed=seed, logprobs=0
    )
    assert (said.choices[0].text, said.choices[0].logprobs.token_ids) == (told["text"], told["ids"])


def test_chats_have_the_family_s_layout_and_stream_as_whole_answers(client, model):
    messages = [{"role": "system", "content": "你是诗人。"}, {"role": "user", "content": "《静夜思》的作者是谁？"}]
    ids = LAYOUTS["Baichuan2-7B"](messages, model.tokenizer.encode, model.tokenizer.chat_settings)
    expected = list(model.generate(ids, max_new_tokens=30))
    whole = client.chat.completions.create(model="embedded", messages=messages, temperature=0, max_tokens=30)
    assert whole.choices[0].message.content == model.tokenizer.decode(expected, skip_special_tokens=True)
    assert whole.usage.prompt_tokens == len(ids)
    with client.chat.completions.create(
        model="embedded", messages=messages, temperature=0, max_completion_tokens=30, stream=True, logprobs=True,
        top_logprobs=2, stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert not chunks[-1].choices and chunks[-1].usage == whole.usage
    tokens = [one for c in chunks for choice in c.choices for one in (choice.logprobs.content or [])]
    assert [one.id for one in tokens] == expected
    assert all(len(one.top_logprobs) == 2 and bytes(one.bytes).decode() == one.token for one in tokens)
    assert tokens[0].logprob == tokens[0].top_logprobs[0].logprob


def test_echo_and_logprobs_in_the_layout_of_completions(client, model):
    said = client.completions.create(
        model="embedded", prompt=PROMPT, max_tokens=0, temperature=0, logprobs=2, echo=True
    )
    found, ids = said.choices[0].logprobs, model.tokenizer.encode(PROMPT)
    logits = model(ids, "float64")[0]
    exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert said.choices[0].text == PROMPT == "".join(found.tokens) and said.usage.completion_tokens == 0
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    np.testing.assert_allclose(found.token_logprobs[1:], exact[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
    assert all(token in top for token, top in zip(found.tokens[1:], found.top_logprobs[1:], strict=True))
    assert [PROMPT[start:].startswith(token) for start, token in zip(found.text_offset, found.tokens, strict=True)]


def test_several_prompts_and_choices_are_numbered_in_order(client):
    said = client.completions.create(
        model="embedded", prompt=["静夜思->", "春晓->"], n=2, max_tokens=3, seed=5, temperature=1
    )
    assert [choice.index for choice in said.choices] == [0, 1, 2, 3]
    second = client.completions.create(model="embedded", prompt="静夜思->", max_tokens=3, seed=6, temperature=1)
    assert said.choices[1].text == second.choices[0].text


def test_stop_strings_that_cut_tokens(client):
    whole = client.completions.create(model="embedded", prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text
    for stop in (whole[1:3], whole[2:5], whole[0]):
        texts = []
        for stream in (False, True):
            said = client.completions.create(
                model="embedded", prompt=PROMPT, max_tokens=12, temperature=0, stop=["no", stop], stream=stream
            )
            choices = [c.choices[0] for c in said] if stream else said.choices
            texts.append(("".join(choice.text for choice in choices), choices[-1].finish_reason))
        assert texts == [(whole[: whole.index(stop)], "stop")] * 2


def test_characters_of_several_tokens_come_whole(client, model):
    """A bias makes the model spell a rare character by the bytes of its UTF-8, one token each."""
    rare = "𪚥"
    (*ids,) = model.tokenizer.encode(rare)
    assert len(ids) == 4
    for first in range(1, 5):
        bias = {str(id): 100 for id in ids}
        with client.completions.create(
            model="embedded", prompt=ids[:first], max_tokens=9, temperature=1, seed=2, logit_bias=bias, stream=True,
            logprobs=1,
        ) as stream:  # fmt: skip
            chunks = [c.choices[0] for c in stream]
        tokens = [id for c in chunks for id in c.logprobs.token_ids]
        assert "".join(c.text for c in chunks) == model.tokenizer.decode(tokens) and len(tokens) == 9
        spelled = [token for c in chunks for token in c.logprobs.tokens]
        assert all(token.startswith("bytes:\\x") for token in spelled)


@pytest.mark.parametrize("family", ["Baichuan-7B", "Baichuan2-13B"])
def test_other_families_are_served(tiny_folder, family):
    """A random model without a tokenizer cannot talk, and says so before it serves."""
    ran = subprocess.run([sys.executable, "-m", "refimpl", "serve", str(tiny_folder(family)), "--port", "0"],
                         capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 2 and "has no tokenizer" in ran.stderr


def test_an_export_and_a_simulation_are_served(coded_export, tmp_path, model):
    pytest.importorskip("onnxruntime")
    with serving(str(coded_export), "--engine", "onnxruntime") as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        name = next(iter(client.models.list())).id
        said = client.completions.create(model=name, prompt=PROMPT, max_tokens=4, temperature=0, logprobs=1)
        seeded = [
            client.completions.create(model=name, prompt=PROMPT, max_tokens=4, seed=1).choices[0].text for _ in "ab"
        ]
    assert name == "embedded-onnxruntime" and said.choices[0].text.startswith("李商隐") and seeded[0] == seeded[1]
    with serving("--encodings", str(coded_export / "encodings.json")) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        said = client.completions.create(model="embedded-simulated", prompt=PROMPT, max_tokens=4, temperature=0)
    assert said.choices[0].text.startswith("李商隐")


# Hostile and clumsy clients.


@pytest.mark.parametrize(
    "content, status",
    [
        (b"{", 400),
        (b"[]", 400),
        (b"[" * 100_000, 400),
        (b"\xff\xfe", 400),
        (b'{"model": "embedded"}', 400),
        (b"x" * (5 << 20), 413),
    ],
)
def test_bodies_that_are_refused(address, content, status):
    said = post(address, content=content)
    assert said.status_code == status and set(said.json()["error"]) == {"message", "type", "param", "code"}


def test_a_huge_body_without_a_length_is_cut_off(address):
    def pieces():
        for _ in range(6):
            yield b"x" * (1 << 20)

    assert post(address, content=pieces()).status_code == 413


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/v2", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/embeddings", 404),
    ],
)
def test_paths_and_methods_that_do_not_exist(address, method, path, status):
    said = httpx.request(method, address + path)
    assert said.status_code == status and said.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"prompt": [5, 99999]}, "token id 99999 is outside the vocabulary of 3584"),
        ({"prompt": [-1]}, "token id -1 is outside"),
        ({"prompt": [10**30]}, "ids"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "\ud800"}, "half of one"),
        ({"prompt": "\ud800", "model": "\ud800"}, "there is no model"),
        ({"prompt": [7] * 600}, "the context has 512 tokens; the prompt has 600, and an answer of 16 does not fit"),
        ({"prompt": [7] * 500}, "the prompt has 500, and an answer of 16 does not fit"),
        ({"max_tokens": 10**9}, "an answer of 1000000000 does not fit"),
        ({"tools": [1]}, "tools is not supported"),
        ({"logit_bias": {"99999": 1}}, "99999"),
    ],
)
def test_requests_that_cannot_be_done(address, changes, says):
    for stream in (False, True):
        body = json.dumps({"model": "embedded", "prompt": "春", "stream": stream} | changes)
        said = post(address, content=body.encode())
        assert said.status_code == (404 if "model" in changes else 400)
        assert says in said.json()["error"]["message"]


def test_a_long_conversation_loses_its_oldest_rounds_and_a_long_message_is_refused(client):
    rounds = [{"role": role, "content": "春眠不觉晓" * 10} for role in ("user", "assistant")] * 20
    said = client.chat.completions.create(
        model="embedded", messages=[*rounds, {"role": "user", "content": "谁？"}], max_tokens=4
    )
    assert 100 < said.usage.prompt_tokens <= 512 - 4
    with pytest.raises(openai.BadRequestError, match="the context has 512 tokens; the prompt has") as found:
        client.chat.completions.create(
            model="embedded", messages=[{"role": "user", "content": "春眠" * 600}], max_tokens=4
        )
    assert found.value.code == "context_length_exceeded"


def test_pages_of_other_sites_are_refused(address):
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        said = post(address, json=LONG, headers=headers)
        assert said.status_code == 403, headers


def raw(address, data: bytes, wait: float = 10.0) -> bytes:
    """What comes back for some bytes, until the server closes or `wait` seconds are over."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(data)
        got = b""
        try:
            while piece := connection.recv(65536):
                got += piece
        except OSError:
            pass
        return got


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x00\xa5 not http",
        b"GET / HTTP/1.1\r\nno header\r\n\r\n",
        b"GET " + b"a" * 100_000,
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(address, data):
    assert b" 400 " in raw(address, data).split(b"\r\n")[0]


def test_slow_clients_are_given_up_and_a_full_queue_says_when_to_come_again():
    code = (
        "import refimpl; from refimpl.serve.server import serve; from refimpl.serve.served import Served\n"
        "serve([Served('embedded', refimpl.load())], port=0, waiting=1, request_seconds=1, read_seconds=1)"
    )
    with serving(code=code) as (address, process):
        assert b" 408 " in raw(address, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        assert b" 408 " in raw(
            address, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"
        )
        assert raw(address, b"") == b""
        unread = json.dumps(
            {
                "model": "embedded",
                "prompt": [[7] * 400] * 100,
                "max_tokens": 0,
                "echo": True,
                "logprobs": 20,
                "stream": True,
            }
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(unread)}\r\n\r\n".encode()
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as silent:  # asks, and does not read
            silent.sendall(head + unread)
            time.sleep(1)
            while httpx.get(f"{address}/health").json()["running"]:
                time.sleep(0.1)
            got = b""
            with contextlib.suppress(OSError):
                while piece := silent.recv(1 << 20):
                    got += piece
            assert got.startswith(b"HTTP/1.1 200") and b"[DONE]" not in got
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(post(address, json=LONG | {"n": 2}))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = sorted(answer.status_code for answer in answers)
        assert codes[0] == 200 and codes[-1] == 503
        busy = next(answer for answer in answers if answer.status_code == 503)
        assert int(busy.headers["retry-after"]) >= 1 and "requests wait already" in busy.json()["error"]["message"]
        assert post(address, json=LONG | {"max_tokens": 2}).status_code == 200
        assert process.poll() is None


def test_a_client_that_goes_away_stops_its_computation(address):
    for stream in (False, True):
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.3) as client:
            if stream:
                with client.stream("POST", f"{address}/v1/completions", json=LONG | {"n": 16, "stream": True}) as said:
                    next(said.iter_lines())
                    raise httpx.ReadTimeout("enough")
            client.post(f"{address}/v1/completions", json=LONG | {"n": 16})
        while httpx.get(f"{address}/health").json()["running"]:
            time.sleep(0.02)
        assert time.monotonic() - began < 5  # all sixteen would take longer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_what_it_computes(number):
    with serving() as (address, process):
        got = []

        def read():
            with httpx.stream(
                "POST", f"{address}/v1/completions", json=LONG | {"stream": True, "n": 16}, timeout=30
            ) as said:
                for line in said.iter_lines():
                    got.append(line)

        thread = threading.Thread(target=read)
        thread.start()
        while not got:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        thread.join(10)
    assert (process.returncode, out, err) == (0, "ended\n", "")
    assert got and "the server ends" in got[-2]


def test_a_token_is_needed_where_others_can_come(monkeypatch):
    ran = subprocess.run([sys.executable, "-m", "refimpl", "serve", "--host", "0.0.0.0", "--port", "0"],
                         capture_output=True, text=True, env={**os.environ, "REFIMPL_TOKEN": ""})  # fmt: skip
    assert ran.returncode == 2 and "token" in ran.stderr
    with serving("--host", "0.0.0.0", "--token", "secret") as (address, _):
        address = address.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()
        assert len(list(openai.OpenAI(base_url=f"{address}/v1", api_key="secret").models.list())) == 1


def test_an_address_that_is_taken(address):
    port = address.rpartition(":")[2]
    ran = subprocess.run([sys.executable, "-m", "refimpl", "serve", "--port", port], capture_output=True, text=True)
    assert ran.returncode == 2 and "another program serves there" in ran.stderr
