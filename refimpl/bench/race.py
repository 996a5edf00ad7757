"""How fast a full size model runs here, each engine in turns within one run, against the speed of memory.

The model has the true shapes of Baichuan2-7B and seeded random Q4_0 blocks, made in memory: 3.9 GB of distinct weights,
because a machine's caches hold whole layers. Engines that are not installed are left out. What each one does:

- `read`: every byte of those weights, read once by all threads. No engine can decode a token faster.
- `refimpl`: this package; activations stay float32.
- `refimpl-int16`, `refimpl-int8`: this package with activations rounded to 16 or to 8 bits.
- `llama.cpp`: the same blocks as a GGUF file; activations are rounded to 8 bits.
- `onnxruntime`: the same bytes in MatMulNBits nodes, one graph for each matrix; only matrix products.
- `torch`: only matrix products in bfloat16, of as many matrices as take 3.6 GB; the time is scaled up to the model.

`float32` runs a prompt through another model, with float32 weights (2 layers take 3.7 GB): `refimpl` with Numba,
`numpy`, and `torch`, which computes only the matrix products. `attention` computes only one token's attention,
over caches of `--tokens` keys in each layer, kept as `float16`, `int8` and `float32`. Each is compared with `read-…`,
which reads every byte of the same caches once.
"""

from __future__ import annotations

import importlib
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.blocks.gguf_out import add_sizes
from refimpl.cache import DTYPES, room
from refimpl.checkpoint.resolve import expected_shapes
from refimpl.checkpoint.weights import QuantizedWeight, Weight, Weights
from refimpl.config import FAMILIES, Config
from refimpl.errors import InputError
from refimpl.model import Model
from refimpl_kernels.formats.q8_rows import Q8Rows
from refimpl_kernels.formats.table import Blocks

ENGINES = ("read", "refimpl", "refimpl-int16", "refimpl-int8", "llama.cpp", "onnxruntime", "torch")
WHATS = {"decode": ENGINES, "prefill": ENGINES[1:], "float32": ("refimpl", "numpy", "torch"),
         "attention": ("read-float16", "float16", "read-int8", "int8", "read-float32", "float32")}  # fmt: skip
TOKENS = {"decode": 1, "prefill": 128, "float32": 128, "attention": 4096}
LAYERS = {"decode": 32, "prefill": 32, "float32": 2, "attention": 16}


@dataclass
class Timing:
    """The seconds that an engine took, round by round."""

    name: str
    seconds: list[float] = field(default_factory=list)
    resident: float | None = None  # bytes of memory after the first pass, if it was measured

    def facts(self, tokens: int, reference: Timing, nbytes: int) -> dict[str, Any]:
        """Tokens a second and, relative to `reference` round by round, how many times as fast."""
        ratios = [r / s for r, s in zip(reference.seconds, self.seconds, strict=True)]
        median = statistics.median(self.seconds)
        memory = {} if self.resident is None else {"resident_gigabytes": self.resident / 1e9}
        return {
            "engine": self.name,
            "tokens_per_second": tokens / median,
            "slowest": tokens / max(self.seconds),
            "fastest": tokens / min(self.seconds),
            f"times_{reference.name}": statistics.median(ratios),
            "gigabytes_per_second": nbytes / median / 1e9,
            **memory,
        }


def run(
    what: str, layers: int | None, rounds: int, threads: int, engines: tuple[str, ...] | None, tokens: int | None
) -> list[dict]:
    """Facts of each engine: `what` is a key of WHATS; layers, engines and tokens are the usual ones if None.

    At most as many threads are used as Numba has, which is one for each core. Raises InputError for an unknown engine,
    and for fewer than one round, layer, token or thread.
    """
    layers, tokens = LAYERS[what] if layers is None else layers, TOKENS[what] if tokens is None else tokens
    for name in engines or ():
        if name not in WHATS[what] and name not in ENGINES:
            raise InputError(f"the engine is {name!r}, expected some of {','.join(WHATS[what])}")
    if rounds < 1 or layers < 1 or tokens < 1 or threads < 1:
        raise InputError("rounds, layers, tokens and threads are numbers from 1")
    import numba

    threads = min(threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]  # no more than it has
    numba.set_num_threads(threads)
    tokens = 1 if what == "decode" else tokens
    chosen = [name for name in WHATS[what] if engines is None or name in engines]
    with tempfile.TemporaryDirectory() as folder:
        if what == "attention":
            makers, nbytes = _attention(layers, tokens)
            tokens = 1
        else:
            model = synthetic(layers) if what != "float32" else dense(layers)
            nbytes = dict.fromkeys(chosen, sum(_nbytes(weight) for weight in matrices(model)))
            passes = _DENSE if what == "float32" else _PASSES
            makers = {name: partial(passes[name], model, tokens, threads, Path(folder)) for name in chosen}
        _say(f"{layers} layers of Baichuan2-7B, {what}, {nbytes[chosen[0]] / 1e9:.2f} GB, {threads} threads")
        rows = race({name: makers[name] for name in chosen}, rounds)
    usual = rows.get("refimpl") or next(iter(rows.values()))
    references = {name: rows.get(f"read-{name.removeprefix('read-')}", usual) for name in rows}
    return [row.facts(tokens, references[name], nbytes[name]) for name, row in rows.items()]


def race(makers: dict[str, Callable[[], Callable]], rounds: int) -> dict[str, Timing]:
    """Makes and warms up each engine, and times them in turns. An engine that is not installed is left out.

    A pass may return a factor for its time.
    """
    passes: dict[str, Callable[[], Any]] = {}
    rows = {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            once = make()
            once()  # compile, touch, warm up
        except ImportError as error:
            _say(f"{name} is left out: {error}")
            continue
        passes[name], rows[name] = once, Timing(name)
        _say(f"{name} is ready after {time.perf_counter() - start:.1f} s")
        if name == "refimpl":
            rows[name].resident = resident()
    for _ in range(rounds):
        for name, once in passes.items():
            start = time.perf_counter()
            scale = once()
            rows[name].seconds.append((time.perf_counter() - start) * (scale or 1.0))
    return rows


def resident() -> float | None:
    """Bytes of physical memory that this process holds, where the system says so."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def show(facts: list[dict]) -> str:
    """The facts as a table."""
    lines = []
    for row in facts:
        times = next(key for key in row if key.startswith("times_"))
        lines.append(
            f"{row['engine']:13} {row['tokens_per_second']:8.2f} tokens/s ({row['slowest']:.2f} - {row['fastest']:.2f})"
            f"   {row[times]:6.3f} x {times.removeprefix('times_')}   {row['gigabytes_per_second']:6.1f} GB/s"
            + (f"   {row['resident_gigabytes']:.2f} GB resident" if "resident_gigabytes" in row else "")
        )
    return "\n".join(lines)


def synthetic(layers: int = 32, seed: int = 0) -> Model:
    """Baichuan2-7B with random Q4_0 blocks in memory. The embedding is only looked up, so one row serves all."""
    config = Config(family="Baichuan2-7B", num_hidden_layers=layers, **FAMILIES["Baichuan2-7B"])
    rng = np.random.default_rng(seed)
    entries: dict[str, Any] = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            entries[name] = Weight(np.ones(shape, np.float32))
        elif name == "model.embed_tokens.weight":
            row = rng.standard_normal((1, shape[1])).astype(ml_dtypes.bfloat16)
            entries[name] = Weight(np.broadcast_to(row, shape))
        else:
            packed = np.frombuffer(rng.bytes(shape[0] * shape[1] // 2), np.uint8).reshape(shape[0], -1)
            # Codes -8 … 7 have a standard deviation of 4.6: the scales make products keep the size of their input.
            size = 1 / (4.6 * np.sqrt(shape[1]))
            scales = (size * (0.75 + 0.5 * rng.random((shape[0], shape[1] // 32), np.float32))).astype(np.float16)
            entries[name] = QuantizedWeight(Blocks("q4_0", (shape[0], shape[1]), 32, 1, packed, scales))
    return Model(config, Weights(entries), backend="numba")


def dense(layers: int = 2, seed: int = 0) -> Model:
    """Baichuan2-7B with float32 weights in memory, random ones that repeat."""
    config = Config(family="Baichuan2-7B", num_hidden_layers=layers, **FAMILIES["Baichuan2-7B"])
    some = np.random.default_rng(seed).standard_normal(1 << 20, np.float32)
    entries: dict[str, Any] = {}
    for name, shape in expected_shapes(config).items():
        values = np.ones(shape, np.float32) if len(shape) == 1 else some[: shape[1]][None] / np.sqrt(shape[1])
        if len(shape) == 2 and name != "model.embed_tokens.weight":
            values = np.resize(some / np.float32(np.sqrt(shape[1])), shape)
        entries[name] = Weight(np.broadcast_to(values, shape))
    return Model(config, Weights(entries), backend="numba")


def matrices(model: Model) -> Iterator[Any]:
    """The matrices that a forward multiplies by, in its order."""
    return (w for n, w in model.weights.items() if len(w.shape) == 2 and n != "model.embed_tokens.weight")


def products(model: Model, tokens: int) -> Iterator[tuple[Any, int]]:
    """Each matrix, and how many tokens it is multiplied with: a prompt needs only the logits of its last token."""
    head = model.weights["lm_head.weight"]
    return ((weight, 1 if weight is head else tokens) for weight in matrices(model))


def _nbytes(weight: Any) -> int:
    return weight.blocks.nbytes if hasattr(weight, "blocks") else weight.array.nbytes


def _attention(layers: int, tokens: int) -> tuple[dict[str, Callable[[], Callable]], dict[str, int]]:
    """Makers of one token's attention over `layers` caches of `tokens` keys, and of reading them; their bytes."""
    from refimpl_kernels.fast import read as fast_read
    from refimpl_kernels.fast.ops import NumbaOps

    some = np.random.default_rng(0).standard_normal((1, 32, tokens, 128), np.float32)
    query, ops = some[:, :, :1], NumbaOps()

    @cache
    def caches(dtype: str) -> list[Any]:
        kept = room(some.shape, dtype)
        kept[:] = some
        if dtype != "int8":
            return [np.roll(kept, n, 2) for n in range(2 * layers)]
        return [Q8Rows(np.roll(kept.codes, n, 2), np.roll(kept.scales, n, 2)) for n in range(2 * layers)]

    def attending(dtype: str) -> Callable:
        kept = caches(dtype)

        def once() -> None:
            for key, value in zip(kept[::2], kept[1::2], strict=True):
                scores = ops.matmul(query, key.transpose(0, 1, 3, 2))
                ops.weighted_sum(ops.softmax(scores * 128**-0.5), value)

        return once

    def reading(dtype: str) -> Callable:
        parts = ([one.codes, one.scales] if isinstance(one, Q8Rows) else [one] for one in caches(dtype))
        arrays = [array for some in parts for array in some]
        return lambda: [fast_read.read(array) for array in arrays] and None

    makers: dict[str, Callable[[], Callable]] = {}
    nbytes = {}
    for dtype in DTYPES:
        makers[dtype], makers[f"read-{dtype}"] = partial(attending, dtype), partial(reading, dtype)
        nbytes[dtype] = nbytes[f"read-{dtype}"] = 2 * layers * room(some.shape, dtype).nbytes
    return makers, nbytes


def _read(model: Model, tokens: int, threads: int, folder: Path) -> Callable:
    from refimpl_kernels.fast import read as fast_read

    arrays = [array for weight in matrices(model) for array in (weight.blocks.packed, weight.blocks.scales)]
    return lambda: [fast_read.read(array) for array in arrays] and None


def _refimpl(model: Model, tokens: int, threads: int, folder: Path) -> Callable:
    caches = [model.new_cache(capacity=2048)]

    def once() -> None:
        if caches[0].length + tokens > 2048 or tokens > 1:
            caches[0] = model.new_cache(capacity=2048)
        model(np.zeros((1, tokens), np.int64), cache=caches[0], logits_to_keep=1)  # as llama.cpp does

    return once


def _llama(model: Model, tokens: int, threads: int, folder: Path) -> Callable:
    llama = _engine("llama_cpp")
    path = folder / "model.gguf"
    write_gguf(model, path)
    engine = llama.Llama(str(path), n_ctx=2048, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def once() -> None:
        if engine.n_tokens + tokens > 2048 or tokens > 1:
            engine.reset()
        engine.eval([5] * tokens)

    return once


def write_gguf(model: Model, path: Path) -> None:
    """The model as a GGUF file without a tokenizer. llama.cpp keeps queries, keys and values apart."""
    gguf = _engine("gguf")
    config, kinds = model.config, gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    add_sizes(writer, config)
    writer.add_tokenizer_model("no_vocab")

    def q4_0(name: str, blocks: Blocks) -> None:
        codes = blocks.packed.reshape(blocks.shape[0], -1, 16)
        data = np.concatenate([blocks.scales[..., None].view(np.uint8), codes], axis=-1)  # 2 + 16 bytes a block
        writer.add_tensor(name, data.reshape(blocks.shape[0], -1), raw_dtype=kinds.Q4_0)

    weights = model.weights
    writer.add_tensor("token_embd.weight", np.zeros((config.vocab_size, config.hidden_size), np.float16))
    writer.add_tensor("output_norm.weight", np.ones(config.hidden_size, np.float32))
    q4_0("output.weight", weights["lm_head.weight"].blocks)
    for i in range(config.num_hidden_layers):
        at, to = f"model.layers.{i}", f"blk.{i}"
        packed = weights[f"{at}.self_attn.W_pack.weight"].blocks
        for n, part in enumerate("qkv"):
            rows = slice(n * config.hidden_size, (n + 1) * config.hidden_size)
            q4_0(f"{to}.attn_{part}.weight", packed.rows(rows))
        q4_0(f"{to}.attn_output.weight", weights[f"{at}.self_attn.o_proj.weight"].blocks)
        for part in ("gate", "up", "down"):
            q4_0(f"{to}.ffn_{part}.weight", weights[f"{at}.mlp.{part}_proj.weight"].blocks)
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{to}.{part}.weight", np.ones(config.hidden_size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _onnxruntime(model: Model, tokens: int, threads: int, folder: Path) -> Callable:
    onnx, ort = _engine("onnx"), _engine("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would slow the others down
    helper, kinds = onnx.helper, onnx.TensorProto

    def session(blocks: Blocks, tokens: int):
        (rows, columns), raw = blocks.shape, onnx.numpy_helper.from_array
        names, facts = (["x", "codes", "scales"], ["y"]), dict(K=columns, N=rows, bits=4, block_size=32)
        node = helper.make_node("MatMulNBits", *names, domain="com.microsoft", **facts)
        codes = raw(blocks.packed.reshape(rows, -1, 16), "codes")
        scales = raw(blocks.scales.astype(np.float32).reshape(-1), "scales")
        value = lambda name, size: helper.make_tensor_value_info(name, kinds.FLOAT, [tokens, size])
        graph = helper.make_graph([node], "g", [value("x", columns)], [value("y", rows)], [codes, scales])
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        proto = helper.make_model(graph, opset_imports=imports, ir_version=10)
        made = ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
        return made, np.ones((tokens, columns), np.float32)

    sessions = [session(weight.blocks, count) for weight, count in products(model, tokens)]
    return lambda: [made.run(None, {"x": x}) for made, x in sessions] and None


def _torch(model: Model, tokens: int, threads: int, folder: Path) -> Callable:
    torch = _engine("torch")
    torch.set_num_threads(threads)
    work = size = done = 0
    pairs: list = []
    for weight, count in products(model, tokens):
        (rows, columns), work = weight.shape, work + count * math.prod(weight.shape)
        if 2 * (size + rows * columns) <= 3.6e9:
            size, done = size + rows * columns, done + count * rows * columns
            x = torch.ones(count, columns, dtype=torch.bfloat16)
            pairs.append((x, torch.randn(rows, columns).to(torch.bfloat16)))

    def once() -> float:
        with torch.inference_mode():
            for x, weight in pairs:
                torch.nn.functional.linear(x, weight)
        return work / done

    return once


def _numpy(model: Model, tokens: int, threads: int, folder: Path) -> Callable:
    plain = model.with_backend("numpy")
    return lambda: plain(np.zeros((1, tokens), np.int64), logits_to_keep=1) is None or None


def _torch_float32(model: Model, tokens: int, threads: int, folder: Path) -> Callable:
    torch = _engine("torch")
    torch.set_num_threads(threads)
    pairs = [(torch.ones(n, weight.shape[1]), torch.from_numpy(weight.array)) for weight, n in products(model, tokens)]

    def once() -> None:
        with torch.inference_mode():
            for x, weight in pairs:
                torch.nn.functional.linear(x, weight)

    return once


def _rounding(backend: str) -> Callable:
    return lambda model, *others: _refimpl(model.with_backend(backend), *others)


_DENSE: dict[str, Callable[[Model, int, int, Path], Callable]] = {
    "refimpl": _refimpl, "numpy": _numpy, "torch": _torch_float32,
}  # fmt: skip
_PASSES: dict[str, Callable[[Model, int, int, Path], Callable]] = {
    "read": _read, "refimpl": _refimpl, "refimpl-int16": _rounding("numba-int16"),
    "refimpl-int8": _rounding("numba-int8"), "llama.cpp": _llama, "onnxruntime": _onnxruntime, "torch": _torch,
}  # fmt: skip


def _engine(name: str) -> Any:
    """Another engine's package, if it is installed. This package does not depend on it, so it is imported by name."""
    return importlib.import_module(name)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
