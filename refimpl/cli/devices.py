"""Verbs for a phone: encodings, simulation, graphs, verdicts."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from refimpl.cli.verbs import DTYPE, JSON, MODEL, SWEEP, TEXT, integers, load_model, model_folder, option, report, verb
from refimpl.errors import InputError, at_most

RUNNING = {"engine", "model", "encodings", "chained", "graph", "dtype"}  # options that need a device's outputs
JUDGING = {"min_sqnr", "max_lsb", "max_over", "html", "junit", "model_explorer", "save"}
FLOATS = option(
    "--dtype", choices=("float32", "float16"), help="of a device without grids (default: as its outputs show)"
)


@verb(
    "refimpl calibrate weights/B2-7B --text wiki.txt --out encodings.json",
    *(MODEL, TEXT, DTYPE, SWEEP, JSON),
    option("--out", required=True, metavar="FILE"),
    option("--version", default="1.0.0", help="of the file: 0.6.1, 1.0.0 (default) or 2.0.0"),
    option(
        "--method",
        choices=("minmax", "percentile", "mse"),
        default="minmax",
        help="how the ranges of activations are chosen (default: minmax)",
    ),
    option(
        "--percentile",
        type=float,
        default=99.99,
        metavar="P",
        help="with that method, the share that is kept at each end (default: 99.99)",
    ),
    option("--weight-bits", type=int, default=4, help="of linears; the head has 8 (default: 4)"),
    option("--block-size", type=int, metavar="N", help="a scale for so many weights, not for each row"),
    option("--lpbq", action="store_true", help="scales of blocks as small multiples of the row's"),
)
def calibrate(arguments) -> int:
    """Find the range of every tensor on a text, and write AIMET encodings for 4-bit weights, 16-bit activations."""
    from export.files.encodings import write_encodings
    from golden.cost.quality import read_documents
    from refimpl.grids.calibrate import calibrate
    from refimpl.grids.encodings import Recipe
    from refimpl.sweep import workers

    model = load_model(arguments)
    ids = read_documents(Path(arguments.text), model, arguments.tokens)
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
    option("--encodings", required=True, metavar="FILE"),
    option(
        "--what-if",
        action="append",
        default=[],
        metavar="PATTERN=BITS",
        help="raise what matches to so many bits, and say what is gained; may be given several times",
    ),
    option(
        "--rounding",
        choices=("away", "even"),
        default="away",
        help="half a step goes away from zero as in AIMET (default), or to even as in ONNX",
    ),
    option("--integer", action="store_true", help="sum products of codes, exactly"),
)
def simulate(arguments) -> int:
    """Predict what quantization by an encodings file costs, tensor by tensor, and what more bits would gain."""
    from export.files.encodings import read_encodings
    from golden.cost.predict import outcome_table, outcomes_json, predict, what_if
    from golden.cost.quality import read_documents
    from refimpl.sweep import workers

    model = load_model(arguments)
    encodings = read_encodings(arguments.encodings, model)
    ids = read_documents(Path(arguments.text), model, arguments.tokens)
    changes = [change(text) for text in arguments.what_if]
    with workers(arguments.jobs, arguments.dask) as executor:
        rest = (arguments.window, arguments.rounding, arguments.integer, arguments.dtype, executor, arguments.resume)
        noise = predict(model, encodings, ids, *rest)
        outcomes = what_if(model, encodings, ids, changes, *rest)
    if arguments.json:
        print(f'{{"noise": {noise.to_json()}, "outcomes": {outcomes_json(outcomes)}}}')
    else:
        print(f"{noise}\n\n{outcome_table(outcomes)}")
    return 0


@verb(
    "refimpl export weights/B2-7B --out build/b2-7b --tokens 128,1 --context 4096 --parts 5",
    MODEL,
    option("--out", metavar="DIR", help="a new folder"),
    option("--check", metavar="DIR", help="export nothing: say what AI Hub or Genie would refuse of the graphs there"),
    option("--json", action="store_true", help="of --check: print JSON instead of text"),
    option("--tokens", default="128,1", help="tokens per call of each graph (default: 128,1)"),
    option("--context", type=int, help="tokens that the static cache holds (default: the model's context)"),
    option("--parts", type=int, help="how many graphs the model is split into (default: 2)"),
    option(
        "--graph",
        action="append",
        default=[],
        metavar="PATTERN",
        help="no parts, but each module or tensor that matches, alone: model.layers.3.mlp, '*.scores'",
    ),
    option("--probe", action="append", default=[], metavar="TAPS", help="tensors, by a glob, that are outputs as well"),
    option("--layers", type=int, metavar="N", help="only the first N layers, with norm and head: to try a compile"),
    option("--profile", help="plain, aihub, qdq or matmulnbits (default: qdq with --int4, else plain)"),
    option("--opset", type=int, help="of ONNX, from 17 on (default: the profile's)"),
    option("--ir-version", type=int, help="of ONNX's file format (default: the profile's)"),
    option(
        "--forms", metavar="LIST", help="some of conv,unpack,heads,scale-on-key,rank4,fused (default: the profile's)"
    ),
    option("--encodings", metavar="FILE", help="of refimpl calibrate; without, aihub's come from the prompt alone"),
    option("--encodings-version", default="1.0.0", help="of model.encodings: 0.6.1, 1.0.0 (default) or 2.0.0"),
    option(
        "--int4",
        type=int,
        metavar="BLOCK",
        help="quantize matrices to 4-bit blocks of this size first (default: of 32 for qdq and matmulnbits)",
    ),
    option("--keep", action="append", default=[], metavar="PATTERN", help="modules that stay as they are"),
    option("--no-golden", action="store_true", help="graphs only, without test data: enough for a compiler"),
    option("--force", action="store_true", help="replace an earlier export in DIR"),
)
def export(arguments) -> int:
    """Emit the model as ONNX, part by part or a module alone, with golden inputs and outputs."""
    from export import emit
    from export.files.encodings import read_encodings
    from export.preflight.check import check

    if arguments.check:
        return report(arguments, check(arguments.check))
    if not arguments.out:
        raise InputError("nothing says where the graphs go; give --out DIR, or --check DIR for those that are there")
    model = load_model(arguments)
    encodings = read_encodings(arguments.encodings, model) if arguments.encodings else None
    if arguments.layers is not None:
        model = model.truncated(arguments.layers)
    block_size = arguments.int4
    if block_size is None and not encodings and arguments.profile in ("qdq", "matmulnbits"):
        block_size = 32
    if block_size is not None:
        model = model.quantize("int4", block_size=block_size, keep=arguments.keep)
    elif arguments.keep:
        raise InputError("nothing is quantized, so there is nothing to keep; give --int4 BLOCK, or leave --keep out")
    count = arguments.parts if arguments.parts is not None else 1 if arguments.graph else 2
    parts = emit(
        model, integers(arguments.tokens), arguments.context, count, arguments.profile, arguments.opset,
        arguments.ir_version, arguments.forms and [form for form in arguments.forms.split(",") if form],
        encodings=encodings, encodings_version=arguments.encodings_version, graphs=arguments.graph,
        probe=arguments.probe, layers=arguments.layers,
    )  # fmt: skip
    parts.save(Path(arguments.out), arguments.force, golden=not arguments.no_golden)
    then = "" if arguments.no_golden else f"; refimpl verify {arguments.out} runs them"
    print(f"{len(parts)} graphs are in {arguments.out}{then}")
    if parts.encodings and not encodings:
        print(f"their ranges are those of the prompt's {parts.plan.prompt} tokens, too few for a device; calibrate the "
              "model on a text, and give --encodings")  # fmt: skip
    return 0


@verb(
    "refimpl verify build/b2-7b outputs/ --model weights/Baichuan2-7B-Chat --html verdict.html",
    option("folder", metavar="DIR", help="an export; or a run that --save has written, to be judged again"),
    option("outputs", metavar="OUTPUTS", nargs="?", help="what a device returned: a file, or a folder"),
    option("--engine", choices=("auto", "onnxruntime", "reference"), help="what runs graphs here (default: auto)"),
    option("--model", metavar="MODEL", nargs="?", const="", help="what was exported: finer limits and more causes"),
    option("--encodings", metavar="FILE", help="of the device, if the export has none"),
    option("--chained", action="store_true", help="each graph had what the one before gave (default: golden inputs)"),
    option("--graph", metavar="NAME", help="whose OUTPUTS they are, where no name says it"),
    FLOATS,
    option("--min-sqnr", type=float, metavar="DB", help="what every tensor must have, in place of derived limits"),
    option("--max-lsb", type=float, metavar="N", help="how many codes any value may be off"),
    option("--max-over", type=float, metavar="SHARE", help="how many values may be off by more than one code"),
    option("--html", metavar="FILE", help="write a page for a person: where it begins, how bad, why"),
    option("--junit", metavar="FILE", help="write JUnit XML"),
    option("--model-explorer", metavar="FILE", help="write node data for Google's Model Explorer"),
    option("--save", metavar="RUN", help="write all figures, to be judged again without the device's arrays"),
    JSON,
)
def verify(arguments) -> int:
    """Run exported parts and compare every output with the oracle; or judge what a device returned for them."""
    from export import verify
    from export.verdict.trial import verify_on_grids
    from refimpl.files import read_json

    path, outputs = Path(arguments.folder), arguments.outputs
    if outputs is None:
        if path.is_file():
            expect_unasked(arguments, RUNNING, "a device's outputs, of which a saved run has but the figures")
        else:
            expect_unasked(arguments, RUNNING - {"engine"} | JUDGING, "a device's outputs")
            rounds = read_json(path / "manifest.json").get("onnx", {}).get("on_grids")
            return report(arguments, (verify_on_grids if rounds else verify)(path, engine=arguments.engine or "auto"))
    from export.measure.figures import Thresholds
    from export.verdict import report as files
    from export.verdict.trial import judge
    from export.verdict.verdict import Verdict, read_run
    from refimpl.files import expect_writable, write_all
    from refimpl.model import load

    texts = {"html": files.html, "junit": files.junit, "model_explorer": files.model_explorer, "save": Verdict.to_json}
    targets = [(target, text) for name, text in texts.items() if (target := getattr(arguments, name))]
    expect_writable([target for target, _ in targets])
    limits = Thresholds(arguments.min_sqnr, arguments.max_lsb, arguments.max_over)
    if outputs is None:
        verdict = read_run(path).judged(limits)
    else:
        model = None if arguments.model is None else load(arguments.model or None)
        encodings = device_encodings(arguments.encodings, path, model) if arguments.encodings else None
        verdict = judge(
            path, outputs, model, encodings, arguments.engine or "auto",
            way="chained" if arguments.chained else "isolated", graph=arguments.graph, dtype=arguments.dtype,
            thresholds=limits,
        )  # fmt: skip
    write_all([(target, text(verdict)) for target, text in targets])
    return report(arguments, verdict)


def expect_unasked(arguments, names: set[str], what: str) -> None:
    """Raises InputError if an option is given that only belongs to something else."""
    given = {name: value for name in sorted(names) if (value := getattr(arguments, name)) is not None}
    if asked := [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not False]:
        raise InputError(f"{at_most(asked)} belongs to {what}; give them: refimpl verify DIR OUTPUTS")


@verb(
    "refimpl bisect build/b2-7b --model weights/Baichuan2-7B-Chat --executor hub --device 'Samsung Galaxy S25'",
    option("folder", metavar="DIR", help="an export"),
    option("outputs", metavar="OUTPUTS", nargs="?", help="what the device returned already, which saves a run"),
    option("--model", metavar="MODEL", nargs="?", const="", help="what was exported (default: the graph as it is)"),
    option("--encodings", metavar="FILE", help="of the device, if the export has none"),
    option("--graph", metavar="NAME", help="only this one (default: the first whose outputs are wrong)"),
    option("--executor", choices=("auto", "onnxruntime", "reference", "hub"), default="auto",
           help="what runs the graphs: an engine here, or a device of AI Hub"),
    option("--device", metavar="NAME", help="of hub, such as 'Samsung Galaxy S25'"),
    option("--api-url", metavar="URL", help="of hub: another server than that of client.ini"),
    option("--compile-options", default="", metavar="TEXT", help="of hub: added to those of compile jobs"),
    option("--until", action="store_true", help="cut graphs off at what they show, where more outputs change them"),
    option("--probes-per-run", type=int, default=1, metavar="N", help="tensors that a run may show (default: 1)"),
    FLOATS,
    option("--min-sqnr", type=float, metavar="DB", help="what every tensor must have, in place of derived limits"),
    JSON,
)  # fmt: skip
def bisect(arguments) -> int:
    """Find the operation that goes wrong, with the fewest runs that tell it from all others."""
    from contextlib import ExitStack

    from export.hub.jobs import Options
    from export.hub.session import Session
    from export.measure.figures import Thresholds
    from export.run.executor import Engine, Executor
    from export.search.bisection import bisect
    from refimpl.model import load

    hub = arguments.executor == "hub"
    if hub != bool(arguments.device):
        raise InputError("--executor hub and --device NAME belong together; give both, or none")
    model = None if arguments.model is None else load(arguments.model or None)
    folder, options = Path(arguments.folder), Options(compile=arguments.compile_options)
    encodings = device_encodings(arguments.encodings, folder, model) if arguments.encodings else None
    with ExitStack() as stack:
        device: Executor = Engine(arguments.executor)
        if hub:
            device = stack.enter_context(Session(folder, arguments.device, arguments.api_url, options))
        return report(arguments, bisect(
            folder, device, model, arguments.graph, arguments.outputs, arguments.until,
            arguments.probes_per_run, arguments.dtype, Thresholds(arguments.min_sqnr),
            label=None if hub else engine_version(arguments.executor), encodings=encodings,
        ))  # fmt: skip


def engine_version(name: str) -> str:
    """An engine by name and version, for what it computed is only that of this version."""
    from importlib import metadata

    installed = find_spec("onnxruntime") is not None and name != "reference"
    package = "onnxruntime" if installed else "onnx"
    return f"{package} {metadata.version(package)}"


def device_encodings(path: str, folder: Path, model):
    """The encodings in a file, of the model or of as much of it as the export tells."""
    from export.files.encodings import read_encodings
    from export.measure.references import shapes_of

    return read_encodings(path, model or shapes_of(folder))


@verb(
    "refimpl bundle weights/Baichuan2-7B-Chat --graphs build/b2-7b --out genie",
    MODEL,
    option("--graphs", required=True, metavar="DIR", help="what refimpl export --profile aihub has written of it"),
    option("--out", required=True, metavar="DIR", help="a new folder"),
    option("--bins", nargs="+", default=[], metavar="NAME", help="the compiled binaries, part after part; not read"),
    option("--soc", default="8-elite", help="8-gen-2, 8-gen-3, 8-elite (default), x-elite or x2-elite"),
)
def bundle(arguments) -> int:
    """Write what Genie needs beside the compiled binaries: configurations, tokenizer, metadata, a prompt."""
    from export.phone.bundle import binaries, bundle

    bundle(model_folder(arguments), arguments.graphs, arguments.out, arguments.bins, arguments.soc)
    print(f"the bundle is in {arguments.out}; put {', '.join(binaries(arguments.out))} there, and run")
    print(f'cd {arguments.out} && genie-t2t-run -c genie_config.json -p "$(cat sample_prompt.txt)"')
    return 0


def change(text: str) -> tuple[str, int]:
    """A glob and bits, from PATTERN=BITS."""
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdecimal():
        raise InputError(f"{text!r} is no change such as '*.down_proj.weight=8'")
    return pattern, int(bits)
