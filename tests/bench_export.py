"""What writing a large model's graphs costs, against a plain copy of the same bytes. Not run by pytest.

    python tests/bench_checkpoints.py generate /tmp/b2 --layers 4     # true width, fewer layers where the disk is short
    python tests/bench_export.py /tmp/b2 [--profile aihub] [--rounds 3]

Copies and exports take turns, from a cold page cache to synced files. The second graph of a part has a copy of the
first one's weights, which comes from the page cache; the plain copy reads all that the export wrote. Memory is what the
process has beyond the page cache, and its peak resident set, which counts mapped pages of the checkpoint as well.
Goldens take what computing the model takes: they are not part of the time, unless asked for.
"""

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import refimpl
from export import emit
from refimpl.bench.storage import AnonymousMemory, cold


def measure(folder: Path, profile: str, rounds: int, parts: int, golden: bool) -> None:
    out, copy = folder.with_name(f"{folder.name}-export"), folder.with_name(f"{folder.name}-copied")
    encodings = None
    ratios = []
    for _ in range(rounds):
        cold(folder)
        os.sync()
        with AnonymousMemory() as memory:
            began = time.perf_counter()
            model = refimpl.load(folder)
            if profile == "aihub" and encodings is None:
                encodings = emit(model, profile=profile, parts=parts, prompt=[5, 6, 7]).encodings
                print(f"calibration on 3 tokens: {time.perf_counter() - began:.1f} s")
                cold(folder)
                began = time.perf_counter()
            graphs = emit(model, parts=parts, profile=profile, prompt=[5, 6, 7], encodings=encodings)
            graphs.save(out, overwrite=True, golden=golden)
            os.sync()
            took = time.perf_counter() - began
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        more, resident = (memory.peak - memory.first) / 1e6, getrusage(RUSAGE_SELF).ru_maxrss / 1e3
        print(f"{len(graphs)} graphs, {size / 1e9:.2f} GB: {took:.1f} s, {size / took / 1e9:.2f} GB/s, "
              f"anonymous memory +{more:.0f} MB, peak resident {resident:.0f} MB", flush=True)  # fmt: skip
        for graph in graphs:
            cold(out / graph)
        began = time.perf_counter()
        shutil.copytree(out, copy)
        os.sync()
        copied = time.perf_counter() - began
        print(f"plain copy: {copied:.1f} s, {size / copied / 1e9:.2f} GB/s", flush=True)
        ratios.append(copied / took)
        shutil.rmtree(copy)
        shutil.rmtree(out)
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"the export reaches {middle:.0%} of a plain copy ({low:.0%} to {high:.0%})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--profile", default="plain")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--golden", action="store_true", help="with goldens")
    arguments = parser.parse_args()
    measure(arguments.folder, arguments.profile, arguments.rounds, arguments.parts, arguments.golden)
