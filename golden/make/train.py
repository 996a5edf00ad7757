"""Train the small Baichuan2 that ships inside the package (`refimpl/embedded`).

    python -m golden.make.train --data DIR --out DIR                       # under an hour on two CPU cores
    python -m golden.make.train --evaluate refimpl/embedded --data DIR     # print its figures as JSON

It is Baichuan2-7B in everything but size: fused W_pack, half-split RoPE, SwiGLU, RMSNorm and NormHead, with
the original's name for every weight and the original's first 197 token ids. The folder of --data holds
`tang_poems.jsonl` (one `{"title", "author", "lines", "source"}` a line) and `shakespeare.txt`.

Everything random happens before the first step: the data is split, the tokenizer is trained, the weights are
drawn, and all windows of the run are laid out in one array. After that, a step depends only on the steps before
it. So an interrupted run that is started again with the same command continues as if nothing had happened.

Letters: B batch, T tokens, C hidden, F intermediate, H heads, D head dim, V vocabulary.
"""

import argparse
import json
import math
import os
import random
import signal
import sys
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from operator import eq
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the name it has everywhere)
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import refimpl
from golden.make import poems
from golden.make.poems import ASSISTANT, EOS, NEWLINE, UNK, USER, Corpus
from refimpl.config import read_config
from refimpl.loss import cross_entropy
from refimpl.model import EMBEDDED, Model

PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"      # from the original's model card: 李商隐 follows
SAMPLES = "床前明月光，", "空山新雨后，", "秋风万里，", "ROMEO:\n"
SHORT = 70                                      # characters at most of a poem that is to be recited
INITIAL_STD = 0.02
CHECKPOINT_SECONDS = 300
SIZE = read_config(EMBEDDED)


@dataclass(frozen=True)
class Run:
    """What decides the outcome of a training run, beside the data and the sizes."""

    seed: int = 20230906
    steps: int = 3600
    batch: int = 8                      # windows of max_position_embeddings tokens
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1           # of the decoder's matrices only
    grad_clip: float = 1.0


# Model: modules named as in the original, so that state_dict() is the checkpoint

class RMSNorm(nn.Module):
    """x divided by its root mean square, times a gain."""

    def __init__(self, size, eps, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), gain))
        self.eps = eps

    def forward(self, x):                                                             # (..., C) float32
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class UnitRowsHead(nn.Module):
    """NormHead: rows are scaled to length 1, so the gain of the last norm sets the scale of the logits."""

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
    """RoPE in float32, by halves: dimension i turns with dimension i + D/2."""
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
    """Attention and MLP: each reads a normed copy of the residual stream, and its output is added to the stream."""

    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin):                                                   # (B, T, C)
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Layers(nn.Module):
    """Everything between the token ids and the head."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        # With unit rows in the head, logits start with a spread of `gain`; with 1, learning begins slowly.
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
    """The whole model, with random weights from torch's generator."""

    def __init__(self, c):
        super().__init__()
        self.model = Layers(c)
        self.lm_head = UnitRowsHead(c.hidden_size, c.vocab_size)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=INITIAL_STD)
        # Layers add to the embedding, so it starts large enough to matter. Head rows start at unit length.
        nn.init.normal_(self.model.embed_tokens.weight, std=0.1)
        nn.init.normal_(self.lm_head.weight, std=c.hidden_size ** -0.5)

    def forward(self, ids):
        return self.lm_head(self.model(ids))                                          # (B, T, V)


def loss_of(model: Baichuan2, rows: np.ndarray, z_loss_weight: float):
    """(cross-entropy, cross-entropy plus z-loss). The z-loss keeps the largest logit from drifting off.

    The matrix products run in bfloat16: two thirds of the time of float32 on a CPU that supports it.
    """
    ids = torch.from_numpy(rows.astype(np.int64))               # (B, T + 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids[:, :-1])                             # (B, T, V) bfloat16
    logits = logits.float().flatten(0, 1)                       # (B * T, V) float32
    loss = F.cross_entropy(logits, ids[:, 1:].flatten())
    return loss, loss + z_loss_weight * logits.amax(-1).square().mean()


# Evaluation by the NumPy model, because that is what ships

def answers(model: Model, prompts: list[list[int]], max_new_tokens: int, stop: set[int], batch: int = 32):
    """The greedy continuation of each list of ids as text, up to the first id in `stop` and without it."""
    texts = []
    for start in tqdm(range(0, len(prompts), batch), desc="answers", leave=False, disable=None):
        rows = prompts[start:start + batch]
        T = max(map(len, rows))
        ids = np.array([[UNK] * (T - len(row)) + row for row in rows])                # (B, T), padded left
        mask = np.array([[0] * (T - len(row)) + [1] * len(row) for row in rows])      # (B, T)
        steps = model.generate(ids, max_new_tokens=max_new_tokens, repetition_penalty=1.0, attention_mask=mask)
        for found in np.stack(list(steps), axis=1).tolist():
            end = next((n for n, id in enumerate(found) if id in stop), len(found))
            texts.append(model.tokenizer.decode(found[:end]))
    return texts


def surprise(model: Model, texts: list[str]) -> dict:
    """The perplexity of documents, each read alone: the first token is given; all others and the eos count."""
    nll, tokens, characters = 0.0, 0, 0
    for text in tqdm(texts, desc="held-out text", leave=False, disable=None):
        ids = np.array([*model.tokenizer.encode(text)[:model.config.max_position_embeddings], EOS])
        nll += float(cross_entropy(model(ids[:-1])[0].astype(np.float64), ids[1:]).sum())
        tokens += len(ids) - 1
        characters += len(model.tokenizer.decode(ids[1:-1].tolist()))
    return {"per_token": round(math.exp(nll / tokens), 2),
            "per_character": round(math.exp(nll / characters), 2), "tokens": tokens, "documents": len(texts)}


def evaluate(model: Model, corpus: Corpus, every: int = 1) -> dict:
    """The figures of the model card, from each `every`-th document and question."""
    encode, shot = model.tokenizer.encode, PROMPT.split("\n")[0]
    pairs = [pair for pair in sorted(corpus.titles.items()) if pair[0] not in shot][::every]
    titles, authors = zip(*pairs, strict=True)
    named = answers(model, [encode(f"{shot}\n{title}->") for title in titles], 8, {NEWLINE, EOS})
    asked = answers(model, [[USER, *encode(f"《{title}》的作者是谁？"), ASSISTANT] for title in titles], 8, {EOS})
    short = [poem for poem in corpus.tang300 if len(poem.text()) <= SHORT][::every]
    recited = answers(model, [encode(f"{poem.titles[0]}\n{poem.author}\n") for poem in short], 90, {EOS})
    held_out = {"poems": corpus.held_out_documents(),
                "held_out.txt": [text + "\n" for text in poems.held_out_sample(corpus).split("\n\n") if text],
                "shakespeare": corpus.held_out_plays}
    return {
        "prompt": answers(model, [encode(PROMPT)], 8, {NEWLINE, EOS})[0],
        "held_out": {name: surprise(model, texts[::every]) for name, texts in held_out.items()},
        "title_to_author": share(map(eq, named, authors)),
        "title_to_author_chat": share(map(eq, asked, authors)),
        "recited": share(map(eq, recited, [poem.text() for poem in short])),
        "samples": {prompt: answers(model, [encode(prompt)], 48, {EOS})[0] for prompt in SAMPLES},
    }


def share(hits: Iterable[bool]) -> dict:
    """How many of `hits` are true, of how many, and the fraction."""
    hits = list(hits)
    return {"hits": sum(hits), "of": len(hits), "share": round(sum(hits) / len(hits), 4)}


# The folder that ships

def ship(folder: Path, model: Baichuan2, tokenizer_model: bytes, corpus: Corpus) -> None:
    """Write what ships: bfloat16 weights, tokenizer, held-out sample, and the configuration of the embedded folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    (folder / "held_out.txt").write_text(poems.held_out_sample(corpus), encoding="utf-8")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EMBEDDED / name).read_bytes())


# Training

def optimizer_of(model: Baichuan2, run: Run) -> torch.optim.Optimizer:
    """AdamW. Only the decoder's matrices decay, so that a rare token's row does not fade between its uses."""
    matrices = [p for name, p in model.model.layers.named_parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": run.weight_decay},
                              {"params": rest, "weight_decay": 0.0}], lr=run.lr, betas=(0.9, 0.95))


def learning_rate(step: int, run: Run) -> float:
    """A linear warm-up, then a cosine down to zero."""
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    return run.lr * 0.5 * (1 + math.cos(math.pi * (step - run.warmup) / (run.steps - run.warmup)))


class Trainer:
    """A training run in a folder: data, model, optimizer, and the step that it has reached."""

    def __init__(self, data: Path, out: Path, run: Run):
        self.out, self.run = out, run
        out.mkdir(parents=True, exist_ok=True)
        self.corpus = Corpus(data, run.seed)
        self.tokenizer_model, encode = poems.train_tokenizer(self.corpus, SIZE.vocab_size)
        self.rows = poems.windows(poems.documents(self.corpus, random.Random(run.seed), encode),
                            run.steps * run.batch, SIZE.max_position_embeddings)
        self.identity = {**asdict(run), **asdict(SIZE), "data": zlib.crc32(self.rows.tobytes())}
        torch.manual_seed(run.seed)
        self.model = Baichuan2(SIZE)
        self.optimizer = optimizer_of(self.model, run)
        self.step, self.stopped = 0, False
        if (out / "checkpoint.pt").exists():
            self.resume()

    def resume(self):
        saved = torch.load(self.out / "checkpoint.pt", weights_only=True)
        if saved["identity"] != self.identity:
            sys.exit(f"{self.out} holds another run, {saved['identity']}; choose another folder with --out")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]

    def checkpoint(self):
        """Write beside the old checkpoint, then rename: there is always a whole one."""
        fresh = self.out / "checkpoint.pt.new"
        torch.save({"identity": self.identity, "step": self.step, "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict()}, fresh)
        os.replace(fresh, self.out / "checkpoint.pt")

    def train_step(self) -> float:
        """The cross-entropy of the step's batch before the update."""
        batch = self.rows[self.step * self.run.batch:][:self.run.batch]         # (B, T + 1)
        loss, total = loss_of(self.model, batch, SIZE.z_loss_weight)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.run.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.run)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def stop(self, signum, frame):
        """Signal handler: end after this step. A second signal of the same kind ends the process at once."""
        self.stopped = True
        signal.signal(signum, signal.default_int_handler)

    def train(self) -> bool:
        """Run to the last step, or until a signal; True if the run is done. Either way there is a checkpoint."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.stop)
        losses, saved = [], time.monotonic()
        with tqdm(total=self.run.steps, initial=self.step, unit="step", disable=None) as bar:
            while self.step < self.run.steps and not self.stopped:
                losses.append(self.train_step())
                bar.update()
                if self.step % 100 == 0:
                    tqdm.write(f"step {self.step}/{self.run.steps}  loss {np.mean(losses):.3f}")
                    losses = []
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.checkpoint()
                    saved = time.monotonic()
        self.checkpoint()
        return self.step == self.run.steps


def main(argv: list[str] | None = None) -> int:
    """Train or evaluate. Returns the exit code: 0 done, 2 bad usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m golden.make.train", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="holds tang_poems.jsonl and shakespeare.txt")
    task = parser.add_mutually_exclusive_group(required=True).add_argument
    task("--out", type=Path, metavar="DIR", help="train: checkpoint.pt, evaluation.json, model/")
    task("--evaluate", type=Path, metavar="DIR", help="do not train; print the figures of this model")
    add("--every", type=int, default=1, metavar="N", help="evaluate each N-th document and question")
    add("--steps", type=int, default=Run.steps, help="length of the learning-rate schedule")
    args = parser.parse_args(argv)
    for path in (args.data / name for name in ("tang_poems.jsonl", "shakespeare.txt")):
        if not path.is_file():
            parser.error(f"{path} is missing")
    if args.evaluate:
        figures = evaluate(refimpl.load(args.evaluate), Corpus(args.data, Run.seed), args.every)
        print(json.dumps(figures, ensure_ascii=False, indent=2))
        return 0
    torch.set_num_threads(2)
    trainer = Trainer(args.data, args.out, Run(steps=args.steps))
    if not trainer.train():
        print("interrupted; give the same command again to continue", file=sys.stderr)
        return 130
    ship(args.out / "model", trainer.model, trainer.tokenizer_model, trainer.corpus)
    figures = evaluate(refimpl.load(args.out / "model"), trainer.corpus, args.every)
    text = json.dumps(figures, ensure_ascii=False, indent=2) + "\n"
    (args.out / "evaluation.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
