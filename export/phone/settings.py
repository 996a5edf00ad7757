"""Genie's configurations: what a model is, how it samples, and the NPU that it runs on.

**Source**: AI Hub Models 0.65, `templates/llm/llm_helpers.py`; Qualcomm's configuration of Baichuan2-7B in AI Hub Apps
0.20; of keys, the Genie documentation, "Genie Dialog JSON configuration string".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from export.run.socs import soc_called
from refimpl.config import Config

LONGEST_ANSWER = 2048  # tokens, where the context has so many
CORES = "0xe0"  # of the CPU, as Qualcomm's configurations have it: the fast ones of a phone


def genie_config(config: Config, context: int, bins: Sequence[str], bos: int, eos: int) -> dict[str, Any]:
    """`genie_config.json`. `bos` is put before every prompt; -1 for a tokenizer that adds none, as Baichuan's.

    `bins`: the binaries, all prompt parts before all token parts where each graph has its own.
    """
    theta = config.rope_theta or 0.0
    engine = {
        "version": 1,
        "n-threads": 3,
        "backend": {
            "version": 1,
            "type": "QnnHtp",
            "QnnHtp": {
                "version": 1, "use-mmap": True, "spill-fill-bufsize": 0, "mmap-budget": 0, "poll": True,
                "cpu-mask": CORES, "kv-dim": config.head_dim,
                "rope-theta": int(theta) if theta.is_integer() else theta,
                "pos-id-dim": config.head_dim // 2, "allow-async-init": False,
            },
            "extensions": "htp_backend_ext_config.json",
        },
        "model": {"version": 1, "type": "binary", "binary": {"version": 1, "ctx-bins": list(bins)}},
    }  # fmt: skip
    return {
        "dialog": {
            "version": 1,
            "type": "basic",
            "max-num-tokens": min(LONGEST_ANSWER, context - 1),
            "context": {
                "version": 1, "size": context, "n-vocab": config.vocab_size, "bos-token": bos, "eos-token": eos
            },
            "sampler": {"version": 1, "seed": 42, "temp": 0.8, "top-k": 40, "top-p": 0.95},
            "tokenizer": {"version": 1, "path": "tokenizer.json"},
            "engine": engine,
        }
    }  # fmt: skip


def htp_config(soc: str) -> dict[str, Any]:
    """`htp_backend_ext_config.json` for an SoC by its name."""
    chosen = soc_called(soc)
    core = {"core_id": 0, "perf_profile": "burst", "rpc_control_latency": 100}
    return {
        "devices": [{"soc_model": chosen.model, "dsp_arch": chosen.architecture, "cores": [core]}],
        "memory": {"mem_type": "shared_buffer"},
        "context": {"weight_sharing_enabled": True},
    }
