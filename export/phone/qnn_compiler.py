"""Compiles one binary, in a process of its own: the job `compile` of a `Process`.

ONNX Runtime hands a graph to Qualcomm's compiler when a session is opened, and writes the context binary that comes out
(`ep.context_enable`). A graph inside a binary has the name under which the provider was registered, so it is registered
once for each graph. Graphs that share their weights are compiled in one process, into one binary: an option of the last
graph ends the sharing.

A failure may abort the process, so each binary has a process of its own.

**Source**: onnxruntime-qnn, `docs/execution_providers/QNN-ExecutionProvider.md`.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from refimpl.errors import InputError, at_most

FALLBACK = "assigned to the default CPU EP"  # of ONNX Runtime's message for a graph that is not taken whole


def compile_binary(folder: Path, graphs: list[str], out: str, soc_model: int, arch: str, shared: bool):
    """Compiles the graphs' folders into `out`, with a message for each.

    Raises InputError, with the compiler's reason, for a graph that it does not take.
    """
    import onnxruntime
    import onnxruntime_qnn

    options = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(), "soc_model": str(soc_model), "htp_arch": arch,
        "offload_graph_io_quantization": "0", "enable_framework_op_trace": "1",
    }  # fmt: skip
    sessions = []  # kept open: graphs that share weights are one context
    for number, path in enumerate(map(Path, graphs)):
        name, started = path.name, time.perf_counter()
        trace = Path(out) / f"{name}.trace"
        trace.mkdir()
        onnxruntime.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
        chosen = {**options, "framework_op_trace_dir": str(trace)}
        entries = {
            "ep.context_enable": "1", "ep.context_embed_mode": "0",
            "ep.context_file_path": str(Path(out) / f"{name}.onnx"),
        }  # fmt: skip
        if shared:
            chosen["enable_htp_weight_sharing"] = "1"
            entries["ep.share_ep_contexts"] = "1"
            if number == len(graphs) - 1:
                entries["ep.stop_share_ep_contexts"] = "1"
        try:
            sessions.append(_session(path, name, chosen, {**entries, "session.disable_cpu_ep_fallback": "1"}))
        except Exception as error:  # ONNX Runtime raises its own kinds
            reason = " ".join(str(error).split())
            if FALLBACK in reason:
                reason = _left_out(path, name, options)
            raise InputError(f"{name} does not compile: {reason[:400]}") from None
        yield {"graph": name, "seconds": time.perf_counter() - started, "trace": _condensed(trace)}
    return {}


def _session(path: Path, provider: str, options: dict[str, str], entries: dict[str, str]) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    for key, value in entries.items():
        settings.add_session_config_entry(key, value)
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]
    settings.add_provider_for_devices(devices[:1], options)
    return onnxruntime.InferenceSession(str(path / "model.onnx"), settings)


def _left_out(path: Path, provider: str, options: dict[str, str]) -> str:
    """A sentence with the nodes that the compiler leaves to the CPU."""
    plain = {key: value for key, value in options.items() if "trace" not in key}
    session = _session(path, provider, plain, {"session.record_ep_graph_assignment_info": "1"})
    nodes = [
        f"{node.op_type} {node.name}"
        for group in session.get_provider_graph_assignment_info()
        if group.ep_name == "CPUExecutionProvider"
        for node in group.get_nodes()
    ]
    return f"the NPU does not take {at_most(nodes, 4)}; export with quantized borders, or see refimpl export --check"


def _condensed(folder: Path) -> dict[str, list[list[str]]]:
    """Operation of Qualcomm's -> its type, and the ONNX nodes that it comes from."""
    found: dict[str, list[list[str]]] = defaultdict(list)
    for path in folder.glob("*.json"):
        for subgraph in json.loads(path.read_text(encoding="utf-8")).get("subgraph_traces", ()):
            for mapping in subgraph.get("op_mappings", ()):
                nodes = [source["name"] for source in mapping.get("sources", ()) if source.get("type") == "OP"]
                found[mapping["dst_name"]] = [[mapping["dst_qnn_op_type"]], list(dict.fromkeys(nodes))]
    return dict(found)


JOBS = {"compile": compile_binary}
