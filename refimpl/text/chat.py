"""A conversation as the token ids of a prompt: the layouts of Baichuan2, Baichuan 1 and Qwen2.

    Baichuan2    system 195 question 196 answer 195 question 196
    Baichuan 1          195 question 196 answer </s> 195 question 196
    Qwen2        <|im_start|>system⏎ system <|im_end|>⏎ <|im_start|>user⏎ question <|im_end|>⏎ <|im_start|>assistant⏎

Each layout is a pure function of the messages, an `encode` from text to ids, and five numbers. Each follows its
original to the letter. They differ most in what they do with a conversation that is too long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from refimpl.errors import InputError

Message = Mapping[str, str]  # {"role": "user", "content": "..."}
Encode = Callable[[str], list[int]]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatSettings:
    """The numbers of a layout; lengths are in tokens. The defaults are those of Baichuan2's chat models."""

    context: int = 4096  # of the prompt and the answer together: model_max_length in the official code
    max_new_tokens: int = 2048  # kept free for the answer
    user_token_id: int = 195  # opens what the user says
    assistant_token_id: int = 196  # opens what the assistant says
    eos_token_id: int = 2  # ends what the assistant says (Baichuan 1) or what anybody says (Qwen2)


def lay_out_baichuan2(messages: Sequence[Message], encode: Encode, settings: ChatSettings) -> list[int]:
    """The prompt of a Baichuan2 chat model, at most `context - max_new_tokens` ids long.

    A system message may come first; it has no role id. There is no <s>, and no </s> after an answer. A conversation
    that is too long loses its oldest rounds (a user's message starts a round); if the newest alone is too long, the
    prompt loses its beginning, system message and role id included. If the assistant spoke last, no 196 is added.
    Otherwise 196 is added, but not counted with the rounds: if they fit exactly, the prompt loses its first id.

    As in the original, if `max_new_tokens` equals the context, the final cut removes nothing. If it is larger, its
    excess is cut off the beginning, which may leave an empty prompt.

    Raises InputError for what is not a conversation and for a system message that is not the first.

    **Source** `build_chat_input` in generation_utils.py of Baichuan2-7B-Chat and Baichuan2-13B-Chat (the same file).
    """
    check_messages(messages)
    late = [number for number, message in enumerate(messages) if number and message["role"] == "system"]
    if late:
        raise InputError(f"message {late[0]} has the role system, which Baichuan2 takes first only; move it there")
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    opening = {"user": settings.user_token_id, "assistant": settings.assistant_token_id}
    room = settings.context - settings.max_new_tokens
    prompt, rounds, newer = encode(system), [], []  # type: list[int], list[int], list[int]
    turns = [message for message in messages if message["role"] != "system"]
    for number, message in reversed(list(enumerate(turns))):
        newer = [opening[message["role"]], *encode(message["content"]), *newer]
        if message["role"] == "user" or number == 0:
            if rounds and len(prompt) + len(rounds) + len(newer) > room:
                break
            rounds, newer = newer + rounds, []
    prompt = prompt + rounds
    if messages[-1]["role"] != "assistant":
        prompt.append(settings.assistant_token_id)
    return prompt[-room:]  # room may be zero or negative, see above


def lay_out_baichuan(messages: Sequence[Message], encode: Encode, settings: ChatSettings) -> list[int]:
    """The prompt of a Baichuan 1 chat model: at most `max(context // 2, context - max_new_tokens)` ids, and 196.

    Every answer ends with </s>; 196 always comes last, even after an answer. An answer before the first question is
    dropped. A conversation that is too long loses its oldest rounds, then its beginning.

    Raises InputError for what is not a conversation and for a system message, unless it is in the part that is lost.

    **Source** `_build_chat_input` in modeling_baichuan.py of Baichuan-13B-Chat; Baichuan-7B has no layout of its own.
    """
    check_messages(messages)
    room = max(settings.context // 2, settings.context - settings.max_new_tokens)
    prompt, newer = [], []  # type: list[int], list[int]
    for message in reversed(messages):
        if message["role"] == "system":
            raise InputError("Baichuan 1 has no role system; put the text at the beginning of the first user message")
        if message["role"] == "assistant":
            newer = [settings.assistant_token_id, *encode(message["content"]), settings.eos_token_id, *newer]
            continue
        newer = [settings.user_token_id, *encode(message["content"]), *newer]
        if prompt and len(prompt) + len(newer) > room:
            break
        prompt, newer = newer + prompt, []
        if len(prompt) >= room:
            break
    return [*prompt[-room:], settings.assistant_token_id]


def lay_out_qwen2(messages: Sequence[Message], encode: Encode, settings: ChatSettings) -> list[int]:
    """The prompt of a Qwen2 chat model (ChatML). If the first message is not a system message, Qwen2's own comes first.

    Here `user_token_id` and `assistant_token_id` are both <|im_start|>, and `eos_token_id` is <|im_end|>.

    Raises InputError for what is not a conversation, and for one that does not leave `max_new_tokens` of the context
    free: the original has no rule for shortening it.

    **Source** `chat_template` in tokenizer_config.json of Qwen2-7B-Instruct. There, the prompt is one text.
    Special tokens are split off before anything else, so encoding the texts between them gives the same ids.
    """
    check_messages(messages)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    prompt: list[int] = []
    for message in messages:
        text = encode(f"{message['role']}\n{message['content']}")
        prompt += [settings.user_token_id, *text, settings.eos_token_id, *encode("\n")]
    prompt += [settings.assistant_token_id, *encode("assistant\n")]
    if len(prompt) + settings.max_new_tokens > settings.context:
        raise InputError(
            f"the conversation has {len(prompt)} tokens and the answer may have {settings.max_new_tokens}, "
            f"more than the context of {settings.context} together; leave out old messages"
        )
    return prompt


LAYOUTS: dict[str, Callable[[Sequence[Message], Encode, ChatSettings], list[int]]] = {
    "Baichuan-7B": lay_out_baichuan,
    "Baichuan-13B": lay_out_baichuan,
    "Baichuan2-7B": lay_out_baichuan2,
    "Baichuan2-13B": lay_out_baichuan2,
    "Qwen2-7B": lay_out_qwen2,
}


def check_messages(messages: Sequence[Message]) -> None:
    """Raises InputError unless the messages are a list of at least one {"role": ..., "content": text}."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"the messages are {messages!r:.60}, expected a list of at least one role and content")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise InputError(f"message {number} is {message!r:.60}, expected {{'role': ..., 'content': ...}}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise InputError(f"message {number} has the role {role!r:.40}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"message {number} has the content {content!r:.40}, expected text")
