"""Training: fine-tune a model, or adapters for it, on conversations."""

from __future__ import annotations

import json

from refimpl.cli.options import JSON, MODEL, load_model
from refimpl.cli.verbs import option, verb


@verb(
    "refimpl finetune weights/Baichuan2-7B-Base --data conversations.json --lora --qlora --out b2-7b.lora",
    MODEL,
    option("--data", required=True, metavar="FILE",
           help="conversations of human and gpt: a JSON list, or one in each line"),
    option("--out", required=True, metavar="DIR", help="a new folder for the checkpoint, or for the peft adapter"),
    option("--lora", action="store_true", help="train low-rank adapters (default: train every parameter)"),
    option("--qlora", action="store_true", help="with --lora: the base is in NF4 and does not change"),
    option("--rank", type=int, default=1, metavar="N", help="rank of the adapters (default: 1)"),
    option("--alpha", type=float, default=32, metavar="X", help="adapters are scaled by alpha / rank (default: 32)"),
    option("--targets", default="W_pack", metavar="NAMES", help="linears that get an adapter, such as W_pack,o_proj"),
    option("--max-length", type=int, default=512, metavar="N", help="tokens of a conversation, at most (default: 512)"),
    option("--epochs", type=int, default=4, metavar="N", help="how often the data is read (default: 4)"),
    option("--steps", type=int, metavar="N", help="stop after N steps"),
    option("--batch-size", type=int, default=16, metavar="N", help="conversations in a batch (default: 16)"),
    option("--accumulation", type=int, default=1, metavar="N", help="batches in a step (default: 1)"),
    option("--learning-rate", type=float, default=2e-5, metavar="X", help="of every step (default: 2e-5)"),
    option("--beta1", type=float, default=0.9, metavar="X", help="of AdamW (default: 0.9)"),
    option("--beta2", type=float, default=0.98, metavar="X", help="of AdamW (default: 0.98)"),
    option("--epsilon", type=float, default=1e-8, metavar="X", help="of AdamW (default: 1e-8)"),
    option("--weight-decay", type=float, default=1e-4, metavar="X", help="of the matrices (default: 1e-4)"),
    option("--max-grad-norm", type=float, default=1.0, metavar="X", help="clip gradients to this norm (default: 1.0)"),
    option("--seed", type=int, default=42, metavar="N", help="of the order of the data (default: 42)"),
    option("--jobs", type=int, default=1, metavar="N", help="processes that share each batch (default: 1)"),
    option("--dask", metavar="ADDRESS", help="share each batch on the Dask cluster at this address (extra: dask)"),
    JSON,
)  # fmt: skip
def finetune(arguments) -> int:
    """Fine-tune a model on conversations as the official script does; an interrupted run continues."""
    from refimpl.errors import InputError
    from refimpl.gradients.adapters import Lora
    from refimpl.gradients.data import read_examples
    from refimpl.gradients.finetune import Options, finetune
    from refimpl.gradients.optimizer import AdamW
    from refimpl.sweep import workers

    a = arguments
    if a.qlora and not a.lora:
        raise InputError("with --qlora the weights are in NF4 and cannot learn, only adapters can; give --lora, too")
    if a.max_length < 2:
        raise InputError(f"the maximum length is {a.max_length}, expected at least 2 tokens")
    model = load_model(a)
    model = model.quantize("nf4") if a.qlora else model
    length = min(a.max_length, model.config.max_position_embeddings)
    examples = read_examples(a.data, model.tokenizer, length)
    optimizer = AdamW(a.learning_rate, a.beta1, a.beta2, a.epsilon, a.weight_decay, a.max_grad_norm)
    lora = Lora(a.rank, a.alpha, tuple(a.targets.split(","))) if a.lora else None
    options = Options(optimizer, lora, a.epochs, a.batch_size, a.accumulation, a.steps, a.seed)
    with workers(a.jobs, a.dask) as executor:
        done = finetune(model, examples, a.out, options, executor)
    if a.json:
        print(json.dumps({"out": a.out, "examples": len(examples), "losses": done.losses}))
        return 0
    what = "the adapter" if lora else "the checkpoint"
    print(f"{len(done.losses)} steps on {len(examples)} conversations: the loss went from {done.losses[0]:.4f} to "
          f"{done.losses[-1]:.4f}; {a.out} holds {what}, losses.json and loss.svg")  # fmt: skip
    return 0


@verb(
    "refimpl repair b2-7b-q4_0 --against weights/Baichuan2-7B-Chat --text wiki.txt --out b2-7b-q4_0-repaired",
    option("model", metavar="MODEL", help="a checkpoint whose matrices are in blocks with scales"),
    option("--against", metavar="REF", help="the float checkpoint that it was made of (default: the embedded model)"),
    option("--text", required=True, metavar="FILE", help="UTF-8 text, blank lines between documents"),
    option("--tokens", type=int, metavar="N", help="read only the first N tokens of it (default: all)"),
    option("--window", type=int, default=128, metavar="N", help="tokens that are run at a time (default: 128)"),
    option("--steps", type=int, default=200, metavar="N", help="how many (default: 200)"),
    option("--batch-size", type=int, default=8, metavar="N", help="windows of a step (default: 8)"),
    option("--learning-rate", type=float, default=2e-3, metavar="X", help="of the scales' factors (default: 2e-3)"),
    option("--seed", type=int, default=0, metavar="N", help="of the choice of windows (default: 0)"),
    option("--out", required=True, metavar="DIR", help="a new folder"),
    JSON,
)  # fmt: skip
def repair(arguments) -> int:
    """Train the scales of a quantized model towards the float model's predictions."""
    from pathlib import Path

    from golden.cost.reading import read_documents
    from refimpl.errors import InputError
    from refimpl.gradients.optimizer import AdamW
    from refimpl.gradients.repair import repair
    from refimpl.model import Model, load

    a = arguments
    model, teacher, out = load_model(a), load(a.against), Path(a.out)
    if out.exists():
        raise InputError(f"{out} is there already; choose another place or delete it")
    if min(a.steps, a.batch_size) < 1 or a.window < 2:
        raise InputError("steps and batch size are whole numbers from 1, and a window has two tokens at least")
    ids = read_documents(Path(a.text), teacher, a.tokens)
    rows = [teacher.token_ids(ids[i : i + a.window])[0] for i in range(0, len(ids) - a.window + 1, a.window)]
    if not rows:
        raise InputError(f"{a.text} has {len(ids)} tokens, fewer than one window of {a.window}; use a smaller one")
    optimizer = AdamW(learning_rate=a.learning_rate, weight_decay=0.0)
    weights, losses = repair(model, teacher, rows, None, optimizer, a.steps, a.batch_size, a.seed)
    Model(model.config, weights, model.folder).save(out)
    if a.json:
        print(json.dumps({"out": a.out, "losses": losses}))
        return 0
    print(f"{len(losses)} steps: the KL divergence went from {losses[0]:.5f} to {losses[-1]:.5f} nats on the text; "
          f"judge the model in {a.out} by another text with refimpl quality --against")  # fmt: skip
    return 0
