"""Truth: every tensor of a run, and how far it is from PyTorch's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refimpl.cli.options import (
    DTYPE,
    JSON,
    MODEL,
    PROMPT,
    integers,
    load_model,
    model_folder,
    prompt_ids,
    report,
    typed_text,
)
from refimpl.cli.verbs import option, verb
from refimpl.errors import InputError

TAPS = option("--taps", metavar="PATTERN", help="only tensors whose name matches this glob, such as '*.self_attn.*'")


@verb(
    "refimpl trace -p 床前明月光 --taps '*.self_attn.*'",
    *(MODEL, PROMPT, DTYPE, TAPS, JSON),
    option("--out", metavar="DIR", help="write the tensors to this new folder instead of printing a table"),
)
def trace(arguments) -> int:
    """Show or save every tensor of one forward."""
    from golden.bundle import write_trace

    model = load_model(arguments)
    recorded = model.trace(prompt_ids(arguments, model), arguments.dtype, taps=arguments.taps)
    if arguments.out:
        write_trace(Path(arguments.out), recorded)
        print(f"{len(recorded)} tensors are in {arguments.out}")
        return 0
    rows = [_row(name, array) for name, array in recorded.items()]
    if arguments.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        shape = " ".join(map(str, row["shape"]))
        print(f"{row['name']:46} {shape:16} {row['dtype']:9} rms {row['rms']:<9.4g} "
              f"min {row['min']:<9.4g} max {row['max']:.4g}")  # fmt: skip
    return 0


@verb(
    "refimpl compare mine.trace b2-7b.golden",
    option("a", metavar="A", help="the run that is judged: a folder that refimpl trace --out has written"),
    option("b", metavar="B", help="the reference; of a golden, the number format that A has, if it is recorded"),
    JSON,
)
def compare(arguments) -> int:
    """Judge the trace A by the trace B; either may be a golden of one prompt."""
    from golden import compare, read_trace

    judged = read_trace(arguments.a)
    return report(arguments, compare(judged, read_trace(arguments.b, dtype=judged.meta.get("dtype"))))


@verb(
    "refimpl golden make weights/B2-13B --out b2-13b.golden --prompt 你好 --trust-remote-code",
    MODEL,
    option("--out", required=True, metavar="DIR", help="a new folder for the golden"),
    option("--prompt", "-p", action="append", default=[], metavar="TEXT", help="a text to run; may be repeated"),
    option("--ids", action="append", default=[], help="token ids to run, such as 5,17,9; may be repeated"),
    option("--dtype", default="float32,float64", help="formats to record (default: float32,float64)"),
    TAPS,
    option(
        "--implementation",
        choices=("auto", "remote", "transformers"),
        default="auto",
        help="remote: the folder's own code; transformers: its classes; auto (default): transformers' where one fits",
    ),
    option("--trust-remote-code", action="store_true", help="allow that the folder's own modeling code is executed"),
    option("--gradients", action="store_true",
           help="record a training step instead: gradients, AdamW's moments, the parameters after it"),
    option("--data", metavar="FILE", help="with --gradients: conversations in the place of prompts, a batch each"),
    option("--max-length", type=int, default=64, metavar="N", help="with --data: its tokens (default: 64)"),
    option("--accumulation", type=int, default=2, metavar="N", help="with --data: batches of the step (default: 2)"),
)  # fmt: skip
def golden_make(arguments) -> int:
    """Record every tensor of the PyTorch model (extra: torch)."""
    from golden.make.pytorch import make

    folder = model_folder(arguments)
    if arguments.gradients:
        return _golden_of_step(arguments, folder)
    prompts: list[Any] = [typed_text(text) for text in arguments.prompt]
    prompts += [list(integers(ids)) for ids in arguments.ids]
    make(folder, Path(arguments.out), prompts, dtypes=tuple(arguments.dtype.split(",")), taps=arguments.taps,
         trust_remote_code=arguments.trust_remote_code, implementation=arguments.implementation)  # fmt: skip
    print(f"the golden of {folder} is in {arguments.out}")
    return 0


@verb(
    "refimpl golden check weights/B2-13B b2-13b.golden",
    MODEL,
    option("golden", metavar="GOLDEN", help="folder of a golden"),
    option("--dtype", help="check this number format only"),
    option(
        "--fed",
        action="store_true",
        help="feed each operation with the golden's tensors, so that each shows its own error (16 bits: always)",
    ),
    option("--trace", metavar="DIR", help="of a training step: judge the tensors in this folder, and name the mistake"),
    JSON,
)
def golden_check(arguments) -> int:
    """Compare this implementation, or the training step of another (--trace), with a golden from PyTorch."""
    from golden import check
    from golden.step import is_step

    if is_step(arguments.golden):
        return _check_step(arguments)
    if arguments.trace:
        raise InputError(f"{arguments.golden} is of forwards; judge a trace by it with refimpl compare")
    found = check(load_model(arguments), Path(arguments.golden), arguments.dtype, arguments.fed or None)
    return report(arguments, found)


@verb(
    "refimpl golden show b2-13b.golden",
    option("golden", metavar="GOLDEN", help="folder of a golden"),
)
def golden_show(arguments) -> int:
    """Show what a golden holds and where it comes from."""
    from golden import read
    from golden.step import is_step, read_step

    print((read_step if is_step(arguments.golden) else read)(Path(arguments.golden)).describe())
    return 0


def _golden_of_step(arguments, folder: Path) -> int:
    """Makes the golden of a training step: of each prompt, or of each conversation, a batch."""
    import numpy as np

    from golden.bundle import Case
    from golden.make.gradients import make_step
    from golden.step import Batch, Setting
    from refimpl.config import read_config
    from refimpl.gradients.data import read_examples
    from refimpl.model import load

    model = load(folder)
    if arguments.data:
        examples = read_examples(arguments.data, model.tokenizer, arguments.max_length)[: arguments.accumulation]
        pairs = [(example.ids[None], example.labels[None]) for example in examples]
    else:
        prompts = [typed_text(text) for text in arguments.prompt] + [list(integers(ids)) for ids in arguments.ids]
        pairs = [(model.token_ids(prompt), model.token_ids(prompt)) for prompt in prompts]
    if not pairs or any(ids.shape[1] < 2 or not (np.asarray(labels)[:, 1:] >= 0).any() for ids, labels in pairs):
        raise InputError("there is nothing to predict; give --prompt or --ids of two tokens at least, or --data")
    setting = Setting(read_config(folder).z_loss_weight)
    make_step(folder, arguments.out, [Batch(Case(ids), labels) for ids, labels in pairs], setting,
              implementation=arguments.implementation, trust_remote_code=arguments.trust_remote_code)  # fmt: skip
    print(f"the golden of a training step of {folder} is in {arguments.out}")
    return 0


def _check_step(arguments) -> int:
    """Judges a training step: this package's, or the one in --trace."""
    from golden import read_trace
    from golden.step import read_step
    from golden.step_check import check_step, judge

    model, truth = load_model(arguments), read_step(arguments.golden)
    if not arguments.trace:
        return report(arguments, check_step(model, truth, arguments.dtype))
    trace = read_trace(arguments.trace)
    return report(arguments, judge(trace, truth, arguments.dtype or truth.dtypes[0], model))


def _row(name: str, array) -> dict[str, Any]:
    """A line of the table of tensors."""
    import numpy as np

    wide = array.astype(np.float64)
    rms = float(np.sqrt(np.mean(wide * wide)))
    return {"name": name, "shape": list(array.shape), "dtype": str(array.dtype), "rms": rms,
            "min": float(wide.min()), "max": float(wide.max())}  # fmt: skip
