"""`verify` a saved export: run its graphs, and compare every output with its golden."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from export.folder.arrays import as_trace, checked, read_arrays
from export.folder.manifest import read_manifest
from export.graphs.plan import Arrays, GraphSpec, Plan, carry
from export.run.engines import Engine
from export.run.executor import Executor
from golden.compare import Report, compare


def verify(folder: str | Path, engine: str | Executor = "auto") -> Report:
    """Runs every graph of an export, and compares what is no padding with the golden outputs.

    Twice: `isolated`, each part from its golden inputs, so that it shows its own error alone; and `chained`, as a
    device runs, each part from what the one before gave, and a token from the prompt's keys and values. The tensors
    of the report are called `{graph}/{isolated or chained}/{tap}`, and have the layout of the tap. Graphs that are
    modules alone go on from nobody, and are run isolated only.

    `engine`: "onnxruntime"; "reference", ONNX's own evaluator; "auto", the first of them that is installed; or any
    other executor. Files are first held against the manifest's sha256. Raises InputError for a folder that is not a
    whole export.
    """
    folder = Path(folder)
    plan, limits = read_manifest(folder)
    report = Report(())
    for spec, way, outputs in run_graphs(folder, plan, Engine(engine) if isinstance(engine, str) else engine):
        reference = as_trace(spec, read_arrays(folder, spec, "output", spec.outputs))
        report += compare(as_trace(spec, outputs), reference, limits).within(f"{spec.name}/{way}/")
    return report


def run_graphs(folder: Path, plan: Plan, executor: Executor) -> Iterator[tuple[GraphSpec, str, Arrays]]:
    """What an executor computes of each graph of an export, isolated and chained."""
    after_prompt = Arrays()
    ways = ("isolated", "chained") if plan.chained else ("isolated",)
    total = sum(map(len, plan.runs))
    with tqdm(desc="verifying", total=total, unit="graph", disable=None, leave=False) as progress:
        for run in plan.runs:
            flow = Arrays(after_prompt)
            for spec in run:
                golden = read_arrays(folder, spec, "input", spec.inputs)
                feeds = [golden]
                if plan.chained:
                    feeds.append(golden | {v.name: carry(spec, v, flow) for v in spec.inputs if v.source})
                results = run_graph(executor, folder, spec, feeds)
                for way, outputs in zip(ways, results, strict=True):
                    yield spec, way, outputs
                flow |= results[-1]
                progress.update()
            after_prompt = after_prompt or flow


def run_graph(executor: Executor, folder: Path, spec: GraphSpec, inputs: list[Arrays]) -> list[Arrays]:
    """The outputs of a graph for each of some inputs. Raises InputError if the executor gives other shapes, or none."""
    return [checked(outputs, spec.outputs, spec.name) for outputs in executor.run(folder / spec.name, inputs)]
