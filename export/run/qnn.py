"""The code that runs beside Qualcomm's library in a separate process: sessions of ONNX Runtime with its QNN provider.

`htp.py` asks for these jobs. The library is used through ONNX Runtime's public options, which its documentation of the
QNN Execution Provider lists; nothing here knows how it computes.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.run.process import read_arrays, write_arrays
from refimpl.errors import one_line

PROVIDER = "QNNExecutionProvider"
KEPT = 16  # sessions that stay open
_NODE = re.compile(r"\s*Operator type: \S* Node name: (.*) Node index: \d+")
_REASON = re.compile(r"\s*REASON : (.*)")
_ERROR = re.compile(r"\[E:onnxruntime[^]]*\]\s*(.*)")
_COLOUR = re.compile(r"\x1b?\[[0-9;]*m")

_sessions: dict[str, Any] = {}


def _devices() -> list[Any]:
    """The QNN provider's devices, an NPU before all others. The first call loads the library."""
    import onnxruntime
    import onnxruntime_qnn

    def found() -> list[Any]:
        return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]

    if not found():
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    return sorted(found(), key=lambda device: device.device.type.name != "NPU")


def about(folder: Path) -> dict[str, Any]:
    """The installed versions, and the kind of the first device that the provider sees."""
    import onnxruntime
    import onnxruntime_qnn

    versions = onnxruntime_qnn.build_and_package_info
    return {"package": versions.__version__, "qnn": versions.qnn_version, "onnxruntime": onnxruntime.__version__,
            "device": _devices()[0].device.type.name}  # fmt: skip


def open_graph(folder: Path, graph: str, key: str, options: Mapping[str, str], entries: Mapping[str, str]):
    """Compiles a graph, unless that is done.

    The answer has the outputs' names; for each provider, how many nodes of each operator it runs; the nodes that are
    not on the NPU, with the provider's reason where it states one; and seconds. Raises RuntimeError with the compiler's
    message, and the errors that its log has before it.
    """
    import onnxruntime
    import onnxruntime_qnn

    if key in _sessions:
        session, answer = _sessions.pop(key)
        _sessions[key] = session, answer
        return answer
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 0  # the level at which it says why it does not take a node
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for name, value in entries.items():
        settings.add_session_config_entry(name, value)
    backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    settings.add_provider_for_devices(_devices()[:1], {**backend, **options})
    printed = folder / "printed.txt"
    start, begin = printed.stat().st_size, time.perf_counter()
    try:
        session = onnxruntime.InferenceSession(graph, settings)
    except Exception as error:
        errors = [line for kind, line in _log(printed, start) if kind == "error"]
        said = [*dict.fromkeys(errors[-3:]), str(error)]
        raise RuntimeError(" | ".join(said)) from None
    seconds = time.perf_counter() - begin
    reasons: dict[str, str] = {}
    node = ""
    for kind, text in _log(printed, start):
        if kind == "node":
            node = text
        elif kind == "reason" and node:
            reasons[node], node = text, ""
    counts: dict[str, Counter] = {}
    elsewhere = []
    for piece in session.get_provider_graph_assignment_info():
        for one in piece.get_nodes():
            counts.setdefault(piece.ep_name, Counter())[one.op_type] += 1
            if piece.ep_name != PROVIDER:
                elsewhere.append([one.op_type, one.name, reasons.get(one.name, "")])
    answer = {"outputs": [output.name for output in session.get_outputs()], "counts": counts,
              "elsewhere": elsewhere, "seconds": seconds}  # fmt: skip
    settings.log_severity_level = 4
    while len(_sessions) >= KEPT:
        del _sessions[next(iter(_sessions))]
    _sessions[key] = session, answer
    return answer


def _log(printed: Path, start: int) -> Iterator[tuple[str, str]]:
    """The lines of ONNX Runtime's log that are of use, from a place on: a node's name, a reason, an error."""
    with open(printed, errors="replace") as file:
        file.seek(start)
        for line in file:
            for kind, pattern in (("node", _NODE), ("reason", _REASON), ("error", _ERROR)):
                if found := pattern.match(line) if kind != "error" else pattern.search(line):
                    yield kind, one_line(_COLOUR.sub("", found[1]).strip())[:500]


def compiles(folder: Path, weights: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Whether the graph in the file `cut.onnx`, whose weights lie in the folder `weights`, compiles at all."""
    import onnxruntime
    import onnxruntime_qnn

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    settings.add_provider_for_devices(_devices()[:1], {**backend, **options})
    try:
        onnxruntime.InferenceSession((folder / "cut.onnx").read_bytes(), settings)
    except Exception:  # any kind of error means that it does not
        return {"compiles": False}
    return {"compiles": True}


def run(folder: Path, key: str, runs: Sequence[Sequence[Sequence[str]]]):
    """Runs an open graph on each of some inputs, whose files are in `in0`, `in1`, …; a message for each when done."""
    import onnxruntime

    session, answer = _sessions[key]
    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = 4
    written = []
    for i, files in enumerate(runs):
        begin = time.perf_counter()
        outputs = session.run(answer["outputs"], read_arrays(folder / f"in{i}", files), quiet)
        written.append(write_arrays(folder / f"out{i}", dict(zip(answer["outputs"], outputs, strict=True))))
        yield {"seconds": time.perf_counter() - begin}
    return {"runs": written}


JOBS = {"about": about, "open": open_graph, "compiles": compiles, "run": run}
