"""Reads the recordings of the official PyTorch code, in which tensors have short names, under our names.

`python tests/recorded.py SHARED golden/data` converts what fits a repository into the goldens there.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

import golden
import refimpl
from golden.bundle import Case, sha256
from refimpl.trace import Trace

DTYPES = {"f64x": "float64", "f32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MODELS = ("baichuan2-7b-tiny", "baichuan2-13b-tiny", "baichuan-7b-v1-tiny", "qwen2-tiny")
CASES = ("p1", "p7", "p33", "p130", "batch2", "pad", "pad_nopos")

_SHORT = {
    "embed": "model.embed_tokens", "final_norm": "model.norm", "logits": "lm_head",
    "out": "{at}", "input_norm": "{at}.input_layernorm", "wpack": "{at}.self_attn.W_pack",
    "q": "{at}.self_attn.q_proj", "k": "{at}.self_attn.k_proj", "v": "{at}.self_attn.v_proj",
    "q_rope": "{at}.self_attn.query", "attn": "{at}.self_attn.context", "o_proj": "{at}.self_attn.o_proj",
    "post_norm": "{at}.post_attention_layernorm", "gate": "{at}.mlp.gate_proj", "up": "{at}.mlp.up_proj",
    "act": "{at}.mlp.act_fn", "down": "{at}.mlp.down_proj", "probs": "{at}.self_attn.probs",
    "scores": "{at}.self_attn.scores",
}  # fmt: skip


def our_name(short: str) -> str:
    """`layer1.q_rope` -> `model.layers.1.self_attn.query`, `present0.k` -> `model.layers.0.self_attn.key`."""
    where, _, what = short.rpartition(".")
    if where.startswith("present"):
        return f"model.layers.{where[7:]}.self_attn.{ {'k': 'key', 'v': 'value'}[what] }"
    return _SHORT[what].format(at=f"model.layers.{where[5:]}")


class Recording:
    """One recorded model: inputs, and for a precision and a case its tensors under our names."""

    def __init__(self, shared, name):
        self.folder = shared / "models" / name
        self.file = safe_open(shared / "golden" / f"{name}.safetensors", "numpy")
        self.keys = list(self.file.keys())

    def __getitem__(self, key):
        return self.file.get_tensor(key)

    def inputs(self, case):
        """The arguments of a forward: ids and, where the case has one, the attention mask."""
        case = case.replace("_nopos", "")
        mask = f"input.{case}.attention_mask"
        given = {"attention_mask": self[mask]} if mask in self.keys else {}
        return {"ids": self[f"input.{case}.input_ids"], **given}

    def tensors(self, precision, case):
        """Our name -> array of every tensor recorded for this precision and case.

        Scores were recorded with the mask added; what was masked is NaN here, and ALiBi's bias is still in them.
        """
        found = {}
        for key in self.keys:
            start = f"{precision}.{case}."
            if key.startswith(start) and not key.endswith("logits_rows"):
                found[our_name(key.removeprefix(start))] = self[key]
        for name, array in found.items():
            if name.endswith(".scores"):
                low = array.astype(np.float64) < -1e4
                found[name] = np.where(low, np.nan, array)
        return found


# precision of the recording -> the format it is the truth of. The 13B model has 8 heads, whose slopes are powers of
# two: there f64, with float32 slopes, is f64x.
CONVERTED = {"f64": "float64", "f64x": "float64", "bf16": "bfloat16"}
KEPT = {
    "baichuan-7b-v1-tiny": [("f64x", "p7"), ("f64x", "p33"), ("bf16", "p7")],
    "baichuan2-13b-tiny": [("f64", "p7"), ("f64x", "p33"), ("f64", "pad")],
    "qwen2-tiny": [("f64x", "p7"), ("f64x", "p33"), ("bf16", "p7")],
}


def convert(shared: Path, out: Path) -> None:
    """A model and a golden of each family but Baichuan2-7B, which the embedded model stands for."""
    for name, kept in KEPT.items():
        recording, told = Recording(shared, name), json.loads((shared / "golden" / f"{name}.json").read_text())
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(recording.folder, folder / "model", ignore=shutil.ignore_patterns("*.bin"))
        config = refimpl.load(recording.folder).config
        cases, traces, rules = {}, {}, {}
        for precision, case in kept:
            inputs, dtype = recording.inputs(case), CONVERTED[precision]
            cases[case] = Case(inputs["ids"], inputs.get("attention_mask"))
            found = {n: x for n, x in recording.tensors(precision, case).items() if not n.endswith(".scores")}
            order = [n for n in refimpl.names.taps(config) if n in found]
            origin = "observed" if precision != "f64" else "observed, the float32 steps of the code done in float64"
            traces[case, dtype] = Trace({n: found[n] for n in order}, {"origin": dict.fromkeys(order, origin)})
            rules.setdefault(dtype, golden.tolerances(config, dtype, tokens=33))
        provenance = {
            "code": "transformers Qwen2ForCausalLM" if "qwen" in name else "the official modeling_baichuan.py",
            "weights": {"model.safetensors": sha256(folder / "model" / "model.safetensors")},
            "weights made by": "random numbers (NumPy PCG64)",
            "converted from": f"{name}.safetensors, sha256 {sha256(shared / 'golden' / f'{name}.safetensors')}",
            **{k: told[k] for k in ("torch", "transformers")},
        }  # fmt: skip
        golden.write(folder / "golden", config, cases, traces, provenance, rules)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
