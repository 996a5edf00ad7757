"""`verify` a saved export: run its graphs, and compare every output with its golden."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from tqdm import tqdm

from export.folder.emit import FORMAT, TEST_DATA, Arrays
from export.graphs.plan import GraphSpec, Plan, Value, carry
from golden.bundle import sha256
from golden.compare import Report, compare
from golden.tolerance import LARGEST, Tolerance
from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.files import read_json
from refimpl.trace import Trace


def verify(folder: str | Path, engine: str = "auto") -> Report:
    """Runs every graph of an export, and compares what is no padding with the golden outputs.

    Twice: `isolated`, each part from its golden inputs, so that it shows its own error alone; and `chained`, as a
    device runs, each part from what the one before gave, and a token from the prompt's keys and values. The tensors
    of the report are called `{graph}/{isolated or chained}/{tap}`, and have the layout of the tap. Graphs that are
    modules alone go on from nobody, and are run isolated only.

    `engine`: "onnxruntime"; "reference", ONNX's own evaluator; "auto", the first of them that is installed. Files are
    first held against the manifest's sha256. Raises InputError for a folder that is not a whole export.
    """
    folder = Path(folder)
    plan, limits = read_manifest(folder)
    report = Report(())
    for spec, way, outputs in run_graphs(folder, plan, engine):
        reference = as_trace(spec, read_arrays(folder, spec, "output", spec.outputs))
        report += compare(as_trace(spec, outputs), reference, limits).within(f"{spec.name}/{way}/")
    return report


def run_graphs(folder: Path, plan: Plan, engine: str) -> Iterator[tuple[GraphSpec, str, Arrays]]:
    """What an engine computes of each graph of an export, isolated and chained."""
    open_graph, after_prompt = engine_called(engine), Arrays()
    ways = ("isolated", "chained") if plan.chained else ("isolated",)
    total = sum(map(len, plan.runs))
    with tqdm(desc="verifying", total=total, unit="graph", disable=None, leave=False) as progress:
        for run in plan.runs:
            flow = Arrays(after_prompt)
            for spec in run:
                golden = read_arrays(folder, spec, "input", spec.inputs)
                feeds = [golden]
                if plan.chained:
                    feeds.append(golden | {v.name: carry(spec, v, flow) for v in spec.inputs if v.source})
                results = run_graph(open_graph, folder, spec, feeds)
                for way, outputs in zip(ways, results, strict=True):
                    yield spec, way, outputs
                flow |= results[-1]
                progress.update()
            after_prompt = after_prompt or flow


def as_trace(spec: GraphSpec, outputs: Mapping[str, np.ndarray]) -> Trace:
    """A graph's outputs as the taps that they show, without padding."""
    return Trace((value.tap or value.name, unpadded(value, outputs[value.name], spec)) for value in spec.outputs)


def unpadded(value: Value, array: np.ndarray, spec: GraphSpec) -> np.ndarray:
    """An output as the tap that it shows, without padding: neither its tokens, nor, where they look, its keys."""
    if value.key_axis is not None:
        new = spec.context - spec.tokens
        keys = [*range(new - spec.past, new), *range(spec.context - spec.real, spec.context)]
        array = np.take(array, keys, value.key_axis)
    array = np.moveaxis(array, value.token_axis, 0)[-spec.real :]
    array = np.moveaxis(array, 0, value.token_axis)
    return array.transpose(value.tap_axes) if value.tap_axes else array


def engine_called(name: str) -> Callable[[Path], Callable]:
    """What opens a graph, and gives a function of output names and inputs. Raises InputError for an unknown engine."""
    installed = find_spec("onnxruntime") is not None
    if name == "reference" or (name == "auto" and not installed):
        from export.run.reference import reference_evaluator

        return lambda path: reference_evaluator(path).run
    if name not in ("auto", "onnxruntime"):
        raise InputError(f"engine is {name!r}, expected auto, onnxruntime or reference")
    if not installed:
        raise InputError("onnxruntime is not installed; install refimpl[onnxruntime], or use the engine reference")
    import onnxruntime

    return lambda path: onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run


def run_graph(open_graph: Callable, folder: Path, spec: GraphSpec, feeds: list[Arrays]) -> list[Arrays]:
    """What an engine computes of each of some inputs. Raises InputError if it cannot, or gives other shapes."""
    names = [value.name for value in spec.outputs]
    try:
        compute = open_graph(folder / spec.name / "model.onnx")
        results = [compute(names, inputs) for inputs in feeds]
    except Exception as error:  # each engine raises its own kinds
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the engine cannot run {spec.name}: {reason}; export again") from None
    return [checked(dict(zip(names, outputs, strict=True)), spec.outputs, spec.name) for outputs in results]


def read_arrays(folder: Path, spec: GraphSpec, kind: str, values: list[Value]) -> Arrays:
    """The golden inputs or outputs of a graph. Raises InputError if they are not what the plan says."""
    arrays = Arrays()
    for i, value in enumerate(values):
        path = folder / TEST_DATA.format(spec.name) / f"{kind}_{i}.pb"
        proto = onnx.TensorProto()
        try:
            proto.ParseFromString(path.read_bytes())
            if proto.data_location == onnx.TensorProto.EXTERNAL:
                raise ValueError("its data is elsewhere")
            arrays[value.name] = onnx.numpy_helper.to_array(proto)
        except (DecodeError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is not a tensor: {error}; export again") from None
    return checked(arrays, values, spec.name)


def checked(arrays: Arrays, values: list[Value], graph: str) -> Arrays:
    """The arrays, if their shapes and dtypes are those of the values."""
    for value in values:
        array = arrays[value.name]
        if (array.shape, array.dtype) != (value.shape, value.dtype):
            raise InputError(
                f"{value.name} of {graph} is {array.dtype} {array.shape}, expected {value.dtype} {value.shape}; "
                "export again"
            )
    return arrays


def read_manifest(folder: Path, weights: bool = True) -> tuple[Plan, dict[str, Tolerance]]:
    """What an export consists of, after a check that each of its files is there with the bytes that were written.

    Without `weights` only the goldens are checked. Raises InputError for what is no manifest of this version, is
    damaged, or does not describe what it says it does.
    """
    path = folder / "manifest.json"
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} has the format {manifest.get('format')!r}, expected {FORMAT!r}; export again")
    if manifest.get("golden") is False:
        raise InputError(f"{folder} was exported without goldens, so nothing can be verified; export with them")
    try:
        stated, files = manifest["plan"], manifest["files"]
        config = Config(**manifest["config"])
        alone = stated.get("modules") or stated.get("only")
        graphs = len(stated["modules"]) if stated.get("modules") else 1 if alone else config.num_hidden_layers
        if graphs * len(stated["tokens"]) > len(files):
            raise ValueError("it describes more layers than there are files for")
        words: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stated.items()}
        plan = Plan(config, **words)
        specs = [spec for run in plan.runs for spec in run]
        simulated = manifest["golden"]["simulated"]
        limits = {v.tap: Tolerance(**manifest["tolerances"][v.tap]) for s in specs for v in s.outputs if v.tap}
        if not all(isinstance(limit.relative, float) and 0 <= limit.relative <= LARGEST for limit in limits.values()):
            raise ValueError(f"a tolerance is no number from 0 to {LARGEST}")
        expected = {
            name: (files[name]["bytes"], files[name]["sha256"])
            for spec in specs
            for name in file_names(spec, simulated, plan.chained)
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}; export again") from None
    expected = {name: of for name, of in expected.items() if weights or name.startswith("test_data/")}
    for name, (size, digest) in tqdm(expected.items(), "reading", unit="file", disable=None, leave=False):
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or sha256(file) != digest:
            raise InputError(f"{file} is not the file of {size} bytes that was exported; export again")
    return plan, limits


def read_scores(folder: Path) -> dict[str, float]:
    """Tap -> the largest attention score of a layer in the golden run of an export; {} if that was not recorded.

    Raises InputError for what cannot be one.
    """
    path = folder / "manifest.json"
    found = (read_json(path).get("golden") or {}).get("scores", {})
    if not isinstance(found, dict) or not all(type(x) is float and 0 <= x < 2.0**128 for x in found.values()):
        raise InputError(f"{path} is damaged: the sizes of scores are {found!s:.60}; export again")
    return found


def file_names(spec: GraphSpec, simulated: bool, chained: bool = True) -> list[str]:
    """The files of a graph, relative to the export."""
    names = [f"{spec.name}/model.onnx", f"{spec.name}/model.data"]
    kinds = [("input", spec.inputs), ("output", spec.outputs)]
    if simulated:
        kinds += [("simulated", spec.outputs), *[("simulated_chained", spec.outputs)] * chained]
    for kind, values in kinds:
        names += [f"{TEST_DATA.format(spec.name)}/{kind}_{i}.pb" for i in range(len(values))]
    return names
