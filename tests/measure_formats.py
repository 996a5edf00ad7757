"""What each format, and each way to choose scales, costs a trained model: `python tests/measure_formats.py [MODEL]`.

Every matrix of the model but the embedding becomes blocks. Importance comes from the first half of the held-out text,
all figures from the second half. Errors are relative to the root mean square: of the weights, and of the outputs that
each matrix alone gives for the inputs that it has in float32; both are means over the matrices. KL in nats, and the
ratio of perplexities, are those of the whole quantized model against itself in float32.
"""

import sys

import numpy as np

import refimpl
from golden.cost.quality import quality
from golden.cost.reading import read_documents
from refimpl.checkpoint.weights import QuantizedWeight
from refimpl.model import EMBEDDED, Model
from refimpl.names import input_of
from refimpl_kernels import formats
from refimpl_kernels.formats import search

WAYS = {"nearest": {"search": 0}, "search": {"search": 16}, "importance": {"search": 16}}
TOKENS = 1024


def rms(a: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a, dtype=np.float64))))


def main(path=None) -> None:
    model = refimpl.load(path, backend="numpy")
    ids = read_documents(EMBEDDED / "held_out.txt", model)
    half, window = len(ids) // 2, model.config.max_position_embeddings
    calibration, held = (model.trace(part[: min(window, TOKENS)]) for part in (ids[:half], ids[half:]))
    matrices = {n: w for n, w in model.weights.items() if len(w.shape) == 2 and n != "model.embed_tokens.weight"}
    weights = {n: w.read(np.dtype(np.float32)) for n, w in matrices.items()}
    print(f"{'format':12} {'scales':11} {'bits':>6} {'weights':>8} {'outputs':>8} {'KL':>8} {'perplexity':>10}")
    for name, form in formats.FORMATS.items():
        for way, options in WAYS.items():
            if "search" not in form.options and way != "nearest":
                continue
            options = options if "search" in form.options else {}
            quantized, errors, outputs, bits = {}, [], [], 0.0
            for matrix, weight in weights.items():
                x = np.asarray(held[input_of(matrix.removesuffix(".weight"))], np.float32).reshape(-1, weight.shape[1])
                given = dict(options)
                if way == "importance":
                    given["importance"] = search.importance_of(
                        np.asarray(calibration[input_of(matrix.removesuffix(".weight"))], np.float32)
                    )
                blocks = formats.quantize(weight, name, **given)
                back = formats.dequantize(blocks)
                errors.append(rms(weight - back) / rms(weight))
                outputs.append(rms(x @ (weight - back).T) / rms(x @ weight.T))
                bits += blocks.bits_per_weight * weight.size
                quantized[matrix] = QuantizedWeight(blocks)
            bits /= sum(w.size for w in weights.values())
            small = Model(model.config, model.weights.replace(quantized), model.folder, "numpy")
            found = quality(small, model, ids[half : half + 4 * window])
            ratio = found.perplexity / found.reference_perplexity
            line = f"{name:12} {way:11} {bits:6.3f} {np.mean(errors):8.4f} {np.mean(outputs):8.4f}"
            print(f"{line} {found.kl_mean:8.4f} {ratio:10.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
