"""The folder of a graph that is written for one run, and removed after it, also where the search was killed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from export.measure.places import Dataflow
from export.run.ledger import lock
from refimpl.errors import InputError

WORK = ".bisect-"  # how the folders of the graphs that are run begin


class Written:
    """A graph's folder that exists while it is needed. It is locked, so that `sweep` knows that its search is alive."""

    def __init__(self, flow: Dataflow, showed: Sequence[str], until: bool):
        self.flow, self.showed, self.until = flow, showed, until

    def __enter__(self) -> Path:
        try:
            self.folder = Path(mkdtemp(prefix=WORK, dir=self.flow.folder.parent))
            self.lock = open(self.folder / "lock", "ab")
            lock(self.lock)
            return self.flow.save(self.folder, self.showed, self.until)
        except OSError as error:
            raise InputError(f"cannot write in {self.flow.folder.parent}: {error.strerror}; make room there") from None

    def __exit__(self, *_: object) -> None:
        self.lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes the graphs that a killed search has left."""
    for left in folder.glob(f"{WORK}*"):
        if left.is_symlink() or not left.is_dir():
            continue
        try:
            with open(left / "lock", "ab") as file:
                lock(file)
        except OSError:  # it is in use, or not ours to remove
            continue
        shutil.rmtree(left, ignore_errors=True)
