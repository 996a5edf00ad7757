"""The command `refimpl`: one verb for each job.

Exit code 0: done, or the numbers agree. 1: they differ. 2: bad usage or bad input, told in one line.

The command line stands above all packages, so this file alone in refimpl imports golden and export, where used.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import refimpl
from refimpl.errors import InputError

if TYPE_CHECKING:
    from golden.compare import Report
    from refimpl.model import Model


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Chinese shows its code points
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = _parser().parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"refimpl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("refimpl: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # of standard output, since verbs turn those of files into an InputError
        _stop_printing()
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
            return 0
        print(f"refimpl: cannot print: {error.strerror}", file=sys.stderr)
        return 2


def demo(arguments) -> int:
    """Do the whole job on the embedded model and tell the story on one screen."""
    from export.demo import run

    return 0 if run(Path(arguments.out)) else 1


def info(arguments) -> int:
    """Say what a checkpoint is, and what is wrong with it."""
    from refimpl.info import examine, table

    facts = examine(_folder(arguments))
    checkpoints = facts.get("checkpoints", [facts])
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else "\n\n".join(map(table, checkpoints)))
    problems = [problem for one in checkpoints for problem in one["problems"]]
    for problem in problems:
        print(f"refimpl: {problem}", file=sys.stderr)
    return 2 if problems else 0


def generate(arguments) -> int:
    """Continue a text."""
    return _say(arguments, _ids(arguments, _load(arguments)))


def chat(arguments) -> int:
    """Answer a message."""
    model = _load(arguments)
    said = [("system", arguments.system), ("user", arguments.message)]
    messages = [{"role": role, "content": _text(text)} for role, text in said if text]
    room = model.config.max_position_embeddings
    if (arguments.max_new_tokens or 0) >= room:
        raise InputError(f"max_new_tokens is {arguments.max_new_tokens}, which leaves no room in a context of {room}")
    ids = model.tokenizer.chat(messages, arguments.max_new_tokens)
    return _say(arguments, ids)


def trace(arguments) -> int:
    """Show or save every tensor of one forward."""
    import numpy as np

    from golden.bundle import write_trace

    model = _load(arguments)
    recorded = model.trace(_ids(arguments, model), arguments.dtype, taps=arguments.taps)
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


def compare(arguments) -> int:
    """Judge the trace A by the trace B; either may be a golden of one prompt instead."""
    from golden import compare, read_trace

    judged = read_trace(arguments.a)
    return _report(arguments, compare(judged, read_trace(arguments.b, dtype=judged.meta.get("dtype"))))


def convert(arguments) -> int:
    """Write a checkpoint as safetensors: another format, NormHead applied, or an adapter merged."""
    from refimpl.convert import convert

    report = convert(arguments.source, arguments.out, arguments.dtype, arguments.shard_size, arguments.normalize_head,
                     arguments.lora)  # fmt: skip
    if arguments.json:
        print(json.dumps(report))
        return 0
    print(f"{report['tensors']} tensors, {report['bytes'] / 1e9:.2f} GB, are in {arguments.out}; see SHA256SUMS")
    if arguments.normalize_head:
        shortest, longest = report["row lengths"]
        print(f"the rows of lm_head have lengths from {shortest:.6f} to {longest:.6f}: what rounding leaves of 1")
    return 0


def golden_make(arguments) -> int:
    """Record every tensor of the PyTorch model (extra: torch)."""
    from golden.pytorch import make

    folder = _folder(arguments)
    prompts = _prompts(arguments)
    make(folder, Path(arguments.out), prompts, dtypes=tuple(arguments.dtype.split(",")), taps=arguments.taps,
         trust_remote_code=arguments.trust_remote_code, implementation=arguments.implementation)  # fmt: skip
    print(f"the golden of {folder} is in {arguments.out}")
    return 0


def golden_check(arguments) -> int:
    """Compare this implementation with a golden from PyTorch."""
    from golden import check

    return _report(arguments, check(_load(arguments), Path(arguments.golden), arguments.dtype, arguments.fed or None))


def golden_show(arguments) -> int:
    """Say what a golden holds."""
    from golden import read

    print(read(Path(arguments.golden)).describe())
    return 0


def calibrate(arguments) -> int:
    """Find the range of every tensor on a text, and write AIMET encodings for 4-bit weights, 16-bit activations."""
    from export.encodings import write_encodings
    from golden.quality import read_documents
    from refimpl.calibrate import calibrate
    from refimpl.encodings import Recipe

    model = _load(arguments)
    ids = read_documents(Path(arguments.text), model)[: arguments.tokens]
    recipe = Recipe(weight_bits=arguments.weight_bits, block_size=arguments.block_size, lpbq=arguments.lpbq)
    found = calibrate(model, ids, recipe, arguments.method, arguments.percentile, arguments.window, arguments.dtype)
    write_encodings(found, arguments.out, arguments.version)
    print(f"{len(found.activations)} tensors and {len(found.parameters)} weights, from {len(ids)} tokens, "
          f"have their encodings in {arguments.out}")  # fmt: skip
    return 0


def simulate(arguments) -> int:
    """Predict what quantization by an encodings file costs, tensor by tensor, and what more bits would gain."""
    from export.encodings import read_encodings
    from golden.predict import outcome_table, outcomes_json, predict, what_if
    from golden.quality import read_documents

    model = _load(arguments)
    encodings = read_encodings(arguments.encodings, model)
    ids = read_documents(Path(arguments.text), model)[: arguments.tokens]
    changes = [_change(text) for text in arguments.what_if]
    noise = predict(model, encodings, ids, arguments.window, arguments.rounding, arguments.integer, arguments.dtype)
    outcomes = what_if(model, encodings, ids, changes, arguments.window, arguments.rounding, arguments.integer,
                       arguments.dtype)  # fmt: skip
    if arguments.json:
        print(f'{{"noise": {noise.to_json()}, "outcomes": {outcomes_json(outcomes)}}}')
    else:
        print(f"{noise}\n\n{outcome_table(outcomes)}")
    return 0


def export(arguments) -> int:
    """Emit the model as ONNX, part by part, with golden inputs and outputs."""
    from export import emit

    model = _load(arguments)
    if arguments.int4:
        model = model.quantize("int4", block_size=arguments.int4, keep=arguments.keep)
    parts = emit(model, tokens=_integers(arguments.tokens), context=arguments.context, parts=arguments.parts)
    parts.save(Path(arguments.out), overwrite=arguments.force)
    print(f"{len(parts)} graphs are in {arguments.out}; refimpl verify {arguments.out} runs them")
    return 0


def verify(arguments) -> int:
    """Run exported parts and compare every output with the oracle."""
    from export import verify

    return _report(arguments, verify(Path(arguments.folder), engine=arguments.engine))


def bench(arguments) -> int:
    """Measure a synthetic Baichuan2-7B against other engines and the speed of memory (extra: bench)."""
    from refimpl import bench

    facts = bench.run(arguments.what, arguments.layers, arguments.rounds, arguments.threads or bench.default_threads(),
                      tuple(arguments.engines.split(",")), arguments.tokens)  # fmt: skip
    print(json.dumps(facts) if arguments.json else bench.show(facts))
    return 0


def _say(arguments, ids) -> int:
    """Generates and prints pieces of text as they come, or ids where the folder has no tokenizer."""
    model = arguments.loaded
    new = model.generate(
        ids, max_new_tokens=arguments.max_new_tokens, do_sample=arguments.sample, temperature=arguments.temperature,
        top_k=arguments.top_k, top_p=arguments.top_p, repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed, dtype=arguments.dtype,
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


def _load(arguments) -> Model:
    from refimpl.model import load

    arguments.loaded = load(arguments.model)
    return arguments.loaded


def _folder(arguments) -> Path:
    from refimpl.model import EMBEDDED

    return Path(arguments.model) if arguments.model else EMBEDDED


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"{text!r} is not a list of whole numbers such as 128,1") from None


def _change(text: str) -> tuple[str, int]:
    """A glob and bits, from PATTERN=BITS."""
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdecimal():
        raise InputError(f"{text!r} is no change such as '*.down_proj.weight=8'")
    return pattern, int(bits)


def _ids(arguments, model: Model):
    """The prompt's token ids, from text (in which `\\n` stands for a new line) or from --ids."""
    if arguments.ids:
        return list(_integers(arguments.ids))
    if not arguments.prompt:
        raise InputError("the prompt is empty; give a text, or token ids with --ids")
    return model.tokenizer.encode(_text(arguments.prompt))


def _prompts(arguments) -> list:
    prompts: list[Any] = [_text(text) for text in arguments.prompt]
    return prompts + [list(_integers(ids)) for ids in arguments.ids]


def _text(argument: str) -> str:
    """A text from the command line, which is UTF-8 whatever the terminal is; `\\n` stands for a new line."""
    try:
        return os.fsencode(argument).decode("utf-8").replace("\\n", "\n")
    except UnicodeDecodeError:
        raise InputError("the text is not UTF-8; type it in a UTF-8 terminal, or give token ids") from None


def _report(arguments, report: Report) -> int:
    """Prints the verdict; its exit code holds however much of the report is read."""
    try:
        print(report.to_json() if arguments.json else report, flush=True)
    except BrokenPipeError:
        _stop_printing()
    return 0 if report else 1


def _stop_printing() -> None:
    """Nobody reads on: what Python still flushes at its end goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="refimpl", description="The numerical oracle for Baichuan2.")
    parser.add_argument("--version", action="version", version=f"refimpl {refimpl.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(run, example: str, *parents, under=verbs) -> argparse.ArgumentParser:
        """A verb that calls `run`, whose docstring is its help."""
        name = run.__name__.removeprefix("golden_")
        sub = under.add_parser(name, help=run.__doc__, description=run.__doc__, epilog=f"example: {example}",
                               parents=parents, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        sub.set_defaults(run=run)
        return sub

    def options(*rows: tuple[str, dict]) -> argparse.ArgumentParser:
        """Options that several verbs share."""
        shared = argparse.ArgumentParser(add_help=False)
        for flags, keywords in rows:
            shared.add_argument(*flags.split(), **keywords)
        return shared

    model = options(("model", dict(nargs="?", metavar="MODEL", help="a checkpoint (default: the embedded model)")))
    machine = options(("--json", dict(action="store_true", help="print JSON instead of text")))
    dtype = options(("--dtype", dict(default="float32", help="float64, float32 (default), bfloat16 or float16")))
    prompt = options(
        ("--prompt -p", dict(default="", help=r"a text; \n stands for a new line")),
        ("--ids", dict(help="token ids instead, such as 5,17,9")),
    )
    sampling = options(
        ("--max-new-tokens", dict(type=int, metavar="N")),
        ("--sample", dict(action="store_true", help="draw tokens instead of taking the likeliest")),
        ("--seed", dict(type=int, help="makes the draws repeatable")),
        ("--temperature", dict(type=float)),
        ("--top-k", dict(type=int)),
        ("--top-p", dict(type=float)),
        ("--repetition-penalty", dict(type=float)),
    )

    sub = verb(demo, "refimpl demo")
    sub.add_argument("--out", default="refimpl-demo", help="where graphs and reports go (default: refimpl-demo)")

    verb(info, "refimpl info weights/Baichuan2-7B-Chat", model, machine)

    example = r"refimpl generate -p '登鹳雀楼->王之涣\n夜雨寄北->' --max-new-tokens 8"
    verb(generate, example, model, prompt, sampling, dtype, machine)

    sub = verb(chat, "refimpl chat -m 《静夜思》的作者是谁？", model, sampling, dtype, machine)
    sub.add_argument("--message", "-m", required=True)
    sub.add_argument("--system", help="a system message")

    sub = verb(trace, "refimpl trace -p 床前明月光 --taps '*.self_attn.*'", model, prompt, dtype, machine)
    sub.add_argument("--taps", metavar="PATTERN", help="only tensors whose name matches this glob")
    sub.add_argument("--out", metavar="DIR", help="write the tensors there instead of printing a table")

    sub = verb(compare, "refimpl compare mine.trace b2-7b.golden", machine)
    sub.add_argument("a", metavar="A", help="what is judged: a folder that refimpl trace --out has written")
    sub.add_argument("b", metavar="B", help="the reference, in A's number format if it is a golden that has it")

    sub = verb(convert, "refimpl convert weights/Baichuan2-7B-Chat --out weights/b2-7b --dtype bfloat16", machine)
    sub.add_argument("source", metavar="SRC", help="a checkpoint in any layout; it is only read")
    sub.add_argument("--out", required=True, metavar="DST", help="a new folder")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the parameters are")
    sub.add_argument("--shard-size", default="5GB", metavar="SIZE", help="bytes in a file at most (default: 5GB)")
    sub.add_argument("--normalize-head", action="store_true", help="apply NormHead: a Baichuan2 for Baichuan 1's code")
    sub.add_argument("--lora", metavar="ADAPTER", help="merge the peft LoRA adapter in this folder")

    of_golden = verbs.add_parser("golden", help="Make, check and show goldens from PyTorch.")
    goldens = of_golden.add_subparsers(metavar="VERB", required=True)

    example = "refimpl golden make weights/B2-13B --out b2-13b.golden --prompt 你好 --trust-remote-code"
    sub = verb(golden_make, example, model, under=goldens)
    sub.add_argument("--out", required=True, metavar="DIR")
    sub.add_argument("--prompt", "-p", action="append", default=[], help="a text to run; may be given several times")
    sub.add_argument("--ids", action="append", default=[], help="token ids to run, such as 5,17,9")
    sub.add_argument("--dtype", default="float32,float64", help="formats to record (default: float32,float64)")
    sub.add_argument("--taps", metavar="PATTERN", help="only tensors whose name matches this glob")
    kinds = ("auto", "remote", "transformers")
    why = "the folder's own code, or transformers' classes (default: the latter where they fit)"
    sub.add_argument("--implementation", choices=kinds, default="auto", help=why)
    sub.add_argument("--trust-remote-code", action="store_true", help="execute the folder's own modeling code")

    sub = verb(golden_check, "refimpl golden check weights/B2-13B b2-13b.golden", model, machine, under=goldens)
    sub.add_argument("golden", metavar="GOLDEN")
    sub.add_argument("--dtype", help="check this format only")
    why = "go on with the golden's tensors, so that each shows its own error (16 bits always do)"
    sub.add_argument("--fed", action="store_true", help=why)

    sub = verb(golden_show, "refimpl golden show b2-13b.golden", under=goldens)
    sub.add_argument("golden", metavar="GOLDEN")

    text = options(
        ("--text", dict(required=True, metavar="FILE", help="UTF-8 text, blank lines between documents")),
        ("--tokens", dict(type=int, metavar="N", help="read no more than so many (default: all)")),
        ("--window", dict(type=int, default=512, metavar="N", help="tokens at a time (default: 512)")),
    )
    example = "refimpl calibrate weights/B2-7B --text wiki.txt --out encodings.json"
    sub = verb(calibrate, example, model, text, dtype)
    sub.add_argument("--out", required=True, metavar="FILE")
    sub.add_argument("--version", default="1.0.0", help="of the file: 0.6.1, 1.0.0 (default) or 2.0.0")
    why = "how the ranges of activations are chosen (default: minmax)"
    sub.add_argument("--method", choices=("minmax", "percentile", "mse"), default="minmax", help=why)
    why = "with that method, the share that is kept at each end (default: 99.99)"
    sub.add_argument("--percentile", type=float, default=99.99, metavar="P", help=why)
    sub.add_argument("--weight-bits", type=int, default=4, help="of linears; the head has 8 (default: 4)")
    sub.add_argument("--block-size", type=int, metavar="N", help="a scale for so many weights, not for each row")
    sub.add_argument("--lpbq", action="store_true", help="scales of blocks as small multiples of the row's")

    example = "refimpl simulate weights/B2-7B --encodings e.json --text wiki.txt --what-if '*.down_proj.weight=8'"
    sub = verb(simulate, example, model, text, dtype, machine)
    sub.add_argument("--encodings", required=True, metavar="FILE")
    why = "raise what matches to so many bits, and say what is gained; may be given several times"
    sub.add_argument("--what-if", action="append", default=[], metavar="PATTERN=BITS", help=why)
    why = "half a step goes away from zero as in AIMET (default), or to even as in ONNX"
    sub.add_argument("--rounding", choices=("away", "even"), default="away", help=why)
    sub.add_argument("--integer", action="store_true", help="sum products of codes, exactly")

    example = "refimpl export weights/B2-7B --out build/b2-7b --tokens 128,1 --context 4096 --parts 5"
    sub = verb(export, example, model)
    sub.add_argument("--out", required=True, metavar="DIR")
    sub.add_argument("--tokens", default="128,1", help="tokens per call of each graph (default: 128,1)")
    sub.add_argument("--context", type=int, help="tokens that the static cache holds (default: the model's context)")
    sub.add_argument("--parts", type=int, default=2, help="how many graphs the model is split into (default: 2)")
    sub.add_argument("--int4", type=int, metavar="BLOCK", help="quantize matrices to 4-bit blocks of this size first")
    sub.add_argument("--keep", action="append", default=[], metavar="PATTERN", help="modules that stay as they are")
    sub.add_argument("--force", action="store_true", help="replace an earlier export in DIR")

    sub = verb(verify, "refimpl verify build/b2-7b", machine)
    sub.add_argument("folder", metavar="DIR")
    sub.add_argument("--engine", choices=("auto", "onnxruntime", "reference"), default="auto")

    sub = verb(bench, "refimpl bench decode --engines read,refimpl,llama.cpp", machine)
    sub.add_argument("what", choices=("decode", "prefill"), help="one token after another, or many at once")
    sub.add_argument("--layers", type=int, default=32, help="fewer than 32 fit into less memory, or into a cache")
    sub.add_argument("--rounds", type=int, default=5, help="engines take turns so many times (default: 5)")
    sub.add_argument("--threads", type=int, help="(default: all cores)")
    sub.add_argument("--tokens", type=int, default=128, help="how many at once in prefill (default: 128)")
    sub.add_argument("--engines", default="read,refimpl,llama.cpp,onnxruntime,torch", help="who takes part")
    return parser
