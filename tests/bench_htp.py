"""One layer of Baichuan2-7B's true width on Qualcomm's emulation: `python tests/bench_htp.py` (extra: htp).

Hidden 4096, intermediate 11008, 32 heads, 512 words, random weights on grids of 4 bits; a prompt's graph of 128 tokens
and a token's. For each context: seconds to compile and to run once, memory of the compiler's process, and how far its
outputs are from ONNX Runtime's on the CPU. `--context 512 4096:heads=16` are the contexts with their forms, minutes
each; `--folder DIR` keeps the model and the exports.
"""

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
from conftest import write_checkpoint

import refimpl
from export import emit
from export.run.engines import Engine
from export.run.htp import Htp
from refimpl.errors import InputError
from refimpl.grids.calibrate import calibrate
from refimpl.model import Model

WIDTH = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=1, vocab_size=512,
             max_position_embeddings=4096)  # fmt: skip


def layer(folder: Path) -> Model:
    """The layer, with embeddings and a head of few words."""
    if not (folder / "model").is_dir():
        write_checkpoint(folder / "model", "Baichuan2-7B", **WIDTH)
    return refimpl.load(folder / "model")


def inputs(graph: Path) -> dict[str, np.ndarray]:
    """Random inputs of a graph, of likely sizes; everything may be seen."""
    proto, rng = onnx.load(graph / "model.onnx", load_external_data=False).graph, np.random.default_rng(0)
    sizes = {v.name: [axis.dim_value for axis in v.type.tensor_type.shape.dim] for v in proto.input}
    return {name: (rng.normal(size=size) * (0.0 if "mask" in name else 0.3)).astype(np.float32)
            for name, size in sizes.items()}  # fmt: skip


def measured(graph: Path, soc: str) -> str:
    """A line of figures for one graph."""
    fed = inputs(graph)
    with Htp(soc) as device:
        try:
            device.compile(graph)
            begin = time.perf_counter()
            (found,) = device.run(graph, [fed])
        except InputError as error:
            return f"{graph.name}: {error}"
        seconds = time.perf_counter() - begin
        place = device.placements[graph.name]
    (other,) = Engine("onnxruntime").run(graph, [fed])
    distances = [10 * np.log10(np.sum(other[name] ** 2.0) / max(np.sum((found[name] - other[name]) ** 2.0), 1e-30))
                 for name in found]  # fmt: skip
    return (f"{graph.name}: {place.on_npu} nodes on the NPU, {len(place.elsewhere)} elsewhere; compiled in "
            f"{place.seconds:.0f} s, run in {seconds:.0f} s, {device.peak / 2**30:.1f} GiB; "
            f"{min(distances):.0f} dB or more to ONNX Runtime")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", nargs="+", default=["512", "4096:heads=16"], metavar="N[:FORM]")
    parser.add_argument("--soc", default="8-elite")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        model = layer(folder)
        encodings = calibrate(model, np.random.default_rng(0).integers(3, 512, 64), window=64)
        for text in arguments.context:
            context, _, form = text.partition(":")
            parts = emit(model, (128, 1), int(context), 2, "qdq", encodings=encodings, forms=[form] if form else None,
                         prompt=[5, 6, 7])  # fmt: skip
            saved = parts.save(folder / text.replace(":", " "), overwrite=True, golden=False)
            for name in parts:
                if name.endswith("_2_of_2"):
                    print(measured(saved / name, arguments.soc), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
