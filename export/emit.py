"""`emit` a model as ONNX graphs, and `save` them: weights streamed, goldens beside them, all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm

import refimpl
from export.graph import Built, Graph, OnnxOps, Parameter, write_data
from export.parts import GraphSpec, Plan, carry, host_inputs
from golden.tolerance import tolerances
from kernels.ops import NumPyOps
from refimpl.errors import InputError, at_most
from refimpl.files import read_json
from refimpl.model import Model
from refimpl.quantize import QuantizedWeight

FORMAT = "refimpl export 1"
PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"  # from the model card of Baichuan2-7B-Base
TEST_DATA = "test_data/{}/test_data_set_0"  # beside the graphs' folders: AI Hub takes nothing else in those
ONNX_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}


def emit(
    model: Model,
    tokens: int | Sequence[int] = (128, 1),
    context: int | None = None,
    parts: int = 1,
    opset: int = 21,
    ir_version: int = 10,
    prompt: str | Sequence[int] | None = None,
) -> Parts:
    """The model as static ONNX graphs, one for each part and each number of `tokens` at a time.

    `context` is the window in tokens, by default the model's. `parts`: 1 has everything in one graph; with more, the
    first is the embedding and the last has the head. `prompt`, a text or ids, is what the golden inputs are about.

    No weight is read yet. Raises InputError for numbers that do not fit the model, or each other.
    """
    lowest = helper.OP_SET_ID_VERSION_MAP.get(("ai.onnx", opset), 0)
    if opset < 17 or not lowest:
        raise InputError(f"opset is {opset}, expected 17 to {onnx.defs.onnx_opset_version()}")
    if not lowest <= ir_version <= onnx.IR_VERSION:
        raise InputError(f"ir_version is {ir_version}, expected {lowest} to {onnx.IR_VERSION} with opset {opset}")
    sizes = sorted({tokens} if isinstance(tokens, int) else set(tokens), reverse=True)
    longest = model.config.max_position_embeddings
    plan = Plan(model.config, tuple(sizes), longest if context is None else context, parts)
    ids = golden_prompt(model, plan.room) if prompt is None else model.token_ids(prompt).reshape(-1).tolist()
    plan = Plan(plan.config, plan.tokens, plan.context, plan.parts, len(ids))
    graphs = {spec.name: build(model, spec, opset, ir_version) for run in plan.runs for spec in run}
    return Parts(model, plan, ids, graphs, opset, ir_version)


def build(model: Model, spec: GraphSpec, opset: int, ir_version: int) -> Built:
    """One graph: the decoder's own code, run on symbols."""
    graph = Graph()
    ops = OnnxOps(graph, opset)
    inputs = {v.name: graph.input(v.name, v.shape, ONNX_TYPES[v.dtype]) for v in spec.inputs}
    weights = {name: Parameter(name, weight) for name, weight in model.weights.items()}
    outputs = spec.part.outputs(model.config, weights, ops, inputs, graph.tap)
    for name, tensor in outputs.items():
        tensor.name = name
    return graph.build(spec.name, list(inputs.values()), list(outputs.values()), opset, ir_version)


def golden_prompt(model: Model, room: int) -> list[int]:
    """A line of the model card, or random ids for want of a tokenizer, in three quarters of the room."""
    try:
        ids = model.token_ids(PROMPT)[0]
    except InputError:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, room)
    return ids[: max(1, room * 3 // 4)].tolist()


@dataclass(frozen=True)
class Parts:
    """The graphs of a model, by name, and what is needed to save them. `len` counts the graphs."""

    model: Model
    plan: Plan
    prompt: list[int]
    graphs: Mapping[str, Built]
    opset: int
    ir_version: int

    def __len__(self) -> int:
        return len(self.graphs)

    def __iter__(self) -> Iterator[str]:
        return iter(self.graphs)

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: {len(built.proto.graph.node)} nodes, {sum(n for _, n in built.layout.values()) / 1e6:.1f} MB"
            for name, built in self.graphs.items()
        )

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Writes `folder`, complete or not at all, and returns its path:

            {graph}/model.onnx, model.data                             a folder for each graph, fit to be uploaded
            test_data/{graph}/test_data_set_0/input_0.pb, output_0.pb  golden inputs and outputs, ONNX's own layout
            manifest.json                                              what all of it is, with sha256; written last

        Each graph of a part has its own copy of the weights: an upload takes one folder, and ONNX refuses links.
        Memory holds a tile of weights at a time. Every graph passes `onnx.checker` with full_check.

        `overwrite` replaces an earlier export, and nothing else. Raises InputError for a folder that is something
        else, or that cannot be written.
        """
        folder = Path(folder).resolve()
        check_free(folder, overwrite)
        mine = f".{folder.name}.{os.getpid()}"
        partial, replaced = folder.with_name(f"{mine}.partial"), folder.with_name(f"{mine}.replaced")
        try:
            partial.mkdir(parents=True)
            self._write(partial)
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror}; choose another place") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if replaced.exists() and not folder.exists():
                replaced.rename(folder)
        return folder

    def _write(self, folder: Path) -> None:
        files: dict[str, dict[str, Any]] = {}

        def record(path: Path, sha256: str) -> None:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256}

        def write(path: Path, proto) -> None:
            data = proto.SerializeToString(deterministic=True)
            path.write_bytes(data)
            record(path, hashlib.sha256(data).hexdigest())

        weights: dict[int, tuple[Path, str]] = {}  # of a part, once they are written
        cases = goldens(self.model, self.plan, self.prompt)
        for spec, inputs, outputs in tqdm(cases, "exporting", len(self), unit="graph", disable=None, leave=False):
            graph, data_set = folder / spec.name, folder / TEST_DATA.format(spec.name)
            graph.mkdir()
            data_set.mkdir(parents=True)
            write(graph / "model.onnx", self.graphs[spec.name].proto)
            if spec.part.number in weights:
                path, sha256 = weights[spec.part.number]
                shutil.copyfile(path, graph / "model.data")
            else:
                with open(graph / "model.data", "wb") as file:
                    sha256 = write_data(file, self.graphs[spec.name])
                weights[spec.part.number] = graph / "model.data", sha256
            record(graph / "model.data", sha256)
            onnx.checker.check_model(str(graph / "model.onnx"), full_check=True)
            for kind, arrays in (("input", inputs), ("output", outputs)):
                for i, (name, array) in enumerate(arrays.items()):
                    write(data_set / f"{kind}_{i}.pb", numpy_helper.from_array(array, name))
        text = json.dumps(self._manifest(files), indent=1, ensure_ascii=False)
        (folder / "manifest.json").write_text(text, encoding="utf-8")

    def _manifest(self, files: Mapping[str, Mapping]) -> dict[str, Any]:
        plan, config, weights = self.plan, self.model.config, self.model.weights
        # Positions and sums go no further than what is no padding: masked places add exactly nothing.
        limits = tolerances(config, "float32", tokens=max(spec.real + spec.past for run in plan.runs for spec in run))
        return {
            "format": FORMAT,
            "versions": {"refimpl": refimpl.__version__, "onnx": onnx.__version__, "numpy": np.__version__},
            "config": asdict(config),
            "plan": {key: getattr(plan, key) for key in ("tokens", "context", "parts", "prompt")},
            "onnx": {"opset": self.opset, "ir_version": self.ir_version},
            "quantization": {
                name: {"format": weight.blocks.format, "block_size": weight.blocks.block_size}
                for name, weight in weights.items()
                if isinstance(weight, QuantizedWeight)
            },
            "golden": {"prompt": self.prompt, "outputs": "NumPy in float64 from the stored inputs, then float32"},
            "tolerances": {v.tap: asdict(limits[v.tap]) for s in plan.runs[0] for v in s.outputs if v.tap},
            "graphs": {
                spec.name: {
                    "real_tokens": spec.real, "past_tokens": spec.past,
                    "inputs": [asdict(v) for v in spec.inputs], "outputs": [asdict(v) for v in spec.outputs],
                }
                for run in plan.runs for spec in run
            },
            "files": files,
        }  # fmt: skip


Arrays = dict[str, np.ndarray]


def goldens(model: Model, plan: Plan, prompt: list[int]) -> Iterator[tuple[GraphSpec, Arrays, Arrays]]:
    """Each graph with golden inputs and outputs, run by run: the first reads the prompt, each other goes on from there.

    It goes on with the likeliest token, and then, where more are asked for, with the prompt again. Outputs are what
    NumPy computes in float64 from the very inputs, rounded to float32, and the next part is given those.
    """
    after_prompt = Arrays()
    for run in plan.runs:
        ids, flow = prompt, Arrays(after_prompt)
        if after_prompt:
            ids = list(islice(cycle([int(flow["logits"][0, -1].argmax()), *prompt]), run[0].tokens))
        for spec in run:
            host = host_inputs(model, spec, ids)
            inputs = {v.name: carry(spec, v, flow) if v.source else host[v.name] for v in spec.inputs}
            computed = spec.part.outputs(model.config, model.weights, NumPyOps("float64"), inputs)
            outputs = {v.name: np.ascontiguousarray(computed[v.name], v.dtype) for v in spec.outputs}
            flow |= outputs
            yield spec, inputs, outputs
        after_prompt = after_prompt or flow


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
    ours = {"manifest.json"} | {str(name).split("/")[0] for name in manifest.get("files", ())}
    if others := sorted(there - ours):
        raise InputError(f"{folder} also holds {at_most(others)}, which no export does; move that away first")
