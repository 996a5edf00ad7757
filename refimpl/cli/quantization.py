"""Quantization: 4-bit weights, encodings for a phone, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refimpl.cli.options import (
    CACHE_DTYPE,
    DTYPE,
    JSON,
    MODEL,
    SWEEP,
    TEXT,
    listed_ids,
    load_model,
    model_folder,
    size_of_blocks,
    text_ids,
)
from refimpl.cli.verbs import option, verb
from refimpl.errors import InputError

if TYPE_CHECKING:
    from golden.cost.attribution import Attribution
    from golden.cost.reading import Reading
    from refimpl.blocks.importance import Importance
    from refimpl.sweep import Pool

KEEP = option(
    "--keep", action="append", default=[], metavar="PATTERN", help="modules that are not quantized; may be repeated"
)
BLOCK_SIZE = option(
    "--block-size", type=size_of_blocks, metavar="N", help="weights that share a scale; or channel, or tensor"
)


@verb(
    "refimpl quantize weights/Baichuan2-7B-Chat --out weights/b2-7b-q4_0 --format q4_0 --keep lm_head",
    MODEL,
    option("--out", required=True, metavar="DIR", help="a new folder, which every verb takes; or a new file.gguf"),
    option("--format", metavar="NAME",
           help="q4_0, q4_k, int4, nf4, … for all matrices but the embedding (kernels/README.md lists them)"),
    option("--recipe", metavar="FILE",
           help='in place of --format: JSON such as {"lm_head": "q8_0", "*": {"format": "q4_k"}}'),
    *(KEEP, BLOCK_SIZE),
    option("--search", choices=("mse", "nearest"),
           help="mse: search for the scales with the least squared error; nearest: only round (default: the format's)"),
    option("--importance", metavar="FILE", help="weigh errors by input columns: a file of refimpl importance"),
    option("--text", metavar="FILE", help="the same, from a UTF-8 text on which the model is run first"),
    option("--tokens", type=int, metavar="N", help="read only the first N tokens of the text (default: all)"),
    option("--shard-size", default="500MB", metavar="SIZE", help="bytes of tensors in one file (default: 500MB)"),
    JSON,
)  # fmt: skip
def quantize(arguments) -> int:
    """Write a checkpoint with its matrices in blocks of a number format."""
    from refimpl.blocks.save import quantize_checkpoint

    recipe = _recipe(arguments)
    if recipe is None:
        raise InputError("nothing says what the matrices become; give either --format or --recipe")
    search = 0 if arguments.search == "nearest" else arguments.search
    given = {"block_size": arguments.block_size, "search": search}
    options = {name: value for name, value in given.items() if value is not None}
    if arguments.out.endswith(".gguf"):
        return _write_gguf(arguments, recipe, options)
    report = quantize_checkpoint(model_folder(arguments), arguments.out, recipe, arguments.keep,
                                 _importance(arguments), arguments.shard_size, **options)  # fmt: skip
    if arguments.json:
        print(json.dumps(report))
        return 0
    count = len(report["tensors"])
    what = f"{count} {'matrix is' if count == 1 else 'matrices are'} quantized"
    print(f"{what}; {report['bytes'] / 1e9:.3g} GB are in {arguments.out}")
    return 0


def _write_gguf(arguments, recipe, options) -> int:
    from refimpl.blocks.gguf_out import write_gguf
    from refimpl.checkpoint.folder import Checkpoint

    source, importance = Checkpoint.read(model_folder(arguments)), _importance(arguments)
    size = write_gguf(source, arguments.out, recipe, arguments.keep, importance, **options)
    print(json.dumps({"bytes": size}) if arguments.json else f"{size / 1e9:.3g} GB are in {arguments.out}")
    return 0


@verb(
    "refimpl importance weights/Baichuan2-7B-Chat --text wiki.txt --out b2-7b.importance",
    *(MODEL, TEXT, DTYPE, SWEEP, JSON),
    option("--out", required=True, metavar="FILE", help="a new file"),
    option("--gradients", action="store_true", help="weigh activations by how much the loss depends on the output"),
)
def importance(arguments) -> int:
    """Find which input columns of each matrix matter, for refimpl quantize --importance."""
    from refimpl.blocks.importance import observe_importance, write_importance
    from refimpl.gradients.sensitivity import observe_sensitivity
    from refimpl.sweep import workers

    model = load_model(arguments)
    ids = text_ids(arguments, model)
    with workers(arguments.jobs, arguments.dask) as executor:
        if arguments.gradients:
            found = observe_sensitivity(model, ids, arguments.window, executor=executor, resume=arguments.resume)
        else:
            found = observe_importance(model, ids, arguments.window, arguments.dtype, executor, arguments.resume)
    write_importance(arguments.out, found)
    if arguments.json:
        print(json.dumps({"out": arguments.out, "matrices": len(found), **found.meta}, ensure_ascii=False))
        return 0
    print(f"the importance of the inputs of {len(found)} matrices, from {len(ids)} tokens, is in {arguments.out}")
    return 0


@verb(
    "refimpl quality weights/B2-7B --format q4_0 --text wiki.txt",
    MODEL,
    option("--against", metavar="REF", help="the reference, another checkpoint (default: MODEL before quantization)"),
    option("--format", "--formats", metavar="NAME", help="quantize MODEL first; a list of formats, or all: a table"),
    option("--recipe", metavar="FILE", help="in place of --format: see refimpl quantize"),
    *(BLOCK_SIZE, KEEP),
    option("--text", metavar="FILE", help="UTF-8 text, blank lines between documents (default: held-out poems)"),
    option("--tokens", type=int, metavar="N", help="read only the first N tokens (default: all)"),
    option("--window", type=int, default=512, metavar="N", help="tokens that are run at a time (default: 512)"),
    option("--attribution", action="store_true", help="show what the quantization of each tensor alone adds to the KL"),
    option("--top", type=int, default=20, metavar="N", help="with --attribution: show N tensors (default: 20)"),
    option("--out", metavar="FILE.svg", help="with --attribution: draw a map of layers and modules"),
    *(DTYPE, CACHE_DTYPE, SWEEP, JSON),
)  # fmt: skip
def quality(arguments) -> int:
    """Judge a model by a reference on a text: perplexity, KL divergence, same top-1, with error bars."""
    from golden.cost.attribution import attribute
    from golden.cost.quality import quality
    from golden.cost.side_by_side import side_by_side, table, to_dicts
    from refimpl.model import load
    from refimpl.sweep import workers
    from refimpl_kernels.formats.table import FORMATS

    recipe = _recipe(arguments)
    names = list(FORMATS) if arguments.format == "all" else (arguments.format or "").split(",")
    _expect_one_question(arguments, recipe, several=len(names) > 1)
    model = load_model(arguments)
    reference = load(arguments.against) if arguments.against else model
    ids = text_ids(arguments, reference)
    with workers(arguments.jobs, arguments.dask) as executor:
        reading = _reading(arguments, executor)
        if len(names) > 1:
            rows = side_by_side(model, names, ids, arguments.block_size, arguments.keep, reading)
            print(json.dumps(to_dicts(rows)) if arguments.json else table(rows))
            return 0
        if recipe:
            model = model.quantize(recipe, arguments.block_size, arguments.keep)
        if arguments.attribution:
            return _show_attribution(arguments, attribute(model, reference, ids, reading))
        found = quality(model, reference, ids, reading, arguments.cache_dtype)
    print(json.dumps(found.to_dict()) if arguments.json else found)
    return 0


@verb(
    "refimpl calibrate weights/B2-7B --text wiki.txt --out encodings.json",
    *(MODEL, DTYPE, SWEEP, JSON),
    option("--text", metavar="FILE", help="UTF-8 text with blank lines between documents"),
    option("--ids", metavar="IDS", help="in place of a text: token ids such as 5,17,9, or a file of them"),
    option("--tokens", type=int, metavar="N", help="read only the first N tokens (default: all)"),
    option("--window", type=int, default=512, metavar="N", help="tokens that are run at a time (default: 512)"),
    option("--out", required=True, metavar="FILE", help="a new file"),
    option("--version", default="1.0.0", help="of the file's format: 0.6.1, 1.0.0 (default) or 2.0.0"),
    option("--method", choices=("minmax", "percentile", "mse"), default="minmax",
           help="how the ranges of activations are chosen (default: minmax)"),
    option("--percentile", type=float, default=99.99, metavar="P",
           help="with --method percentile: the share of values that is kept at each end (default: 99.99)"),
    option("--weight-bits", type=int, default=4, metavar="N", help="bits of linears; the head has 8 (default: 4)"),
    option("--block-size", type=int, metavar="N", help="one scale for N weights (default: one for each row)"),
    option("--lpbq", action="store_true", help="make the scales of blocks small multiples of the row's scale"),
)  # fmt: skip
def calibrate(arguments) -> int:
    """Find the range of every tensor on a text or its ids, and write AIMET encodings for a phone."""
    from export.files.encodings import write_encodings
    from refimpl.grids.calibrate import calibrate
    from refimpl.grids.recipe import Recipe
    from refimpl.sweep import workers

    if bool(arguments.text) == bool(arguments.ids):
        said = "both a text and token ids" if arguments.text else "nothing to calibrate on"
        raise InputError(f"there is {said}; give either --text FILE, or --ids, for which no tokenizer is needed")
    model = load_model(arguments)
    ids = listed_ids(arguments.ids, arguments.tokens) if arguments.ids else text_ids(arguments, model)
    recipe = Recipe(weight_bits=arguments.weight_bits, block_size=arguments.block_size, lpbq=arguments.lpbq)
    with workers(arguments.jobs, arguments.dask) as executor:
        found = calibrate(model, ids, recipe, arguments.method, arguments.percentile, arguments.window, arguments.dtype,
                          executor, arguments.resume)  # fmt: skip
    write_encodings(found, arguments.out, arguments.version)
    if arguments.json:
        counts = {"activations": len(found.activations), "parameters": len(found.parameters), "tokens": len(ids)}
        print(json.dumps({"out": arguments.out, **counts}, ensure_ascii=False))
        return 0
    print(f"{len(found.activations)} tensors and {len(found.parameters)} weights, from {len(ids)} tokens, "
          f"have their encodings in {arguments.out}")  # fmt: skip
    return 0


@verb(
    "refimpl simulate weights/B2-7B --encodings e.json --text wiki.txt --what-if '*.down_proj.weight=8'",
    *(MODEL, TEXT, DTYPE, SWEEP, JSON),
    option("--encodings", required=True, metavar="FILE", help="a file of refimpl calibrate, or of AIMET"),
    option("--what-if", action="append", default=[], metavar="PATTERN=BITS",
           help="give the tensors that match so many bits, and show what that gains; may be repeated"),
    option("--rounding", choices=("away", "even"), default="away",
           help="where half a step goes: away from zero as in AIMET (default), or to even as in ONNX"),
    option("--integer", action="store_true", help="sum the products of codes as exact integers"),
)  # fmt: skip
def simulate(arguments) -> int:
    """Predict what an encodings file costs, tensor by tensor, and what more bits would gain."""
    from export.files.encodings import read_encodings
    from golden.cost.predict import outcome_table, outcomes_json, predict, what_if
    from refimpl.sweep import workers

    model = load_model(arguments)
    encodings = read_encodings(arguments.encodings, model)
    ids = text_ids(arguments, model)
    changes = [change(text) for text in arguments.what_if]
    with workers(arguments.jobs, arguments.dask) as executor:
        rest = (_reading(arguments, executor), arguments.rounding, arguments.integer)
        noise = predict(model, encodings, ids, *rest)
        outcomes = what_if(model, encodings, ids, changes, *rest)
    if arguments.json:
        print(f'{{"noise": {noise.to_json()}, "outcomes": {outcomes_json(outcomes)}}}')
    else:
        print(f"{noise}\n\n{outcome_table(outcomes)}")
    return 0


def change(text: str) -> tuple[str, int]:
    """A glob and bits, from PATTERN=BITS."""
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdecimal():
        raise InputError(f"{text!r} is not a change such as '*.down_proj.weight=8'")
    return pattern, int(bits)


def _reading(arguments, executor: Pool | None) -> Reading:
    """The `Reading` that the options ask for."""
    from golden.cost.reading import Reading

    return Reading(arguments.window, arguments.dtype, executor, arguments.resume)


def _recipe(arguments) -> Any:
    """The recipe of --recipe, or the format of --format, or None."""
    from refimpl.blocks.quantize import read_recipe

    if arguments.format and arguments.recipe:
        raise InputError("give either --format or --recipe; both say what the matrices become")
    return read_recipe(Path(arguments.recipe)) if arguments.recipe else arguments.format


def _importance(arguments) -> Importance | None:
    """The importance that --importance holds, or that --text shows, or None."""
    from refimpl.blocks.importance import observe_importance, read_importance

    if arguments.tokens is not None and not arguments.text:
        raise InputError("--tokens says how much of --text is read; give --text, too")
    if arguments.importance and arguments.text:
        raise InputError("give either --importance or --text; both say which columns matter")
    if arguments.importance:
        return read_importance(arguments.importance)
    if not arguments.text:
        return None
    model = load_model(arguments)
    return observe_importance(model, text_ids(arguments, model))


def _expect_one_question(arguments, recipe: Any, several: bool) -> None:
    """Raises InputError unless the options of `quality` ask for one thing. `several`: formats side by side."""
    from golden.cost.picture import expect_svg

    if not (arguments.against or recipe or arguments.cache_dtype):
        raise InputError("there is nothing to compare with; give --against REF, or --format q4_0, or --format all")
    if several and (arguments.against or arguments.attribution):
        raise InputError("a table of formats always has MODEL as its reference; give one --format with --against or "
                         "--attribution")  # fmt: skip
    if arguments.cache_dtype and (several or arguments.attribution):
        raise InputError("--cache-dtype is for one comparison; leave out --attribution and further formats")
    if arguments.top < 1:
        raise InputError(f"top is {arguments.top}, expected how many tensors to show, from 1")
    if arguments.out:
        if not arguments.attribution:
            raise InputError("--out is the picture of an attribution; give --attribution, too")
        expect_svg(arguments.out)


def _show_attribution(arguments, found: Attribution) -> int:
    """Draws and prints an attribution."""
    from golden.cost.picture import write_svg

    if arguments.out:
        write_svg(found, arguments.out)
    print(found.to_json() if arguments.json else f"{found.whole}\n\n{found.table(arguments.top)}")
    return 0
