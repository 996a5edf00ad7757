"""Graphs and devices: Qualcomm's compiler on this machine, and what is in its binaries."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from refimpl.cli.options import JSON, MODEL, load_model, typed_text
from refimpl.cli.verbs import option, verb
from refimpl.errors import InputError

SOC = option("--soc", default="8-elite", metavar="NAME",
             help="8-gen-2, 8-gen-3, 8-elite (default), 8-elite-gen-5, x-elite or x2-elite")  # fmt: skip


@verb(
    "refimpl compile build/b2-7b --soc 8-elite --out build/bin",
    option("folder", metavar="DIR", help="an export with codes at its border: refimpl export --border codes"),
    option("--out", required=True, metavar="DIR", help="folder for the binaries; those that are there are kept"),
    SOC,
    option("--desk", action="store_true", help="one binary for each graph, for the emulation on this machine"),
    option("--part", type=int, metavar="N", help="compile only this part"),
)
def compile(arguments) -> int:
    """Compile an export into context binaries with Qualcomm's compiler, on this machine (extra: htp)."""
    from export.phone.compiler import compile_graphs

    print(compile_graphs(arguments.folder, arguments.out, arguments.soc, not arguments.desk, arguments.part))
    return 0


def info_of_binary(arguments) -> int:
    """`refimpl info FILE.bin`: shows what is in a context binary, or where it differs from an export."""
    from export.phone.binary import differences, read_binary

    binary = read_binary(Path(arguments.model))
    if arguments.export:
        found = differences(binary, arguments.export, arguments.soc)
        print(found.to_json() if arguments.json else found)
        return 0 if found else 1
    print(binary.to_json() if arguments.json else binary)
    return 0


@verb(
    "refimpl genie -p '白日依山尽，'",
    MODEL,
    option("--prompt", "-p", required=True, metavar="TEXT", help=r"a text; \n stands for a new line"),
    option("--chat", action="store_true", help="the text is what a user says, in the model's own layout"),
    option("--max-new-tokens", type=int, default=24, metavar="N", help="stop after N tokens (default: 24)"),
    option("--out", metavar="DIR", help="keep all that is made there, and go on from what it has (default: keep none)"),
    option("--text", metavar="FILE", help="calibrate on this UTF-8 text (the embedded model has one)"),
    option("--bundle", metavar="DIR", help="make nothing: run Genie over this bundle, with a binary for each graph"),
    option("--graphs", metavar="DIR", help="with --bundle: the export that its binaries come from, to judge by"),
    option("--tokens", type=int, metavar="N", help="of a prompt at a time (default: 128, or what the context holds)"),
    option("--context", type=int, metavar="N", help="tokens that the cache holds (default: the model's, at most 512)"),
    option("--parts", type=int, default=2, metavar="N", help="how many graphs the model is split into (default: 2)"),
    SOC,
    option("--accuracy", metavar="FILE", help="compare the perplexity of this text with Genie's as well"),
    option("--no-outputs", action="store_true", help="judge what is fed, and not what comes out, which takes as long"),
    JSON,
)
def genie(arguments) -> int:
    """Compile and bundle a model, run Qualcomm's own Genie on it, and judge what it says (extra: htp)."""
    from export.phone.answer import Bundled, Question, ask
    from export.run.library import library
    from refimpl.cli.genie import Sizes, build, chat_prompt

    library("Genie")
    model = load_model(arguments)
    prompt = typed_text(arguments.prompt)
    if arguments.chat:
        prompt = chat_prompt(model, prompt)
    text, scored = (Path(path) if path else None for path in (arguments.text, arguments.accuracy))
    for path in (text, scored):
        if path is not None and not path.is_file():
            raise InputError(f"{path} is not a file; expected a UTF-8 text")

    def say(piece: str) -> None:
        if not arguments.json:
            print(piece, end="", flush=True)

    question = Question(prompt, arguments.max_new_tokens, scored, not arguments.no_outputs, arguments.soc)

    def told(bundled: Path, export: Path | None) -> int:
        answer = ask(model, Bundled(bundled, export), question, say)
        print(answer.to_json() if arguments.json else answer)
        return 0 if answer else 1

    if arguments.bundle:
        return told(Path(arguments.bundle), Path(arguments.graphs) if arguments.graphs else None)
    if arguments.graphs:
        raise InputError("--graphs belongs to --bundle DIR; without it the graphs are made")
    context = arguments.context or min(512, model.config.max_position_embeddings)
    sizes = Sizes(arguments.tokens or min(128, context // 4), context, arguments.parts, arguments.soc)
    if arguments.out:
        export, bundled = build(model, Path(arguments.out), sizes, text)
        return told(bundled, export)
    with TemporaryDirectory(prefix="refimpl-genie-") as folder:
        export, bundled = build(model, Path(folder), sizes, text)
        return told(bundled, export)
