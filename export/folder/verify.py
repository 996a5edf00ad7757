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
    """Runs every graph of an export twice, and compares its outputs with the goldens; padding is left out.

    `isolated`: each graph gets its golden inputs, so its error is its own. `chained`: each graph gets the outputs of
    the graph before it, and a token graph the prompt's keys and values, as on a device. Modules alone continue no other
    graph, so they run isolated only. A tensor of the report is called `{graph}/{isolated or chained}/{tap}`, in the
    layout of the tap.

    `engine`: "onnxruntime"; "reference", ONNX's own evaluator; "auto", the first of them that is installed; or any
    other executor. Before any graph runs, each file must have the sha256 of the manifest. Raises InputError for a
    folder that is not a whole export.
    """
    folder = Path(folder)
    plan, limits = read_manifest(folder)
    report = Report(())
    for spec, way, outputs in run_graphs(folder, plan, Engine(engine) if isinstance(engine, str) else engine):
        reference = as_trace(spec, read_arrays(folder, spec, "output", spec.outputs))
        report += compare(as_trace(spec, outputs), reference, limits).within(f"{spec.name}/{way}/")
    return report


def run_graphs(folder: Path, plan: Plan, executor: Executor) -> Iterator[tuple[GraphSpec, str, Arrays]]:
    """Each graph of an export with its outputs, isolated and chained, as an executor computes them."""
    after_prompt = Arrays()
    ways = ("isolated", "chained") if plan.chained else ("isolated",)
    total = sum(map(len, plan.runs))
    with tqdm(desc="verifying", total=total, unit="graph", disable=None, leave=False) as progress:
        for run in plan.runs:
            so_far = Arrays(after_prompt)
            for spec in run:
                golden = read_arrays(folder, spec, "input", spec.inputs)
                feeds = [golden]
                if plan.chained:
                    feeds.append(golden | {v.name: carry(spec, v, so_far) for v in spec.inputs if v.source})
                results = run_graph(executor, folder, spec, feeds)
                for way, outputs in zip(ways, results, strict=True):
                    yield spec, way, outputs
                so_far |= results[-1]
                progress.update()
            after_prompt = after_prompt or so_far


def run_graph(executor: Executor, folder: Path, spec: GraphSpec, inputs: list[Arrays]) -> list[Arrays]:
    """The outputs of a graph for each of some inputs. Raises InputError if the executor gives other shapes, or none."""
    return [checked(outputs, spec.outputs, spec.name) for outputs in executor.run(folder / spec.name, inputs)]
