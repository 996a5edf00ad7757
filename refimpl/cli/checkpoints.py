"""Verbs about checkpoints on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.cli.verbs import DTYPE, JSON, MODEL, SWEEP, TEXT, load_model, model_folder, option, size_of_blocks, verb

if TYPE_CHECKING:
    from refimpl.blocks.importance import Importance


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
    option("--shard-size", default="5GB", metavar="SIZE", help="bytes of tensors in a file at most (default: 5GB)"),
    option("--normalize-head", action="store_true", help="apply NormHead: a Baichuan2 for Baichuan 1's code"),
    option("--lora", metavar="ADAPTER", help="merge the peft LoRA adapter in this folder"),
    JSON,
)
def convert(arguments) -> int:
    """Write a checkpoint as safetensors: another format, NormHead applied, or an adapter merged."""
    from refimpl.checkpoint.convert import convert

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


@verb(
    "refimpl quantize weights/Baichuan2-7B-Chat --out weights/b2-7b-q4_0 --format q4_0 --keep lm_head",
    MODEL,
    option("--out", required=True, metavar="DIR", help="a new folder, which every verb takes as a model"),
    option("--format", help="of all matrices but the embedding: q4_0, q4_k, int4, nf4, … (kernels/README.md)"),
    option("--recipe", metavar="FILE", help='instead: JSON such as {"lm_head": "q8_0", "*": {"format": "q4_k"}}'),
    option("--keep", action="append", default=[], metavar="PATTERN", help="modules that stay as they are"),
    option("--block-size", type=size_of_blocks, metavar="N", help="or channel, or tensor (default: the format's own)"),
    option(
        "--search",
        choices=("mse", "nearest"),
        help="look for the scales of the least squared error, or round to nearest (default: the format's own way)",
    ),
    option("--importance", metavar="FILE", help="weigh errors by input columns: a file of refimpl importance"),
    option("--text", metavar="FILE", help="the same, from a UTF-8 text that the model is run on first"),
    option("--tokens", type=int, metavar="N", help="read no more of the text than so many (default: all)"),
    option("--shard-size", default="500MB", metavar="SIZE", help="bytes of tensors in a file at most (default: 500MB)"),
    JSON,
)
def quantize(arguments) -> int:
    """Write a checkpoint with its matrices in blocks of a number format."""
    from refimpl.blocks.quantize import read_recipe
    from refimpl.blocks.save import quantize_checkpoint
    from refimpl.errors import InputError

    if (arguments.format is None) == (arguments.recipe is None):
        raise InputError("give either --format or --recipe, which says what the matrices become")
    recipe = arguments.format or read_recipe(Path(arguments.recipe))
    search = 0 if arguments.search == "nearest" else arguments.search
    given = {"block_size": arguments.block_size, "search": search}
    options = {name: value for name, value in given.items() if value is not None}
    report = quantize_checkpoint(model_folder(arguments), arguments.out, recipe, arguments.keep,
                                 _importance(arguments), arguments.shard_size, **options)  # fmt: skip
    count = len(report["tensors"])
    what = f"{count} {'matrix is' if count == 1 else 'matrices are'} quantized"
    said = f"{what}; {report['bytes'] / 1e9:.3g} GB are in {arguments.out}"
    print(json.dumps(report) if arguments.json else said)
    return 0


@verb(
    "refimpl importance weights/Baichuan2-7B-Chat --text wiki.txt --out b2-7b.importance",
    *(MODEL, TEXT, DTYPE, SWEEP, JSON),
    option("--out", required=True, metavar="FILE"),
)
def importance(arguments) -> int:
    """Find on a text which input columns of each matrix matter, for refimpl quantize --importance."""
    from golden.cost.quality import read_documents
    from refimpl.blocks.importance import observe_importance, write_importance
    from refimpl.sweep import workers

    model = load_model(arguments)
    ids = read_documents(Path(arguments.text), model, arguments.tokens)
    with workers(arguments.jobs, arguments.dask) as executor:
        found = observe_importance(model, ids, arguments.window, arguments.dtype, executor, arguments.resume)
    write_importance(arguments.out, found)
    if arguments.json:
        print(json.dumps({"out": arguments.out, "matrices": len(found), **found.meta}, ensure_ascii=False))
        return 0
    print(f"the importance of the inputs of {len(found)} matrices, from {len(ids)} tokens, is in {arguments.out}")
    return 0


def _importance(arguments) -> Importance | None:
    """What --importance or --text gives."""
    from golden.cost.quality import read_documents
    from refimpl.blocks.importance import observe_importance, read_importance
    from refimpl.errors import InputError

    if arguments.tokens is not None and not arguments.text:
        raise InputError("--tokens says how much of --text is read; give that, too")
    if arguments.importance and arguments.text:
        raise InputError("give either --importance or --text; both say which columns matter")
    if arguments.importance:
        return read_importance(arguments.importance)
    if not arguments.text:
        return None
    model = load_model(arguments)
    return observe_importance(model, read_documents(Path(arguments.text), model, arguments.tokens))
