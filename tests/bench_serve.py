"""What serving costs: requests per second and the time to the first token, beside a plain loop over `generate`.

    python tests/bench_serve.py [MODEL] [--tokens 64] [--rounds 7]

Both take turns, one request at a time, and the median counts. The server runs in a process of its own, as it does for
clients; the loop runs in another. MODEL: a folder (default: the embedded model). `--layers N`: a synthetic Baichuan2-7B
of so many layers in 4 bits, made in memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent
PLACES = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parent / "kernels")))

LOOP = """
import json, sys, time
from bench_serve import model_of
model = model_of(json.loads(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    ids, tokens = json.loads(line)
    began = time.perf_counter()
    first, text = None, ""
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True, "seed": 1}
    stream = model.tokenizer.stream(model.generate(ids, **how))
    for piece in stream:
        first = first or time.perf_counter() - began
        text += piece
    print(json.dumps([first, time.perf_counter() - began, text]), flush=True)
"""
SERVE = """
import json, sys
from bench_serve import model_of
from refimpl.serve.served import Served
from refimpl.serve.server import serve
serve([Served("m", model_of(json.loads(sys.argv[1])))], port=0)
"""


def model_of(about):
    """The model to serve."""
    import refimpl

    if about["layers"] is None:
        return refimpl.load(about["model"])
    from refimpl.bench.race import synthetic

    model = synthetic(about["layers"])
    tokenizer = refimpl.load().tokenizer  # ids behind its vocabulary have no text
    model.tokenizer = replace(tokenizer, vocab_size=model.config.vocab_size)
    return model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    about = json.dumps({"model": arguments.model, "layers": arguments.layers})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pipes["env"] = {**os.environ, "PYTHONPATH": PLACES}
    loop = subprocess.Popen([sys.executable, "-c", LOOP, about], **pipes)
    server = subprocess.Popen([sys.executable, "-c", SERVE, about], **pipes)
    try:
        loop.stdout.readline()
        address = server.stdout.readline().split(" at ")[1].split()[0]
        ids = list(range(500, 516))
        tokens = arguments.tokens
        body = {"model": "m", "prompt": ids, "max_tokens": tokens, "min_new_tokens": tokens, "seed": 1}
        seen = {name: [] for name in ("generate", "whole", "stream")}
        with httpx.Client(base_url=address, timeout=600) as client:
            for number in range(arguments.rounds + 1):  # the first round warms up
                print(json.dumps([ids, arguments.tokens]), file=loop.stdin, flush=True)
                plain = json.loads(loop.stdout.readline())
                began = time.perf_counter()
                text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
                whole = [None, time.perf_counter() - began, text]
                stream = streamed(client, body | {"stream": True})
                assert plain[2] == whole[2] == stream[2], "the texts differ"
                if number:
                    for name, found in zip(seen, (plain, whole, stream), strict=True):
                        seen[name].append(found)
    finally:
        loop.kill()
        server.kill()
    base = statistics.median(total for _, total, _ in seen["generate"])
    print(f"{arguments.tokens} tokens behind a prompt of {len(ids)}; median of {arguments.rounds}")
    print(f"{'':10} {'requests/s':>10} {'ms/token':>9} {'first token ms':>15} {'cost':>7}")
    for name, found in seen.items():
        total = statistics.median(total for _, total, _ in found)
        first = [first for first, _, _ in found if first]
        shown = f"{statistics.median(first) * 1e3:.1f}" if first else "-"
        each = total / arguments.tokens * 1e3
        print(f"{name:10} {1 / total:10.2f} {each:9.2f} {shown:>15} {total / base - 1:+7.1%}")


def streamed(client, body):
    """Seconds to the first text, seconds in all, the text."""
    began, first, text = time.perf_counter(), None, ""
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                piece = json.loads(line[6:])["choices"][0]["text"]
                first = first or (piece and time.perf_counter() - began)
                text += piece
    return [first, time.perf_counter() - began, text]


if __name__ == "__main__":
    main()
