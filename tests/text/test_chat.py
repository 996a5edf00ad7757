"""The chat layouts against what the official code gave, with the real tokenizer and without it."""

import json
from dataclasses import replace

import pytest

from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.text.chat import LAYOUTS, ChatSettings, lay_out_baichuan, lay_out_baichuan2, lay_out_qwen2
from refimpl.text.tokenizer import load_tokenizer

# A few texts with the ids that Baichuan2's tokenizer gives them: enough of a tokenizer for the recorded cases below.
IDS = {
    "你好！有什么可以帮助你的吗？": [16829, 67, 5817, 21777, 2193, 93122, 68],
    "世界上第二高的山峰是哪座": [8352, 2382, 4767, 67740, 63687, 93110],
    "你是一个翻译助手。": [26553, 10166, 18183, 66],
    "今天天气怎么样？": [2441, 4054, 12000, 68],
    "系统提示。": [2274, 4434, 66],
    "百川智能。": [70335, 3932, 66],
    "第一句": [1870, 93226],
    "第二句": [2382, 93226],
    "你好！": [16829, 67],
    "答一": [93140, 92342],
    "答二": [93140, 92565],
    "再问": [92730, 92614],
    "你好": [16829],
    "欢迎": [3524],
    "再见": [20020],
    "好": [92428],
    "短": [93193],
    "问": [92614],
}
DIGITS = [92335, 92336, 92338, 92354, 92369, 92358, 92373, 92383, 92370, 92362]
IDS.update({str(digit): [id] for digit, id in enumerate(DIGITS)})


def encode(text: str) -> list[int]:
    ids = []
    while text:
        known = next(known for known in sorted(IDS, key=len, reverse=True) if text.startswith(known))
        ids, text = ids + IDS[known], text[len(known) :]
    return ids


def turns(*contents: str, first: str = "user") -> list[dict]:
    """Messages of alternating roles."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def system(content: str) -> list[dict]:
    return [{"role": "system", "content": content}]


WEATHER = turns(*("今天天气怎么样？" * 30 + str(number) for number in range(21)))
WEATHER_IDS = [[2441, 4054, 12000, 68] * 30 + encode(str(number)) for number in range(21)]
LONG, LONG_IDS = "百川智能。" * 400, [70335, 3932, 66] * 400

# messages, context, max_new_tokens, what build_chat_input gave (Baichuan2), what _build_chat_input gave (Baichuan 1)
RECORDED = {
    "empty": (turns(""), 4096, 2048, [195, 196], [195, 196]),
    "multi": (
        turns("你好", "你好！有什么可以帮助你的吗？", "世界上第二高的山峰是哪座"), 4096, 2048,
        [195, 16829, 196, 16829, 67, 5817, 21777, 2193, 93122, 68, 195, 8352, 2382, 4767, 67740, 63687, 93110, 196],
        [195, 16829, 196, 16829, 67, 5817, 21777, 2193, 93122, 68, 2, 195, 8352, 2382, 4767, 67740, 63687, 93110, 196],
    ),
    "system": (
        system("你是一个翻译助手。") + turns("你好"), 128, 128, [26553, 10166, 18183, 66, 195, 16829, 196], InputError
    ),
    "ends with assistant": (
        turns("你好", "你好！"), 4096, 2048, [195, 16829, 196, 16829, 67], [195, 16829, 196, 16829, 67, 2, 196]
    ),
    "two users in a row": (
        turns("第一句") + turns("第二句"), 128, 128, [195, 2382, 93226, 196], [195, 1870, 93226, 195, 2382, 93226, 196]
    ),
    "two assistants in a row": (
        [*turns("问", "答一"), *turns("答二", "再问", first="assistant")], 4096, 2048,
        [195, 92614, 196, 93140, 92342, 196, 93140, 92565, 195, 92730, 92614, 196],
        [195, 92614, 196, 93140, 92342, 2, 196, 93140, 92565, 2, 195, 92730, 92614, 196],
    ),
    "starts with assistant": (
        turns("欢迎", "你好", first="assistant"), 128, 128, [195, 16829, 196], [195, 16829, 196]
    ),
    "more to come than fits": (turns("你好", "你好！"), 128, 200, [], [195, 16829, 196, 16829, 67, 2, 196]),
    "one long message": (
        turns(LONG), 256, 200, ([195, *LONG_IDS, 196])[-56:], [*[195, *LONG_IDS][-128:], 196]
    ),
    "long history": (
        WEATHER, 512, 128,
        [195, *WEATHER_IDS[18], 196, *WEATHER_IDS[19], 195, *WEATHER_IDS[20], 196],  # 370 ids
        [195, *WEATHER_IDS[18], 196, *WEATHER_IDS[19], 2, 195, *WEATHER_IDS[20], 196],  # 371 ids
    ),
    "long history and a system message": (
        system("系统提示。" * 20) + WEATHER, 256, 200, [*WEATHER_IDS[20][-55:], 196], [195, *WEATHER_IDS[20], 196]
    ),
    "long system message": (
        system(LONG) + turns("你好", "好", "再见"), 512, 128, ([*LONG_IDS, 195, 20020, 196])[-384:], InputError
    ),
    "last round too long": (
        turns("短", "短", LONG), 256, 200, ([*LONG_IDS, 196])[-56:], [*LONG_IDS[-128:], 196]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDED)
@pytest.mark.parametrize("generation", [2, 1])
def test_layout_is_the_recorded_one(case, generation):
    messages, context, new, *expected = RECORDED[case]
    layout, ids = {2: (lay_out_baichuan2, expected[0]), 1: (lay_out_baichuan, expected[1])}[generation]
    settings = ChatSettings(context, new)
    if ids is InputError:
        with pytest.raises(InputError, match="no role system; put the text"):
            layout(messages, encode, settings)
    else:
        assert layout(messages, encode, settings) == ids


def test_all_recorded_conversations(shared):
    recorded = json.loads((shared / "golden" / "chat-baichuan2.json").read_text())
    folder = shared / "tokenizers" / "baichuan2"
    tokenizers = {
        "build_chat_input": load_tokenizer(folder, Config(family="Baichuan2-13B")),
        "v1_build_chat_input": load_tokenizer(folder, Config(family="Baichuan-13B")),
    }
    compared = 0
    for case in recorded["cases"]:
        for name, tokenizer in tokenizers.items():
            settings = replace(tokenizer.chat_settings, context=case["model_max_length"])
            tokenizer = replace(tokenizer, chat_settings=settings)
            try:
                ids = tokenizer.chat(case["messages"], case["max_new_tokens"])
            except InputError:
                assert name + "_error" in case, case["name"]
            else:
                assert ids == case[name], case["name"]
            compared += 1
    assert compared == 52


def test_rounds_that_fit_exactly_are_kept():
    # By the rule of build_chat_input: system and rounds together may fill context - max_new_tokens, and 196 comes on
    # top and is paid for by the first id. One token less, and the older round goes.
    messages = [*system("系统提示。"), *turns("你好", "好", "再见")]
    whole = [2274, 4434, 66, 195, 16829, 196, 92428, 195, 20020]
    assert lay_out_baichuan2(messages, encode, ChatSettings(100, 100 - 9)) == [*whole, 196][-9:]
    assert lay_out_baichuan2(messages, encode, ChatSettings(100, 100 - 8)) == [2274, 4434, 66, 195, 20020, 196]


def test_baichuan2_keeps_an_answer_before_the_first_question():
    messages = turns("欢迎", "你好", first="assistant")
    assert lay_out_baichuan2(messages, encode, ChatSettings()) == [196, 3524, 195, 16829, 196]


def test_baichuan1_keeps_half_the_context_for_the_prompt():
    messages = turns("你好", "好", "再见")  # 195 16829 196 92428 2 and 195 20020: 7 ids
    assert len(lay_out_baichuan(messages, encode, ChatSettings(14, 13))) == 7 + 1
    assert lay_out_baichuan(messages, encode, ChatSettings(13, 12)) == [195, 20020, 196]
    assert len(lay_out_baichuan(messages, encode, ChatSettings(13, 6))) == 7 + 1
    # A full prompt ends the search before the system message is seen: the original raises nothing here.
    assert lay_out_baichuan(system("系统提示。") + turns("你好"), encode, ChatSettings(4, 3)) == [195, 16829, 196]


def test_role_ids_are_the_settings():
    settings = ChatSettings(user_token_id=7, assistant_token_id=8, eos_token_id=9)
    assert lay_out_baichuan2(turns("你好", "好", "再见"), encode, settings) == [7, 16829, 8, 92428, 7, 20020, 8]
    assert lay_out_baichuan(turns("你好", "好", "再见"), encode, settings) == [7, 16829, 8, 92428, 9, 7, 20020, 8]


def render_qwen2(messages, context=100, max_new_tokens=1) -> str:
    """The ChatML text of a conversation, with a character as token; the ids 1 and 2 stand for the special tokens."""
    settings = ChatSettings(context, max_new_tokens, user_token_id=1, assistant_token_id=1, eos_token_id=2)
    ids = lay_out_qwen2(messages, lambda text: [ord(character) for character in text], settings)
    return "".join({1: "<|im_start|>", 2: "<|im_end|>"}.get(id, chr(id)) for id in ids)


def test_qwen2_writes_chatml():
    # As the chat_template of Qwen2-7B-Instruct renders it.
    assert render_qwen2(turns("Hi")) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render_qwen2(system("Be brief.") + turns("1+1?", "2", " ")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n <|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_qwen2_refuses_what_does_not_fit():
    length = len(render_qwen2(system("") + turns("Hi")).replace("<|im_start|>", "1").replace("<|im_end|>", "2"))
    assert render_qwen2(system("") + turns("Hi"), context=length + 5, max_new_tokens=5)
    with pytest.raises(InputError, match=f"has {length} tokens and the answer may have 6, .* leave out old messages"):
        render_qwen2(system("") + turns("Hi"), context=length + 5, max_new_tokens=6)


@pytest.mark.parametrize(
    "messages, says",
    [
        ([], "at least one"),
        ("Hi", "expected a list"),
        (None, "expected a list"),
        (["Hi"], "message 0 is 'Hi', expected {'role': "),
        ([None], "message 0 is None, expected {'role': "),
        ([{"role": "user"}], "message 0 is {'role': 'user'}"),
        ([{"role": "user", "content": None}], "message 0 has the content None, expected text"),
        ([*turns("你好"), {"role": "user", "content": ["text"]}], "message 1 has the content"),
        ([{"role": "tool", "content": "你好"}], "the role 'tool', expected one of system, user, assistant"),
        ([{"role": ["user"], "content": "你好"}], "message 0 has the role"),
    ],
)
@pytest.mark.parametrize("family", LAYOUTS)
def test_what_is_no_conversation_is_refused_in_one_line(family, messages, says):
    with pytest.raises(InputError) as error:
        LAYOUTS[family](messages, encode, ChatSettings())
    assert says in str(error.value) and "\n" not in str(error.value)


def test_baichuan2_takes_a_system_message_first_only():
    with pytest.raises(InputError, match="message 2 has the role system, which Baichuan2 takes first only; move"):
        lay_out_baichuan2(turns("你好", "好") + system("系统提示。"), encode, ChatSettings())
    assert lay_out_baichuan2(system("系统提示。"), encode, ChatSettings()) == [2274, 4434, 66, 196]
