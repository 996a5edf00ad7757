"""How far Qualcomm's emulation is from everything else: `python tests/measure_htp.py` (extra: htp).

For three families and two SoCs, each tensor of an export on grids: how far the emulation is from the float oracle, from
the simulation of AIMET's arithmetic (`simulate`) and from the same graph in ONNX Runtime on the CPU, in dB and in codes
of the tensor's own grid. First each operation alone, from golden inputs; then each tensor in the midst of its graph,
where it has inherited what those before it did. Rows are kinds of tensors, over all layers and both graphs: the worst
dB, the root mean square and the largest number of codes. `--taps` prints each tensor of each layer, `--markdown` a
table as READMEs have it.
"""

import argparse
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conftest import SHARED, write_checkpoint
from tqdm import tqdm

import refimpl
from export import emit
from export.folder.arrays import read_arrays, unpadded
from export.folder.manifest import read_manifest
from export.measure.references import grids_of
from export.run.engines import Engine
from export.run.htp import Htp
from refimpl.grids.calibrate import calibrate
from refimpl.model import EMBEDDED, Model
from refimpl.names import taps
from refimpl_kernels.affine import Encoding

FAMILIES = {"Baichuan2-7B": "", "Baichuan2-13B": "baichuan2-13b-tiny", "Qwen2-7B": "qwen2-tiny"}
AGAINST = ("oracle", "simulate", "CPU")


@dataclass(frozen=True)
class Distance:
    """One tensor of one graph against another: dB, and codes off, root mean square and largest; NaN without a grid."""

    tap: str
    against: str
    sqnr: float
    rms: float
    largest: float


def model_of(family: str, folder: Path) -> tuple[Model, np.ndarray]:
    """A model of a family, and ids for its ranges: the embedded one, a tiny one beside the checkout, or a random."""
    if not FAMILIES[family]:
        model = refimpl.load()
        return model, model.token_ids((EMBEDDED / "held_out.txt").read_text())[0, :1024]
    there = SHARED / "models" / FAMILIES[family]
    model = refimpl.load(there if there.is_dir() else write_checkpoint(folder / family, family))
    return model, np.random.default_rng(0).integers(3, model.config.vocab_size, 512)


def distances(family: str, soc: str, alone: bool, folder: Path) -> Iterator[Distance]:
    """Every tensor of a family's export against AGAINST, operations alone or whole graphs."""
    model, text = model_of(family, folder)
    encodings = calibrate(model, text)
    names = [name for name in taps(model.config) if name != "model.embed_tokens"]
    prompt = text[: min(12, len(text))].tolist()
    context = min(64, model.config.max_position_embeddings)
    single = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    options = {"graphs": single} if alone else {"parts": 2, "probe": names}
    parts = emit(model, (16, 1), context, profile="qdq", encodings=encodings, prompt=prompt, **options)
    saved = parts.save(folder / f"{family} {soc} {alone}")
    plan, grids = read_manifest(saved)[0], grids_of(encodings, model.config)
    with Htp(soc) as device:
        for spec in tqdm([spec for run in plan.runs for spec in run], f"{family}, {soc}", disable=None, leave=False):
            given = [read_arrays(saved, spec, "input", spec.inputs)]
            (found,), (cpu,) = device.run(saved / spec.name, given), Engine("onnxruntime").run(saved / spec.name, given)
            others = {"oracle": read_arrays(saved, spec, "output", spec.outputs), "CPU": cpu,
                      "simulate": read_arrays(saved, spec, "simulated", spec.outputs)}  # fmt: skip
            for value in spec.outputs:
                mine = unpadded(value, found[value.name], spec)
                for against in AGAINST:
                    yield distance(str(value.tap), against, mine, unpadded(value, others[against][value.name], spec),
                                   grids.get(str(value.tap)))  # fmt: skip


def distance(tap: str, against: str, mine: np.ndarray, other: np.ndarray, grid: object) -> Distance:
    """How far an array is from another."""
    off = mine.astype(np.float64) - other
    power = float((other.astype(np.float64) ** 2).sum())
    sqnr = 10 * np.log10(power / float((off**2).sum())) if off.any() and power else np.inf
    codes = off / grid.scale if isinstance(grid, Encoding) else np.full(1, np.nan)
    return Distance(tap, against, sqnr, float(np.sqrt(np.mean(codes**2))), float(np.abs(codes).max()))


def table(found: list[Distance], each: bool, markdown: bool) -> str:
    """A line for each kind of tensor, in computing order."""
    rows: dict[str, dict[str, list[Distance]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        rows[one.tap if each else one.tap.rpartition(".")[2] if not one.tap.rpartition(".")[2].isdigit() else "layer"][
            one.against
        ].append(one)
    heads = ["tensor", *(f"{what} {against}" for against in AGAINST for what in ("dB to", "codes rms / max to"))]
    lines = []
    for name, columns in rows.items():
        cells = [name]
        for against in AGAINST:
            those = columns[against]
            rms, largest = np.sqrt(np.mean([d.rms**2 for d in those])), max(d.largest for d in those)
            cells.append(f"{min(d.sqnr for d in those):.1f}".replace("inf", "exact"))
            cells.append("" if np.isnan(rms) else f"{rms:.2g} / {largest:.0f}")
        lines.append(cells)
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))
    widths = [max(len(line[i]) for line in (heads, *lines)) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in (heads, *lines))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--soc", nargs="+", default=["8-elite", "8-gen-3"])
    parser.add_argument("--taps", action="store_true", help="a line for each tensor of each layer")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for family in arguments.family:
            for soc in arguments.soc:
                for alone in (True, False):
                    title = f"{family}, {soc}, {'each operation alone' if alone else 'in the midst of its graph'}"
                    found = list(distances(family, soc, alone, Path(folder)))
                    print(f"{title}\n\n{table(found, arguments.taps, arguments.markdown)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
