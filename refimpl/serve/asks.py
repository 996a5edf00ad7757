"""What a client asks for: the JSON of a request becomes an `Ask`, or is refused in one line.

A key that OpenAI's API has and this server has not is refused, unless its value changes nothing: a client that asks for
tools and gets plain text would look for the fault elsewhere. A key that nobody knows is refused too.

**Source** OpenAI's API reference, /v1/chat/completions and /v1/completions, as of the client openai 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from refimpl.errors import InputError, at_most, near, one_line
from refimpl.files import parse_json
from refimpl.generation import VALID

STOPS, CHOICES, PROMPTS, TOP = 16, 16, 256, 20  # the most stop strings, choices, prompts and alternatives of a token


class RefusedError(Exception):
    """A request that gets an error as its answer: the HTTP status, a line, and the field or the code of the error."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(one_line(message))
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's layout."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Ask:
    """A request, checked. `prompts`: texts or token ids; of a chat, its one conversation.

    `max_tokens`: None for as many as the model's settings say. `logprobs`: how many alternatives of each token; None
    for no log-probabilities. `options`: those of `refimpl.generation.generate`.
    """

    model: str
    chat: bool
    prompts: tuple[Any, ...]
    max_tokens: int | None = None
    choices: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False
    logprobs: int | None = None
    echo: bool = False
    options: dict[str, Any] = field(default_factory=dict)


Check = Callable[[Any], bool]


def _whole(low: int, high: int) -> tuple[Check, str]:
    return lambda n: type(n) is int and low <= n <= high, f"a whole number from {low} to {high}"


def _number(low: float, high: float) -> tuple[Check, str]:
    return lambda x: type(x) in (int, float) and low <= x <= high, f"a number from {low:g} to {high:g}"


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    several = value if isinstance(value, list) else [value]
    return len(several) <= STOPS and all(_text(one) and one for one in several)


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(id) is int for id in value)


def _prompts(value: Any) -> bool:
    if isinstance(value, str) or _ids(value):
        return True
    return isinstance(value, list) and 0 < len(value) <= PROMPTS and all(_text(one) or _ids(one) for one in value)


def _biases(value: Any) -> bool:
    return isinstance(value, dict) and all(
        id.isdecimal() and len(id) < 10 and _number(-100, 100)[0](bias) for id, bias in value.items()
    )


def _stream_options(value: Any) -> bool:
    return isinstance(value, dict) and all(name == "include_usage" and type(on) is bool for name, on in value.items())


_TRUTH: tuple[Check, str] = (lambda value: type(value) is bool, "true or false")
# field -> a test of its value, and what the error says is expected. null is as good as an absent field.
BOTH: dict[str, tuple[Check, str]] = {
    "model": (_text, "the name of a model"),
    "max_tokens": _whole(0, 1 << 31),
    "n": _whole(1, CHOICES),
    "stop": (_texts, f"a text, or a list of up to {STOPS} texts"),
    "stream": _TRUTH,
    "stream_options": (_stream_options, 'an object such as {"include_usage": true}'),
    "seed": _whole(0, (1 << 63) - 1),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "logit_bias": (_biases, "an object of token ids and numbers from -100 to 100"),
    # what OpenAI's API does not have, under transformers' names
    **{name: VALID[name] for name in ("top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
                                      "min_new_tokens")},
}  # fmt: skip
CHAT: dict[str, tuple[Check, str]] = {
    "messages": (lambda value: isinstance(value, list) and bool(value), "a list of messages"),
    "max_completion_tokens": _whole(1, 1 << 31),
    "logprobs": _TRUTH,
    "top_logprobs": _whole(0, TOP),
}
TEXT: dict[str, tuple[Check, str]] = {
    "prompt": (_prompts, f"a text, a list of token ids, or a list of up to {PROMPTS} of these"),
    "logprobs": _whole(0, TOP),
    "echo": _TRUTH,
}
# What OpenAI's API has and is not done here: field -> the values that change nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "presence_penalty": (0,), "frequency_penalty": (0,), "best_of": (1,), "suffix": ("",), "web_search_options": (),
    "reasoning_effort": ("none",), "verbosity": ("medium",),
}  # fmt: skip
# What says who asks and how a service keeps the request: it changes no token, so any value is taken and left alone.
ASIDE = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
         "parallel_tool_calls"}  # fmt: skip


def read_ask(data: bytes, chat: bool) -> Ask:
    """The request in the body of /v1/chat/completions, or of /v1/completions. Raises RefusedError."""
    return _checked(_object(data), chat)


def _object(data: bytes) -> dict[str, Any]:
    try:
        body = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON that can be read: {error}") from None
    if not isinstance(body, dict):
        raise RefusedError(400, f"the body is a JSON {type(body).__name__}, expected an object")
    return body


def _checked(body: Mapping[str, Any], chat: bool) -> Ask:
    fields = BOTH | (CHAT if chat else TEXT)
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in NOT_DONE and not any(value == same and type(value) is type(same) for same in NOT_DONE[name]):
            harmless = f"; leave it out{''.join(f', or give {one!r}' for one in NOT_DONE[name])}"
            raise RefusedError(400, f"{name} is not supported by this server{harmless}", name, "unsupported_parameter")
        if name not in fields and name not in NOT_DONE and name not in ASIDE:
            raise RefusedError(
                400, f"there is no field {name!r:.40}{near(name, set(fields))}", None, "unknown_parameter"
            )
    for name, (valid, expected) in fields.items():
        if name in given and not valid(given[name]):
            raise RefusedError(400, f"{name} is {given[name]!r:.60}, expected {expected}", name, "invalid_value")
    for name in ("model", "messages" if chat else "prompt"):
        if name not in given:
            raise RefusedError(400, f"the request has no {name}", name, "missing_required_parameter")
    return _ask(given, chat)


def read_inside(data: bytes) -> tuple[Ask, list[int]]:
    """What the chat page wants to look into: a request of /v1/chat/completions whose `answer` are the ids so far."""
    body = _object(data)
    answer = body.pop("answer", [])
    if answer != [] and not _ids(answer):
        raise RefusedError(400, f"answer is {answer!r:.60}, expected a list of token ids", "answer", "invalid_value")
    return _checked(body, True), answer


def read_tokenize(data: bytes) -> tuple[Ask, str | None]:
    """vLLM's request for the ids of a `prompt` or of `messages`, and the model that it names, if it does."""
    body = _object(data)
    kept: dict[str, Any] = {name: body[name] for name in ("prompt", "messages") if name in body}
    if len(kept) != 1 or not isinstance(kept.get("prompt", ""), str):
        raise RefusedError(400, "the request has no prompt that is a text, and no messages; expected one of these")
    return _checked({"model": "", **kept}, "messages" in kept), _model(body)


def read_detokenize(data: bytes) -> tuple[list[int], str | None]:
    """vLLM's request for the text of `tokens`, and the model that it names, if it does."""
    body = _object(data)
    tokens: Any = body.get("tokens")
    if tokens != [] and not _ids(tokens):
        raise RefusedError(400, f"tokens is {tokens!r:.60}, expected a list of token ids", "tokens", "invalid_value")
    return tokens, _model(body)


def _model(body: Mapping[str, Any]) -> str | None:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise RefusedError(400, f"model is {model!r:.60}, expected the name of a model", "model", "invalid_value")
    return model or None


def _ask(given: Mapping[str, Any], chat: bool) -> Ask:
    """The Ask of fields that are in order, each alone."""
    if "stream_options" in given and not given.get("stream"):
        raise RefusedError(400, "stream_options belongs to a stream; set stream to true", "stream_options")
    if "top_logprobs" in given and not given.get("logprobs"):
        raise RefusedError(400, "top_logprobs belongs to logprobs; set logprobs to true", "top_logprobs")
    if chat:
        prompts: tuple[Any, ...] = (read_messages(given["messages"]),)
        logprobs = given.get("top_logprobs", 0) if given.get("logprobs") else None
        longest = given.get("max_completion_tokens", given.get("max_tokens"))
    else:
        prompt = given["prompt"]
        prompts = (prompt,) if isinstance(prompt, str) or _ids(prompt) else tuple(prompt)
        logprobs, longest = given.get("logprobs"), given.get("max_tokens", 16)  # 16 is OpenAI's default
    if longest == 0 and not given.get("echo"):
        raise RefusedError(
            400, "max_tokens is 0, so there is nothing to answer; set echo, or ask for a token", "max_tokens"
        )
    stop = given.get("stop", [])
    return Ask(
        given["model"], chat, prompts, longest, given.get("n", 1), (stop,) if isinstance(stop, str) else tuple(stop),
        given.get("stream", False), given.get("stream_options", {}).get("include_usage", False), logprobs,
        given.get("echo", False), _options(given),
    )  # fmt: skip


def read_messages(messages: list[Any]) -> list[dict[str, str]]:
    """A conversation as `refimpl.text.chat` takes it. Raises RefusedError for anything but text."""
    found = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise RefusedError(400, f"{where} is {message!r:.60}, expected a role and content", "messages")
        role, content = message.get("role"), message.get("content")
        if extra := [name for name, value in message.items()
                     if name not in ("role", "content", "name") and value not in (None, [])]:  # fmt: skip
            said = f"{where} has {at_most(extra, 3)}, which is not supported; leave it out"
            raise RefusedError(400, said, "messages", "unsupported_parameter")
        if isinstance(content, list):
            parts = [part if isinstance(part, dict) else {"type": part} for part in content]
            if other := [part.get("type") for part in parts if part.get("type") != "text"]:
                said = f"{where} has a part of type {other[0]!r:.40}; this model reads text only"
                raise RefusedError(400, said, "messages", "unsupported_content")
            texts = [part.get("text") for part in parts]
            content = "".join(map(str, texts)) if all(map(_text, texts)) else texts
        if not isinstance(content, str):
            raise RefusedError(400, f"{where} has the content {content!r:.60}, expected text", "messages")
        if role == "developer":  # OpenAI's newer name
            role = "system"
        if role not in ("system", "user", "assistant"):
            said = f"{where} has the role {role!r:.40}, expected system, user or assistant"
            raise RefusedError(400, said, "messages")
        found.append({"role": role, "content": content})
    return found


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `generate`. What is not given is left to the folder's generation_config.json.

    Temperature 0 takes the likeliest token. A top_p of 0 also leaves the likeliest alone.
    """
    names = ("top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
    options = {name: given[name] for name in names if name in given}
    if "logit_bias" in given:
        options["sequence_bias"] = [[[int(id)], float(bias)] for id, bias in given["logit_bias"].items()]
    if "temperature" in given:
        options["do_sample"] = given["temperature"] > 0
        if given["temperature"] > 0:
            options["temperature"] = float(given["temperature"])
    if "top_p" in given:
        options["top_p"] = float(given["top_p"]) or 1e-9
    if "seed" in given:
        options["seed"] = given["seed"]
    return options


def refused(error: InputError, status: int = 400, param: str | None = None) -> RefusedError:
    """An InputError as the answer to the request that caused it."""
    return RefusedError(status, str(error), param)
