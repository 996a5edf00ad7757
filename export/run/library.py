"""Qualcomm's libraries, where the package onnxruntime-qnn has put them (extra: htp)."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from pathlib import Path

from export.run.htp import expect_installed
from refimpl.errors import InputError


def library(name: str) -> Path:
    """The path of a shared library, such as `Genie`.

    Raises InputError, with what to do, if the package is not here, or has no such library for this machine.
    """
    expect_installed()
    found = find_spec("onnxruntime_qnn")
    assert found and found.origin
    path = Path(found.origin).parent / (f"{name}.dll" if platform.system() == "Windows" else f"lib{name}.so")
    if not path.is_file():
        raise InputError(f"onnxruntime-qnn has no {path.name} on this machine; use one with x86_64 and Linux")
    return path


def search_path() -> str:
    """The folders that LD_LIBRARY_PATH needs, so that one library finds the others."""
    folder = library("QnnSystem").parent
    return f"{folder}:{folder.with_name('onnxruntime_qnn.libs')}"
