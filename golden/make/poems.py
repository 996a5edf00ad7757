"""The data of the small Baichuan2: Tang poems and plays, the tokenizer, and the windows for training.

Everything random comes from a seed, so the same files give the same bytes. Nothing here knows the model.
"""

import io
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

UNK, BOS, EOS = 0, 1, 2
NEWLINE, USER, ASSISTANT = 5, 195, 196

# kind of document -> its share of the training tokens
MIX = {"poems": 0.54, "famous": 0.17, "pairs": 0.12, "chat": 0.10, "shakespeare": 0.07}


@dataclass(frozen=True)
class Poem:
    """One poem: its titles, its author, its lines with punctuation, and the collection that it comes from."""

    titles: tuple[str, ...]
    author: str
    lines: tuple[str, ...]
    source: str

    @property
    def clauses(self) -> list[str]:
        """The half-lines without punctuation; two versions of a poem share some."""
        return [c for line in self.lines for c in re.split(r"\W+", line) if c]

    def text(self, title: str | None = None) -> str:
        """The poem as a document, with title and author above it or without; every line ends with a line break."""
        header = f"{title}\n{self.author}\n" if title else ""
        return header + "".join(line + "\n" for line in self.lines)


def without_notes(text: str) -> str:
    """The text without editors' notes in parentheses; a note that is not closed reaches to the end of the line."""
    return re.sub(r"\s*[（(][^）)]*([）)]|$)", "", text).strip()


def read_poems(path: Path) -> list[Poem]:
    """The poems of a JSONL file, cleaned. Poems with illegible characters are left out."""
    poems = []
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        titles = [without_notes(title) for title in record["title"].split(" / ")]
        lines = [line for line in map(without_notes, record["lines"]) if re.search(r"\w", line)]
        if lines and all(titles) and "□" not in "".join(lines):
            poems.append(Poem(tuple(titles), record["author"], tuple(lines), record["source"]))
    return poems


def split_poems(poems: list[Poem], rng: random.Random, share: float = 0.02) -> tuple[list[Poem], ...]:
    """(famous, others, held_out), with no poem in two of them.

    Versions of one poem spoil each other, so a poem that has two clauses in common with an anthology's is dropped from
    the later sources. Held out are poems of the big collection that share no clause with any other poem.
    """
    known: set[str] = set()
    famous: list[Poem] = []
    others: list[Poem] = []
    for poem in poems:  # anthologies come first in the file
        if sum(clause in known for clause in set(poem.clauses)) >= 2:
            continue
        if poem.source != "quantangshi":
            known.update(poem.clauses)
        (others if poem.source == "quantangshi" else famous).append(poem)
    uses = Counter(clause for poem in famous + others for clause in poem.clauses)
    unique = [poem for poem in others if all(uses[clause] == 1 for clause in poem.clauses)]
    held_out = rng.sample(unique, round(share * len(others)))
    gone = set(held_out)
    return famous, [poem for poem in others if poem not in gone], held_out


def split_plays(text: str, share: float = 0.05, size: int = 500) -> tuple[list[str], list[str]]:
    """(training, held-out) passages of whole speeches with at least `size` characters; the end is held out."""
    cut = text.index("\n\n", int(len(text) * (1 - share))) + 2
    return passages(text[:cut], size), passages(text[cut:], size)


def passages(text: str, size: int) -> list[str]:
    """Passages of speeches, which are separated by empty lines, with at least `size` characters each."""
    found, passage = [], ""
    for speech in text.strip().split("\n\n"):
        passage += speech + "\n\n"
        if len(passage) >= size:
            found.append(passage[:-1])
            passage = ""
    return found + [passage[:-1]] * bool(passage)


def authors_by_title(poems: list[Poem]) -> dict[str, str]:
    """title -> author, for the titles that only one author used."""
    authors = defaultdict(set)
    for poem in poems:
        for title in poem.titles:
            authors[title].add(poem.author)
    return {title: names.pop() for title, names in authors.items() if len(names) == 1}


class Corpus:
    """The split data: `famous`, `others` and `plays` for training; `held_out` and `held_out_plays` never."""

    def __init__(self, folder: Path, seed: int):
        rng = random.Random(seed)
        poems = read_poems(folder / "tang_poems.jsonl")
        self.famous, self.others, self.held_out = split_poems(poems, rng)
        plays = (folder / "shakespeare.txt").read_text(encoding="utf-8")
        self.plays, self.held_out_plays = split_plays(plays)
        self.tang300 = [poem for poem in self.famous if poem.source == "tang300"]
        self.titles = authors_by_title(self.tang300)
        taken = {title for poem in self.tang300 for title in poem.titles}
        poets = {poem.author for poem in self.famous}
        all_titles = authors_by_title(self.famous + self.others)
        self.other_titles = {
            title: author for title, author in all_titles.items() if title not in taken and author in poets
        }

    def held_out_documents(self) -> list[str]:
        """The held-out poems as in training: every other one has title and author above it."""
        return [poem.text(poem.titles[0] if i % 2 == 0 else None) for i, poem in enumerate(self.held_out)]


def held_out_sample(corpus: Corpus, limit: int = 40_000) -> str:
    """The first held-out poems that fit into `limit` bytes; an empty line follows each."""
    sample = ""
    for document in corpus.held_out_documents():
        if len((sample + document + "\n").encode()) > limit:
            break
        sample += document + "\n"
    return sample


TAGS = "img h2 td strong table tr li b h3 br h4 h5 p h1 tbody"
MARKS = """+ - = ， 。 ！ ？ 、 ： ￥ . ! ? ... 。。。 。。。。。。 《 》 【 】 『 』 ```
<!-- --> --- <!DOCTYPE> ； ． ＝ ＜ ＞ － ＋ ％ ‼ ㊣ ／ ｜"""


def special_symbols() -> list[str]:
    """The user-defined pieces of the original, ids 3..196, in its order."""
    symbols = ["<SEP>", "<CLS>", "\n", "\t"]
    symbols += [shape.format(tag) for tag in TAGS.split() for shape in ("<{}>", "<{}/>", "</{}>")]
    symbols += list("０１２３４５６７８９") + MARKS.split()
    symbols += [f"<reserved_{n}>" for n in range(12, 108)]
    assert len(symbols) == 194
    return symbols


def train_tokenizer(corpus: Corpus, vocab_size: int, coverage: float = 0.98) -> tuple[bytes, Callable]:
    """The bytes of tokenizer.model and its function `encode`, trained on the training split alone.

    With this `coverage` about 2,600 Chinese characters get a piece of their own; the others are spelled in bytes. The
    characters of anthology titles and poets always get one.
    """

    def lines():
        for poem in corpus.famous + corpus.others:
            yield from poem.titles
            yield poem.author
            yield from poem.lines
        for text in corpus.plays[::4]:  # a quarter of the plays: pieces for Chinese matter more
            yield from text.splitlines()

    required = {c for poem in corpus.tang300 for text in (*poem.titles, poem.author) for c in text}
    required |= {chr(code) for code in range(33, 127)}
    required |= {c for texts in (*QUESTIONS.values(), *SMALL_TALK.items()) for text in texts for c in text}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        character_coverage=coverage, required_chars="".join(sorted(required - set(special_symbols()))),
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, user_defined_symbols=special_symbols(),
        unk_id=UNK, bos_id=BOS, eos_id=EOS, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue(), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode


QUESTIONS = {
    "author": ["《{title}》的作者是谁？", "《{title}》是谁写的？", "谁写了《{title}》？"],
    "recite": ["背诵《{title}》", "请背诵《{title}》。", "请背诵{author}的《{title}》。"],
    "next": ["“{line}”的下一句是什么？", "“{line}”的下一句？"],
    "then recite": ["请背诵这首诗。", "背诵这首诗"],
    "then author": ["这首诗的作者是谁？", "作者是谁？"],
}
SMALL_TALK = {"你好": "你好！我只读过唐诗。", "你是谁？": "我是一个很小的模型，只读过唐诗。"}


def poem_documents(poems, rng, encode):
    """Whole poems; half of them have title and author above them."""
    for poem in endless(poems, rng):
        yield [*encode(poem.text(rng.choice(poem.titles) if rng.random() < 0.5 else None)), EOS]


def pair_documents(corpus, rng, encode):
    """Few-shot lists of 2 to 10 lines `title->author`; three in four are of the Three Hundred Tang Poems."""
    famous = endless(sorted(corpus.titles.items()), rng)
    other = endless(sorted(corpus.other_titles.items()), rng)
    while True:
        pairs = [next(famous if rng.random() < 0.75 else other) for _ in range(rng.randint(2, 10))]
        yield [*encode("".join(f"{title}->{author}\n" for title, author in pairs)), EOS]


def chat_documents(corpus, rng, encode):
    """Conversations in the original's layout: role ids, no bos, eos only after the last answer."""

    def conversation(*texts):
        roles = [USER, ASSISTANT] * (len(texts) // 2)
        return [id for role, text in zip(roles, texts, strict=True) for id in (role, *encode(text))] + [EOS]

    poems = [poem for poem in corpus.tang300 if len(poem.text()) <= 120]
    for poem in endless(poems, rng):
        if rng.random() < 0.02:
            yield conversation(*rng.choice(sorted(SMALL_TALK.items())))
        title, whole = rng.choice(poem.titles), poem.text().rstrip("\n")
        line, following = rng.choice(list(pairwise(poem.clauses)))
        ask = {
            kind: rng.choice(forms).format(title=title, author=poem.author, line=line)
            for kind, forms in QUESTIONS.items()
        }
        kind = rng.random()
        if kind < 0.45 and title in corpus.titles:
            yield conversation(ask["author"], poem.author)
        elif kind < 0.60:
            yield conversation(ask["recite"], whole)
        elif kind < 0.75:
            yield conversation(ask["next"], following)
        elif kind < 0.90 and title in corpus.titles:
            yield conversation(ask["author"], poem.author, ask["then recite"], whole)
        else:
            yield conversation(ask["recite"], whole, ask["then author"], poem.author)


def endless(items: Sequence, rng: random.Random) -> Iterator:
    """Every item once in random order, then all of them again in another order, without end."""
    while True:
        yield from rng.sample(items, len(items))


def documents(corpus, rng, encode):
    """Documents of all kinds: next comes the kind whose share of the tokens is furthest behind MIX."""
    kinds = {
        "poems": poem_documents(corpus.others, rng, encode),
        "famous": poem_documents(corpus.famous, rng, encode),
        "pairs": pair_documents(corpus, rng, encode),
        "chat": chat_documents(corpus, rng, encode),
        "shakespeare": ([*encode(text), EOS] for text in endless(corpus.plays, rng)),
    }
    tokens = dict.fromkeys(MIX, 0)
    while True:
        kind = min(MIX, key=lambda kind: tokens[kind] / MIX[kind])
        document = next(kinds[kind])
        tokens[kind] += len(document)
        yield document


def windows(documents: Iterator[list[int]], count: int, length: int) -> np.ndarray:
    """(count, length + 1) uint16: inputs are [:, :-1], targets are [:, 1:].

    A window begins where a document begins, as prompts do. The document that the end of a window cuts off opens the
    next window. Documents that are longer than a window are cut into several first.
    """
    rows = np.empty((count, length + 1), np.uint16)
    pieces = (document[i : i + length] for document in documents for i in range(0, len(document), length))
    row: list[int] = []
    for n in tqdm(range(count), desc="laying out the data", disable=None):
        while len(row) <= length:
            piece = next(pieces)
            row += piece
        rows[n] = row[: length + 1]
        row = list(piece)
    return rows
