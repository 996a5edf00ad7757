"""How fast a training step is beside PyTorch's on the same CPU: python tests/bench_gradients.py [--wide]

Both take forward, backward, clipping and AdamW, all parameters, in float32 on as many threads as NUMBA_NUM_THREADS says
(all cores if it says nothing). They take turns; medians of the times and of the ratios are printed. `--wide`: two
layers of Baichuan2-7B's width, with 4,000 words, and without AdamW, whose moments take more memory than all else.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from conftest import write_checkpoint

import refimpl
from golden.bundle import Case
from golden.make.gradients import Training
from refimpl.gradients.backward import backward
from refimpl.gradients.finetune import _masters, trained
from refimpl.gradients.objective import NextToken
from refimpl.gradients.optimizer import AdamW, Moments
from refimpl.gradients.products import cores, keep_freed_memory


def clock(function):
    """Seconds by the clock, and of the processor: the latter alone mean something where others compute, too."""
    start, busy = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - busy


def main():
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=7)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = refimpl.load().folder
        if a.wide:
            sizes = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=4000)
            folder = write_checkpoint(Path(place, "m"), "Baichuan2-7B", max_position_embeddings=4096, **sizes)
        keep_freed_memory()  # as finetune does; PyTorch's step gains by it, too
        model = refimpl.load(folder, backend="numba")
        ids = np.random.default_rng(0).integers(1, model.config.vocab_size, (a.rows, a.tokens))
        adamw, moments, parameters = AdamW(), Moments(), _masters(model)
        torch.set_num_threads(cores())
        training = Training(folder, "float32")
        optimizer = training.optimizer(adamw)

        def forward():
            refimpl.Model(model.config, trained(model, parameters, None), folder, "numba")(ids)

        def ours(recompute=False):
            weights = trained(model, parameters, None)
            _, found = backward(
                model, ids, NextToken(ids), parameters.__contains__, recompute=recompute, weights=weights
            )
            if not a.wide:
                adamw.step(parameters, found, moments, adamw.clip(found)[0])

        def theirs():
            if a.wide:
                optimizer.zero_grad()
                training.loss(Case(ids), ids).backward()
            else:
                training.step([(Case(ids), ids)], optimizer, adamw)

        def their_forward():
            with torch.no_grad():
                training.loss(Case(ids), ids)

        ways = {
            "forward": forward,
            "step": ours,
            "step, recomputing": lambda: ours(True),
            "PyTorch's forward": their_forward,
            "PyTorch's step": theirs,
        }
        times = {name: [] for name in ways}
        for turn in range(a.repeat + 1):
            for name, way in ways.items():
                taken = clock(way)
                if turn:  # the first compiles
                    times[name].append(taken)
    for name, taken in times.items():
        wall, busy = (statistics.median(column) for column in zip(*taken, strict=True))
        print(f"{name:20} {wall:8.3f} s, of the processor {busy:8.3f} s")
    for one, other in (("PyTorch's step", "step"), ("PyTorch's step", "step, recomputing"), ("step", "forward")):
        pairs = [(x[0] / y[0], x[1] / y[1]) for x, y in zip(times[one], times[other], strict=True)]
        wall, busy = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{one} / {other}: {wall:.2f}, of the processor's time {busy:.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory of this process, PyTorch included: {peak / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
