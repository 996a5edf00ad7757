"""Makes refimpl/conformance/data: questions, PyTorch's answers, and the answers of known faults.

    PYTHONPATH=.:kernels python tests/make_conformance.py [FAMILY ...]

PyTorch computes in float64, without a cache and without padding. Its forward here is written in torch's own operations;
before it is used, it is held to transformers' classes (RoPE) and to what the official code gave (golden/data, ALiBi).
Candidates are prompts of a few tokens. One is taken if the right answer is clear, and every fault's answer differs.
"""

import json
import math
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

import golden
import refimpl
from golden.make.pytorch import make as golden_make
from refimpl.config import FAMILIES
from refimpl.conformance import kit
from refimpl.conformance.faults import FAULTS
from refimpl.conformance.questions import DATA
from refimpl.positions import alibi_slopes
from refimpl.serve.writing import likeliest, log_softmax
from refimpl.text.chat import LAYOUTS, ChatSettings

CLEAR, SEVERAL, NEW, TRIES = 0.25, 0.08, 8, 2000  # nats between the two likeliest tokens; tokens; prompts
WINDOW = "tokens more than 2048 back are not seen"  # the fault that a long prompt must show; others may hide
GOLDEN = Path(golden.__file__).parent / "data"


def forward(config, tensors, ids):
    """Logits (T, V) of ids (T,): the families' forward in torch, float64."""
    H, K, D, T = config.num_attention_heads, config.num_key_value_heads, config.head_dim, len(ids)

    def norm(name, x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * tensors[f"{name}.weight"]

    def linear(name, x):
        return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]
    bias = torch.where(distance > 0, -torch.inf, 0.0).double()[None]
    if config.alibi:
        bias = bias + torch.tensor(alibi_slopes(H))[:, None, None] * distance
    else:
        angles = torch.arange(T).double()[:, None] * config.rope_theta ** (-torch.arange(0, D, 2).double() / D)
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))

    def turned(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    x = tensors["model.embed_tokens.weight"][torch.tensor(ids)]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        y = norm(f"{at}.input_layernorm", x)
        if config.qkv_packed:
            q, k, v = linear(f"{at}.self_attn.W_pack", y).chunk(3, -1)
        else:
            q, k, v = (linear(f"{at}.self_attn.{m}_proj", y) for m in "qkv")
        q, k, v = (one.view(T, -1, D).transpose(0, 1) for one in (q, k, v))
        if not config.alibi:
            q, k = turned(q), turned(k)
        k, v = (one.repeat_interleave(H // K, 0) for one in (k, v))
        y = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(D) + bias, -1) @ v
        x = x + linear(f"{at}.self_attn.o_proj", y.transpose(0, 1).reshape(T, -1))
        y = norm(f"{at}.post_attention_layernorm", x)
        x = x + linear(
            f"{at}.mlp.down_proj", functional.silu(linear(f"{at}.mlp.gate_proj", y)) * linear(f"{at}.mlp.up_proj", y)
        )
    head = tensors["lm_head.weight"]
    head = functional.normalize(head) if config.norm_head else head
    return functional.linear(norm("model.norm", x), head)


def tensors_of(folder):
    from safetensors.torch import load_file

    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def hold_to_others(folder, config, ids):
    """The forward above, against code that we did not write."""
    if config.alibi:
        recorded, folder = (
            golden.read(GOLDEN / "baichuan2-13b-tiny" / "golden"),
            GOLDEN / "baichuan2-13b-tiny" / "model",
        )
        official = recorded.trace("p33", "float64")
        ids = np.asarray(official.meta["ids"])[0].tolist()
    else:
        with tempfile.TemporaryDirectory() as place:
            made = golden_make(folder, Path(place) / "golden", [ids], ("float64",), taps="lm_head")
            official = made.trace(dtype="float64")
    found, expected = forward(refimpl.load(folder).config, tensors_of(folder), ids).numpy(), official["lm_head"][0]
    np.testing.assert_allclose(found, expected, atol=1e-8)


class Maker:
    def __init__(self, family, folder):
        warnings.simplefilter("ignore")
        self.family, self.model = family, refimpl.load(folder)
        self.config, self.tokenizer = self.model.config, self.model.tokenizer
        self.tensors, self.rng = tensors_of(folder), np.random.default_rng(5)
        self.found = []
        pieces = [id for id in range(self.config.vocab_size) if self._plain(id)]
        self.pieces = np.array(pieces)
        hold_to_others(folder, self.config, self.pieces[:9].tolist())

    def _plain(self, id):
        """Whether a token is whole characters that every engine shows alike."""
        try:
            text = self.tokenizer.token_bytes(id).decode()
        except UnicodeDecodeError:
            return False
        return (
            bool(text)
            and text.isprintable()
            and " " not in text
            and id > 258 * (self.family != "Qwen2-7B")
            and "<" not in text
        )

    def text_of(self, ids):
        return self.tokenizer.decode(list(ids))

    def prompt(self, length):
        while True:
            ids = self.rng.choice(self.pieces, length).tolist()
            text = self.text_of(ids)
            ids = self.tokenizer.encode(text)
            if len(ids) == length or length > 50:
                return ids

    def answer(self, rows, ids, finish=""):
        top = {self.tokenizer.token_bytes(id).decode(errors="replace"): round(p, 5) for id, p in likeliest(rows[0], 5)}
        return {"text": self.tokenizer.decode(ids, skip_special_tokens=True), "top": top, "finish": finish}

    def truth(self, ids, new):
        """PyTorch's answer, how clear it is, and its tokens."""
        rows, said, ids = [], [], list(ids)
        with torch.no_grad():
            for _ in range(new):
                rows.append(log_softmax(forward(self.config, self.tensors, ids)[-1].numpy()))
                said.append(int(rows[-1].argmax()))
                ids.append(said[-1])
                if said[-1] == self.config.eos_token_id:
                    break
        clear = min(np.diff(np.sort(row)[-2:])[0] for row in rows)
        finish = "stop" if said[-1] == self.config.eos_token_id else "length"
        return self.answer(rows, said, finish), clear, said

    def ours(self, model, ids, new, padded=0):
        """What a model of ours answers, a broken one too."""
        rows, said, cache = [], [], model.new_cache()
        mask = np.array([[0] * padded + [1] * len(ids)])
        logits = model(np.array([[0] * padded + list(ids)]), attention_mask=mask, cache=cache, logits_to_keep=1)
        for _ in range(new):
            rows.append(log_softmax(logits[0, -1]))
            said.append(int(rows[-1].argmax()))
            if said[-1] == self.config.eos_token_id or len(said) == new:
                break
            logits = model([[said[-1]]], cache=cache, logits_to_keep=1)
        return self.answer(rows, said)

    def ask(self, feature, candidates, faults, new=1, chat=False, same=(), ends=False):
        """Takes the first candidate (body, ids) that decides. `faults`: cause -> function (ids) -> answer, or None."""
        for body, ids in candidates:
            if len(ids) + new > self.config.max_position_embeddings:  # Baichuan 1's layout leaves no room at times
                continue
            right, clear, said = self.truth(ids, new)
            if clear < (CLEAR if new == 1 and len(ids) < 1000 else SEVERAL) or not all(
                self._plain(id) for id in said[: -1 if ends else None]
            ):
                continue
            if ends != (said[-1] == self.config.eos_token_id) or (ends and len(said) < 3):
                continue
            if len(ids) > 1000:
                print(f"... clear by {clear:.2f}", flush=True)
            wrong = {cause: answer for cause, broken in faults.items() if (answer := broken(ids)) is not None}
            unseen = [cause for cause, answer in wrong.items() if answer["text"] in (right["text"], "")]
            if (len(ids) < 1000 and unseen) or WINDOW in unseen:
                continue
            wrong = {cause: answer for cause, answer in wrong.items() if cause not in unseen}
            mine = self.ours(self.model, ids, new)
            assert mine["text"] == right["text"], (mine, right)
            body = {"max_tokens": new + 4 if ends else new, "temperature": 0, **body}
            self.found.append(
                {
                    "feature": feature,
                    "body": body,
                    "ids": ids,
                    "right": right,
                    "faults": wrong,
                    "chat": chat,
                    "same": list(same),
                }
            )
            print(f"{self.family:14} {feature:26} clear by {clear:.2f}, {len(wrong)} faults", flush=True)
            return
        raise SystemExit(f"{self.family}: no prompt decides {feature}")

    def prompts(self, *lengths):
        for _ in range(TRIES):
            ids = self.prompt(int(self.rng.choice(lengths)))
            yield {"prompt": self.text_of(ids)}, ids

    def broken(self, feature, new=1, padded=0):
        models = {cause: change(self.model) for cause, change in FAULTS[feature].items()}
        return {
            cause: lambda ids, model=model: self.ours(model, ids, new, padded)
            for cause, model in models.items()
            if model
        }

    def make(self):
        bos = {"<s> is put before the prompt": lambda ids: self.ours(self.model, [self.config.bos_token_id, *ids], 1)}
        self.ask("token ids of a text", self.prompts(6, 9), bos)
        for feature in ("head", "RoPE's pairs", "RoPE's base", "ALiBi", "W_pack", "bias of q, k, v"):
            if faults := self.broken(feature):
                lengths = (200, 300) if feature == "RoPE's base" else (20, 40)
                self.ask(feature, self.prompts(*lengths), faults)
        self.ask("KV cache", self.prompts(9), self.broken("KV cache", NEW), NEW)
        self.batch()
        self.ask("end of text", self.prompts(3, 4, 5), {}, 12, ends=True)
        self.ask("sampling at the edges", self.prompts(9), {}, 4, same=(
            {"temperature": 0.001, "seed": 3}, {"temperature": 2, "top_p": 1e-6, "seed": 4},
            {"temperature": 0, "top_p": 0.5},
        ))  # fmt: skip
        if self.family != "Qwen2-7B":
            self.bytes()
        self.chats()
        if self.config.alibi:
            window = {WINDOW: lambda ids: self.ours(self.model, ids[-2048:], 1)}
            self.ask("ALiBi beyond 2048 tokens", self.far(), self.broken("ALiBi beyond 2048 tokens") | window)

    def far(self):
        """Prompts of one token many times, then another: the last token looks for the first, more than 2048 back.

        In the head of layer 0 that forgets least, both have about the same weight, though ALiBi takes 8 off the first.
        """
        first = self.model.truncated(3)  # the others hardly matter, and a long prompt takes long
        scores = self.scores_of_layer_0(int(alibi_slopes(self.config.num_attention_heads).argmin()))
        for _ in range(TRIES):
            near, last = self.rng.integers(len(self.pieces), size=2)
            far = np.abs(scores[last] - scores[last, near] - 8.8).argmin()
            text = self.text_of([self.pieces[far]] * 150 + [self.pieces[near]] * 2100 + [self.pieces[last]])
            ids = self.tokenizer.encode(text)
            answers = {self.ours(first, some, 1)["text"] for some in (ids, ids[-2048:])} if len(ids) == 2251 else set()
            if len(answers) == 2:
                yield {"prompt": text}, ids

    def scores_of_layer_0(self, head):
        """How well each piece's query fits each piece's key there, without positions: (pieces, pieces)."""
        at, D = "model.layers.0", self.config.head_dim
        x = self.tensors["model.embed_tokens.weight"][torch.tensor(self.pieces)]
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True)) * self.tensors[f"{at}.input_layernorm.weight"]
        q, k, _ = (x @ self.tensors[f"{at}.self_attn.W_pack.weight"].T).chunk(3, -1)
        part = slice(head * D, (head + 1) * D)
        return (q[:, part] @ k[:, part].T / math.sqrt(D)).numpy()

    def bytes(self):
        unknown = {"bytes of a rare character are <unk>": lambda ids: self.ours(self.model, self.unk(ids), 1)}

        def texts():
            for _ in range(TRIES):
                text = self.text_of(self.prompt(4)) + "𪚥😀"
                yield {"prompt": text}, self.tokenizer.encode(text)

        self.ask("byte fallback", texts(), unknown)

    def unk(self, ids):
        return [
            0 if 0xF0 in (data := self.tokenizer.token_bytes(id)) or (len(data) == 1 and data[0] > 127) else id
            for id in ids
        ]

    def batch(self):
        """Three prompts of different lengths at once: each is answered as if it were alone."""
        change = {cause: fault(self.model) for cause, fault in FAULTS["batch"].items()}
        for _ in range(TRIES):
            prompts = [self.prompt(n) for n in (5, 9, 3)]
            truths = [self.truth(ids, 3) for ids in prompts]
            if min(clear for _, clear, _ in truths) < SEVERAL or not all(
                self._plain(id) for *_, said in truths for id in said
            ):
                continue
            join = lambda answers: {"text": "\n".join(a["text"] for a in answers), "top": {}, "finish": ""}
            right = join([truth for truth, *_ in truths])
            wrong = {
                cause: join([self.ours(model, ids, 3, 9 - len(ids)) for ids in prompts])
                for cause, model in change.items()
            }
            if any(answer["text"] == right["text"] for answer in wrong.values()):
                continue
            body = {"max_tokens": 3, "temperature": 0, "prompt": [self.text_of(ids) for ids in prompts]}
            self.found.append(
                {
                    "feature": "batch",
                    "body": body,
                    "ids": prompts,
                    "right": right,
                    "faults": wrong,
                    "chat": False,
                    "same": [],
                }
            )
            print(f"{self.family:14} batch")
            return
        raise SystemExit("no batch decides")

    def chats(self):
        settings, encode = self.tokenizer.chat_settings, self.tokenizer.encode
        layout = LAYOUTS[self.family]

        def laid(messages, new):
            return layout(
                messages,
                encode,
                ChatSettings(
                    settings.context, new, settings.user_token_id, settings.assistant_token_id, settings.eos_token_id
                ),
            )

        def spoken(rounds, length, system):
            roles = [role for _ in range(rounds) for role in ("user", "assistant")][:-1]
            first = [{"role": "system", "content": self.text_of(self.prompt(4))}] if system else []
            return first + [{"role": role, "content": self.text_of(self.prompt(length))} for role in roles]

        def candidates(rounds, length, system=False):
            for _ in range(TRIES):
                messages = spoken(rounds, length, system)
                ids = laid(messages, 1)
                self.said[tuple(ids)] = messages
                yield {"messages": messages}, ids

        self.said = {}
        contents = lambda ids: self.said[tuple(ids)]
        answered = lambda ids: self.ours(self.model, ids, 1)
        others = {
            "the messages are run together, without roles": lambda ids: together(contents(ids), encode),
            "the roles are changed for each other": lambda ids: [{195: 196, 196: 195}.get(id, id) for id in ids],
            "<s> is put before the prompt": lambda ids: [self.config.bos_token_id, *ids],
            "the messages have ChatML's layout, spelled out": lambda ids: encode(chatml(contents(ids))),
            "the messages have Llama 2's layout": lambda ids: encode(llama2(contents(ids))),
            "each answer ends with </s>": lambda ids: self.ended(contents(ids), encode),
        }  # fmt: skip
        if self.family == "Qwen2-7B":
            kept = ("the messages are run together, without roles", "the messages have Llama 2's layout")
            others = {cause: others[cause] for cause in kept}
            others["the system message that Qwen2 adds is left out"] = lambda ids: ids[
                ids.index(self.config.eos_token_id) + 2 :
            ]
        elif self.family.startswith("Baichuan-"):
            del others["each answer ends with </s>"]
            others["answers do not end with </s>"] = lambda ids: [id for id in ids if id != 2]
        faults = {
            cause: lambda ids, wrong=wrong: self.ours(self.model, wrong(ids), 1) for cause, wrong in others.items()
        }
        self.ask("chat layout", candidates(2, 5), faults, chat=True)
        if self.family.startswith("Baichuan2"):
            self.ask("system message", candidates(1, 5, True), {
                "the system message is left out": lambda ids: answered(ids[ids.index(195) :]),
                "the messages have Llama 2's layout": lambda ids: answered(encode(llama2(contents(ids)))),
                "the system message has the user's role": lambda ids: answered([195, *ids]),
            }, chat=True)  # fmt: skip
        if self.config.max_position_embeddings == 512 and self.family != "Qwen2-7B":
            whole = lambda ids: self.whole(contents(ids), encode)
            self.ask("truncation of a long chat", candidates(8, 40), {
                "its beginning is cut off, whatever stands there": lambda ids: answered(whole(ids)[-511:]),
                "its end is cut off": lambda ids: answered(whole(ids)[:511]),
                "all but the last message is left out": lambda ids: answered(self.whole(contents(ids)[-1:], encode)),
            }, chat=True)  # fmt: skip

    def ended(self, messages, encode):
        out = []
        for m in messages:
            out += [
                195 if m["role"] == "user" else 196,
                *encode(m["content"]),
                *([2] if m["role"] == "assistant" else []),
            ]
        return [*out, 196]

    def whole(self, messages, encode):
        end = [2] if self.family.startswith("Baichuan-") else []
        out = []
        for m in messages:
            out += [195, *encode(m["content"])] if m["role"] == "user" else [196, *encode(m["content"]), *end]
        return [*out, 196]


def chatml(messages):
    """ChatML's layout, as text."""
    said = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(said) + "<|im_start|>assistant\n"


def together(messages, encode):
    """The contents one after another."""
    return [id for message in messages for id in encode(message["content"])]


def llama2(messages):
    """What llama-cpp-python does with a model that has no chat template (0.3)."""
    if messages[0]["role"] == "system":
        return f"[INST] <<SYS>>\n{messages[0]['content']}\n<</SYS>> {messages[1]['content']} [/INST]"
    said = [f"<s>[INST]{m['content']}  " if m["role"] == "user" else f"[/INST]{m['content']} </s>" for m in messages]
    return " " + "".join(said) + "[/INST]"


def main():
    torch.set_num_threads(1)
    for family in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as place:
            maker = Maker(family, kit.write(family, Path(place) / "model"))
            maker.make()
        made = {"version": kit.VERSION, "family": family, "torch": torch.__version__, "questions": maker.found}
        DATA.mkdir(exist_ok=True)
        (DATA / f"{family}.json").write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
