"""Verbs about what a change of the weights costs."""

from __future__ import annotations

import json
from pathlib import Path

from refimpl.cli.verbs import CACHE_DTYPE, DTYPE, JSON, MODEL, SWEEP, load_model, option, size_of_blocks, verb
from refimpl.errors import InputError


@verb(
    "refimpl quality weights/B2-7B --format q4_0 --text wiki.txt",
    MODEL,
    option(
        "--against", metavar="REF", help="the reference, another checkpoint (default: MODEL before it is quantized)"
    ),
    option("--format", "--formats", metavar="NAME", help="quantize to this format first; several, or all: a table"),
    option("--recipe", metavar="FILE", help="or as this recipe says: see refimpl quantize"),
    option("--block-size", type=size_of_blocks, metavar="N", help="with it: weights that share a scale"),
    option("--keep", action="append", default=[], metavar="PATTERN", help="with it: modules that stay as they are"),
    option("--text", metavar="FILE", help="UTF-8 text, blank lines between documents (default: held-out poems)"),
    option("--tokens", type=int, metavar="N", help="read no more than so many (default: all)"),
    option("--window", type=int, default=512, metavar="N", help="tokens at a time (default: 512)"),
    option("--attribution", action="store_true", help="what each tensor's quantization alone adds to the KL"),
    option("--top", type=int, default=20, metavar="N", help="with it: how many tensors are shown (default: 20)"),
    option("--out", metavar="FILE.svg", help="with it: a picture, layers by modules"),
    *(DTYPE, CACHE_DTYPE, SWEEP, JSON),
)
def quality(arguments) -> int:
    """Judge a model by a reference on a text: perplexity, KL divergence, same top-1, RMS Δp, with error bars."""
    from golden.cost.attribution import attribute, expect_svg
    from golden.cost.quality import quality, side_by_side, table, to_dicts
    from refimpl.blocks.quantize import read_recipe
    from refimpl.model import load
    from refimpl.sweep import workers
    from refimpl_kernels.formats.table import FORMATS

    if arguments.format and arguments.recipe:
        raise InputError("give either --format or --recipe, which says what the matrices become")
    recipe = read_recipe(Path(arguments.recipe)) if arguments.recipe else arguments.format
    if not (arguments.against or recipe or arguments.cache_dtype):
        raise InputError("there is nothing to compare with; give --against REF, or --format q4_0, or --format all")
    names = list(FORMATS) if arguments.format == "all" else (arguments.format or "").split(",")
    if len(names) > 1 and (arguments.against or arguments.attribution):
        raise InputError(
            "several formats are judged by MODEL as it is; give one --format with --against, --attribution"
        )
    if arguments.cache_dtype and (len(names) > 1 or arguments.attribution):
        raise InputError("--cache-dtype is for one comparison; leave out --attribution and further formats")
    if arguments.top < 1:
        raise InputError(f"top is {arguments.top}, expected how many tensors to show")
    if arguments.out:
        if not arguments.attribution:
            raise InputError("--out is the picture of an attribution; give --attribution, too")
        expect_svg(arguments.out)
    model = load_model(arguments)
    reference = load(arguments.against) if arguments.against else model
    ids = text_ids(arguments, reference)
    with workers(arguments.jobs, arguments.dask) as executor:
        rest = (arguments.window, arguments.dtype, executor, arguments.resume)
        if len(names) > 1:
            rows = side_by_side(model, names, ids, arguments.block_size, arguments.keep, *rest)
            print(json.dumps(to_dicts(rows)) if arguments.json else table(rows))
            return 0
        if recipe:
            model = model.quantize(recipe, arguments.block_size, arguments.keep)
        if arguments.attribution:
            attributed = attribute(model, reference, ids, *rest)
            if arguments.out:
                attributed.write_svg(arguments.out)
            print(
                attributed.to_json() if arguments.json else f"{attributed.whole}\n\n{attributed.table(arguments.top)}"
            )
            return 0
        found = quality(model, reference, ids, *rest, arguments.cache_dtype)
    print(json.dumps(found.to_dict()) if arguments.json else found)
    return 0


def text_ids(arguments, model) -> list[int]:
    """The ids of --text, or for the embedded model those of the poems that it was not trained on."""
    from golden.cost.quality import read_documents
    from refimpl.model import EMBEDDED

    if arguments.text is None and model.folder != EMBEDDED:
        raise InputError("give a text to judge by with --text FILE")
    return read_documents(Path(arguments.text or EMBEDDED / "held_out.txt"), model, arguments.tokens)
