"""`Parts`, the graphs of a model, and how they become a folder: weights streamed, all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from tqdm import tqdm

import refimpl
from export.files.encodings import write_encodings
from export.folder.goldens import goldens
from export.folder.manifest import BESIDE, FORMAT, TEST_DATA, quantization
from export.graphs.data import Built, write_data
from export.graphs.grids import graph_encodings
from export.graphs.plan import Arrays, Plan
from export.graphs.profiles import Profile
from golden.bundle import sha256 as digest
from golden.tolerance import Tolerance, tolerances
from refimpl.errors import InputError, at_most
from refimpl.files import read_json
from refimpl.grids.encodings import Encodings
from refimpl.model import Model, SimulatedModel
from refimpl.names import taps
from refimpl_kernels.affine import Rounding


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
                     "on_grids": self.profile.on_grids, "coded": self.profile.coded},
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
