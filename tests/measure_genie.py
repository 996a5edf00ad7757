"""How often Genie says what the oracle says: prompts through the real one, on the emulation.

    python tests/measure_genie.py --prompts 50 --tokens 8

Each prompt is the beginning of a poem that the embedded model has not seen. Genie continues it greedily over a bundle
that is made here; then its tokens are held against those of the same graphs on ONNX Runtime's CPU engine, and against
those of the float32 oracle. They are equal, or part at a near tie, or part otherwise, which wants an explanation. Every
input that Genie fed is judged in every code; with --outputs so is every output. It prints a line for each prompt that
parts, and a table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm import tqdm

from export.files.encodings import read_encodings
from export.graphs.borders import across
from export.graphs.plan import Arrays
from export.phone.fed import judge_calls
from export.phone.host import Host
from export.phone.parting import parting
from export.run.genie import Genie
from export.run.htp import Htp
from refimpl import load
from refimpl.cli.genie import Sizes, build
from refimpl.model import EMBEDDED


class Open:
    """ONNX Runtime's CPU engine, whose sessions stay open."""

    def __init__(self) -> None:
        self.sessions: dict = {}

    def run(self, graph: Path, inputs: list[Arrays]) -> list[Arrays]:
        """The outputs for each of the inputs."""
        import onnxruntime

        if graph not in self.sessions:
            path, only = str(graph / "model.onnx"), ["CPUExecutionProvider"]
            self.sessions[graph] = onnxruntime.InferenceSession(path, providers=only)
        session = self.sessions[graph]
        names = [output.name for output in session.get_outputs()]

        def compute(given):
            return [dict(zip(names, session.run(names, fed), strict=True)) for fed in given]

        return across(graph / "model.onnx", inputs, compute)


def prompts(count: int) -> list[str]:
    """The beginnings of poems: up to the first comma or full stop, and a little beyond for every second one."""
    text = (EMBEDDED / "held_out.txt").read_text(encoding="utf-8")
    found = []
    for poem in text.split("\n\n"):
        lines = poem.strip().splitlines()
        body = "\n".join(lines)
        for end in range(4, len(body)):
            if body[end - 1] in "，。":
                found.append(body[: end + (2 if len(found) % 2 else 0)])
                break
    return list(dict.fromkeys(found))[:count]


def main() -> int:
    """Prints the table; 1 if anything is unexplained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--outputs", action="store_true", help="judge outputs, too, by the emulation")
    parser.add_argument("--out", help="keep the export and the bundle there")
    arguments = parser.parse_args()
    model, limit = load(), arguments.tokens
    texts = [text for text in prompts(4 * arguments.prompts) if len(model.tokenizer.encode(text)) + limit < 62]
    texts = texts[: arguments.prompts]
    counts: dict[str, Counter[str]] = {"graphs": Counter(), "oracle": Counter()}
    judged, spent, said = Counter[str](), 0.0, 0
    with TemporaryDirectory() as kept:
        export, bundle = build(model, Path(arguments.out or kept), Sizes(16, 64, 2, "8-elite"), None)
        simulated = model.simulate(read_encodings(export / "encodings.json", model), rounding="even")
        engine = Open()
        with Htp() as htp:
            for text in tqdm(texts, "prompts", disable=None):
                ids = model.tokenizer.encode(text)
                with Genie(bundle, capture=True) as genie:
                    started = time.perf_counter()
                    answer = "".join(genie.say(text, limit))
                    spent += time.perf_counter() - started
                    fed = judge_calls(Host(model, export), genie.calls(), ids, htp if arguments.outputs else None)
                judged.update(
                    {"calls": fed.calls, "inputs": fed.inputs, "outputs": fed.outputs, "wrong": len(fed.lines)}
                )
                said += len(fed.tokens)
                for line in fed.lines:
                    print(f"{text!r}: {line}")
                steps = list(Host(model, export).generate(ids, len(fed.tokens), engine))
                noise = [rms(a - b) for (_, a), b in zip(steps, fed.logits, strict=False)]
                found = parting([token for token, _ in steps], [row for _, row in steps], fed.tokens, noise)
                counts["graphs"][kind(found)] += 1
                if found:
                    print(f"{text!r} -> {answer!r}: chained graphs: {found}")
                found = against_oracle(model, simulated, ids, fed.tokens)
                counts["oracle"][kind(found)] += 1
                if found:
                    print(f"{text!r} -> {answer!r}: oracle: {found}", flush=True)
    print(f"{len(texts)} prompts, {said} tokens, {spent / max(said, 1):.2f} s a token (with capture)")
    print("| Genie against | equal | near ties | others |\n| --- | --- | --- | --- |")
    for who, found in counts.items():
        print(f"| {who} | {found['equal']} | {found['near tie']} | {found['other']} |")
    print(f"{judged['inputs']} inputs and {judged['outputs']} outputs of {judged['calls']} calls judged, "
          f"{judged['wrong']} not as they should be")  # fmt: skip
    return 1 if judged["wrong"] or any(found["other"] for found in counts.values()) else 0


def against_oracle(model, simulated, ids, tokens):
    """Where Genie parts from the oracle; the noise is what quantization alone does to the logits there."""
    row = np.array([[*ids, *tokens[:-1]]])
    exact = np.asarray(model(row))[0, len(ids) - 1 :]
    chosen = exact.argmax(-1).tolist()
    if chosen == list(tokens):
        return None
    index = next(i for i, (a, b) in enumerate(zip(chosen, tokens, strict=True)) if a != b)
    noise = rms(np.asarray(simulated(row))[0, len(ids) - 1 + index] - exact[index])
    return parting(chosen, exact, tokens, [noise] * len(tokens))


def kind(found) -> str:
    """The column of the table."""
    return "equal" if found is None else "near tie" if found.near_tie else "other"


def rms(x) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


if __name__ == "__main__":
    sys.exit(main())
