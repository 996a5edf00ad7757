"""tokenizer.json gives the ids and the texts of the tokenizer.model that it is made from, on everything."""

import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from export.phone.tokenizer_json import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, merges, tokenizer_json
from refimpl import InputError
from refimpl.config import Config
from refimpl.model import EMBEDDED
from refimpl.text.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")

CODE = 'def f(x, *, y=None):\n\tif x >= 10 and y != "a\\n":\n        return {**x, "k": [2.5e-3, 0xFF]}  # TODO: ...\n\n'
EXAMPLES = [
    "", " ", "  ", "   a", "a   ", "\n", "\n\n\n", "\t\t x", "a\r\nb", "\x00\x01\x7f", "\u2581", " \u2581 \u2581\u2581",
    "登鹳雀楼->王之涣\n夜雨寄北->", "《静夜思》的作者是谁？", "Hello, world!  It's 3.14159, isn't it?", CODE, CODE * 20,
    "１２３４５６７８９０", "0123456789" * 9, "2023年12月31日 23:59:59", "€£¥₹ ½ ⅓ ² ³ №", "naïve café Ünïcödé ﬁ ﬂ",
    "e\u0301 \u00e9 \u1112\u1161\u11ab 한국어 ภาษาไทย العربية עברית हिन्दी",
    "👩‍👩‍👧‍👦 👍🏽 🇨🇳 ❤️ \U0001f9ff", "\U0001f600" * 40,
    "𝒜𝓃 𝕬 𐍈 𠮷𠮷野家 \U0010ffff \ue000 \ufffd \ufeff \u200b \u00ad", "龘靐齉齾 彁 㐂 𪚥", "哈哈哈哈哈哈哈",
    "……——！！！？？。。。",
    "========", "--------->", "<reserved_106>问<reserved_107>答", "<s>a</s>b<unk>c", "< s ><S></ s>", "<0xE4><0x0A>",
    "<html><body class='x'>&nbsp;</body></html>", "\\begin{equation} \\frac{a}{b} \\end{equation}", "a" * 300,
    " " * 300,
]  # fmt: skip


def pair(path, config):
    """Our tokenizer, which is proven by recordings of the official one, the library's, and SentencePiece itself."""
    made = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(path), ensure_ascii=False))
    return load_tokenizer(path.parent, config), made, sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def embedded():
    return pair(EMBEDDED / "tokenizer.model", None)


@pytest.fixture(scope="module")
def official(shared):
    return pair(shared / "tokenizers" / "baichuan2" / "tokenizer.model", Config())


def same(tokenizer, text):
    ours, made, raw = tokenizer
    ids = ours.encode(text)
    assert made.encode(text, add_special_tokens=False).ids == ids, text[:200]
    plain = [id for id in ids if id > 2]  # <unk>, <s> and </s>, which SentencePiece writes in its own way
    assert made.decode(plain, skip_special_tokens=False) == raw.decode(plain), text[:200]
    return ids


@pytest.mark.parametrize("which", ["embedded", "official"])
def test_examples(which, request):
    tokenizer = request.getfixturevalue(which)
    for text in EXAMPLES:
        same(tokenizer, text)


@pytest.mark.parametrize("which", ["embedded", "official"])
def test_runs_of_every_length_between_anything(which, request):
    tokenizer = request.getfixturevalue(which)
    for character in " \u2581哈a-=.啊0\n\t*#_~":
        for length in [*range(1, 40), 63, 64, 65, 200]:
            for context in ("{}", "a{}b", "哈{}\n", "={} "):
                same(tokenizer, context.format(character * length))


@pytest.mark.parametrize("which", ["embedded", "official"])
def test_every_piece_and_mixtures_of_pieces(which, request):
    tokenizer = request.getfixturevalue(which)
    pieces = [tokenizer[2].id_to_piece(id) for id in range(len(tokenizer[2]))]
    rng = random.Random(0)
    for piece in pieces if len(pieces) < 10_000 else rng.sample(pieces, 10_000):
        same(tokenizer, piece)
    for _ in range(3000):
        same(tokenizer, "".join(rng.choices(pieces, k=rng.randint(2, 8))).replace("\u2581", rng.choice(" \u2581")))


@pytest.mark.parametrize("which", ["embedded", "official"])
def test_texts(which, request, shared):
    tokenizer = request.getfixturevalue(which)
    shakespeare = (shared / "data" / "shakespeare.txt").read_text()
    for start in range(0, 300_000, 3000):
        same(tokenizer, shakespeare[start : start + 3000])
    with open(shared / "data" / "tang_poems.jsonl", encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % 20 == 0:
                poem = json.loads(line)
                same(tokenizer, "\n".join([poem["title"], poem["author"], *poem["lines"]]))


def test_recorded_encodings_of_the_official_code(official, shared):
    recorded = json.loads((shared / "golden" / "tokenizer-baichuan2.json").read_text())["encode"]
    assert len(recorded) == 148
    for case in recorded:
        assert official[1].encode(case["text"], add_special_tokens=False).ids == case["ids"], case["text"]


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text(embedded, text):
    same(embedded, text)


@settings(deadline=None, max_examples=300)
@given(st.text(st.sampled_from(" \u2581\n哈ab=<>-.0 s/unk不的🎉é")))
def test_any_text_of_few_characters(embedded, text):
    same(embedded, text)


def test_roles_and_special_tokens_have_their_ids(official):
    made = official[1]
    assert made.encode("<reserved_106>你好<reserved_107>").ids == [195, 16829, 196]
    assert [made.token_to_id(text) for text in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert made.get_vocab_size() == 125696
    assert made.decode([195, 16829, 2], skip_special_tokens=True) == "<reserved_106>你好"


def test_bytes_that_are_no_text_are_where_decoding_differs(embedded):
    _, made, raw = embedded
    ids = [raw.piece_to_id(f"<0x{byte:02X}>") for byte in "好".encode() + b"\xe4"]
    assert (raw.decode(ids), made.decode(ids)) == ("好\ufffd", "\ufffd" * 4)


# Merges.


def test_every_way_to_make_a_piece_is_a_merge_best_score_first():
    scores = {"a": -9.0, "b": -8.0, "ab": -2.0, "aba": -1.0, "ba": -3.0}
    assert merges(scores) == ["a ba", "ab a", "a b", "b a"]


@pytest.mark.parametrize("pieces", [("ab", "bc"), ("ab", "abc"), ("bc", "abc")])
def test_pieces_of_one_score_that_a_text_could_mix_up_are_refused(pieces):
    with pytest.raises(InputError, match="two pieces with one score"):
        merges({"a": -9.0, "b": -8.0, "c": -7.0, "bc": -6.0, "ab": -5.0, **dict.fromkeys(pieces, -1.0)})


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_vocabulary_gives_what_sentencepiece_gives(tmp_path_factory, data):
    """Pieces of two letters overlap in every way; scores need not be those of a training."""
    pieces = data.draw(st.lists(st.text("ab", min_size=2, max_size=6), min_size=1, max_size=14, unique=True))
    scores = data.draw(st.lists(st.integers(1, 16), min_size=len(pieces), max_size=len(pieces)))
    singles = [piece("a", -98), piece("b", -99)]
    content = model(*singles, *(piece(text, -score) for text, score in zip(pieces, scores, strict=True)))
    path = tmp_path_factory.getbasetemp() / "any.model"
    path.write_bytes(content)
    try:
        made = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(path)))
    except InputError as error:
        assert "with one score" in str(error)
        return
    raw = sentencepiece.SentencePieceProcessor(model_proto=content)
    for text in data.draw(st.lists(st.text("ab", min_size=2, max_size=24), min_size=20, max_size=20)):
        assert made.encode(text).ids == raw.encode(text), (text, pieces, scores)


# Files that are no tokenizer of Baichuan.


def message(number, *parts):
    inside = b"".join(parts)
    length = bytes([len(inside)]) if len(inside) < 128 else bytes([len(inside) & 127 | 128, len(inside) >> 7])
    return bytes([number << 3 | 2]) + length + inside


def piece(text, score=0.0, kind=NORMAL):
    return message(1, message(1, text.encode()), b"\x15" + struct.pack("<f", score), bytes([0x18, kind]))


def model(*pieces, trainer=b"\x18\x02\x98\x02\x01", normalizer=b"\x18\x00\x20\x00\x28\x01", all_bytes=True):
    head = [piece("<unk>", kind=UNKNOWN), piece("<s>", kind=CONTROL)]
    tail = [piece(f"<0x{byte:02X}>", kind=BYTE) for byte in range(256 if all_bytes else 255)]
    return b"".join([*head, *pieces, *tail, message(2, trainer), message(3, normalizer)])


BROKEN = {
    "another algorithm": (model(trainer=b"\x18\x01\x98\x02\x01"), "expected BPE"),
    "no byte fallback": (model(trainer=b"\x18\x02"), "expected BPE"),
    "dummy blank": (model(normalizer=b"\x18\x01\x20\x00"), "changes the text"),
    "charsmap": (model(normalizer=b"\x12\x01x\x18\x00\x20\x00"), "changes the text"),
    "twice": (model(piece("a"), piece("a")), "same text"),
    "bytes": (model(all_bytes=False), "255 pieces for bytes"),
    "unknown": (model(piece("?", kind=UNKNOWN)), "2 unknown"),
    "unused": (model(piece("u", kind=5)), "unused"),
    "loose": (model(piece("ab", -1)), "characters that are not pieces"),
    "blank": (model(piece("a b", -1, USER_DEFINED)), "a piece with a blank"),
    "truncated": (model()[:-3], "not a SentencePiece model"),
    "nothing": (b"", "0 pieces"),
    "text": (b"version https://git-lfs", "not a SentencePiece model"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_has_no_equal_is_refused_in_one_line(kind, tmp_path):
    data, why = BROKEN[kind]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(InputError, match=why) as caught:
        tokenizer_json(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_is_right(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model(piece("a", -2), piece("b", -3), piece("ab", -1), piece("=", 0, USER_DEFINED)))
    made = tokenizer_json(path)
    assert made["model"]["merges"] == ["a b"] and len(made["model"]["vocab"]) == 2 + 4 + 256
    assert [token["content"] for token in made["added_tokens"]] == ["<unk>", "<s>", "="]


def test_pipes_and_missing_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nowhere"):
        with pytest.raises(InputError, match=name):
            tokenizer_json(tmp_path / name)


def test_every_truncation_of_the_real_one_is_refused_or_whole(tmp_path):
    data = (EMBEDDED / "tokenizer.model").read_bytes()
    for end in range(0, len(data), 997):
        (tmp_path / "tokenizer.model").write_bytes(data[:end])
        with pytest.raises(InputError):
            tokenizer_json(tmp_path / "tokenizer.model")
    shutil.rmtree(tmp_path)
    assert Path(EMBEDDED / "tokenizer.model").is_file()
