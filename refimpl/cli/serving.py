"""Serving: how fast tokens come."""

from __future__ import annotations

import json

from refimpl.cli.options import JSON
from refimpl.cli.verbs import option, verb


@verb(
    "refimpl bench decode --engines read,refimpl,llama.cpp",
    option(
        "what",
        choices=("decode", "prefill", "float32", "attention", "load", "quantize"),
        help="decode: one token after another; prefill: many at once, with 4-bit weights; float32: the same with "
        "float32 weights; attention alone; load: open a quantized folder; quantize: make one",
    ),
    option("--layers", type=int, metavar="N",
           help="fewer layers need less memory, or fit into a cache (default: 32; float32 2, attention 16)"),
    option("--rounds", type=int, default=5, metavar="N", help="how often the engines take turns (default: 5)"),
    option("--threads", type=int, metavar="N", help="(default: all cores)"),
    option("--tokens", type=int, metavar="N",
           help="how many at once (default: 128), or in the cache of attention (default: 4096)"),
    option("--format", default="q4_0", metavar="NAME", help="what quantize makes (default: q4_0)"),
    option("--engines", metavar="NAMES", help="such as read,refimpl,llama.cpp (default: all that are installed)"),
    JSON,
)  # fmt: skip
def bench(arguments) -> int:
    """Measure the speed of a synthetic Baichuan2-7B, of other engines and of memory (extra: bench)."""
    from refimpl.bench import race, storage

    threads = race.default_threads() if arguments.threads is None else arguments.threads
    if arguments.what in ("load", "quantize"):
        layers = 32 if arguments.layers is None else arguments.layers
        stored = storage.run(arguments.what, layers, arguments.rounds, threads, arguments.format)
        print(json.dumps(stored) if arguments.json else storage.show(stored))
        return 0
    engines = tuple(arguments.engines.split(",")) if arguments.engines else None
    facts = race.run(arguments.what, arguments.layers, arguments.rounds, threads, engines, arguments.tokens)
    print(json.dumps(facts) if arguments.json else race.show(facts))
    return 0
