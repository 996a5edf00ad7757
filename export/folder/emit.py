"""`emit` a model as ONNX graphs, and `save` them: weights streamed, goldens beside them, all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm

import refimpl
from export.files.encodings import graph_encodings, simulate_graph, write_encodings
from export.graphs.cut import HIDES, matching_modules, substituting
from export.graphs.data import Built, Parameter, write_data
from export.graphs.fuse import fusing
from export.graphs.ops import INT4_OPSET, OnnxOps
from export.graphs.plan import GraphSpec, Part, Plan, carry, host_inputs
from export.graphs.profiles import Profile, checked_forms, profile_named
from export.graphs.qdq import quantized
from export.graphs.symbols import Graph, joined
from golden.bundle import sha256 as digest
from golden.tolerance import Tolerance, largest_scores, tolerances
from refimpl.blocks.quantize import QuantizedWeight
from refimpl.errors import InputError, at_most
from refimpl.files import read_json
from refimpl.grids.calibrate import calibrate
from refimpl.grids.encodings import Encodings
from refimpl.model import Model, SimulatedModel
from refimpl.names import taps
from refimpl.trace import Tap, feeding, silent
from refimpl_kernels.affine import Rounding
from refimpl_kernels.ops import NumPyOps

FORMAT = "refimpl export 1"
PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"  # from the model card of Baichuan2-7B-Base
BESIDE = ("hub.jsonl", "bisect.jsonl", "outputs")  # of `hub` and `bisect` in its folder: the next export may use it
TEST_DATA = "test_data/{}/test_data_set_0"  # beside the graphs' folders: AI Hub takes nothing else in those
ONNX_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}


def emit(
    model: Model,
    tokens: int | Sequence[int] = (128, 1),
    context: int | None = None,
    parts: int = 1,
    profile: str | None = None,
    opset: int | None = None,
    ir_version: int | None = None,
    forms: Iterable[str] | None = None,
    prompt: str | Sequence[int] | None = None,
    encodings: Encodings | None = None,
    encodings_version: str = "1.0.0",
    graphs: str | Sequence[str] = (),
    probe: str | Sequence[str] = (),
    layers: int | None = None,
) -> Parts:
    """The model as static ONNX graphs, one for each part and each number of `tokens` at a time.

    `context` is the window in tokens, by default the model's. `parts`: 1 has everything in one graph; with more, the
    first is the embedding and the last has the head. `profile`: what the graphs are for, see `graphs.profiles`; by
    default "qdq" for a model with int4 weights, "plain" for any other. `opset`, `ir_version` and `forms` take the
    place of the profile's. `prompt`, a text or ids, is what the golden inputs are about. `encodings` are those of
    the model; where the profile needs them and there are none, they come from the prompt alone. They are written in
    `encodings_version`.

    `graphs`: globs on modules and taps, such as `model.layers.3.mlp` or `*.scores`. Each is then a graph alone, with
    what it has in the model as its golden, and there are no parts. `probe`: globs on taps that are outputs of the
    graphs as well. `layers`: the model is cut to so many, with norm and head behind them, and so are `encodings`.

    No weight is written yet. Raises InputError for numbers that do not fit the model, or each other.
    """
    if layers is not None:
        model = model.truncated(layers)
        encodings = encodings and encodings.of(model.config, model.weights)
    blocks = any(isinstance(weight, QuantizedWeight) and weight.blocks.format == "int4"
                 for weight in model.weights.values())  # fmt: skip
    name = profile or ("qdq" if blocks else "plain")
    row = profile_named(name)
    if encodings is not None and row.weights != "float32":
        if blocks or name != "qdq":
            raise InputError(f"the encodings say which grids weights are on, and so do the 4-bit blocks of {name}; "
                             "give the model as it is with the profile qdq, or no encodings")  # fmt: skip
        row = replace(row, weights="float32", forms=row.forms | {"unpack"}, on_grids=True)
    if row.weights != "float32" and not blocks:
        raise InputError(f"the profile {name} is for 4-bit weights, and the model has none; quantize it to int4 first")
    if opset is not None:
        row = replace(row, opset=opset, forms=row.forms | {"fused"} if name == "plain" and opset >= 23 else row.forms)
    if row.on_grids and row.opset < INT4_OPSET:
        raise InputError(f"opset is {row.opset}, but grids of 4 and 16 bits need {INT4_OPSET}")
    lowest = helper.OP_SET_ID_VERSION_MAP.get(("ai.onnx", row.opset), 0)
    if row.opset < 17 or not lowest:
        raise InputError(f"opset is {row.opset}, expected 17 to {onnx.defs.onnx_opset_version()}")
    row = replace(row, ir_version=max(row.ir_version, lowest) if ir_version is None else ir_version,
                  forms=checked_forms(row.forms if forms is None else forms, row.opset))  # fmt: skip
    if not lowest <= row.ir_version <= onnx.IR_VERSION:
        raise InputError(
            f"ir_version is {row.ir_version}, expected {lowest} to {onnx.IR_VERSION} with opset {row.opset}"
        )
    sizes = sorted({tokens} if isinstance(tokens, int) else set(tokens), reverse=True)
    longest = model.config.max_position_embeddings
    config = model.config
    plan = Plan(
        config, tuple(sizes), longest if context is None else context, parts, profile=name,
        modules=matching_modules(config, [graphs] if isinstance(graphs, str) else graphs),
        hides=tuple(tap for form, taps in HIDES.items() if form in row.forms for tap in taps),
    ).probing([probe] if isinstance(probe, str) else probe)  # fmt: skip
    ids = golden_prompt(model, plan.room) if prompt is None else model.token_ids(prompt).reshape(-1).tolist()
    plan = replace(plan, prompt=len(ids))
    if row.encodings and encodings is None:
        encodings = calibrate(model, np.array([ids]), dtype="float64")  # whose ranges no BLAS rounds differently
    if encodings is not None:
        encodings.check(model.config, model.weights)
    built = {spec.name: build(model, spec, row, encodings) for run in plan.runs for spec in run}
    return Parts(model, plan, ids, built, row, encodings, encodings_version)


def build(model: Model, spec: GraphSpec, profile: Profile, encodings: Encodings | None = None) -> Built:
    """One graph: the decoder's own code, run on symbols."""
    graph = Graph(profile.forms)
    ops = OnnxOps(graph, profile.opset, profile.weights)
    symbols = {v.name: graph.input(v.name, v.shape, ONNX_TYPES[v.dtype]) for v in [*spec.whole.inputs, *spec.inputs]}
    inputs = [symbols[v.name] for v in spec.inputs]
    weights = {name: Parameter.whole(name, weight) for name, weight in model.weights.items()}
    tap = substituting(symbols, then=graph.tap)
    tap = fusing(graph, then=tap) if "fused" in profile.forms else tap
    outputs = {name: joined(x) for name, x in spec.computed(weights, ops, symbols, tap).items()}
    for name, tensor in outputs.items():
        tensor.name = name
    built = graph.build(spec.name, inputs, list(outputs.values()), profile.opset, profile.ir_version)
    return quantized(built, graph_encodings(encodings, spec, built)) if encodings and profile.on_grids else built


def golden_prompt(model: Model, room: int) -> list[int]:
    """A line of the model card, or random ids for want of a tokenizer, in three quarters of the room."""
    try:
        ids = model.token_ids(PROMPT)[0]
    except InputError:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, room)
    return ids[: max(1, room * 3 // 4)].tolist()


@dataclass(frozen=True)
class Parts:
    """The graphs of a model, by name, and what is needed to save them. `len` counts the graphs.

    `given`: their golden inputs, where those are known.
    """

    model: Model
    plan: Plan
    prompt: list[int]
    graphs: Mapping[str, Built]
    profile: Profile
    encodings: Encodings | None = None
    encodings_version: str = "1.0.0"
    given: Mapping[str, Arrays] | None = None

    def __len__(self) -> int:
        return len(self.graphs)

    def __iter__(self) -> Iterator[str]:
        return iter(self.graphs)

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: {len(built.proto.graph.node)} nodes, {sum(n for _, n in built.layout.values()) / 1e6:.1f} MB"
            for name, built in self.graphs.items()
        )

    def save(self, folder: str | Path, overwrite: bool = False, golden: bool = True) -> Path:
        """Writes `folder`, complete or not at all, and returns its path:

            {graph}/model.onnx, model.data                             a folder for each graph, fit to be uploaded
            {graph}/model.encodings                                    where there are encodings
            test_data/{graph}/test_data_set_0/input_0.pb, output_0.pb  golden inputs and outputs, ONNX's own layout
                        simulated_0.pb, simulated_chained_0.pb         what a quantized device should answer to those
                                                                       inputs, and to what such a device gave before
            encodings.json                                             the model's encodings, by tap
            manifest.json                                              what all of it is, with sha256; written last

        Each graph of a part has its own copy of the weights: an upload takes one folder, and ONNX refuses links.
        Memory holds a tile of weights at a time. Every graph passes `onnx.checker` with full_check.

        `overwrite` replaces an earlier export, and nothing else: what was sent to AI Hub, and what came back, stays on
        record, so that a graph whose bytes are the same is not sent again. Without `golden` there is no test data: a
        compiler needs none, and the whole model need not be computed.

        Raises InputError for a folder that is something else, or that cannot be written.
        """
        folder = Path(folder).resolve()
        check_free(folder, overwrite)
        mine = f".{folder.name}.{os.getpid()}"
        partial, replaced = folder.with_name(f"{mine}.partial"), folder.with_name(f"{mine}.replaced")
        try:
            partial.mkdir(parents=True)
            self._write(partial, golden)
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
            for name in BESIDE:
                if (replaced / name).exists():
                    (replaced / name).rename(folder / name)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror}; choose another place") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if replaced.exists() and not folder.exists():
                replaced.rename(folder)
        return folder

    def _write(self, folder: Path, golden: bool) -> None:
        files: dict[str, dict[str, Any]] = {}

        def record(path: Path, sha256: str) -> None:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256}

        def write(path: Path, proto) -> None:
            data = proto.SerializeToString(deterministic=True)
            path.write_bytes(data)
            record(path, hashlib.sha256(data).hexdigest())

        def save(path: Path, encodings: Encodings) -> None:
            write_encodings(encodings, path, self.encodings_version)
            record(path, digest(path))

        weights: dict[int, tuple[Path, str]] = {}  # of a part, once they are written
        rounding: Rounding = "even" if self.profile.on_grids else "away"  # as ONNX does, or AIMET
        # Exact sums of integers: the same bits whatever BLAS there is.
        simulation = SimulatedModel(self.model, self.encodings, rounding, integer=True) if self.encodings else None
        scores: dict[str, float] = {}
        cases = goldens(self.model, self.plan, self.prompt, simulation, self.given, scores) if golden else (
            (spec, dict[str, Arrays]()) for run in self.plan.runs for spec in run)  # fmt: skip
        for spec, case in tqdm(cases, "exporting", len(self), unit="graph", disable=None, leave=False):
            graph, data_set = folder / spec.name, folder / TEST_DATA.format(spec.name)
            built = self.graphs[spec.name]
            graph.mkdir()
            data_set.mkdir(parents=True) if golden else None
            write(graph / "model.onnx", built.proto)
            if spec.part.number in weights:
                path, sha256 = weights[spec.part.number]
                shutil.copyfile(path, graph / "model.data")
            else:
                with open(graph / "model.data", "wb") as file:
                    sha256 = write_data(file, built)
                weights[spec.part.number] = graph / "model.data", sha256
            record(graph / "model.data", sha256)
            onnx.checker.check_model(str(graph / "model.onnx"), full_check=True)
            if self.encodings and self.profile.encodings:
                save(graph / "model.encodings", graph_encodings(self.encodings, spec, built))
            for kind, arrays in case.items():
                for i, (name, array) in enumerate(arrays.items()):
                    write(data_set / f"{kind}_{i}.pb", numpy_helper.from_array(array, name))
        if self.encodings:
            save(folder / "encodings.json", self.encodings)
        text = json.dumps(self._manifest(files, golden, scores), indent=1, ensure_ascii=False)
        (folder / "manifest.json").write_text(text, encoding="utf-8")

    def _manifest(self, files: Mapping[str, Mapping], golden: bool, scores: Mapping[str, float]) -> dict[str, Any]:
        plan, config = self.plan, self.model.config
        scores = {name: float(f"{size:.3g}") for name, size in scores.items()}  # the same on any machine
        # Positions and sums go no further than what is no padding: masked places add exactly nothing.
        tokens = max(spec.real + spec.past for run in plan.runs for spec in run)
        limits: dict[str, Tolerance] = {}
        for spec in plan.runs[0]:  # a graph alone begins with the golden's tensors, and inherits from nothing before
            fed = set(taps(config)).difference(spec.taps) if spec.cut else False
            rules = tolerances(config, "float32", tokens, fed, scores)
            limits |= {value.tap: rules[value.tap] for value in spec.outputs if value.tap}
        return {
            "format": FORMAT,
            "versions": {"refimpl": refimpl.__version__, "onnx": onnx.__version__, "numpy": np.__version__},
            "config": asdict(config),
            "plan": {field.name: getattr(plan, field.name) for field in fields(plan) if field.name != "config"},
            "onnx": {"opset": self.profile.opset, "ir_version": self.profile.ir_version,
                     "forms": sorted(self.profile.forms), "weights": self.profile.weights,
                     "on_grids": self.profile.on_grids},
            "quantization": quantization(self.model),
            "golden": golden and {
                "prompt": self.prompt, "outputs": "NumPy in float64 from the stored inputs, then float32",
                "simulated": self.encodings is not None, "scores": scores,
            },
            "tolerances": {name: asdict(limit) for name, limit in limits.items()},
            "graphs": {
                spec.name: {
                    "real_tokens": spec.real, "past_tokens": spec.past,
                    "inputs": [asdict(v) for v in spec.inputs], "outputs": [asdict(v) for v in spec.outputs],
                }
                for run in plan.runs for spec in run
            },
            "files": files,
        }  # fmt: skip


def quantization(model: Model) -> dict[str, dict[str, Any]]:
    """The format of each weight that is quantized."""
    return {
        name: {"format": weight.blocks.format, "block_size": weight.blocks.block_size}
        for name, weight in model.weights.items()
        if isinstance(weight, QuantizedWeight)
    }


Arrays = dict[str, np.ndarray]


def goldens(
    model: Model, plan: Plan, prompt: list[int], simulation: SimulatedModel | None = None,
    given: Mapping[str, Arrays] | None = None, scores: dict[str, float] | None = None,
) -> Iterator[tuple[GraphSpec, dict[str, Arrays]]]:  # fmt: skip
    """Each graph with its golden "input" and "output", run by run: the first reads the prompt, each other goes on.

    It goes on with the likeliest token, and then, where more are asked for, with the prompt again. Outputs are what
    NumPy computes in float64 from the very inputs, rounded to float32, and the next part is given those. A graph alone
    is given what the model, run up to there, has in its place. `given`: the inputs of a graph, where they are known.
    `scores` learns how large the attention scores of each layer are.

    With a `simulation` of a quantized device there is also what that says: "simulated", of the golden inputs, and
    "simulated_chained", of what it said of the graphs before.
    """
    after_prompt, after_simulated = Arrays(), Arrays()
    for run in plan.runs:
        ids, flow, simulated = prompt, Arrays(after_prompt), Arrays(after_simulated)
        if after_prompt:
            likeliest = [int(flow["logits"][0, -1].argmax())] if "logits" in flow else []
            ids = list(islice(cycle([*likeliest, *prompt]), run[0].tokens))
        if plan.modules:
            flow |= around_graphs(model, run, ids, flow)
        for spec in run:
            host = {} if given else host_inputs(model, spec, ids)

            def linked(flow: Arrays, spec: GraphSpec = spec, host: Arrays = host) -> Arrays:
                return {v.name: carry(spec, v, flow) if v.source else host[v.name] for v in spec.inputs}

            inputs = given[spec.name] if given else linked(flow)
            outputs = oracle(model, spec, inputs, measuring(spec, {} if scores is None else scores))
            case = {"input": inputs, "output": outputs}
            if simulation:
                case["simulated"] = simulate_graph(simulation, spec, inputs)
                if plan.chained:
                    case["simulated_chained"] = simulate_graph(simulation, spec, linked(simulated))
                    simulated |= case["simulated_chained"]
            flow |= outputs
            yield spec, case
        after_prompt, after_simulated = after_prompt or flow, after_simulated or simulated


def oracle(model: Model, spec: GraphSpec, inputs: Arrays, tap: Tap = silent) -> Arrays:
    """What NumPy computes in float64 of the inputs of a graph, rounded to the types of its outputs."""
    computed = spec.computed(model.weights, NumPyOps("float64"), spec.filled(inputs), feeding(inputs, then=tap))
    return {v.name: np.ascontiguousarray(computed[v.name], v.dtype) for v in spec.outputs}


def measuring(spec: GraphSpec, scores: dict[str, float]) -> Tap:
    """Keeps how large the attention scores are that a graph computes; those of padding do not count."""

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        if name.endswith(".scores") and name in spec.taps:
            (size,) = largest_scores({name: x[..., -spec.real :, :]}).values()
            scores[name] = max(size, scores.get(name, 0.0))
        return x

    return tap


def around_graphs(model: Model, run: Sequence[GraphSpec], ids: Sequence[int], flow: Arrays) -> Arrays:
    """What graphs alone read, from a run of the model up to the last of them, which goes on from the `flow` before."""
    stop, heads = max(spec.part.layers.stop for spec in run), any(spec.part.heads for spec in run)
    before = replace(run[0].whole, part=Part(1, 1, range(stop), embeds=True, heads=heads))
    host, read = host_inputs(model, before, ids), {v.name for spec in run for v in spec.inputs if v.tap}
    inputs = {v.name: carry(before, v, flow) if v.source else host[v.name] for v in before.inputs}
    found: dict[str, np.ndarray] = {}

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        if name in read:
            found[name] = x.astype(np.float32)
        return x

    found |= before.computed(model.weights, NumPyOps("float64"), inputs, tap)
    return {name: x.astype(np.float32, copy=False) for name, x in found.items()}


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises InputError unless `folder` may be written: it is not there, or empty, or an export to be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, expected a folder; choose another place")
    there = {path.name for path in folder.iterdir()}
    if not there:
        return
    manifest = read_json(folder / "manifest.json") if "manifest.json" in there else {}
    if manifest.get("format") != FORMAT:
        raise InputError(f"{folder} is not empty, and no export; choose another place")
    if not overwrite:
        raise InputError(f"{folder} holds an export; choose another place, or overwrite it (--force)")
    ours = {"manifest.json", *BESIDE} | {str(name).split("/")[0] for name in manifest.get("files", ())}
    if others := sorted(there - ours):
        raise InputError(f"{folder} also holds {at_most(others)}, which no export does; move that away first")
