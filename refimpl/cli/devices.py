"""Graphs and devices: ONNX parts, the verdict on what a device returned, what Genie needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.cli.options import JSON, MODEL, integers, load_model, model_folder, report
from refimpl.cli.verbs import option, verb
from refimpl.errors import InputError, at_most

if TYPE_CHECKING:
    from export.measure.limits import Thresholds
    from export.run.executor import Executor
    from export.verdict.verdict import Verdict
    from refimpl.grids.encodings import Encodings
    from refimpl.model import Model

ENGINES = ("auto", "onnxruntime", "reference", "htp")  # what runs graphs on this machine
# options of verify: the first need a device's outputs; for the second a saved run is enough
NEED_OUTPUTS = {"engine", "model", "encodings", "chained", "graph", "dtype"}
NEED_FIGURES = {"min_sqnr", "max_lsb", "max_over", "html", "junit", "model_explorer", "save", "compiled"}
FLOATS = option("--dtype", choices=("float32", "float16"),
                help="what a device computes in where it has no encodings (default: as its outputs show)")  # fmt: skip
EXPORTED = option("--model", metavar="MODEL", nargs="?", const="",
                  help="what was exported (default: the embedded model): narrower limits and more causes")  # fmt: skip
ENCODINGS = option("--encodings", metavar="FILE", help="the device's encodings, if the export has none")
NPU = [
    option("--soc", metavar="NAME", help="with htp: the Snapdragon, such as 8-gen-3 (default: 8-elite)"),
    option("--strict", action="store_true", help="with htp: an operation that the NPU does not take is an error"),
]
MIN_SQNR = option("--min-sqnr", type=float, metavar="DB", help="require this of every tensor instead of derived limits")


@verb(
    "refimpl export weights/B2-7B --out build/b2-7b --tokens 128,1 --context 4096 --parts 5",
    MODEL,
    option("--out", metavar="DIR", help="a new folder"),
    option("--check", metavar="DIR", help="only say what AI Hub or Genie would refuse about the graphs in DIR"),
    option("--compile", action="store_true", help="with --check: ask Qualcomm's compiler as well (extra: htp)"),
    option("--soc", default="8-elite", metavar="NAME", help="with --compile: for this SoC (default: 8-elite)"),
    option("--json", action="store_true", help="with --check: print JSON instead of text"),
    option("--tokens", default="128,1", metavar="LIST", help="tokens per call of each graph (default: 128,1)"),
    option("--context", type=int, metavar="N", help="tokens that the static cache holds (default: the model's)"),
    option("--parts", type=int, metavar="N", help="how many graphs the model is split into (default: 2)"),
    option("--graph", action="append", default=[], metavar="PATTERN",
           help="instead of parts, each matching module or tensor as a graph: model.layers.3.mlp, '*.scores'"),
    option("--probe", action="append", default=[], metavar="TAPS",
           help="tensors inside the graphs, by a glob, that become outputs as well; may be repeated"),
    option("--layers", type=int, metavar="N", help="only the first N layers, with norm and head: to try a compile"),
    option("--profile", metavar="NAME", help="plain, aihub, qdq or matmulnbits (default: qdq with --int4, else plain)"),
    option("--opset", type=int, metavar="N", help="of ONNX, from 17 on (default: the profile's)"),
    option("--ir-version", type=int, metavar="N", help="of ONNX's file format (default: the profile's)"),
    option("--forms", metavar="LIST",
           help="some of conv,unpack,heads,heads=N,scale-on-key,rank4,norm,fused (default: the profile's)"),
    option("--encodings", metavar="FILE", help="of refimpl calibrate (default for aihub: ranges of the prompt alone)"),
    option("--border", choices=("floats", "codes"), default="floats",
           help="codes: inputs and outputs as Genie and Qualcomm's compiler take them (default: floats)"),
    option("--encodings-version", default="1.0.0", metavar="V",
           help="of model.encodings: 0.6.1, 1.0.0 (default) or 2.0.0"),
    option("--int4", type=int, metavar="BLOCK",
           help="quantize matrices to 4-bit blocks of this size first (default: 32 for qdq and matmulnbits)"),
    option("--keep", action="append", default=[], metavar="PATTERN",
           help="modules that are not quantized; may be repeated"),
    option("--no-golden", action="store_true", help="write graphs without test data, which is enough for a compiler"),
    option("--force", action="store_true", help="replace an earlier export in DIR"),
)  # fmt: skip
def export(arguments) -> int:
    """Write the model as ONNX, part by part or a module alone, with golden inputs and outputs."""
    from export import emit
    from export.files.encodings import read_encodings
    from export.preflight.check import check

    if arguments.check:
        found = check(arguments.check)
        if arguments.compile:
            from export.preflight.by_compiler import check_by_compiling

            asked = check_by_compiling(arguments.check, arguments.soc)
            found = replace(found, findings=found.findings + asked.findings, compiler=asked.compiler)
        return report(arguments, found)
    if arguments.compile:
        raise InputError("--compile belongs to --check DIR; refimpl compile makes binaries")
    if not arguments.out:
        raise InputError("nothing says where the graphs go; give --out DIR, or --check DIR for graphs that are there")
    model = load_model(arguments)
    encodings = read_encodings(arguments.encodings, model) if arguments.encodings else None
    model = _quantized(arguments, model if arguments.layers is None else model.truncated(arguments.layers))
    count = arguments.parts if arguments.parts is not None else 1 if arguments.graph else 2
    forms = arguments.forms and [form for form in arguments.forms.split(",") if form]
    parts = emit(
        model, integers(arguments.tokens), arguments.context, count, arguments.profile, opset=arguments.opset,
        ir_version=arguments.ir_version, forms=forms, encodings=encodings, graphs=arguments.graph,
        encodings_version=arguments.encodings_version, probe=arguments.probe, layers=arguments.layers,
        border=arguments.border,
    )  # fmt: skip
    parts.save(Path(arguments.out), arguments.force, golden=not arguments.no_golden)
    then = "" if arguments.no_golden else f"; refimpl verify {arguments.out} runs them"
    print(f"{len(parts)} graphs are in {arguments.out}{then}")
    if parts.encodings and not encodings:
        print(f"their ranges come from the {parts.plan.prompt} tokens of the prompt, too few for a device; run "
              "refimpl calibrate on a text, and give its file with --encodings")  # fmt: skip
    return 0


@verb(
    "refimpl verify build/b2-7b outputs/ --model weights/Baichuan2-7B-Chat --html verdict.html",
    option("folder", metavar="DIR", help="an export; or a file of --save, to judge that run again"),
    option("outputs", metavar="OUTPUTS", nargs="?", help="what a device returned: a file or a folder"),
    option("--engine", choices=ENGINES,
           help="what runs graphs here; htp is Qualcomm's NPU, emulated (default: auto)"),
    *NPU,
    *(EXPORTED, ENCODINGS),
    option("--chained", action="store_true",
           help="each graph got the outputs of the one before (default: golden inputs)"),
    option("--graph", metavar="NAME", help="the graph that OUTPUTS belong to, if their names do not tell"),
    *(FLOATS, MIN_SQNR),
    option("--max-lsb", type=float, metavar="N", help="allow a value to be N codes off, no more"),
    option("--max-over", type=float, metavar="SHARE", help="allow this share of values to be more than one code off"),
    option("--compiled", metavar="DIR",
           help="of refimpl compile: say which of Qualcomm's operations the guilty tensors became"),
    option("--html", metavar="FILE", help="write a page for a person: where it begins, how bad it is, why"),
    option("--junit", metavar="FILE", help="write JUnit XML"),
    option("--model-explorer", metavar="FILE", help="write node data for Google's Model Explorer"),
    option("--save", metavar="FILE", help="write all figures: they can be judged again without the device's arrays"),
    JSON,
)  # fmt: skip
def verify(arguments) -> int:
    """Compare every output of exported graphs with the oracle: run here, or returned by a device."""
    path = Path(arguments.folder)
    if arguments.outputs is None and not path.is_file() and arguments.engine != "htp":
        return _verify_here(arguments, path)
    from export.verdict import report as files
    from export.verdict.verdict import Verdict
    from refimpl.files import expect_writable, write_all

    texts = {"html": files.html, "junit": files.junit, "model_explorer": files.model_explorer, "save": Verdict.to_json}
    targets = [(target, text) for name, text in texts.items() if (target := getattr(arguments, name))]
    expect_writable([target for target, _ in targets])
    if arguments.compiled and not Path(arguments.compiled).is_dir():
        raise InputError(f"{arguments.compiled} is not a folder; expected what refimpl compile has made of the export")
    verdict = _verdict(arguments, path)
    if arguments.compiled and (guilty := verdict.guilty):
        from dataclasses import replace
        from functools import partial

        from export.phone.provenance import made_of, told

        made = made_of(arguments.compiled, guilty.graph, verdict.suspects or [guilty.tap])
        verdict = replace(verdict, remarks=(*verdict.remarks, told(guilty.graph, made)))
        targets = [(target, partial(text, made=made) if text is files.html else text) for target, text in targets]
    write_all([(target, text(verdict)) for target, text in targets])
    return report(arguments, verdict)


@verb(
    "refimpl bisect build/b2-7b --model weights/Baichuan2-7B-Chat --executor hub --device 'Samsung Galaxy S25'",
    option("folder", metavar="DIR", help="an export"),
    option("outputs", metavar="OUTPUTS", nargs="?", help="what the device returned already: it saves a run"),
    *(EXPORTED, ENCODINGS),
    option("--graph", metavar="NAME", help="search in this graph (default: the first whose outputs are wrong)"),
    option("--executor", choices=(*ENGINES, "hub"), default="auto",
           help="what runs the graphs: an engine here, Qualcomm's NPU (htp), or a device of AI Hub (default: auto)"),
    *NPU,
    option("--device", metavar="NAME", help="with --executor hub: such as 'Samsung Galaxy S25'"),
    option("--api-url", metavar="URL", help="with --executor hub: another server than that of client.ini"),
    option("--compile-options", default="", metavar="TEXT", help="with --executor hub: added to those of compile jobs"),
    option("--until", action="store_true",
           help="cut graphs off after the tensors they show: for a compiler that more outputs would change"),
    option("--probes-per-run", type=int, default=1, metavar="N", help="tensors that one run may show (default: 1)"),
    *(FLOATS, MIN_SQNR, JSON),
)  # fmt: skip
def bisect(arguments) -> int:
    """Find the operation that goes wrong, in the fewest runs of an engine or a device."""
    from contextlib import ExitStack

    from export.hub.session import Session
    from export.measure.limits import Terms, Thresholds
    from export.phone.options import Options
    from export.search.bisection import Probing, bisect

    hub = arguments.executor == "hub"
    if hub != bool(arguments.device):
        raise InputError("--executor hub and --device NAME belong together; give both, or none")
    folder, options = Path(arguments.folder), Options(compile=arguments.compile_options)
    model, encodings = _exported(arguments, folder)
    with ExitStack() as stack:
        device: Executor
        label = None
        if hub:
            device = stack.enter_context(Session(folder, arguments.device, arguments.api_url, options))
        else:
            device, label = stack.enter_context(engine_of(arguments, arguments.executor))
        how = Probing(arguments.graph, arguments.until, arguments.probes_per_run, label)
        terms = Terms(arguments.dtype, Thresholds(arguments.min_sqnr))
        return report(arguments, bisect(folder, device, model, encodings, arguments.outputs, how, terms))


@verb(
    "refimpl bundle weights/Baichuan2-7B-Chat --graphs build/b2-7b --out genie",
    MODEL,
    option("--graphs", metavar="DIR", help="what refimpl export has written of MODEL, on grids"),
    option("--out", metavar="DIR", help="a new folder"),
    option("--compiled", metavar="DIR", help="put the binaries that refimpl compile has made of the graphs in as well"),
    option("--bins", nargs="+", default=[], metavar="NAME",
           help="names of binaries that are compiled elsewhere, part after part; the files are not read"),
    option("--soc", default="8-elite", metavar="NAME",
           help="8-gen-2, 8-gen-3, 8-elite (default), 8-elite-gen-5, x-elite or x2-elite"),
    option("--check", metavar="DIR",
           help="write nothing: say what is wrong with the bundle in DIR, by rules and, with the extra htp, by Genie"),
    option("--json", action="store_true", help="with --check: print JSON instead of text"),
)  # fmt: skip
def bundle(arguments) -> int:
    """Write what Genie needs beside the compiled binaries: configurations, tokenizer, metadata, a prompt."""
    from export.phone.bundle import binaries, bundle

    if arguments.check:
        from export.phone.check import check_bundle

        found = check_bundle(arguments.check)
        print(found.to_json() if arguments.json else found)
        return 0 if found else 1
    if not arguments.graphs or not arguments.out:
        raise InputError("a bundle is made of an export; give --graphs DIR and --out DIR, or --check DIR for one that "
                         "is there")  # fmt: skip
    bundle(model_folder(arguments), arguments.graphs, arguments.out, arguments.bins, arguments.soc, arguments.compiled)
    missing = "" if arguments.compiled else f"; put {', '.join(binaries(arguments.out))} there, and run"
    print(f"the bundle is in {arguments.out}{missing}")
    print(f'cd {arguments.out} && genie-t2t-run -c genie_config.json -p "$(cat sample_prompt.txt)"')
    return 0


def engine_version(name: str) -> str:
    """An engine's name and version: another version may compute other bits, so a resumed search asks for both."""
    from importlib import metadata

    installed = find_spec("onnxruntime") is not None and name != "reference"
    package = "onnxruntime" if installed else "onnx"
    return f"{package} {metadata.version(package)}"


def _quantized(arguments, model: Model) -> Model:
    """The model in the 4-bit blocks that the options of `export` ask for."""
    block_size = arguments.int4
    if block_size is None and not arguments.encodings and arguments.profile in ("qdq", "matmulnbits"):
        block_size = 32
    if block_size is not None:
        return model.quantize("int4", block_size=block_size, keep=arguments.keep)
    if arguments.keep:
        raise InputError("nothing is quantized, so there is nothing to keep; give --int4 BLOCK, or leave --keep out")
    return model


def _verify_here(arguments, folder: Path) -> int:
    """Runs an export on an engine here."""
    from export import verify
    from export.verdict.trial import verify_on_grids

    _expect_unasked(arguments, NEED_OUTPUTS - {"engine"} | NEED_FIGURES, "a device's outputs")
    with engine_of(arguments, arguments.engine or "auto") as (engine, _):
        return report(arguments, (verify_on_grids if _on_grids(folder) else verify)(folder, engine))


def _on_grids(folder: Path) -> bool:
    """Whether the graphs of an export round by themselves."""
    from refimpl.files import read_json

    return bool((read_json(folder / "manifest.json").get("onnx") or {}).get("on_grids"))


def _on_npu(arguments, folder: Path, limits: Thresholds) -> Verdict:
    """Runs an export on Qualcomm's NPU here, and judges it as a device's outputs are judged."""
    from export.measure.limits import Terms
    from export.verdict.trial import verify_on_grids

    _expect_unasked(arguments, {"chained", "graph"}, "a device's outputs")
    halves = None if _on_grids(folder) else "float16"  # in which an NPU computes what has no grid
    model, encodings = _exported(arguments, folder)
    with engine_of(arguments, "htp") as (engine, label):
        verdict = verify_on_grids(folder, engine, model, encodings, Terms(arguments.dtype or halves, limits))
        remarks = (*verdict.remarks, f"{label}: {engine}")  # an Htp says where the nodes ran
    about = {**verdict.about, "outputs": label, "soc": arguments.soc or "8-elite"}
    return replace(verdict, about=about, remarks=remarks)


@contextmanager
def engine_of(arguments, name: str) -> Iterator[tuple[Executor, str]]:
    """The executor that runs graphs here, with its name and version."""
    from export.run.engines import Engine
    from export.run.htp import Htp

    if name != "htp":
        if arguments.soc or arguments.strict:
            raise InputError("--soc and --strict belong to Qualcomm's NPU; give verify --engine htp, or bisect "
                             "--executor htp")  # fmt: skip
        yield Engine(name), engine_version(name)
        return
    with Htp(arguments.soc or "8-elite", arguments.strict) as device:
        yield device, device.about()


def _verdict(arguments, path: Path) -> Verdict:
    """The verdict on a device's outputs, or once more on a saved run."""
    from export.measure.limits import Terms, Thresholds
    from export.verdict.saved import read_run
    from export.verdict.trial import Given, judge

    limits = Thresholds(arguments.min_sqnr, arguments.max_lsb, arguments.max_over)
    if arguments.outputs is None and arguments.engine == "htp" and not path.is_file():
        return _on_npu(arguments, path, limits)
    if arguments.outputs is None:
        _expect_unasked(arguments, NEED_OUTPUTS, "a device's outputs; a saved run has only their figures")
        return read_run(path).judged(limits)
    if arguments.engine == "htp" or arguments.soc or arguments.strict:
        raise InputError("the NPU runs an export here, and OUTPUTS are what a device returned; give one of the two")
    model, encodings = _exported(arguments, path)
    given = Given(arguments.outputs, "chained" if arguments.chained else "isolated", arguments.graph)
    engine = arguments.engine or "auto"
    return judge(path, given, model, encodings, engine, Terms(arguments.dtype, limits))


def _exported(arguments, folder: Path) -> tuple[Model | None, Encodings | None]:
    """What --model and --encodings name. Without a model, encodings are read with the shapes that the export states."""
    from export.files.encodings import read_encodings
    from export.measure.references import shapes_of
    from refimpl.model import load

    model = None if arguments.model is None else load(arguments.model or None)
    if not arguments.encodings:
        return model, None
    return model, read_encodings(arguments.encodings, model or shapes_of(folder))


def _expect_unasked(arguments, names: set[str], what: str) -> None:
    """Raises InputError if one of these options is given without what it needs."""
    given = {name: value for name in sorted(names) if (value := getattr(arguments, name)) is not None}
    if asked := [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not False]:
        raise InputError(f"{at_most(asked)} belongs to {what}; give them: refimpl verify DIR OUTPUTS")
