"""The figures of the catalogue of faults: `python tests/measure_faults.py`.

It prints for each fault whether the verdict detects it, finds its operation, and names its cause rightly: once from all
taps, as probes show them, and once from the outputs of parts alone. Then it counts false alarms: healthy devices over
seeds of weights, prompts, threads, both engines, isolated and chained, and all settings. `--seeds 3` tries the faults
on more models, `--chained` along the chain, `--engine reference` in ONNX's own evaluator; `--table` is the catalogue
as README has it; `-k NAME` only those with that name in theirs.
"""

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path

from faults import FAULTS, SETTINGS, Outcome, World
from tqdm import tqdm

from export.graphs.plan import Way
from export.hub.loop import WAYS


def measured(seeds: int, only: str, engine: str, way: Way, parts: int) -> list[tuple[int, Outcome, Outcome]]:
    """Each fault on each model: what all taps say, and what the outputs of parts say."""
    found, worlds = [], {}
    rows = [fault for fault in FAULTS if only in fault.name]
    with tempfile.TemporaryDirectory() as folder:
        for seed, fault in tqdm(list(product(range(seeds), rows)), "faults", unit="fault", disable=None):
            if (seed, fault.setting) not in worlds:
                at = Path(folder) / f"{seed} {fault.setting}"
                worlds[seed, fault.setting] = World(at, fault.setting, seed, engine=engine, parts=parts)
            world = worlds[seed, fault.setting]
            answers = world.faulty(fault) if way == "isolated" else world.chained(fault)
            graph = world.graphs(fault)[0]
            taps, outputs = (Outcome(fault, world.judged(answers, probes, way), probes, graph)
                             for probes in (True, False))  # fmt: skip
            found.append((seed, taps, outputs))
    return found


def alarms(seeds: int) -> tuple[int, list[str]]:
    """How many healthy devices were judged, and those that were suspected."""
    engines = [("onnxruntime", 1), ("onnxruntime", 2), ("onnxruntime", 4), ("reference", 1)]
    count, raised = 0, []
    for setting, seed, prompt in tqdm(list(product(SETTINGS, range(seeds), (None, 1, 2))), "healthy", disable=None):
        with tempfile.TemporaryDirectory() as folder:
            world = World(Path(folder), setting, seed, prompt)
            for engine, threads in engines:
                world.engine, world.threads = engine, threads
                world.__dict__.pop("healthy", None)
                for probes, way in product((True, False), WAYS):
                    answers = world.healthy if way == "isolated" else world.chained()
                    verdict = world.judged(answers, probes, way)
                    count += 1
                    if not verdict:
                        raised.append(
                            f"{setting}, seed {seed}, prompt {prompt}, {engine}, {threads} threads: {verdict.summary}"
                        )
    return count, raised


def words(outcome: Outcome) -> str:
    return " ".join("yes" if found else "no " for found in (outcome.detected, outcome.localised, outcome.named))


def rates(outcomes: list[Outcome]) -> str:
    return ", ".join(f"{sum(getattr(o, what) for o in outcomes)} {what}" for what in ("detected", "localised", "named"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--engine", default="onnxruntime", choices=["onnxruntime", "reference"])
    parser.add_argument("--chained", action="store_true", help="graphs are given what those before them gave")
    parser.add_argument("--parts", type=int, default=3, choices=[2, 3], help="2: both layers are in one graph")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--healthy", type=int, default=1, metavar="SEEDS", help="of healthy devices; 0 for none")
    parser.add_argument("-k", default="", metavar="NAME")
    arguments = parser.parse_args()
    way: Way = "chained" if arguments.chained else "isolated"
    found = measured(arguments.seeds, arguments.k, arguments.engine, way, arguments.parts)
    if arguments.table:
        print("| fault | device | begins at | cause | from taps | from outputs |\n|---|---|---|---|---|---|")
    for seed, taps, outputs in found:
        fault = taps.fault
        cause = taps.verdict.causes.get(taps.verdict.guilty.name) if taps.verdict.guilty else None
        if arguments.table:
            marks = ["".join("dln"[i] if yes else "–" for i, yes in enumerate((o.detected, o.localised, o.named)))
                     for o in (taps, outputs)]  # fmt: skip
            print(f"| {fault.name}: {fault.field} | {fault.setting} | `{fault.where[0].removeprefix('model.')}` | "
                  f"{cause.name if cause else '–'} | {marks[0]} | {marks[1]} |")  # fmt: skip
        else:
            print(f"{words(taps)}   {words(outputs)}   {fault.name} ({fault.setting}, seed {seed}): {cause}")
    print(f"\n{len(found)} faults")
    print(f"from all taps: {rates([taps for _, taps, _ in found])}")
    print(f"from the outputs of parts alone: {rates([outputs for _, _, outputs in found])}")
    raised: list[str] = []
    if arguments.healthy:
        count, raised = alarms(arguments.healthy)
        print(f"false alarms: {len(raised)} of {count} healthy devices")
        print(*raised, sep="\n")
    return int(bool(raised) or not all(taps.detected for _, taps, _ in found))


if __name__ == "__main__":
    sys.exit(main())
