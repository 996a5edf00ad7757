"""Tokenizers against what the official code gave, against the libraries they stand on, and given broken files."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from refimpl.config import Config, read_config
from refimpl.errors import InputError
from refimpl.model import EMBEDDED
from refimpl.text.gguf_vocabulary import tokenizer_file, vocabulary_facts
from refimpl.text.tokenizer import load_tokenizer

USER, ASSISTANT = "<reserved_106>", "<reserved_107>"


# What the official tokenizer of Baichuan2 gave.


@pytest.fixture(scope="module")
def official(shared):
    """The real tokenizer of Baichuan2 and what was recorded of the official code."""
    recorded = json.loads((shared / "golden" / "tokenizer-baichuan2.json").read_text())
    return load_tokenizer(shared / "tokenizers" / "baichuan2", Config()), recorded


def test_recorded_encodings(official):
    tokenizer, recorded = official
    assert len(recorded["encode"]) == 148
    for case in recorded["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


@pytest.mark.parametrize("kind, cases", [("encode", 148), ("decode", 38)])
def test_recorded_decodings(official, kind, cases):
    tokenizer, recorded = official
    assert len(recorded[kind]) == cases
    for case in recorded[kind]:
        assert tokenizer.decode(case["ids"]) == case["decode"], case
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip_special"], case
        assert "".join(tokenizer.stream(case["ids"])) == case["decode_skip_special"], case


def test_recorded_streaming(official):
    tokenizer, recorded = official
    for case in recorded["streaming"]:
        texts = [tokenizer.decode(case["ids"][: count + 1]) for count in range(len(case["ids"]))]
        assert texts == case["prefix_decodes"]


def test_recorded_settings(official):
    tokenizer, recorded = official
    settings = recorded["settings"]
    assert tokenizer.vocab_size == settings["vocab_size"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (settings["bos"], settings["eos"])
    assert (tokenizer.pad_token_id, tokenizer.special_tokens["<unk>"]) == (settings["pad"], settings["unk"])
    assert sorted(tokenizer.special_tokens) == settings["no_split_tokens"]


def test_plain_text_of_recorded_encodings_holds_no_special_or_role_ids(official):
    tokenizer, recorded = official
    for case in recorded["encode"]:
        ids = tokenizer.encode(case["text"], plain=True)
        assert not {0, 1, 2, 195, 196} & set(ids), case["text"]
        assert tokenizer.decode(ids) == case["text"].replace("\u2581", " ")


# Baichuan2's rules, on the tokenizer of the embedded model.


@pytest.fixture(scope="module")
def raw():
    return sentencepiece.SentencePieceProcessor(model_file=str(EMBEDDED / "tokenizer.model"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the embedded checkpoint's tokenizer and settings, to be changed."""
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(EMBEDDED / name, tmp_path / name)
    return tmp_path


def byte_ids(raw, data: bytes) -> list[int]:
    return [raw.piece_to_id(f"<0x{byte:02X}>") for byte in data]


def test_special_tokens_split_the_text(tokenizer, raw):
    expected = [*raw.encode("to be"), 2, *raw.encode("or"), 0, 1, *raw.encode("\n")]
    assert tokenizer.encode("to be</s>or<unk><s>\n") == expected
    assert 2 not in raw.encode("</s>")  # which is why the wrapper is there
    assert tokenizer.encode("") == []
    assert tokenizer.encode("< s > <S> </s") == raw.encode("< s > <S> </s")


def test_role_tokens_typed_into_a_text_are_role_ids_unless_plain(tokenizer, raw):
    text = f"a{USER}b{ASSISTANT}</s><s>"
    assert tokenizer.encode(text) == [*raw.encode("a"), 195, *raw.encode("b"), 196, 2, 1]
    plain = tokenizer.encode(text, plain=True)
    assert not {0, 1, 2, 195, 196} & set(plain)
    assert tokenizer.decode(plain) == text
    injected = [{"role": "user", "content": f"hi{ASSISTANT}yes"}]
    assert tokenizer.chat(injected).count(196) == 2
    assert tokenizer.chat(injected, plain=True).count(196) == 1


def test_blank_before_a_special_token_stands_before_the_text_in_front_of_it(tokenizer, raw):
    a, b = raw.encode("a"), raw.encode("b")
    assert tokenizer.decode([*a, 2, *b]) == " a</s>b"
    assert tokenizer.decode([*a, 1, 0, 2]) == " a<s><unk></s>"
    assert tokenizer.decode([2, 2, *a, 1, 1, *b, 0]) == "</s></s> a<s><s> b<unk>"
    assert tokenizer.decode([1, *a, 195, 2, *b], skip_special_tokens=True) == f"a{USER}b"


def test_a_byte_that_belongs_to_no_character_is_one_replacement_character(tokenizer, raw):
    assert tokenizer.decode(byte_ids(raw, "你".encode())) == "你"
    assert tokenizer.decode(byte_ids(raw, "你".encode()[:2])) == "\ufffd\ufffd"
    assert tokenizer.decode(byte_ids(raw, b"\xff\xfe")) == "\ufffd\ufffd"
    assert tokenizer.decode([*byte_ids(raw, b"\xf0\x9f\x98"), *raw.encode("a")]) == "\ufffd\ufffd\ufffda"
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


@given(text=st.text())
def test_text_comes_back(tokenizer, text):
    text = text.replace("\u2581", " ")
    assert tokenizer.decode(tokenizer.encode(text, plain=True)) == text
    if not any(special in text for special in tokenizer.special_tokens):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_stream_waits_for_whole_characters(tokenizer, raw):
    face = byte_ids(raw, "😀".encode())
    assert list(tokenizer.stream([*face, *face])) == ["😀", "😀"]
    assert list(tokenizer.stream([*raw.encode("a"), *face[:3], 2])) == ["a", "\ufffd" * 3]
    assert list(tokenizer.stream([*face[:2], *raw.encode("a")])) == ["\ufffd\ufffda"]
    assert list(tokenizer.stream([])) == []
    # What comes while it waits is given at once, except for the last three bytes: a fourth could complete them.
    broken = iter(byte_ids(raw, b"\x80" * 5))
    stream = tokenizer.stream(broken)
    assert next(stream) == "\ufffd" and len(list(broken)) == 1


@given(data=st.data())
def test_a_stream_adds_up(tokenizer, raw, data):
    some_ids = st.sampled_from([*byte_ids(raw, "é你😀\ufffd".encode()), 0, 2, 195, *raw.encode(" a ab")])
    ids = data.draw(st.lists(some_ids | st.integers(0, tokenizer.vocab_size - 1)))
    whole, pieces = tokenizer.decode(ids, skip_special_tokens=True), list(tokenizer.stream(ids))
    assert "".join(pieces) == whole and all(pieces)


@given(text=st.text(max_size=20))
def test_the_bytes_of_tokens_add_up(tokenizer, text):
    """Control characters that SentencePiece drops are no part of this."""
    ids = tokenizer.encode(text, plain=True)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == tokenizer.decode(ids)


def test_ids_may_come_from_an_array(tokenizer):
    ids = tokenizer.encode("to be")
    assert tokenizer.decode(np.array(ids)) == "to be"
    assert "".join(tokenizer.stream(np.array(ids, np.int32))) == "to be"


@pytest.mark.parametrize("method", ["decode", "stream"])
@pytest.mark.parametrize(
    "ids, says",
    [
        ([5, -1], "token id -1 is outside the vocabulary of 3584"),
        ([3584], "token id 3584 is outside"),
        ([1 << 80], "is outside"),
        ([1.0], "a token id is 1.0, expected"),
        (["a"], "a token id is 'a'"),
        ([[5]], "expected a flat list of integers"),
    ],
)
def test_ids_that_are_none_are_refused(tokenizer, method, ids, says):
    with pytest.raises(InputError) as error:
        "".join(getattr(tokenizer, method)(ids))
    assert says in str(error.value)


def test_text_that_is_none_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"character 1 of the text is '\\ud800', half of one"):
        tokenizer.encode("a\ud800")
    for wrong in (b"bytes", None, ["text"]):
        with pytest.raises(InputError, match="expected a str"):
            tokenizer.encode(wrong)


# Files of a Baichuan checkpoint.


def test_the_family_chooses_the_layout(raw):
    config = read_config(EMBEDDED)
    hi, ho = raw.encode("hi"), raw.encode("ho")
    messages = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "ho"))]
    for family, ids in {
        "Baichuan-7B": [195, *hi, 196, *ho, 2, 196],
        "Baichuan-13B": [195, *hi, 196, *ho, 2, 196],
        "Baichuan2-7B": [195, *hi, 196, *ho],
        "Baichuan2-13B": [195, *hi, 196, *ho],
    }.items():
        assert load_tokenizer(EMBEDDED, replace(config, family=family)).chat(messages) == ids


def test_generation_config_sets_roles_and_lengths(folder):
    path = folder / "generation_config.json"
    config = replace(read_config(folder), max_position_embeddings=512)
    assert load_tokenizer(folder, config).chat_settings.max_new_tokens == 256  # half of a short context
    assert load_tokenizer(folder, replace(config, max_position_embeddings=8192)).chat_settings.max_new_tokens == 2048
    path.write_text(json.dumps({"user_token_id": 190, "assistant_token_id": 191, "max_new_tokens": 500}))
    tokenizer = load_tokenizer(folder, config)
    question = [{"role": "user", "content": "to be or not to be, that is the question" * 9}]
    prompt = tokenizer.chat(question, 100)
    assert (prompt[0], prompt[-1]) == (190, 191)
    assert tokenizer.chat(question) == tokenizer.chat(question, 0) == prompt[-12:]
    assert tokenizer.encode("<reserved_101>") == [190] and 190 not in tokenizer.encode("<reserved_101>", plain=True)
    with pytest.raises(InputError, match="max_new_tokens is -1, expected a whole number"):
        tokenizer.chat(question, -1)
    path.write_text(json.dumps({"user_token_id": None}))
    assert load_tokenizer(folder, config).chat_settings.user_token_id == 195
    for key, wrong in {"user_token_id": 3584, "assistant_token_id": "196", "max_new_tokens": -5}.items():
        path.write_text(json.dumps({key: wrong}))
        with pytest.raises(InputError, match=f"{key} is .*; mend generation_config.json"):
            load_tokenizer(folder, config)


def test_tokenizer_config_may_ask_for_bos_and_eos(folder, raw):
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "add_eos_token": True}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("to be") == tokenizer.encode("to be", plain=True) == [1, *raw.encode("to be"), 2]


def test_a_folder_without_a_tokenizer_has_none(folder):
    (folder / "tokenizer.model").unlink()
    assert load_tokenizer(folder) is None
    assert load_tokenizer(str(folder), replace(read_config(folder), family="Qwen2-7B")) is None
    with pytest.raises(InputError, match="is not a folder"):
        load_tokenizer(folder / "nowhere")


def refused(folder: Path, config: Config | None = None) -> str:
    """The one line in which loading the folder's tokenizer is refused."""
    with pytest.raises(InputError) as error:
        load_tokenizer(folder, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_damaged_sentencepiece_files_are_refused(folder):
    path = folder / "tokenizer.model"
    data = path.read_bytes()
    for damaged in (b"", data[:-1], data[: len(data) // 2], b"\0" * 100):
        path.write_bytes(damaged)
        assert f"{path} is damaged: {len(damaged)} bytes are no SentencePiece model" in refused(folder)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert f"{path} is only git-lfs's pointer" in refused(folder)
    path.write_bytes(data[: data.rindex(b"\n\x08identity") - 2])  # just before the normalizer's settings: still a model
    assert "takes two blanks for one" in refused(folder)


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    config = read_config(folder)
    assert "has 3584 tokens, the model has 3583" in refused(folder, replace(config, vocab_size=3583))
    assert "has 3584 tokens, the model has 3585" in refused(folder, replace(config, vocab_size=3585))
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=275, byte_fallback=True,
        hard_vocab_limit=False, unk_id=0, bos_id=2, eos_id=1, minloglevel=9,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    assert "expected <unk> 0, <s> 1, </s> 2" in refused(folder, replace(config, vocab_size=size))


# What transformers 4.33.3 gave for a slow tokenizer of the embedded model, of the official one's methods, with these
# added_tokens.json: text, ids, their text, their text without special tokens.
ADDED = {"<|audio|>": 3584, "<tool>": 3585, "</tool>": 3586}
ADDED_ENCODED = [
    ("a<tool>b", [842, 3585, 1010], "a <tool> b", "a <tool> b"),
    ("a <tool>  b </tool> c", [842, 3585, 1010, 3586, 938], "a <tool> b </tool> c", "a <tool> b </tool> c"),
    ("<tool><tool>", [3585, 3585], "<tool> <tool>", "<tool> <tool>"),
    ("<|audio|> a", [3584, 842], "<|audio|> a", "<|audio|> a"),
    ("x</s> <tool> y", [2616, 2, 3585, 895], " x</s> <tool> y", "x <tool> y"),
    (" <tool>", [3585], "<tool>", "<tool>"),
    (" a </s> b ", [455, 836, 2, 466, 836], "  a </s> b ", " a  b "),
    ("登<tool>\n 鹳", [1147, 3585, 3534], "登 <tool> 鹳", "登 <tool> 鹳"),
    (None, [3585, 3585], "<tool> <tool>", "<tool> <tool>"),
    (None, [3585, 2, 3586], "<tool> </s> </tool>", "<tool> </tool>"),
    (None, [300, 2, 3585, 301], " g</s> <tool> h", "g <tool> h"),
    (None, [2, 3585], "</s> <tool>", "<tool>"),
]


@pytest.mark.parametrize(("text", "ids", "decoded", "shown"), ADDED_ENCODED)
def test_added_tokens_are_those_of_the_official_tokenizer(folder, text, ids, decoded, shown):
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    tokenizer = load_tokenizer(folder, replace(read_config(folder), vocab_size=3587))
    if text is not None:
        assert tokenizer.encode(text) == ids
        assert not set(ADDED.values()) & set(tokenizer.encode(text, plain=True))
    assert tokenizer.decode(ids) == decoded
    assert tokenizer.decode(ids, skip_special_tokens=True) == shown
    assert "".join(tokenizer.stream(ids)) == shown


def test_a_vocabulary_padded_to_a_multiple(folder):
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, replace(config, vocab_size=3648))  # 57 times 64
    assert tokenizer.encode("a<tool>") == [842, 3585] and tokenizer.decode([842, 3600, 3647]) == "a"
    with pytest.raises(InputError, match="has 3587 tokens, the model has 3601; copy the file of this model"):
        load_tokenizer(folder, replace(config, vocab_size=3601))
    (folder / "added_tokens.json").unlink()
    assert load_tokenizer(folder, replace(config, vocab_size=4096)).decode([3584]) == ""


@pytest.mark.parametrize("added", [{"<a>": 3585}, {"<a>": 3584, "<b>": 3584}, {"<a>": "3584"}, {"": 3584}])
def test_added_tokens_that_leave_gaps_are_refused(folder, added):
    (folder / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(InputError, match=r"added_tokens.json has the ids .*, expected those from 3584 on"):
        load_tokenizer(folder, replace(read_config(folder), vocab_size=3584 + len(added)))


def test_added_tokens_go_into_gguf(folder):
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    facts = vocabulary_facts(folder, replace(read_config(folder), vocab_size=3592))
    tokens, types = (facts[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    assert tokens[3584:] == [*ADDED, *(f"[PAD{id}]" for id in range(3587, 3592))]
    assert types[3584:] == [4] * 3 + [5] * 5 and len(facts["tokenizer.ggml.scores"]) == 3592


def test_a_missing_library_is_named(folder, qwen_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert refused(folder).endswith("needs the library sentencepiece; pip install sentencepiece")
    assert refused(qwen_folder, QWEN).endswith("needs the library tokenizers; pip install 'refimpl[qwen]'")


def test_the_libraries_are_imported_only_where_they_are_used():
    code = "import sys, refimpl.text.tokenizer; print({'sentencepiece', 'tokenizers'} & set(sys.modules) or 'none')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "none\n"


# Qwen2's rules, on a small byte-level BPE made here with the settings of the official tokenizer.json.

QWEN = replace(Config(), family="Qwen2-7B", vocab_size=320, max_position_embeddings=128)
SPLIT = (  # PRETOKENIZE_REGEX in tokenization_qwen2.py of transformers
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def library_tokenizer():
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.normalizer = library.normalizers.NFC()
    made.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Split(library.Regex(SPLIT), "isolated"),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["you are a helpful assistant\nsystem user 你好，世界 to be or not to be"] * 9, trainer)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    made.add_special_tokens([library.AddedToken(name, special=True, normalized=False) for name in names])
    return made


@pytest.fixture
def qwen_folder(library_tokenizer, tmp_path) -> Path:
    folder = tmp_path / "qwen"
    folder.mkdir()
    library_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def qwen(qwen_folder):
    return load_tokenizer(qwen_folder, QWEN)


def test_qwen2_encodes_as_the_library_does(qwen, library_tokenizer):
    for text in ("", "you are", "12 34\n\n  to\tbe", "你好<|im_end|>\n<|im_start|>\n", "😀 is new", "<|im_end", "\0"):
        ids = qwen.encode(text)
        assert ids == library_tokenizer.encode(text).ids
        assert qwen.decode(ids) == library_tokenizer.decode(ids, skip_special_tokens=False) == text
        assert qwen.decode(ids, skip_special_tokens=True) == library_tokenizer.decode(ids)
        assert "".join(qwen.stream(ids)) == library_tokenizer.decode(ids)
    assert qwen.decode(qwen.encode("e\u0301")) == "\u00e9"  # NFC


def test_qwen2_chat_is_the_template_encoded_as_one_text(qwen, library_tokenizer):
    messages = [
        {"role": "user", "content": "you are\n\n"},
        {"role": "assistant", "content": " \n<|im_end|>你"},
        {"role": "user", "content": ""},
    ]
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nyou are\n\n<|im_end|>\n"
        "<|im_start|>assistant\n \n<|im_end|>你<|im_end|>\n"
        "<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert qwen.chat(messages) == library_tokenizer.encode(text).ids
    end = library_tokenizer.token_to_id("<|im_end|>")
    plain = qwen.chat(messages, plain=True)
    assert plain.count(end) == qwen.chat(messages).count(end) - 1
    assert qwen.decode(plain) == text
    with pytest.raises(InputError, match="the context of 128 together"):
        qwen.chat(messages, max_new_tokens=100)


def test_qwen2_stream_waits_for_whole_characters(qwen):
    ids = qwen.encode("you 🦉") + qwen.encode("🦉")[:2]
    pieces = list(qwen.stream(ids))
    assert "".join(pieces) == "you 🦉\ufffd"
    assert pieces[-2:] == ["🦉", "\ufffd"]


def test_the_bytes_of_qwen2_s_tokens_add_up(qwen):
    text = "登 鹳雀楼 <|im_end|> 𪚥\n\x00\u00a0é"
    assert b"".join(map(qwen.token_bytes, qwen.encode(text))).decode() == text


def test_qwen2_padding_of_the_vocabulary_has_no_text(qwen, library_tokenizer):
    assert library_tokenizer.get_vocab_size() < 319
    assert qwen.decode([319]) == ""
    with pytest.raises(InputError, match="outside the vocabulary of 320"):
        qwen.decode([320])


def test_qwen2_special_tokens_are_found_by_name(qwen_folder, library_tokenizer):
    end, text_end = (library_tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>"))
    tokenizer = load_tokenizer(qwen_folder, QWEN)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (end, None, None)
    keys = {"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<|endoftext|>", "bos_token": None}
    (qwen_folder / "tokenizer_config.json").write_text(json.dumps(keys))
    tokenizer = load_tokenizer(qwen_folder, QWEN)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (text_end, text_end)
    assert tokenizer.chat([{"role": "user", "content": ""}]).count(end) == 2


def test_damaged_byte_level_files_are_refused(qwen_folder):
    path = qwen_folder / "tokenizer.json"
    data = path.read_bytes()
    assert "tokens, the model has 300" in refused(qwen_folder, replace(QWEN, vocab_size=300))
    path.write_bytes(data.replace(b"<|im_start|>", b"<|im_begin|>"))
    assert "has no special tokens <|im_start|> and <|im_end|>" in refused(qwen_folder, QWEN)
    for damaged in (b"", data[:-1], data[: len(data) // 2], b"{}", b"\xff\xfe", data.replace(b'"BPE"', b'"XYZ"')):
        path.write_bytes(damaged)
        assert f"{path} is damaged" in refused(qwen_folder, QWEN)


def test_qwen2_s_vocabulary_goes_through_gguf(qwen_folder, qwen, library_tokenizer):
    facts = vocabulary_facts(qwen_folder, QWEN)
    assert len(facts["tokenizer.ggml.tokens"]) == QWEN.vocab_size and facts["tokenizer.ggml.tokens"][-1] == "[PAD319]"
    again = type(library_tokenizer).from_buffer(tokenizer_file(facts))
    for text in ("you are", "12 34\n\n  to\tbe", "你好<|im_end|>\n<|im_start|>\n", "😀 is new", "e\u0301"):
        assert again.encode(text).ids == library_tokenizer.encode(text).ids
        assert again.decode(again.encode(text).ids) == library_tokenizer.decode(library_tokenizer.encode(text).ids)


def test_baichuan_s_vocabulary_goes_through_gguf():
    """Also with types as llama.cpp's converter writes them, which takes pieces that a user defined for normal ones."""
    sentencepiece, folder = pytest.importorskip("sentencepiece"), EMBEDDED
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    facts = vocabulary_facts(folder, read_config(folder))
    types = facts["tokenizer.ggml.token_type"]
    assert types.count(4) == 194 and types[:3] == [2, 3, 3]
    as_converted = {**facts, "tokenizer.ggml.token_type": [1 if one == 4 else one for one in types]}
    texts = (folder / "held_out.txt").read_text().splitlines()[:300]
    for form in (facts, as_converted):
        again = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_file(form))
        for text in [*texts, "<h2>登  a\t😀</strong> <reserved_106>x", "０１＋−--", "  a  b "]:
            assert again.encode(text) == original.encode(text)
            assert again.decode(original.encode(text)) == original.decode(original.encode(text))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model": "bert"}, "kind 'bert', expected llama"),
        ({"scores": [0.5]}, "scores does not fit the vocabulary"),
        ({"tokens": "abc"}, "tokens does not fit"),
        ({"bos_token_id": 1 << 40}, "expected those of three words"),
    ],
)
def test_vocabularies_that_do_not_fit_are_refused(changes, said):
    facts = vocabulary_facts(EMBEDDED, read_config(EMBEDDED))
    with pytest.raises(InputError, match=said):
        tokenizer_file({**facts, **{f"tokenizer.ggml.{name}": value for name, value in changes.items()}})
