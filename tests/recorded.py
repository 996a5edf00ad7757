"""Reads the recordings of the official PyTorch code, in which tensors have short names, under our names.

`python tests/recorded.py DIR OUT` converts what fits a repository into the goldens under golden/data.
"""

import numpy as np
from safetensors import safe_open

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
