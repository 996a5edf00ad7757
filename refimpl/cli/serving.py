"""Serving: a model behind OpenAI's API, and how fast tokens come."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.cli.devices import ENGINES, NPU, engine_of
from refimpl.cli.options import CACHE_DTYPE, DTYPE, JSON, load_model
from refimpl.cli.verbs import option, verb
from refimpl.errors import InputError

if TYPE_CHECKING:
    from refimpl.serve.served import Served


@verb(
    "refimpl serve weights/Baichuan2-7B-Chat --beside q4_0",
    option("model", nargs="?", metavar="MODEL",
           help="folder of a checkpoint (default: the embedded model), or an export with --engine"),
    option("--beside", action="append", default=[], metavar="FORMAT",
           help="serve the model in these blocks as well, such as q4_0; may be repeated"),
    option("--encodings", metavar="FILE", help="serve the simulation of these grids as well (refimpl calibrate)"),
    option("--engine", choices=ENGINES,
           help="MODEL is a folder of refimpl export: this engine runs its graphs; htp is Qualcomm's NPU, emulated"),
    option("--of", metavar="MODEL", help="with --engine: what was exported (default: the embedded model)"),
    *NPU,
    option("--name", metavar="NAME", help="what clients call the model (default: its folder's name)"),
    option("--host", default="127.0.0.1", metavar="ADDRESS",
           help="where to serve (default: 127.0.0.1; any other address needs a token)"),
    option("--port", type=int, default=8000, metavar="N", help="(default: 8000; 0 takes a free one)"),
    option("--token", metavar="TEXT", help="what clients must send as their API key (default: REFIMPL_TOKEN)"),
    option("--waiting", type=int, default=32, metavar="N",
           help="requests that may wait; further ones are asked to come later (default: 32)"),
    *(DTYPE, CACHE_DTYPE),
)  # fmt: skip
def serve(arguments) -> int:
    """Serve models by OpenAI's API, at /v1 (extra: serve)."""
    if find_spec("uvicorn") is None or find_spec("starlette") is None:
        raise InputError("serving needs uvicorn and starlette; pip install 'refimpl[serve]'")
    from refimpl.serve.server import serve

    if not 0 <= arguments.port < 1 << 16:
        raise InputError(f"port is {arguments.port}, expected 0 to {(1 << 16) - 1}")
    if arguments.waiting < 1:
        raise InputError(f"waiting is {arguments.waiting}, expected how many requests may wait, from 1")
    token = os.environ.get("REFIMPL_TOKEN") if arguments.token is None else arguments.token
    with _served(arguments) as models:
        serve(models, arguments.host, arguments.port, token, arguments.waiting)
    return 0


@contextmanager
def _served(arguments) -> Iterator[list[Served]]:
    """The models that the options name."""
    from refimpl.model import EMBEDDED, load
    from refimpl.serve.served import Served

    how = (arguments.dtype, arguments.cache_dtype)
    if arguments.engine:
        from refimpl.serve.graphs import Graphs

        if not arguments.model or arguments.beside or arguments.encodings:
            raise InputError("--engine runs an export; give its folder as MODEL, and neither --beside nor --encodings")
        model = load(arguments.of)
        name = arguments.name or (model.folder or EMBEDDED).resolve().name
        with engine_of(arguments, arguments.engine) as (executor, label):
            graphs = Graphs(model, Path(arguments.model), executor)
            yield [Served(f"{name}-{arguments.engine}", graphs, label, *how), Served(name, model, repr(model), *how)]
        return
    if arguments.of or arguments.soc or arguments.strict:
        raise InputError("--of, --soc and --strict belong to the graphs of an export; give --engine, too")
    model = load_model(arguments)
    model.tokenizer  # noqa: B018  a folder without a tokenizer cannot be served: say so now
    model.ops(arguments.dtype)
    model.new_cache(1, 1, arguments.cache_dtype)
    name = arguments.name or (model.folder or EMBEDDED).resolve().name
    found = [Served(name, model, repr(model), *how)]
    for recipe in arguments.beside:
        found.append(Served(f"{name}-{recipe}", model.quantize(recipe), f"{model!r} in {recipe}", *how))
    if arguments.encodings:
        from export.files.encodings import read_encodings

        simulated = model.simulate(read_encodings(arguments.encodings, model))
        about = f"{model!r} on the grids of {arguments.encodings}"
        found.append(Served(f"{name}-simulated", simulated, about, arguments.dtype))
    yield found


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


@verb(
    "refimpl conformance --url http://127.0.0.1:8000 --family Baichuan2-7B",
    option("--kit", metavar="DIR", help="write the tiny models into the new folder DIR, for the engine to load"),
    option("--url", metavar="URL", help="a server with OpenAI's API that serves one of them"),
    option("--gguf", metavar="FILE", help="one of them as a GGUF file: llama.cpp runs it here"),
    option("--command", metavar="CMD", help="a program that reads a request as a line of JSON and answers with a line"),
    option("--family", metavar="NAME", help="which of them (default: as the name of the model or file says)"),
    option("--name", metavar="NAME", help="with --url: what the server calls the model (default: its first)"),
    option("--token", metavar="TEXT", help="with --url: the API key (default: REFIMPL_TOKEN)"),
    JSON,
)  # fmt: skip
def conformance(arguments) -> int:
    """Say which features of the five families an engine has right, and what is wrong with the others."""
    from refimpl.conformance import engines, kit
    from refimpl.conformance.judge import conformance

    given = [name for name in ("kit", "url", "gguf", "command") if getattr(arguments, name)]
    if len(given) != 1:
        raise InputError("give one of --kit DIR, --url URL, --gguf FILE and --command CMD")
    if arguments.kit:
        folders = kit.write_all(arguments.kit)
        print(f"{len(folders)} tiny models are in {arguments.kit}; let the engine load one, then ask it with --url or "
              "--gguf")  # fmt: skip
        return 0
    engine: engines.Engine
    if arguments.url:
        engine = engines.Url(arguments.url, arguments.name, arguments.token or os.environ.get("REFIMPL_TOKEN"))
    else:
        engine = engines.Gguf(arguments.gguf) if arguments.gguf else engines.Command(arguments.command)
    family = arguments.family or kit.family_in(engine.name)
    found = conformance(engine, family)
    print(found.to_json() if arguments.json else found)
    return 0 if found else 1
