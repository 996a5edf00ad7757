"""A README's examples: taken out of it, run in a shell, and compared with what it shows.

Run as a program, it draws the picture of the verdict anew: PYTHONPATH=.:kernels python tests/readme.py
"""

import os
import re
import subprocess
import sys
from html import escape
from pathlib import Path

import numpy as np

import refimpl

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / ".github" / "verdict.svg"
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*[a-z_])")
# Which correct tensor comes nearest to its limit, which engine is installed, and how long it takes, differ by machine.
BY_MACHINE = [
    (r"; worst .*", "; worst"),
    (r"run by \w+", "run by"),
    (r"in \d+ s\b", "in some s"),
    (r"onnxruntime-qnn [\d.]+, QNN [\d.]+", "QNN"),
]
NPU = re.compile(r"5\. Qualcomm's NPU.*?\n\n", re.S)  # the step of the demo that needs the extra htp


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block that has a language."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)


def commands(path: Path) -> list[tuple[str, str]]:
    """(command, what it prints) of all console blocks, without the installation by pip."""
    found = []
    for language, text in blocks(path):
        for part in re.split(r"^\$ ", text, flags=re.M)[1:] if language == "console" else ():
            command, _, printed = part.partition("\n")
            command = re.sub(r"^pip install .*? && ", "", command)
            if command != "pytest":
                found.append((command, printed))
    return found


def with_htp(path: Path, printed: str) -> str:
    """What the demo prints where the extra htp is installed: its fifth step is shown in a block of its own."""
    (step,) = [text for language, text in blocks(path) if language == "text"]
    return NPU.sub(lambda _: f"{step}\n", printed)


def run(command: str, folder: Path) -> str:
    """What a command prints in a shell whose `refimpl` is this one; standard error stays out of it."""
    program = folder / "bin" / "refimpl"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m refimpl "$@"\n')
    program.chmod(0o755)
    paths = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    given = {**os.environ, **paths, "PYTHONUTF8": "1", "COLUMNS": "120"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=given, capture_output=True, text=True)
    assert done.returncode == 0 or "|" in command, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def same(shown: str, printed: str) -> bool:
    """Whether two texts agree in all words, and in their numbers within 2 %, or one in the last digit shown.

    Another BLAS adds in another order; figures over thousands of tokens then differ in their third digit at most.
    """
    for pattern, plain in BY_MACHINE:
        shown, printed = re.sub(pattern, plain, shown), re.sub(pattern, plain, printed)
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    return all(map(_near, NUMBER.findall(shown), NUMBER.findall(printed)))


def _near(shown: str, printed: str) -> bool:
    digits = len(shown.partition("e")[0].partition(".")[2])
    exponent = int(shown.partition("e")[2] or 0)
    return abs(float(shown) - float(printed)) <= max(0.02 * abs(float(shown)), 1.01 * 10.0 ** (exponent - digits))


def answer_late(export: Path, outputs: Path) -> None:
    """Plays the device of the tour: the quantized simulation, but one graph returns its keys one slot late."""
    from export.files.encodings import read_encodings
    from export.measure.kinds import SIMULATION
    from export.measure.references import References

    model = refimpl.load()
    references = References(export, model, read_encodings(export / "encodings.json", model))
    for spec in references.plan.runs[0]:
        answer = references.run(SIMULATION, spec, references.inputs(spec))
        if spec.name == "prompt_ar128_cl256_3_of_4":
            answer = {**answer, "past_key_1_out": np.roll(answer["past_key_1_out"], 1, axis=3)}
        (outputs / spec.name).mkdir(parents=True)
        np.savez(outputs / spec.name / "outputs.npz", **answer)


def picture(path: Path) -> str:
    """The README's verdict as an SVG that looks like a terminal."""
    ((command, printed),) = [pair for pair in commands(path) if pair[0].startswith("refimpl verify")]
    lines = [f"$ {command.partition(' |')[0]}"]
    for line in printed.splitlines():
        lines += re.findall(r".{1,100}(?:\s|$)", line)
    drawn = []
    for i, line in enumerate(lines):
        colour = "#9cdcfe" if not i else "#ff7b72" if line.startswith("differs") else "#e6edf3"
        bold = ' font-weight="bold"' if line.startswith(("It begins", "Likely cause")) else ""
        drawn.append(f'<text x="16" y="{32 + 20 * i}" fill="{colour}"{bold} xml:space="preserve">{escape(line)}</text>')
    height = 20 * len(lines) + 28
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 {height}" width="820" height="{height}">',
        "<style>text{font:13px ui-monospace,Menlo,Consolas,monospace}</style>",
        f'<rect width="820" height="{height}" rx="8" fill="#0d1117"/>', *drawn, "</svg>\n",
    ])  # fmt: skip


if __name__ == "__main__":
    PICTURE.write_text(picture(ROOT / "README.md"), encoding="utf-8")
