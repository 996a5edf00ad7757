"""Verbs that run a model: the demo, text, traces, the clock."""

from __future__ import annotations

import json
from pathlib import Path

from refimpl.cli.verbs import (
    CACHE_DTYPE,
    DTYPE,
    JSON,
    MODEL,
    PROMPT,
    SAMPLING,
    load_model,
    option,
    prompt_ids,
    typed_text,
    verb,
)
from refimpl.errors import InputError


@verb(
    "refimpl demo",
    option("--out", default="refimpl-demo", help="where graphs and reports go (default: refimpl-demo)"),
)
def demo(arguments) -> int:
    """Do the whole job on the embedded model and tell the story on one screen."""
    from refimpl.cli.demo import run

    return 0 if run(Path(arguments.out)) else 1


@verb(
    r"refimpl generate -p '登鹳雀楼->王之涣\n夜雨寄北->' --max-new-tokens 8",
    *(MODEL, PROMPT, SAMPLING, DTYPE, CACHE_DTYPE, JSON),
)
def generate(arguments) -> int:
    """Continue a text."""
    return _say(arguments, prompt_ids(arguments, load_model(arguments)))


@verb(
    "refimpl chat -m 《静夜思》的作者是谁？",
    *(MODEL, SAMPLING, DTYPE, CACHE_DTYPE, JSON),
    option("--message", "-m", required=True),
    option("--system", help="a system message"),
)
def chat(arguments) -> int:
    """Answer a message."""
    model = load_model(arguments)
    said = [("system", arguments.system), ("user", arguments.message)]
    messages = [{"role": role, "content": typed_text(text)} for role, text in said if text]
    room = model.config.max_position_embeddings
    if (arguments.max_new_tokens or 0) >= room:
        raise InputError(f"max_new_tokens is {arguments.max_new_tokens}, which leaves no room in a context of {room}")
    ids = model.tokenizer.chat(messages, arguments.max_new_tokens)
    return _say(arguments, ids)


@verb(
    "refimpl trace -p 床前明月光 --taps '*.self_attn.*'",
    *(MODEL, PROMPT, DTYPE, JSON),
    option("--taps", metavar="PATTERN", help="only tensors whose name matches this glob"),
    option("--out", metavar="DIR", help="write the tensors there instead of printing a table"),
)
def trace(arguments) -> int:
    """Show or save every tensor of one forward."""
    import numpy as np

    from golden.bundle import write_trace

    model = load_model(arguments)
    recorded = model.trace(prompt_ids(arguments, model), arguments.dtype, taps=arguments.taps)
    if arguments.out:
        write_trace(Path(arguments.out), recorded)
        print(f"{len(recorded)} tensors are in {arguments.out}")
        return 0
    rows = []
    for name, array in recorded.items():
        wide = array.astype(np.float64)
        rms = float(np.sqrt(np.mean(wide * wide)))
        rows.append({"name": name, "shape": list(array.shape), "dtype": str(array.dtype), "rms": rms,
                     "min": float(wide.min()), "max": float(wide.max())})  # fmt: skip
    if arguments.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            shape = " ".join(map(str, row["shape"]))
            print(f"{row['name']:46} {shape:16} {row['dtype']:9} rms {row['rms']:<9.4g} "
                  f"min {row['min']:<9.4g} max {row['max']:.4g}")  # fmt: skip
    return 0


@verb(
    "refimpl bench decode --engines read,refimpl,llama.cpp",
    option(
        "what",
        choices=("decode", "prefill", "float32", "attention", "load", "quantize"),
        help="one token after another; many at once, with 4 bits or in float32; attention alone; opening a quantized "
        "folder, or making one",
    ),
    option(
        "--layers",
        type=int,
        help="fewer than 32 fit into less memory, or into a cache (default: 32; float32 2, attention 16)",
    ),
    option("--rounds", type=int, default=5, help="engines take turns so many times (default: 5)"),
    option("--threads", type=int, help="(default: all cores)"),
    option("--tokens", type=int, help="how many at once (default: 128), or in the cache of attention (default: 4096)"),
    option("--format", default="q4_0", help="what quantize makes (default: q4_0)"),
    option("--engines", help="who takes part, such as read,refimpl,llama.cpp (default: all that are installed)"),
    JSON,
)
def bench(arguments) -> int:
    """Measure a synthetic Baichuan2-7B against other engines and the speed of memory (extra: bench)."""
    from refimpl.bench import race as bench
    from refimpl.bench import storage as bench_storage

    threads = bench.default_threads() if arguments.threads is None else arguments.threads
    if arguments.what in ("load", "quantize"):
        layers = 32 if arguments.layers is None else arguments.layers
        stored = bench_storage.run(arguments.what, layers, arguments.rounds, threads, arguments.format)
        print(json.dumps(stored) if arguments.json else bench_storage.show(stored))
        return 0
    facts = bench.run(arguments.what, arguments.layers, arguments.rounds, threads,
                      tuple(arguments.engines.split(",")) if arguments.engines else None, arguments.tokens)  # fmt: skip
    print(json.dumps(facts) if arguments.json else bench.show(facts))
    return 0


def _say(arguments, ids) -> int:
    """Generates and prints pieces of text as they come, or ids where the folder has no tokenizer."""
    model = arguments.loaded
    new = model.generate(
        ids, max_new_tokens=arguments.max_new_tokens, do_sample=arguments.sample, temperature=arguments.temperature,
        top_k=arguments.top_k, top_p=arguments.top_p, repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed, dtype=arguments.dtype, cache_dtype=arguments.cache_dtype,
    )  # fmt: skip
    try:
        tokenizer = model.tokenizer
    except InputError:
        tokenizer = None
    if arguments.json:
        found = list(new)
        text = tokenizer.decode(found, skip_special_tokens=True) if tokenizer else None
        print(json.dumps({"ids": found, "text": text}, ensure_ascii=False))
        return 0
    for piece in tokenizer.stream(new) if tokenizer else (f"{token} " for token in new):
        print(piece, end="", flush=True)
    print()
    return 0
