"""`check_by_compiling`: what Qualcomm's own compiler says of the graphs, which no rule can know better (extra: htp).

It takes seconds a graph where the rules take milliseconds, and it knows one SoC and one version of the compiler. A node
that it leaves to the CPU is an error here, too: a context binary cannot hold it.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from export.files.graph_folder import read_folders
from export.preflight.check import Breach, Preflight
from export.preflight.rule import readable
from export.run.htp import Htp
from refimpl.errors import InputError

RULE = "not-compiled"
REMEDY = "change what it names; refimpl export --profile qdq --encodings FILE --border codes makes graphs that it takes"


def check_by_compiling(folder: str | Path, soc: str = "8-elite") -> Preflight:
    """Compiles each graph of a folder, keeps nothing, and says which one is refused and why.

    Raises InputError if there is no such folder, if the package is missing, and for an unknown SoC.
    """
    graphs, found = read_folders(folder), list[Breach]()
    with Htp(soc, strict=True) as compiler:
        for graph in tqdm(graphs, "compiling", unit="graph", disable=None, leave=False):
            try:
                compiler.compile(graph.folder)
            except InputError as error:
                found.append(Breach(RULE, "error", readable(graph.name), (), 0, str(error), REMEDY))
    takes = f"Qualcomm's compiler takes {len(graphs) - len(found)} of {len(graphs)} graphs for {soc}"
    return Preflight(tuple(found), len(graphs), takes)
