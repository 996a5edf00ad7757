"""Checkpoints: what one is, and writing it in another form."""

from __future__ import annotations

import json
import sys

from refimpl.cli.options import JSON, MODEL, model_folder
from refimpl.cli.verbs import option, verb
from refimpl.errors import InputError


@verb(
    "refimpl info weights/Baichuan2-7B-Chat",
    *(MODEL, JSON),
    option("--export", metavar="DIR", help="of a context binary: say where it differs from the graphs in DIR"),
    option("--soc", metavar="NAME", help="of a context binary: say whether it is made for this SoC, such as 8-elite"),
)
def info(arguments) -> int:
    """Show what a checkpoint is, and what is wrong with it; or what a context binary (FILE.bin) holds."""
    from refimpl.info import examine, table

    if arguments.model and arguments.model.endswith(".bin"):
        from refimpl.cli.phone import info_of_binary

        return info_of_binary(arguments)
    if arguments.export or arguments.soc:
        raise InputError("--export and --soc belong to a context binary; give its file: refimpl info FILE.bin")
    facts = examine(model_folder(arguments))
    checkpoints = facts.get("checkpoints", [facts])
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else "\n\n".join(map(table, checkpoints)))
    problems = [problem for one in checkpoints for problem in one["problems"]]
    for problem in problems:
        print(f"refimpl: {problem}", file=sys.stderr)
    return 2 if problems else 0


@verb(
    "refimpl convert weights/Baichuan2-7B-Chat --out weights/b2-7b --dtype bfloat16",
    option("source", metavar="SRC", help="folder of a checkpoint in any layout; nothing in it is changed"),
    option("--out", required=True, metavar="DIR", help="a new folder; or a new file.gguf, for llama.cpp"),
    option("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: what the parameters have)"),
    option("--shard-size", default="5GB", metavar="SIZE", help="bytes of tensors in one file at most (default: 5GB)"),
    option("--normalize-head", action="store_true",
           help="apply NormHead to the weights, so that Baichuan 1's code runs a Baichuan2"),
    option("--lora", metavar="ADAPTER", help="merge the peft LoRA adapter in this folder"),
    option("--layout", choices=("baichuan", "llama"),
           help="of a 7B: llama splits W_pack and applies NormHead, for LLaMA's code; baichuan is the way back"),
    JSON,
)  # fmt: skip
def convert(arguments) -> int:
    """Write a checkpoint as safetensors: another number format, NormHead applied, an adapter merged."""
    from refimpl.checkpoint.convert import convert

    if arguments.out.endswith(".gguf"):
        return _write_gguf(arguments)
    report = convert(arguments.source, arguments.out, arguments.dtype, arguments.shard_size, arguments.normalize_head,
                     arguments.lora, arguments.layout)  # fmt: skip
    if arguments.json:
        print(json.dumps(report))
        return 0
    print(f"{report['tensors']} tensors, {report['bytes'] / 1e9:.2f} GB, are in {arguments.out}; see SHA256SUMS")
    if "row lengths" in report:
        shortest, longest = report["row lengths"]
        print(
            f"the rows of lm_head have lengths from {shortest:.6f} to {longest:.6f}; rounding makes them differ from 1"
        )
    return 0


def _write_gguf(arguments) -> int:
    from refimpl.blocks.gguf_out import write_gguf
    from refimpl.checkpoint.folder import Checkpoint

    if arguments.lora or arguments.dtype:
        raise InputError("a .gguf keeps the parameters' format; with --dtype or --lora convert into a folder first")
    size = write_gguf(Checkpoint.read(arguments.source), arguments.out)
    print(json.dumps({"bytes": size}) if arguments.json else f"{size / 1e9:.3g} GB are in {arguments.out}")
    return 0
