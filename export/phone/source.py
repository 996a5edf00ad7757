"""A graph's folder as it is handed to a compiler: its inputs and outputs, and the digests of its files."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

from export.run.executor import ends
from export.run.ledger import digest
from refimpl.files import sha256

SAMPLE = 1 << 20  # bytes from each of a few places of a file, by which the size of its zip is estimated


@dataclass(frozen=True)
class Source:
    """A graph's folder: its inputs and outputs, name -> shape in order, and its files, name -> bytes and sha256."""

    folder: Path
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    files: dict[str, tuple[int, str]]

    @classmethod
    def read(cls, folder: Path, weights: tuple[int, str] | None = None) -> Source:
        """Reads a folder. `weights`: bytes and sha256 of its model.data, if known; then it need not be read."""
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
        """A link in `place` to the folder, under the name that AI Hub's own exports have."""
        named = place / f"{self.name}.{'aimet' if self.quantized else 'onnx'}"
        try:
            named.symlink_to(self.folder.resolve(), target_is_directory=True)
        except OSError:  # some systems allow it to administrators alone
            return self.folder
        return named

    def zipped(self) -> int:
        """About how many bytes the upload has, judged by how four pieces of each file compress."""
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
