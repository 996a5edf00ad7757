"""Snapdragons by the names that the command line takes: QNN's number of each, and the architecture of its NPU.

The pair decides what a binary is compiled for. With a number beside the wrong architecture, or with neither, the
compiler fails on whole layers with `QNN_COMMON_ERROR_MEM_ALLOC`. So users give only the name.

**Source**: Qualcomm's QNN overview, "Supported Snapdragon devices"; pairs were compiled with onnxruntime-qnn 2.7.0.
"""

from __future__ import annotations

from dataclasses import dataclass

from refimpl.errors import InputError


@dataclass(frozen=True)
class Soc:
    """One SoC: QNN's `soc_model`, and the architecture of its Hexagon NPU, such as v79."""

    name: str
    model: int
    architecture: str

    @property
    def arch(self) -> str:
        """The architecture as ONNX Runtime's option `htp_arch` takes it."""
        return self.architecture.removeprefix("v")


SOCS = {
    soc.name: soc
    for soc in (
        Soc("8-gen-2", 43, "v73"),
        Soc("8-gen-3", 57, "v75"),
        Soc("8-elite", 69, "v79"),
        Soc("8-elite-gen-5", 87, "v81"),
        Soc("x-elite", 60, "v73"),
        Soc("x2-elite", 88, "v81"),
    )
}


def soc_called(name: str) -> Soc:
    """A row of the table. Raises InputError if there is none."""
    if name not in SOCS:
        raise InputError(f"soc is {name!a:.40}, expected one of {', '.join(SOCS)}")
    return SOCS[name]


def soc_numbered(model: int) -> str:
    """QNN's number with the name that it has here, if any."""
    names = [soc.name for soc in SOCS.values() if soc.model == model]
    return f"{names[0]} (soc_model {model})" if names else f"soc_model {model}"
