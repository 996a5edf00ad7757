"""`Parts`, the graphs of a model, and how they become a folder: weights streamed, all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from tqdm import tqdm

from export.files.encodings import write_encodings
from export.folder.goldens import Goldens
from export.folder.manifest import BESIDE, FORMAT, TEST_DATA, contents
from export.graphs.data import Built, write_data
from export.graphs.grids import bias_encodings, graph_encodings
from export.graphs.part import Part
from export.graphs.plan import Arrays, GraphSpec, Plan, unpadded
from export.graphs.profiles import Profile
from golden.bundle import sha256 as digest
from refimpl.errors import InputError, at_most
from refimpl.files import cannot_write, filling, read_json, replace_folder, settle
from refimpl.grids.encodings import Encodings
from refimpl.model import Model, SimulatedModel
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

        Each graph of a part has its own copy of the weights, because ONNX's own loader refuses a file with several
        links. An export for AI Hub is the exception: its float32 weights are many times as large, and each folder is
        zipped for the upload anyway. There the graphs of a part share one file by hard links, if the disk has them.
        Memory holds a tile of weights at a time. Every graph passes `onnx.checker` with full_check.

        `overwrite` replaces an earlier export, and nothing else. The record of what was sent to AI Hub and of what came
        back stays, so a graph with the same bytes is not sent again. Without `golden` there is no test data: a compiler
        needs none, and the model is not computed.

        Raises InputError for a folder that holds anything else, or that cannot be written.
        """
        folder = Path(folder).resolve()
        settle(folder, BESIDE)
        check_free(folder, overwrite)
        try:
            with filling(folder) as partial:
                self._write(partial, golden)
                replace_folder(partial, folder, BESIDE, lambda: check_free(folder, overwrite))
        except OSError as error:
            raise InputError(cannot_write(folder, error)) from None
        return folder

    @np.errstate(over="ignore", invalid="ignore")  # what overflows is refused
    def _write(self, folder: Path, golden: bool) -> None:
        files, goldens = WrittenFiles(folder), self._goldens() if golden else None
        cases = goldens or [(spec, dict[str, Arrays]()) for run in self.plan.runs for spec in run]
        for spec, case in tqdm(cases, "exporting", len(self), unit="graph", disable=None, leave=False):
            graph, built = folder / spec.name, self.graphs[spec.name]
            graph.mkdir()
            files.proto(graph / "model.onnx", built.proto)
            files.weights(graph / "model.data", built, spec.part, shared=self.profile.encodings)
            onnx.checker.check_model(str(graph / "model.onnx"), full_check=True)
            if self.encodings and self.profile.encodings:
                own = graph_encodings(self.encodings, spec, built)
                own = replace(own, parameters={**own.parameters, **bias_encodings(own, built)})
                files.encodings(graph / "model.encodings", own, self.encodings_version)
            if golden:
                expect_numbers(spec, case["output"])
                files.data_set(folder / TEST_DATA.format(spec.name), case)
        files.share()
        if self.encodings:
            files.encodings(folder / "encodings.json", self.encodings, self.encodings_version)
        told = None if goldens is None else {
            "prompt": self.prompt, "outputs": "NumPy in float64 from the stored inputs, then float32",
            "simulated": self.encodings is not None,
            # With three digits they are the same on any machine.
            "scores": {name: float(f"{size:.3g}") for name, size in goldens.scores.items()},
        }  # fmt: skip
        manifest = contents(self.model, self.plan, self.profile, told, files.listed)
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (folder / "manifest.json").write_text(text, encoding="utf-8")

    def _goldens(self) -> Goldens:
        rounding: Rounding = "even" if self.profile.on_grids else "away"  # as ONNX rounds, or AIMET
        # Sums of integers are exact, so every BLAS gives the same bits.
        simulation = SimulatedModel(self.model, self.encodings, rounding, integer=True) if self.encodings else None
        return Goldens(self.model, self.plan, self.prompt, simulation, self.given)


class WrittenFiles:
    """Writes the files of a folder, and has them `listed` for the manifest: name -> size and sha256."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.listed: dict[str, dict[str, Any]] = {}
        self._weights: dict[Part, tuple[Path, str]] = {}  # of a part, once they are written
        self._lent: dict[Part, list[Path]] = {}  # the other places where `share` puts them

    def _list(self, path: Path, sha256: str) -> None:
        self.listed[path.relative_to(self.folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256}

    def proto(self, path: Path, message: Any) -> None:
        """A protobuf message: a model or a tensor."""
        data = message.SerializeToString(deterministic=True)
        path.write_bytes(data)
        self._list(path, hashlib.sha256(data).hexdigest())

    def weights(self, path: Path, built: Built, part: Part, shared: bool) -> None:
        """Writes a graph's weights. They are streamed for the first graph of a part, and copied for each other one.

        If they are `shared`, the file moves on to the next graph instead, so that it has only one link while that graph
        is checked. In the end `share` gives it back to all.
        """
        first, sha256 = self._weights.get(part, (None, ""))
        if first is None:
            with open(path, "wb") as file:
                sha256 = write_data(file, built)
        elif shared:
            first.rename(path)
            self._lent.setdefault(part, []).append(first)
        else:
            shutil.copyfile(first, path)
        self._weights[part] = path, sha256
        self._list(path, sha256)

    def share(self) -> None:
        """Links the weights of each part from all its graphs, or copies them where the disk has no links."""
        for part, paths in self._lent.items():
            for path in paths:
                try:
                    os.link(self._weights[part][0], path)
                except OSError:
                    shutil.copyfile(self._weights[part][0], path)

    def encodings(self, path: Path, encodings: Encodings, version: str) -> None:
        """An encodings file."""
        write_encodings(encodings, path, version)
        self._list(path, digest(path))

    def data_set(self, folder: Path, case: Mapping[str, Arrays]) -> None:
        """Golden arrays by kind, in the layout of ONNX's own tests: input_0.pb, output_0.pb, …"""
        folder.mkdir(parents=True)
        for kind, arrays in case.items():
            for i, (name, array) in enumerate(arrays.items()):
                self.proto(folder / f"{kind}_{i}.pb", numpy_helper.from_array(array, name))


def expect_numbers(spec: GraphSpec, outputs: Arrays) -> None:
    """Raises InputError if a golden output is NaN or infinite: a device that answers NaN would agree with it."""
    for value in spec.outputs:
        if not np.isfinite(unpadded(value, outputs[value.name], spec)).all():
            raise InputError(f"the golden output {value.name} of {spec.name} is NaN or infinite, so no device can be "
                             "judged by it; mend the model, whose numbers overflow")  # fmt: skip


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
        raise InputError(f"{folder} also holds {at_most(others)}, which no export writes; move that away first")
