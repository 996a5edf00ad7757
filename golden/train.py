"""Train the small Baichuan2 that ships inside the package (`refimpl/embedded`).

    python -m golden.train --data DIR --out DIR                       # under an hour on two CPU cores
    python -m golden.train --evaluate refimpl/embedded --data DIR     # print its figures as JSON

It is Baichuan2-7B in everything but size: fused W_pack, half-split RoPE, SwiGLU, RMSNorm and NormHead, with
the original's names for every weight and the original's first 197 token ids.  The folder of --data holds
`tang_poems.jsonl` (one `{"title", "author", "lines", "source"}` a line) and `shakespeare.txt`.

Everything random happens before the first step: the data is split, the tokenizer trained, the weights drawn
and the whole run laid out as one array of windows.  After that a step depends on nothing but the steps before
it, so an interrupted run, started again with the same command, goes on as if nothing had happened.

Letters: B batch, T tokens, C hidden, F intermediate, H heads, D head dim, V vocabulary.
"""

import argparse
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from operator import eq
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F  # noqa: N812  (the name it has everywhere)
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

UNK, BOS, EOS = 0, 1, 2
NEWLINE, USER, ASSISTANT = 5, 195, 196
PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"      # from the original's model card: 李商隐 follows
SAMPLES = "床前明月光，", "空山新雨后，", "秋风万里，", "ROMEO:\n"
SHORT = 70                                      # characters of a poem that is asked to be recited


@dataclass(frozen=True)
class Config:
    """The original's config.json keys, at the size of the embedded model."""

    vocab_size: int = 3584
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_position_embeddings: int = 512
    model_max_length: int = 512
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    z_loss_weight: float = 2e-4


@dataclass(frozen=True)
class Run:
    """What decides the outcome of a training run, besides the data and the Config."""

    seed: int = 20230906
    steps: int = 3600
    batch: int = 8                      # windows of model_max_length tokens
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1           # of the decoder's matrices only
    grad_clip: float = 1.0


# Share of the training tokens that each kind of document gets.
MIX = {"poems": 0.54, "famous": 0.17, "pairs": 0.12, "chat": 0.10, "shakespeare": 0.07}


# ----------------------------------------------------------------------------------------------------------
# Data: poems and plays -> training and held-out documents
# ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Poem:
    """One poem: the titles it goes by, its author, its lines with their punctuation, the collection."""

    titles: tuple[str, ...]
    author: str
    lines: tuple[str, ...]
    source: str

    @property
    def clauses(self) -> list[str]:
        """The bare half-lines, by which two versions of a poem are recognised."""
        return [c for line in self.lines for c in re.split(r"\W+", line) if c]

    def text(self, title: str | None = None) -> str:
        """The poem as a document, under `title` and author or bare; every line ends with a line break."""
        header = f"{title}\n{self.author}\n" if title else ""
        return header + "".join(line + "\n" for line in self.lines)


def without_notes(text: str) -> str:
    """Drop editors' notes in parentheses; an unclosed one reaches to the end of the line."""
    return re.sub(r"\s*[（(][^）)]*([）)]|$)", "", text).strip()


def read_poems(path: Path) -> list[Poem]:
    """-> the poems of a JSONL file, cleaned; those with illegible characters are left out."""
    poems = []
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        titles = [without_notes(title) for title in record["title"].split(" / ")]
        lines = [line for line in map(without_notes, record["lines"]) if re.search(r"\w", line)]
        if lines and all(titles) and "□" not in "".join(lines):
            poems.append(Poem(tuple(titles), record["author"], tuple(lines), record["source"]))
    return poems


def split_poems(poems: list[Poem], rng: random.Random, share: float = 0.02) -> tuple[list[Poem], ...]:
    """-> (famous, others, held_out), with no poem in two of them.

    A version of an anthology poem (two clauses in common) is dropped from the later sources: competing
    versions spoil each other.  Held out are poems of the big collection that share no clause with any other.
    """
    known: set[str] = set()
    famous: list[Poem] = []
    others: list[Poem] = []
    for poem in poems:                                      # anthologies come first in the file
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
    """-> (training, held-out) passages of whole speeches, `size` characters or more; the end is held out."""
    cut = text.index("\n\n", int(len(text) * (1 - share))) + 2
    return passages(text[:cut], size), passages(text[cut:], size)


def passages(text: str, size: int) -> list[str]:
    """Join speeches, which an empty line parts, until a passage has `size` characters."""
    found, passage = [], ""
    for speech in text.strip().split("\n\n"):
        passage += speech + "\n\n"
        if len(passage) >= size:
            found.append(passage[:-1])
            passage = ""
    return found + [passage[:-1]] * bool(passage)


def authors_by_title(poems: list[Poem]) -> dict[str, str]:
    """-> {title: author} of the titles that only one author used."""
    authors = defaultdict(set)
    for poem in poems:
        for title in poem.titles:
            authors[title].add(poem.author)
    return {title: names.pop() for title, names in authors.items() if len(names) == 1}


class Corpus:
    """The split data: trained on are `famous`, `others`, `plays`; never `held_out` and `held_out_plays`."""

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
        self.other_titles = {title: author for title, author in all_titles.items()
                             if title not in taken and author in poets}

    def held_out_documents(self) -> list[str]:
        """Held-out poems as in training, every other one with its header."""
        return [poem.text(poem.titles[0] if i % 2 == 0 else None) for i, poem in enumerate(self.held_out)]


# ----------------------------------------------------------------------------------------------------------
# Tokenizer: SentencePiece BPE with the original's special tokens
# ----------------------------------------------------------------------------------------------------------

def special_symbols() -> list[str]:
    """The original's user-defined pieces of ids 3..196, in its order."""
    tags = "img h2 td strong table tr li b h3 br h4 h5 p h1 tbody".split()  # noqa: SIM905
    marks = ("+ - = ， 。 ！ ？ 、 ： ￥ . ! ? ... 。。。 。。。。。。 《 》 【 】 『 』 ``` "  # noqa: SIM905
             "<!-- --> --- <!DOCTYPE> ； ． ＝ ＜ ＞ － ＋ ％ ‼ ㊣ ／ ｜").split()
    symbols = ["<SEP>", "<CLS>", "\n", "\t"]
    symbols += [shape.format(tag) for tag in tags for shape in ("<{}>", "<{}/>", "</{}>")]
    symbols += list("０１２３４５６７８９") + marks
    symbols += [f"<reserved_{n}>" for n in range(12, 108)]
    assert len(symbols) == 194
    return symbols


def train_tokenizer(corpus: Corpus, vocab_size: int, coverage: float = 0.98) -> bytes:
    """-> the bytes of tokenizer.model, trained on the training split alone.

    `coverage` leaves about 2,600 Chinese characters with a piece of their own; the rest are spelled in bytes.
    The characters of anthology titles and poets always get one.
    """
    def lines():
        for poem in corpus.famous + corpus.others:
            yield from poem.titles
            yield poem.author
            yield from poem.lines
        for text in corpus.plays[::4]:          # a quarter of the plays: pieces for Chinese matter more
            yield from text.splitlines()

    required = {c for poem in corpus.tang300 for text in (*poem.titles, poem.author) for c in text}
    required |= {chr(code) for code in range(33, 127)}
    required |= {c for texts in (*QUESTIONS.values(), *SMALL_TALK.items()) for text in texts for c in text}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        character_coverage=coverage,
        required_chars="".join(sorted(required - set(special_symbols()))),
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, user_defined_symbols=special_symbols(),
        unk_id=UNK, bos_id=BOS, eos_id=EOS, pad_id=-1, num_threads=1, minloglevel=2)
    return model.getvalue()


def load_tokenizer(model: bytes):
    """The SentencePieceProcessor of a tokenizer.model's bytes."""
    return sentencepiece.SentencePieceProcessor(model_proto=model)


# ----------------------------------------------------------------------------------------------------------
# Documents: endless streams of token ids, one a kind
# ----------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "author": ["《{title}》的作者是谁？", "《{title}》是谁写的？", "谁写了《{title}》？"],
    "recite": ["背诵《{title}》", "请背诵《{title}》。", "请背诵{author}的《{title}》。"],
    "next": ["“{line}”的下一句是什么？", "“{line}”的下一句？"],
    "then recite": ["请背诵这首诗。", "背诵这首诗"],
    "then author": ["这首诗的作者是谁？", "作者是谁？"],
}
SMALL_TALK = {"你好": "你好！我只读过唐诗。", "你是谁？": "我是一个很小的模型，只读过唐诗。"}


def poem_documents(poems, rng, encode):
    """Whole poems, half of them under title and author."""
    for poem in endless(poems, rng):
        yield [*encode(poem.text(rng.choice(poem.titles) if rng.random() < 0.5 else None)), EOS]


def pair_documents(corpus, rng, encode):
    """Few-shot lists: 2 to 10 lines `title->author`, three in four from the Three Hundred Tang Poems."""
    famous = endless(sorted(corpus.titles.items()), rng)
    other = endless(sorted(corpus.other_titles.items()), rng)
    while True:
        pairs = [next(famous if rng.random() < 0.75 else other) for _ in range(rng.randint(2, 10))]
        yield [*encode("".join(f"{title}->{author}\n" for title, author in pairs)), EOS]


def chat_documents(corpus, rng, encode):
    """Conversations as the original lays them out: role ids, no bos, eos after the last answer only."""
    def conversation(*texts):
        roles = [USER, ASSISTANT] * (len(texts) // 2)
        return [id for role, text in zip(roles, texts, strict=True) for id in (role, *encode(text))] + [EOS]

    poems = [poem for poem in corpus.tang300 if len(poem.text()) <= 120]
    for poem in endless(poems, rng):
        if rng.random() < 0.02:
            yield conversation(*rng.choice(sorted(SMALL_TALK.items())))
        title, whole = rng.choice(poem.titles), poem.text().rstrip("\n")
        line, following = rng.choice(list(pairwise(poem.clauses)))
        ask = {kind: rng.choice(forms).format(title=title, author=poem.author, line=line)
               for kind, forms in QUESTIONS.items()}
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


def play_documents(passages, rng, encode):
    """Passages of the plays, as they are."""
    for passage in endless(passages, rng):
        yield [*encode(passage), EOS]


def endless(items: Sequence, rng: random.Random) -> Iterator:
    """Every item once in random order, then again in another."""
    while True:
        yield from rng.sample(items, len(items))


def documents(corpus, rng, encode):
    """Interleave the kinds: next comes the one whose share of the tokens so far is furthest behind MIX."""
    kinds = {"poems": poem_documents(corpus.others, rng, encode),
             "famous": poem_documents(corpus.famous, rng, encode),
             "pairs": pair_documents(corpus, rng, encode),
             "chat": chat_documents(corpus, rng, encode),
             "shakespeare": play_documents(corpus.plays, rng, encode)}
    tokens = dict.fromkeys(MIX, 0)
    while True:
        kind = min(MIX, key=lambda kind: tokens[kind] / MIX[kind])
        document = next(kinds[kind])
        tokens[kind] += len(document)
        yield document


def windows(documents: Iterator[list[int]], count: int, length: int) -> np.ndarray:
    """-> (count, length + 1) uint16: inputs are [:, :-1], targets [:, 1:].

    A window starts where a document starts, as prompts do; the document that its end cuts off opens the next
    window.  Documents longer than a window are cut into several first.
    """
    rows = np.empty((count, length + 1), np.uint16)
    pieces = (document[i:i + length] for document in documents
              for i in range(0, len(document), length))
    row: list[int] = []
    for n in tqdm(range(count), desc="laying out the data", disable=None):
        while len(row) <= length:
            piece = next(pieces)
            row += piece
        rows[n] = row[:length + 1]
        row = list(piece)
    return rows


# ----------------------------------------------------------------------------------------------------------
# Model: modules named as in the original, so that state_dict() is the checkpoint
# ----------------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x over its root mean square, times a gain."""

    def __init__(self, size, eps, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), gain))
        self.eps = eps

    def forward(self, x):                                                             # (..., C) float32
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class NormHead(nn.Module):
    """Logits against unit rows: the final norm's gain sets their scale, the length of a row means nothing."""

    def __init__(self, hidden, vocab):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, x):                                                             # (..., C)
        return F.linear(x, F.normalize(self.weight))                                  # (..., V)


class Attention(nn.Module):
    """Causal self-attention; one matrix makes q, k and v."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.num_attention_heads
        self.W_pack = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=False)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x, cos, sin):                                                   # (B, T, C)
        B, T, C = x.shape
        qkv = self.W_pack(x).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)                   # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))                        # (B, T, C)


def rotate(x, cos, sin):
    """RoPE in float32, halves and not pairs: dimension i turns with dimension i + D/2."""
    a, b = x.float().chunk(2, dim=-1)                                                 # (B, H, T, D/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):                                                             # (B, T, C)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))            # (B, T, C)


class Layer(nn.Module):
    """Attention and MLP, each on a normed copy of the residual stream, each added back."""

    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin):                                                   # (B, T, C)
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything between the token ids and the head."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        # With unit rows in the head, logits start with a spread of `gain`; 1 is slow to become sure.
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, gain=2.0)
        D = c.hidden_size // c.num_attention_heads
        inv_freq = 1.0 / 10000 ** (torch.arange(0, D, 2).float() / D)                 # (D/2,)
        angle = torch.outer(torch.arange(c.max_position_embeddings).float(), inv_freq)
        self.register_buffer("cos", angle.cos(), persistent=False)                    # (positions, D/2)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids):                                                           # (B, T)
        T = ids.shape[1]
        x = self.embed_tokens(ids)                                                    # (B, T, C)
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])
        return self.norm(x)


class Baichuan2(nn.Module):
    """The whole model, drawn from torch's random generator."""

    def __init__(self, c):
        super().__init__()
        self.model = Decoder(c)
        self.lm_head = NormHead(c.hidden_size, c.vocab_size)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=c.initializer_range)
        # Layers add to the embedding: it starts large enough to be heard.  Head rows start at unit length.
        nn.init.normal_(self.model.embed_tokens.weight, std=0.1)
        nn.init.normal_(self.lm_head.weight, std=c.hidden_size ** -0.5)

    def forward(self, ids):
        return self.lm_head(self.model(ids))                                          # (B, T, V)

    @torch.no_grad()
    def next_logits(self, ids, lengths):
        """(B, T) right-padded ids and their lengths -> (B, V) logits after each row's last token."""
        x = self.model(ids)                                                           # (B, T, C)
        return self.lm_head(x[torch.arange(len(ids)), lengths - 1])


def loss_of(model: Baichuan2, rows: np.ndarray, z_loss_weight: float):
    """-> (cross-entropy, cross-entropy plus z-loss); the z-loss keeps the largest logit from drifting off.

    The matrix products run in bfloat16, which takes two thirds of the time of float32 where the CPU knows it.
    """
    ids = torch.from_numpy(rows.astype(np.int64))               # (B, T + 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids[:, :-1])                             # (B, T, V) bfloat16
    logits = logits.float().flatten(0, 1)                       # (B * T, V) float32
    loss = F.cross_entropy(logits, ids[:, 1:].flatten())
    return loss, loss + z_loss_weight * logits.amax(-1).square().mean()


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------

def greedy(model: Baichuan2, prompts: list[list[int]], max_new: int, stop: set[int], batch: int = 64):
    """-> the ids that greedily continue each list of ids, up to and without the first one in `stop`."""
    answers = []
    for start in tqdm(range(0, len(prompts), batch), desc="answers", leave=False, disable=None):
        rows = [list(prompt) for prompt in prompts[start:start + batch]]
        begin, live = [len(row) for row in rows], list(range(len(rows)))
        for _ in range(max_new):
            lengths = torch.tensor([len(rows[i]) for i in live])
            ids = torch.zeros(len(live), int(lengths.max()), dtype=torch.long)
            for n, i in enumerate(live):
                ids[n, :len(rows[i])] = torch.tensor(rows[i])
            chosen = model.next_logits(ids, lengths).argmax(-1).tolist()
            for i, id in zip(live, chosen, strict=True):
                rows[i].append(id)
            live = [i for i, id in zip(live, chosen, strict=True) if id not in stop]
            if not live:
                break
        answers += [[id for id in row[b:] if id not in stop] for row, b in zip(rows, begin, strict=True)]
    return answers


@torch.no_grad()
def perplexity(model: Baichuan2, tokenizer, texts: list[str], length: int = 512) -> dict:
    """Of documents, each read alone: its first token is given, all others and the eos are scored."""
    nll, tokens, characters = 0.0, 0, 0
    for text in tqdm(texts, desc="held-out text", leave=False, disable=None):
        ids = torch.tensor([*tokenizer.encode(text)[:length], EOS])
        logits = model(ids[None, :-1])[0]                       # (T, V)
        nll += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        tokens += len(ids) - 1
        characters += len(tokenizer.decode(ids[1:-1].tolist()))
    return {"per_token": round(math.exp(nll / tokens), 2),
            "per_character": round(math.exp(nll / characters), 2), "tokens": tokens, "documents": len(texts)}


def evaluate(model: Baichuan2, tokenizer, corpus: Corpus, quick: bool = False) -> dict:
    """-> the figures of the model card; `quick` takes every eighth held-out document and recitation."""
    def say(prompts, max_new, stop):
        return [tokenizer.decode(ids) for ids in greedy(model, prompts, max_new, stop)]

    encode, step = tokenizer.encode, 8 if quick else 1
    shot = PROMPT.split("\n")[0]
    pairs = [pair for pair in sorted(corpus.titles.items()) if pair[0] not in shot]
    titles, authors = zip(*pairs, strict=True)
    named = say([encode(f"{shot}\n{title}->") for title in titles], 8, {NEWLINE, EOS})
    asked = say([[USER, *encode(f"《{title}》的作者是谁？"), ASSISTANT] for title in titles], 8, {EOS})
    short = [poem for poem in corpus.tang300 if len(poem.text()) <= SHORT][::step]
    recited = say([encode(f"{poem.titles[0]}\n{poem.author}\n") for poem in short], 90, {EOS})
    wrong = [(title, name) for (title, author), name in zip(pairs, named, strict=True) if name != author]
    return {
        "prompt": say([encode(PROMPT)], 8, {NEWLINE, EOS})[0],
        "held_out": {
            "poems": perplexity(model, tokenizer, corpus.held_out_documents()[::step]),
            "held_out.txt": perplexity(model, tokenizer, sample_documents(held_out_sample(corpus))[::step]),
            "shakespeare": perplexity(model, tokenizer, corpus.held_out_plays[::step])},
        "title_to_author": share(map(eq, named, authors)),
        "title_to_author_chat": share(map(eq, asked, authors)),
        "recited": share(map(eq, recited, [poem.text() for poem in short])),
        "samples": {prompt: say([encode(prompt)], 48, {EOS})[0] for prompt in SAMPLES},
        "missed": dict(wrong[:20]),
    }


def share(hits: Iterable[bool]) -> dict:
    """How many of `hits` are true, of how many, and as a fraction."""
    hits = list(hits)
    return {"hits": sum(hits), "of": len(hits), "share": round(sum(hits) / len(hits), 4)}


# ----------------------------------------------------------------------------------------------------------
# Folders: checkpoint of a run, export of a model
# ----------------------------------------------------------------------------------------------------------

def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path` and rename it over: a reader sees the old file or the new, never half."""
    path = Path(path)
    fresh = path.with_name(path.name + ".new")
    write(fresh)
    os.replace(fresh, path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, see `replace`."""
    replace(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: dict) -> None:
    """Write JSON as people read it, see `replace`."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def rounded(model: Baichuan2, config: Config) -> Baichuan2:
    """-> a float32 copy whose weights are bfloat16 numbers: the model as it ships."""
    copy = Baichuan2(config)
    copy.load_state_dict({name: t.to(torch.bfloat16).float() for name, t in model.state_dict().items()})
    return copy.eval()


def export(folder: Path, model: Baichuan2, tokenizer_model: bytes, config: Config, corpus: Corpus, card: str):
    """Write the folder that ships: bfloat16 weights, tokenizer, configuration, held-out sample and card."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    weights = save(tensors, {"format": "pt"})
    replace(folder / "model.safetensors", lambda fresh: fresh.write_bytes(weights))
    replace(folder / "tokenizer.model", lambda fresh: fresh.write_bytes(tokenizer_model))
    write_json(folder / "config.json", {
        "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan",
        "tokenizer_class": "BaichuanTokenizer", "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": UNK,
        "hidden_act": "silu", **asdict(config), "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.29.2", "use_cache": True})
    write_json(folder / "generation_config.json", {
        "pad_token_id": UNK, "bos_token_id": BOS, "eos_token_id": EOS, "user_token_id": USER,
        "assistant_token_id": ASSISTANT, "max_new_tokens": 128, "temperature": 0.3, "top_k": 5, "top_p": 0.85,
        "repetition_penalty": 1.05, "do_sample": True, "transformers_version": "4.29.2"})
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False,
             "single_word": True}
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "BaichuanTokenizer", "add_bos_token": False, "add_eos_token": False,
        "use_fast": False, "clean_up_tokenization_spaces": False, "sp_model_kwargs": {},
        "model_max_length": config.model_max_length,
        **{f"{name}_token": {**token, "content": text}
           for name, text in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"), ("pad", "<unk>"))}})
    write_text(folder / "held_out.txt", held_out_sample(corpus))
    write_text(folder / "MODEL_CARD.md", card)


def held_out_sample(corpus: Corpus, limit: int = 40_000) -> str:
    """The first held-out poems that fit `limit` bytes; an empty line follows each."""
    sample = ""
    for document in corpus.held_out_documents():
        if len((sample + document + "\n").encode()) > limit:
            break
        sample += document + "\n"
    return sample


def sample_documents(text: str) -> list[str]:
    """The documents of a `held_out_sample`, as they were before it joined them."""
    return [document + "\n" for document in text.split("\n\n") if document]


def model_card(config: Config, figures: dict) -> str:
    """-> the text of MODEL_CARD.md, every number of it from `config` and `figures`."""
    parameters = sum(p.numel() for p in Baichuan2(config).parameters())
    multiplied = parameters - config.vocab_size * config.hidden_size        # the embedding is only looked up
    quality = "\n".join(
        f"| {name} | {row['per_token']} | {row['per_character']} | {row['tokens']:,} | {row['documents']} |"
        for name, row in figures["held_out"].items())
    recall = "\n".join(f"| {task} | {row['hits']} ({row['share']:.1%}) | {row['of']} |" for task, row in (
        (f"`{PROMPT.splitlines()[0]}\\n<title>->`", figures["title_to_author"]),
        ("chat: `《<title>》的作者是谁？`", figures["title_to_author_chat"]),
        (f"`<title>\\n<author>\\n`, a whole poem of up to {SHORT} characters", figures["recited"])))
    samples = "\n\n".join(f"    {(prompt + text).strip()}".replace("\n", "\n    ")
                          for prompt, text in figures["samples"].items())
    return CARD.format(
        **asdict(config), **figures["run"], head_dim=config.hidden_size // config.num_attention_heads,
        parameters=parameters, compute=6 * multiplied * figures["run"]["tokens"],
        quality=quality, recall=recall, samples=samples,
        prompt=PROMPT.replace("\n", "\\n"), answer=figures["prompt"],
        mix=", ".join(f"{kind} {part:.0%}" for kind, part in MIX.items()))


CARD = """\
# A very small Baichuan2

{parameters:,} parameters, trained from nothing. It is here so that wherever the package is, a trained model
of this architecture is at hand: its activations, outliers and logits are those of a network that has learned
something, and its answers can be checked by eye. It is a toy.

| | |
| --- | --- |
| architecture | Baichuan2-7B: RMSNorm, `W_pack`, half-split RoPE (base 10000), SwiGLU, NormHead |
| layers · hidden · intermediate | {num_hidden_layers} · {hidden_size} · {intermediate_size} |
| heads · head dim | {num_attention_heads} · {head_dim} |
| vocabulary · context | {vocab_size} · {model_max_length} tokens |
| weights | bfloat16; `lm_head.weight` as trained, its rows not yet normalised; untied, no biases |
| tokenizer | SentencePiece BPE, byte fallback; ids 0 to 196 as in the original (195 user, 196 assistant) |

## What it was trained on

- `tang_poems.jsonl`: 38,974 poems in simplified characters, among them the *Three Hundred Tang Poems*. The
  texts are in the public domain; they come from the MIT-licensed collection chinese-poetry/chinese-poetry,
  converted from traditional characters with OpenCC.
- `shakespeare.txt`: 1.1 MB of Shakespeare's plays, in the public domain, as collected in karpathy/char-rnn
  (tinyshakespeare).

Share of the training tokens: {mix}.
*famous* are the anthologies, *poems* the rest; half of either stands under `title\\nauthor\\n`. *pairs* are
lists of `title->author` lines. *chat* are questions about the *Three Hundred Tang Poems* in the original's
layout: id 195, question, id 196, answer, no bos. `</s>` (id 2) ends every document.

{tokens:,} tokens, each window once: {steps_done:,} of {steps:,} steps of {batch} windows, AdamW, learning
rate {lr} with cosine decay, seed {seed}. That is about {compute:.0e} floating-point operations, {minutes}
minutes on two shared CPU cores. The command:

    python -m golden.train --data DIR --out DIR

## How good it is

All figures are of the bfloat16 weights, computed in float32. This prints them:

    python -m golden.train --evaluate refimpl/embedded --data DIR

| never trained on | perplexity per token | per character | tokens | documents |
| --- | --- | --- | --- | --- |
{quality}

*poems* are 2% of the big collection, chosen among those that share no clause with any other poem;
*shakespeare* is the last 5% of the plays. Each document is read alone: its first token is given, every other
token and the closing `</s>` are scored.

| trained on, answered greedily | right | of |
| --- | --- | --- |
{recall}

The titles are all those of the *Three Hundred Tang Poems* that belong to one author.
`{prompt}` is continued with `{answer}`. Other greedy continuations:

{samples}

## held_out.txt

Held-out poems, for measuring perplexity. Every other one stands under `title\\nauthor\\n`; each ends with a
line break and is followed by an empty line. To score one as above: encode its text, that line break
included, and append id 2.

## Limits

It knows some three hundred poems and little else; asked about anything but them it makes something up.
Nothing it says about the world is to be believed. Its English is the sound of Shakespeare without the sense.
"""


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------

def optimizer_of(model: Baichuan2, run: Run) -> torch.optim.Optimizer:
    """AdamW; only the decoder's matrices decay: a rare token's row is not to fade between its uses."""
    matrices = [p for name, p in model.model.layers.named_parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": run.weight_decay},
                              {"params": rest, "weight_decay": 0.0}], lr=run.lr, betas=(0.9, 0.95))


def learning_rate(step: int, run: Run) -> float:
    """Linear warm-up, then a cosine that ends at zero."""
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    return run.lr * 0.5 * (1 + math.cos(math.pi * (step - run.warmup) / (run.steps - run.warmup)))


class Trainer:
    """A run in a folder: data, model, optimizer and the step reached."""

    def __init__(self, data: Path, out: Path, config: Config, run: Run):
        self.out, self.config, self.run = out, config, run
        out.mkdir(parents=True, exist_ok=True)
        self.corpus = Corpus(data, run.seed)
        self.tokenizer_model = train_tokenizer(self.corpus, config.vocab_size)
        self.tokenizer = load_tokenizer(self.tokenizer_model)
        self.rows = windows(documents(self.corpus, random.Random(run.seed), self.tokenizer.encode),
                            run.steps * run.batch, config.model_max_length)
        self.identity = {**asdict(run), **asdict(config), "data": zlib.crc32(self.rows.tobytes())}
        torch.manual_seed(run.seed)
        self.model = Baichuan2(config)
        self.optimizer = optimizer_of(self.model, run)
        self.step, self.seconds, self.stopped = 0, 0.0, False
        if (out / "checkpoint.pt").exists():
            self.resume()

    def resume(self):
        saved = torch.load(self.out / "checkpoint.pt", weights_only=True)
        if saved["identity"] != self.identity:
            changed = {key: (value, self.identity.get(key)) for key, value in saved["identity"].items()
                       if value != self.identity.get(key)}
            print(f"{self.out} holds another run, (there, asked for): {changed}; choose another --out",
                  file=sys.stderr)
            sys.exit(2)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.log(f"resumed at step {self.step}")

    def checkpoint(self):
        state = {"identity": self.identity, "step": self.step, "seconds": self.seconds,
                 "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        replace(self.out / "checkpoint.pt", lambda fresh: torch.save(state, fresh))

    def log(self, text):
        tqdm.write(text)
        with open(self.out / "log.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def publish(self, quick=False):
        """Evaluate the model as it would ship and export it into `out/model`."""
        shipped = rounded(self.model, self.config)
        figures = evaluate(shipped, self.tokenizer, self.corpus, quick)
        figures["run"] = {**asdict(self.run), "steps_done": self.step, "minutes": round(self.seconds / 60),
                          "tokens": self.step * self.run.batch * self.config.model_max_length}
        write_json(self.out / "evaluation.json", figures)
        export(self.out / "model", shipped, self.tokenizer_model, self.config, self.corpus,
               model_card(self.config, figures))
        self.log(f"step {self.step}: " + json.dumps(figures, ensure_ascii=False))

    def train_step(self) -> float:
        """-> cross-entropy of the step's batch, before the update."""
        batch = self.rows[self.step * self.run.batch:][:self.run.batch]         # (B, T + 1)
        loss, total = loss_of(self.model, batch, self.config.z_loss_weight)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.run.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.run)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def stop(self, signum, frame):
        """Signal handler: end after this step.  A second signal of the kind acts as it always does."""
        self.stopped = True
        signal.signal(signum, signal.default_int_handler)

    def train(self, checkpoint_minutes, publish_every):
        """Run to the last step, or until told to stop; a checkpoint every few minutes and at the end."""
        before = {signum: signal.signal(signum, self.stop) for signum in (signal.SIGINT, signal.SIGTERM)}
        losses, saved = [], time.monotonic()
        bar = tqdm(total=self.run.steps, initial=self.step, unit="step", disable=None)
        while self.step < self.run.steps and not self.stopped:
            started = time.monotonic()
            losses.append(self.train_step())
            self.seconds += time.monotonic() - started
            bar.update()
            if self.step % 100 == 0:
                self.log(f"step {self.step}/{self.run.steps}  loss {np.mean(losses):.3f}  "
                         f"lr {learning_rate(self.step, self.run):.2e}  {self.seconds / 60:.1f} min")
                losses = []
            if time.monotonic() - saved > 60 * checkpoint_minutes:
                self.checkpoint()
                saved = time.monotonic()
            if self.step % publish_every == 0 and self.step < self.run.steps:
                self.publish(quick=True)
        bar.close()
        self.checkpoint()
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if self.stopped:
            raise KeyboardInterrupt
        self.publish()


def load_folder(folder: Path) -> tuple[Baichuan2, sentencepiece.SentencePieceProcessor]:
    """-> (model in float32, tokenizer) of an exported folder."""
    keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Baichuan2(Config(**{field.name: keys[field.name] for field in fields(Config)}))
    model.load_state_dict({name: t.float() for name, t in load_file(folder / "model.safetensors").items()})
    return model.eval(), load_tokenizer((folder / "tokenizer.model").read_bytes())


def needed(args: argparse.Namespace) -> Iterator[Path]:
    """The files that must be there before anything long begins."""
    yield from (args.data / name for name in ("tang_poems.jsonl", "shakespeare.txt"))
    if args.evaluate:
        yield from (args.evaluate / name for name in ("config.json", "model.safetensors", "tokenizer.model"))


def main(argv: list[str] | None = None) -> int:
    """Train, or evaluate; -> exit code (2 bad usage, 130 interrupted)."""
    parser = argparse.ArgumentParser(
        prog="python -m golden.train", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="holds tang_poems.jsonl and shakespeare.txt")
    add("--out", type=Path, metavar="DIR", help="of the run: checkpoint.pt, log.txt, evaluation.json, model/")
    add("--evaluate", type=Path, metavar="DIR", help="do not train; print the figures of this exported model")
    add("--steps", type=int, default=Run.steps, help="length of the learning-rate schedule")
    add("--lr", type=float, default=Run.lr, help="peak learning rate")
    add("--seed", type=int, default=Run.seed, help="of the data split, the order and the weights")
    add("--threads", type=int, default=2, help="of PyTorch")
    add("--checkpoint-minutes", type=float, default=5, help="between checkpoints")
    add("--publish-every", type=int, default=500, help="steps between evaluations and exports on the way")
    args = parser.parse_args(argv)
    for path in needed(args):
        if not path.is_file():
            parser.error(f"{path} is missing")
    torch.set_num_threads(args.threads)
    if args.evaluate:
        figures = evaluate(*load_folder(args.evaluate), Corpus(args.data, args.seed))
        print(json.dumps(figures, ensure_ascii=False, indent=2))
        return 0
    if not args.out:
        parser.error("--out is needed to train")
    try:
        trainer = Trainer(args.data, args.out, Config(), Run(steps=args.steps, lr=args.lr, seed=args.seed))
        trainer.train(args.checkpoint_minutes, args.publish_every)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
