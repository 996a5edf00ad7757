"""What jobs take and give: options, a graph's folder, datasets in the model's order, outputs by the graph's names.

**Source**: options as AI Hub's generic LLM export gives them (ai-hub-models 0.46), datasets as qai-hub 0.56 has them.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.files.entries import of_file
from export.graphs.naming import sanitised
from export.graphs.plan import Arrays
from export.run.executor import ends
from golden.bundle import sha256
from refimpl.errors import InputError

SAMPLE = 1 << 20  # bytes from each of a few places of a file, to estimate how it zips


@dataclass(frozen=True)
class Options:
    """The options of jobs: QAIRT's version, and what is added to each kind's."""

    qairt: str = "2.42"
    compile: str = ""
    link: str = ""
    run: str = ""

    def for_compile(self, source: Source) -> str:
        """Of a graph: quantized by its encodings where it has any, else in float16, which is the device's own."""
        words = ["--target_runtime qnn_dlc", self._version, f"--output_names {','.join(source.outputs)}"]
        enable = f"--qnn_options context_enable_graphs={source.name}"
        if source.quantized:  # twice, as AI Hub's own export has it
            words += ["--quantize_io", enable, "--quantize_full_type w8a16 --quantize_io"]
        else:
            words.append(enable)
        return " ".join(filter(None, [*words, self.compile]))

    def for_link(self) -> str:
        return " ".join(filter(None, [self._version, self.link]))

    def for_inference(self, graph: str) -> str:
        return " ".join(filter(None, [self._version, f"--qnn_options context_enable_graphs={graph}", self.run]))

    def for_profile(self, graph: str) -> str:
        return " ".join([self.for_inference(graph), "--max_profiler_iterations 50"])

    @property
    def _version(self) -> str:
        return f"--qairt_version {self.qairt}" if self.qairt else ""


@dataclass(frozen=True)
class Source:
    """A graph's folder as it is uploaded: its ends, name -> shape in order, and name -> bytes, sha256 of its files."""

    folder: Path
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    files: dict[str, tuple[int, str]]

    @classmethod
    def read(cls, folder: Path, weights: tuple[int, str] | None = None) -> Source:
        """From a folder. `weights` are bytes and sha256 of its model.data as once written, which saves reading it."""
        inputs, outputs = ends(folder)
        files = {}
        for path in sorted(folder.iterdir()):
            size = path.stat().st_size
            told = weights if path.name == "model.data" and weights and weights[0] == size else None
            files[path.name] = told or (size, sha256(path))
        return cls(folder, inputs, outputs, files)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def quantized(self) -> bool:
        return any(name.endswith(".encodings") for name in self.files)

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    @property
    def digest(self) -> str:
        return digest({name: sha for name, (_, sha) in self.files.items()})

    def called(self, place: Path) -> Path:
        """The folder under the name that AI Hub's own exports give it, in a place for such names."""
        named = place / f"{self.name}.{'aimet' if self.quantized else 'onnx'}"
        try:
            named.symlink_to(self.folder.resolve(), target_is_directory=True)
        except OSError:  # not every system lets everybody
            return self.folder
        return named

    def zipped(self) -> int:
        """About how many bytes the upload has, by how a few pieces of each file compress."""
        total = 0.0
        for name, (size, _) in self.files.items():
            with open(self.folder / name, "rb") as file:
                pieces = []
                for i in range(4):
                    file.seek(size * i // 4)
                    pieces.append(file.read(min(SAMPLE, size // 4 + 1)))
            read = sum(map(len, pieces))
            total += size * sum(len(zlib.compress(piece, 1)) for piece in pieces) / max(read, 1)
        return int(total)


def digest(content: object) -> str:
    """The sha256 of something that JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def arrays_digest(samples: Sequence[Arrays]) -> str:
    """The sha256 of samples: names, order, dtypes, shapes and bytes."""
    return digest(
        [
            [name, str(a.dtype), list(a.shape), hashlib.sha256(np.ascontiguousarray(a).data).hexdigest()]
            for sample in samples
            for name, a in sample.items()
        ]
    )


def io_spec(spec: Mapping[str | None, Iterable]) -> dict[str, list]:
    """A model's inputs or outputs, as the server tells them: graph -> [name, dtype, shape, scale, zero point]."""
    return {graph or "": [list(tensor) for tensor in tensors] for graph, tensors in (spec or {}).items()}


def of_graph(told: Mapping[str, list] | None, graph: str) -> list:
    """Those of one graph."""
    told = told or {}
    return told.get(graph) or told.get("") or []


def named_outputs(path: Path, source: Source, samples: int, grids: Sequence = ()) -> list[Arrays]:
    """The samples in a file of outputs, by the graph's names: by theirs, or where those are others, by their order.

    Raises InputError for what is no such file, or does not have the graph's outputs.
    """
    entries = list(of_file(path, max(map(math.prod, source.outputs.values())), samples))
    tensors = [entries[i : i + samples] for i in range(0, len(entries), samples)]
    if len(tensors) != len(source.outputs):
        raise InputError(f"AI Hub gave {len(tensors)} outputs of {source.name}, the graph has {len(source.outputs)}")
    theirs, mine = [sanitised(first.name) for first, *_ in tensors], {sanitised(name): name for name in source.outputs}
    own = [mine[name] for name in theirs] if set(theirs) == set(mine) else list(source.outputs)
    steps = {sanitised(name): (scale, zero) for name, _, _, scale, zero in grids if scale}
    columns: dict[str, list[np.ndarray]] = {}
    for called, name, column in zip(theirs, own, tensors, strict=True):
        if odd := [entry.shape for entry in column if entry.shape != source.outputs[name]]:
            raise InputError(f"AI Hub gave {name} of {source.name} as {odd[0]}, expected {source.outputs[name]}")
        arrays = [entry.read() for entry in column]
        if arrays[0].dtype.kind == "u" and called in steps:
            scale, zero = steps[called]
            arrays = [((array - np.float64(zero)) * scale) for array in arrays]
        columns[name] = [array.astype(np.float32) for array in arrays]
    return [dict(zip(columns, sample, strict=True)) for sample in zip(*columns.values(), strict=True)]
