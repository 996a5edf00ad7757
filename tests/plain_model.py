"""A second opinion: the same models in straight-line NumPy, one loop over heads, nothing shared with the product.

It knows the families by name and reads the checkpoint by itself, so that a wrong idea about either shows.
"""

import math

import numpy as np
from safetensors.numpy import load_file


def logits(folder, family, ids):
    """Logits (T, V) in float64 of one prompt (T,) without padding."""
    import json

    keys = json.loads((folder / "config.json").read_text())
    w = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}
    heads = keys["num_attention_heads"]
    kv_heads = keys.get("num_key_value_heads", heads)
    dim = keys["hidden_size"] // heads
    theta = {"Baichuan-7B": 1e4, "Baichuan2-7B": 1e4, "Qwen2-7B": keys.get("rope_theta")}.get(family)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(keys["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"], keys["rms_norm_eps"])
        if family == "Qwen2-7B":
            q, k, v = (h @ w[f"{p}self_attn.{n}_proj.weight"].T + w[f"{p}self_attn.{n}_proj.bias"] for n in "qkv")
        else:
            q, k, v = np.split(h @ w[p + "self_attn.W_pack.weight"].T, 3, axis=1)
        out = []
        for head in range(heads):
            kv = head * kv_heads // heads
            qh = q[:, head * dim : (head + 1) * dim]
            kh = k[:, kv * dim : (kv + 1) * dim]
            vh = v[:, kv * dim : (kv + 1) * dim]
            if theta:
                qh, kh = rotate(qh, theta), rotate(kh, theta)
            rows = []
            for t in range(len(ids)):
                s = np.array([qh[t] @ kh[j] / math.sqrt(dim) for j in range(t + 1)])
                if not theta:
                    s += slope(head, heads) * np.arange(t + 1)
                e = np.exp(s - s.max())
                rows.append((e / e.sum()) @ vh[: t + 1])
            out.append(np.array(rows))
        x = x + np.concatenate(out, axis=1) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"], keys["rms_norm_eps"])
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if keys.get("tie_word_embeddings") else "lm_head.weight"]
    if family.startswith("Baichuan2"):
        head = np.array([row / np.linalg.norm(row) if row.any() else row for row in head])
    return norm(x, w["model.norm.weight"], keys["rms_norm_eps"]) @ head.T


def norm(x, gain, eps):
    return np.array([row / math.sqrt(np.mean(row**2) + eps) for row in x]) * gain


def rotate(x, theta):
    """As complex numbers: element i of the first half is real, of the second half imaginary."""
    half = x.shape[1] // 2
    angles = np.outer(np.arange(len(x)), theta ** (-np.arange(half) / half))
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=1)


def slope(head, heads):
    """The (head+1)-th of the ALiBi slopes, by the recursive definition of the paper's code."""

    def series(n):
        return [2 ** (-8 * (k + 1) / n) for k in range(n)]

    power = 1
    while power * 2 <= heads:
        power *= 2
    return (series(power) + series(2 * power)[0::2])[head]
