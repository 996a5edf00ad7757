"""Start here: the demo, text from a model, completion for the shell."""

from __future__ import annotations

import json
from pathlib import Path

from refimpl.cli.options import CACHE_DTYPE, DTYPE, JSON, MODEL, PROMPT, SAMPLING, load_model, prompt_ids, typed_text
from refimpl.cli.verbs import option, verb
from refimpl.errors import InputError

# what an argument is called in the help -> what completes it
FOLDERS = ("DIR", "MODEL", "SRC", "ADAPTER", "REF", "GOLDEN", "A", "B")
FILES = ("FILE", "FILE.svg", "OUTPUTS", "RUN")


@verb(
    "refimpl demo",
    option(
        "--out", default="refimpl-demo", metavar="DIR", help="folder for graphs and reports (default: refimpl-demo)"
    ),
)
def demo(arguments) -> int:
    """Do the whole job on the embedded model and show the results on one screen."""
    from refimpl.cli.demo import run

    return 0 if run(Path(arguments.out)) else 1


@verb(
    r"refimpl generate -p '登鹳雀楼->王之涣\n夜雨寄北->' --max-new-tokens 8",
    *(MODEL, PROMPT, SAMPLING, DTYPE, CACHE_DTYPE, JSON),
)
def generate(arguments) -> int:
    """Continue a text."""
    model = load_model(arguments)
    return _say(arguments, model, prompt_ids(arguments, model))


@verb(
    "refimpl chat -m 《静夜思》的作者是谁？",
    *(MODEL, SAMPLING, DTYPE, CACHE_DTYPE, JSON),
    option("--message", "-m", required=True, metavar="TEXT", help="what the user says"),
    option("--system", metavar="TEXT", help="a system message before it"),
)
def chat(arguments) -> int:
    """Answer a message."""
    model = load_model(arguments)
    said = [("system", arguments.system), ("user", arguments.message)]
    messages = [{"role": role, "content": typed_text(text)} for role, text in said if text]
    room = model.config.max_position_embeddings
    if (arguments.max_new_tokens or 0) >= room:
        raise InputError(f"max_new_tokens is {arguments.max_new_tokens}, which leaves no room in a context of {room}")
    return _say(arguments, model, model.tokenizer.chat(messages, arguments.max_new_tokens))


@verb(
    "refimpl completion bash > ~/.local/share/bash-completion/completions/refimpl",
    option("shell", choices=("bash", "zsh"), help="for zsh, write the script to a file _refimpl in a folder of $fpath"),
)
def completion(arguments) -> int:
    """Print the script with which bash or zsh completes verbs and options (extra: completion)."""
    import refimpl
    from refimpl.cli.parsing import command_line

    try:
        import shtab
    except ImportError:
        raise InputError("completion needs the package shtab, which is not installed; "
                         "pip install 'refimpl[completion]'") from None  # fmt: skip
    completers = dict.fromkeys(FOLDERS, shtab.DIRECTORY) | dict.fromkeys(FILES, shtab.FILE)
    print(shtab.complete(command_line(refimpl.__version__, completers), arguments.shell))
    return 0


def _say(arguments, model, ids) -> int:
    """Generates and prints each piece of text as it comes, or ids where the folder has no tokenizer."""
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
