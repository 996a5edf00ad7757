"""Verbs about truth from PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refimpl.cli.verbs import JSON, MODEL, integers, load_model, model_folder, option, report, typed_text, verb


@verb(
    "refimpl compare mine.trace b2-7b.golden",
    option("a", metavar="A", help="what is judged: a folder that refimpl trace --out has written"),
    option("b", metavar="B", help="the reference, in A's number format if it is a golden that has it"),
    JSON,
)
def compare(arguments) -> int:
    """Judge the trace A by the trace B; either may be a golden of one prompt instead."""
    from golden import compare, read_trace

    judged = read_trace(arguments.a)
    return report(arguments, compare(judged, read_trace(arguments.b, dtype=judged.meta.get("dtype"))))


@verb(
    "refimpl golden make weights/B2-13B --out b2-13b.golden --prompt 你好 --trust-remote-code",
    MODEL,
    option("--out", required=True, metavar="DIR"),
    option("--prompt", "-p", action="append", default=[], help="a text to run; may be given several times"),
    option("--ids", action="append", default=[], help="token ids to run, such as 5,17,9"),
    option("--dtype", default="float32,float64", help="formats to record (default: float32,float64)"),
    option("--taps", metavar="PATTERN", help="only tensors whose name matches this glob"),
    option(
        "--implementation",
        choices=("auto", "remote", "transformers"),
        default="auto",
        help="the folder's own code, or transformers' classes (default: the latter where they fit)",
    ),
    option("--trust-remote-code", action="store_true", help="execute the folder's own modeling code"),
)
def golden_make(arguments) -> int:
    """Record every tensor of the PyTorch model (extra: torch)."""
    from golden.make.pytorch import make

    folder = model_folder(arguments)
    prompts = _prompts(arguments)
    make(folder, Path(arguments.out), prompts, dtypes=tuple(arguments.dtype.split(",")), taps=arguments.taps,
         trust_remote_code=arguments.trust_remote_code, implementation=arguments.implementation)  # fmt: skip
    print(f"the golden of {folder} is in {arguments.out}")
    return 0


@verb(
    "refimpl golden check weights/B2-13B b2-13b.golden",
    MODEL,
    option("golden", metavar="GOLDEN"),
    option("--dtype", help="check this format only"),
    option(
        "--fed",
        action="store_true",
        help="go on with the golden's tensors, so that each shows its own error (16 bits always do)",
    ),
    JSON,
)
def golden_check(arguments) -> int:
    """Compare this implementation with a golden from PyTorch."""
    from golden import check

    return report(
        arguments, check(load_model(arguments), Path(arguments.golden), arguments.dtype, arguments.fed or None)
    )


@verb("refimpl golden show b2-13b.golden", option("golden", metavar="GOLDEN"))
def golden_show(arguments) -> int:
    """Say what a golden holds."""
    from golden import read

    print(read(Path(arguments.golden)).describe())
    return 0


def _prompts(arguments) -> list:
    prompts: list[Any] = [typed_text(text) for text in arguments.prompt]
    return prompts + [list(integers(ids)) for ids in arguments.ids]
