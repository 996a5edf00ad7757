"""Verbs about checkpoints on disk."""

from __future__ import annotations

import json
import sys

from refimpl.cli.verbs import JSON, MODEL, model_folder, option, verb


@verb("refimpl info weights/Baichuan2-7B-Chat", MODEL, JSON)
def info(arguments) -> int:
    """Say what a checkpoint is, and what is wrong with it."""
    from refimpl.info import examine, table

    facts = examine(model_folder(arguments))
    checkpoints = facts.get("checkpoints", [facts])
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else "\n\n".join(map(table, checkpoints)))
    problems = [problem for one in checkpoints for problem in one["problems"]]
    for problem in problems:
        print(f"refimpl: {problem}", file=sys.stderr)
    return 2 if problems else 0


@verb(
    "refimpl convert weights/Baichuan2-7B-Chat --out weights/b2-7b --dtype bfloat16",
    option("source", metavar="SRC", help="a checkpoint in any layout; it is only read"),
    option("--out", required=True, metavar="DST", help="a new folder"),
    option("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the parameters are"),
    option("--shard-size", default="5GB", metavar="SIZE", help="bytes in a file at most (default: 5GB)"),
    option("--normalize-head", action="store_true", help="apply NormHead: a Baichuan2 for Baichuan 1's code"),
    option("--lora", metavar="ADAPTER", help="merge the peft LoRA adapter in this folder"),
    JSON,
)
def convert(arguments) -> int:
    """Write a checkpoint as safetensors: another format, NormHead applied, or an adapter merged."""
    from refimpl.convert import convert

    report = convert(arguments.source, arguments.out, arguments.dtype, arguments.shard_size, arguments.normalize_head,
                     arguments.lora)  # fmt: skip
    if arguments.json:
        print(json.dumps(report))
        return 0
    print(f"{report['tensors']} tensors, {report['bytes'] / 1e9:.2f} GB, are in {arguments.out}; see SHA256SUMS")
    if arguments.normalize_head:
        shortest, longest = report["row lengths"]
        print(f"the rows of lm_head have lengths from {shortest:.6f} to {longest:.6f}: what rounding leaves of 1")
    return 0
