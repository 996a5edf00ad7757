"""`check` a folder of graphs before it is uploaded: what AI Hub, the NPU or Genie is known to refuse, in milliseconds.

A compile job takes an upload of gigabytes and minutes of queue, and then says "exit code 14". Each known reason is a
rule here: RULES lists them, in files by subject. The graphs may be anybody's, in one folder or in a folder for each:
`model.onnx`, and beside it weights and encodings. Weights are never read (see `files/skeleton.py`).

**Source** of each rule: its `source`. "Zoo" is AI Hub Models 0.46 (`models/_shared/llm`), "client" qai-hub 0.56, "ORT"
the documentation of onnxruntime's QNN execution provider, "ports" the reports of people who tried.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from export.files.graph_folder import GraphFolder, read_folders
from export.preflight import of_all, of_files, of_grids, of_model, of_names, of_npu
from export.preflight.rule import Rule, readable, rules_of
from refimpl.errors import at_most

OF_ONE_GRAPH = rules_of(of_files, of_model, of_names, of_grids, of_npu)
OF_ALL_GRAPHS = rules_of(of_all)
RULES = OF_ONE_GRAPH + OF_ALL_GRAPHS
OF_DAMAGED_GRAPHS = (of_files.damaged, of_files.folder_extra_files)  # all others need what could not be read
LISTED = 5  # tensors that a finding names; the others are counted
ROUNDING = (
    "round by themselves, as Qualcomm's compiler takes them (--compile asks it). What AI Hub says of such graphs is "
    "not known: the way that it documents is float graphs with encodings (--profile aihub)"
)
REASONS = 20  # findings of one rule in one graph; all further ones become one


@dataclass(frozen=True)
class Breach:
    """A rule that a graph breaks. `tensors` are the first of the `count` places; `graph` is the folder's name."""

    rule: str
    severity: str
    graph: str
    tensors: tuple[str, ...]
    count: int
    why: str
    remedy: str

    def __str__(self) -> str:
        more = f" and {self.count - len(self.tensors)} more" if self.count > len(self.tensors) else ""
        where = f"{', '.join(self.tensors)}{more}: " if self.tensors else ""
        return f"{where}{self.why}"


@dataclass(frozen=True)
class Preflight:
    """The findings in `graphs` graphs; true if there are none. `compiler`: what a compiler said, if one was asked.

    `rounding`: how many of the graphs round by themselves, so that rules about float graphs for AI Hub were left out.
    """

    findings: tuple[Breach, ...]
    graphs: int
    compiler: str = ""
    rounding: int = 0

    def __bool__(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        """The findings as text. A fault that several graphs share is told once."""
        lines: dict[tuple[str, str, str, str], list[str]] = {}
        for one in self.findings:
            lines.setdefault((one.severity, one.rule, str(one), one.remedy), []).append(one.graph)
        text = [
            f"{severity} {rule}: {what}\n    in {at_most(graphs, 12)}\n    do: {remedy}"
            for (severity, rule, what, remedy), graphs in lines.items()
        ]
        kinds = Counter(one.severity for one in self.findings)
        said = ", ".join(
            f"{kinds[kind]} {kind}{'s' * (kinds[kind] > 1)}" for kind in ("error", "warning") if kinds[kind]
        )
        if self.rounding:
            text.append(f"{self.rounding} of {self.graphs} graphs {ROUNDING}")
        text += [self.compiler] if self.compiler else []
        return "\n".join([*text, f"{said or 'nothing'} found in {self.graphs} graphs"])

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def check(folder: str | Path) -> Preflight:
    """Tests the graphs of a folder by RULES: the graph in it, or the graphs in the folders inside it.

    A damaged file is a finding. Raises InputError if there is no such folder, or no ONNX file in it.
    """
    graphs = read_folders(folder)
    findings: list[Breach] = []
    for rule in OF_ONE_GRAPH:
        for graph in graphs:
            if rule.hub and graph.rounds:
                continue
            if not graph.damage or rule in OF_DAMAGED_GRAPHS:
                findings += _findings(rule, ((graph, *breach) for breach in rule.breaches(graph)))
    if not any(graph.damage for graph in graphs):
        for rule in OF_ALL_GRAPHS:
            findings += _findings(rule, rule.breaches(graphs))
    order = {readable(graph.name): number for number, graph in enumerate(graphs)}
    findings.sort(key=lambda one: (order[one.graph], one.severity))
    return Preflight(tuple(findings), len(graphs), rounding=sum(graph.rounds for graph in graphs))


def _findings(rule: Rule, breaches: Iterator[tuple[GraphFolder, str, str]]) -> list[Breach]:
    """One finding for each graph and reason, with the tensors that share them."""
    places: dict[str, dict[str, dict[str, None]]] = {}
    for graph, name, why in breaches:
        reasons = places.setdefault(readable(graph.name), {})
        if why not in reasons and len(reasons) >= REASONS:
            why = "the like is wrong here as well"
        named = reasons.setdefault(why, {})
        if name:
            named[readable(name)] = None
    return [
        Breach(rule.id, rule.severity, graph_name, tuple(named)[:LISTED], len(named), why, rule.remedy)
        for graph_name, reasons in places.items()
        for why, named in reasons.items()
    ]
