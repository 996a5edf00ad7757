"""The demo: the whole job on the embedded model, from a poem to verified ONNX graphs, on one screen."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import golden
from export.folder.chain import generate
from export.folder.emit import emit
from export.folder.manifest import read_manifest
from export.folder.verify import verify
from export.run.htp import Htp, expect_installed
from export.verdict.trial import verify_on_grids
from export.verdict.verdict import Verdict
from golden.compare import Report
from golden.cost.quality import quality
from golden.cost.reading import read_documents
from refimpl.errors import InputError, at_most
from refimpl.grids.calibrate import calibrate
from refimpl.info import describe
from refimpl.model import EMBEDDED, Model, load

PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"  # the one-shot example of Baichuan2's own model card
ANSWER = "李商隐"
GOLDEN = Path(golden.__file__).parent / "data" / "embedded"
OURS = {"float", "int4", "npu", "report.txt", "report.json"}
TOKENS = 4096  # of held-out text, for the cost of four bits
RANGES = 1024  # of held-out text, for the ranges of a quantized device
SOC = "8-elite"
MARGIN = " " * 25


def run(out: Path) -> bool:
    """Completes a poem's author, checks against PyTorch, quantizes, exports and verifies; True if all of it agrees.

    Graphs and reports go to the folder `out`, which must be new or hold an earlier demo. Raises InputError if it holds
    something else.
    """
    strangers = {path.name for path in out.iterdir()} - OURS if out.is_dir() else set([out.name] * out.exists())
    if strangers:
        raise InputError(f"{out} holds {at_most(sorted(strangers), 3)}, not a demo; choose another place with --out")
    begin = time.perf_counter()
    model = load()
    facts = describe(model)
    print(f"The embedded model: a trained {facts['family']} of {facts['parameters'] / 1e6:.1f} M parameters "
          f"({facts['layers']} layers, hidden {facts['hidden']}).\n")  # fmt: skip
    right = name_a_poet(model)
    reports: dict[str, Report | Verdict] = {**compare_with_pytorch(model)}
    small, text = model.quantize("int4", block_size=32), read_documents(EMBEDDED / "held_out.txt", model)
    show_the_cost(small, model, text[:TOKENS])
    for name, version in (("float", model), ("int4", small)):
        reports[name] = export_and_verify(name, version, out / name)
    if (asked := ask_the_npu(model, text[:RANGES], out / "npu")) is not None:
        reports["npu"] = asked
    write_reports(reports, out)
    good = right and all(reports.values())
    print(f"\n{'All of it agrees' if good else 'IT DIFFERS'}, in {time.perf_counter() - begin:.0f} s. "
          f"Every tensor: {out / 'report.txt'}; the graphs: {out / 'float'}, {out / 'int4'}")  # fmt: skip
    return good


def name_a_poet(model: Model) -> bool:
    """Step 1: the model continues its own model card's example."""
    said = complete(model, PROMPT)
    shown = PROMPT.replace("\n", " ⏎ ")
    print(f"1. It knows its poets    {shown}{said}" + ("" if said == ANSWER else f"   (expected {ANSWER})"))
    return said == ANSWER


def compare_with_pytorch(model: Model) -> dict[str, Report]:
    """Step 2: every tensor against the golden from PyTorch, in two number formats."""
    reports = {dtype: golden.check(model, GOLDEN, dtype) for dtype in ("float64", "float32")}
    for dtype, report in reports.items():
        print(f"2. PyTorch, {dtype:13}{verdict(report)}")
    return reports


def show_the_cost(small: Model, model: Model, text: Sequence[int]) -> None:
    """Step 3: what four bits cost on poems that the model was not trained on."""
    cost = quality(small, model, text)
    print(f"3. What 4 bits cost      perplexity {cost.reference_perplexity:.1f} -> {cost.perplexity:.1f} on held-out "
          f"poems, KL {cost.kl_mean:.3f} nats,\n{MARGIN}same top-1 {cost.same_top:.1%} of {cost.tokens} tokens; "
          f"the author is now {complete(small, PROMPT)}")  # fmt: skip


def export_and_verify(name: str, model: Model, folder: Path) -> Report:
    """Step 4: the model as ONNX graphs in a folder, run and compared."""
    engine = "onnxruntime" if find_spec("onnxruntime") else "reference"
    parts = emit(model, tokens=(16, 1), context=64, parts=3)
    parts.save(folder, overwrite=True)
    report = verify(folder, engine)
    print(f"4. ONNX, {name:16}{len(parts)} graphs run by {engine}, isolated and chained:\n{MARGIN}{verdict(report)}")
    return report


def ask_the_npu(model: Model, text: Sequence[int], folder: Path) -> Verdict | None:
    """Step 5: Qualcomm's compiler and its emulation of the NPU, if the extra htp is installed."""
    try:
        expect_installed()
        return run_on_npu(model, text, folder)
    except InputError as error:
        if find_spec("onnxruntime_qnn"):
            raise
        print(f"5. Qualcomm's NPU        not asked: {error}")
        return None


def run_on_npu(model: Model, text: Sequence[int], folder: Path) -> Verdict:
    """The verdict on what the NPU computes, which is printed with the poet that the model names there."""
    parts = emit(model, tokens=(16, 1), context=64, parts=3, profile="qdq", encodings=calibrate(model, text))
    parts.save(folder, overwrite=True)
    with Htp(SOC) as device:
        verdict = verify_on_grids(folder, device)
        pieces = generate(model, folder, read_manifest(folder)[0], device, model.token_ids(PROMPT)[0].tolist())
        said = model.tokenizer.decode(list(islice(pieces, len(model.tokenizer.encode(ANSWER)))))
        about, places = device.about(), device.placements.values()
    there, elsewhere = sum(place.on_npu for place in places), sum(len(place.elsewhere) for place in places)
    print(f"5. Qualcomm's NPU        {about}:\n{MARGIN}{there} operations on it, {elsewhere} on the CPU, which looks "
          f"up embeddings;\n{MARGIN}{len(verdict.tensors)} tensors {'agree' if verdict else 'DIFFER'}: "
          f"{verdict.summary.split('; ')[1]}; the author is now {said}")  # fmt: skip
    return verdict


def write_reports(reports: Mapping[str, Report | Verdict], out: Path) -> None:
    """All reports for a person, and for a machine."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.txt").write_text("\n\n".join(f"{n}: {r}" for n, r in reports.items()) + "\n", encoding="utf-8")
    content = {name: json.loads(report.to_json()) for name, report in reports.items()}
    (out / "report.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def complete(model: Model, prompt: str) -> str:
    """The rest of the prompt's last line, by greedy decoding."""
    pieces: Sequence[int] = list(islice(model.generate(prompt, max_new_tokens=8), 8))
    return model.tokenizer.decode(pieces).split("\n")[0]


def verdict(report: Report) -> str:
    """How many tensors agree, and the one that is nearest to its limit."""
    worst = report.worst[0]
    where = worst.name.split("/", 1)[1] if "/" in worst.name else worst.name
    total, wrong = len(report.tensors), len(report.failures)
    count = f"{wrong} of {total} tensors DIFFER" if wrong else f"{total} tensors agree"
    return f"{count}; worst {where}, {worst.needed:.0e} of {worst.allowed:.0e}"
