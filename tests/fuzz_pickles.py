"""Mutates PyTorch files and loads them: an InputError or a model's weights, in bounded time and memory, nothing else.

    python tests/fuzz_pickles.py --seconds 60

The mutator knows the layers (bytes of the file, fields of the zip records, opcodes of the pickle, names and values of
its tensors) and repairs the checksum of the pickle, so that mutations reach the machine. What is read goes through
`refimpl.checkpoint.resolve.resolve`, as `load` does it. A case that fails is written to a file and named.
"""

import argparse
import random
import re
import sys
import tempfile
import time
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch_bytes as tb
from torch_bytes import EMPTY, call, name, pickled, saved, saved_legacy, storage, tensor, value

from refimpl import InputError
from refimpl.checkpoint.pickles import ACTIONS
from refimpl.checkpoint.resolve import expected_shapes, resolve
from refimpl.checkpoint.torch_files import NAMES, REPEATED, read_torch
from refimpl.config import config_from_keys

PAIRS = [*NAMES, ("os", "system"), ("torch", "load"), ("builtins", "getattr")]
SLOW = 2.0  # seconds that no file of this size may take
MEMORY = 64 << 20  # bytes that it may take
CONFIG = config_from_keys({
    "model_type": "baichuan", "vocab_size": 4, "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1,
    "num_attention_heads": 1, "max_position_embeddings": 4,
})  # fmt: skip
STATE = b'{"quant_type": "nf4", "shape": [2, 2], "blocksize": 64, "dtype": "float16"}'
STORAGES = {"0": (4, bytes(range(16))), "1": (4, bytes(range(16))), "2": (len(STATE), STATE),
            "3": (16, bytes(range(16))), "4": (16, bytes(range(16)))}  # fmt: skip
ENDS = [".weight", ".data", ".quant_state", ".quant_state.bitsandbytes__nf4", ".absmax", ".quant_map", ".SCB"]
INTERESTING = [0, 1, 2, 4, 15, 16, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1]


def seeds() -> list[bytes]:
    """Good pickles of every kind over the storages "0" and "1", which cases start from."""
    a, b = (tensor(storage(key)) for key in "01")
    parameter = call(name("torch._utils", "_rebuild_parameter"), a, True, EMPTY)
    size = call(name("torch", "Size"), (2, 2))
    quant_state = [a, size, name("torch", "float16"), 64, [a, [b, 256, False, None]], "nf4"]
    metadata = value({"_metadata": {"": {"version": 1}}}) + b"b"
    tied = tb.PROTO + b"}(" + value("a") + a + b"q\0" + value("b") + b"h\0" + value("c") + b + b"u."
    plain = {"a": a, "b": b}
    quantized = {"a.data": parameter, "a.quant_state": quant_state}
    whole = {n: tensor(size=s, stride=(0, 1)[-len(s) :]) for n, s in expected_shapes(CONFIG).items()}
    again = tb.PROTO + EMPTY + value(plain)[1:] + metadata + tb.STOP
    return [pickled(plain), pickled(quantized), tied, again, pickled(whole)]


def quantized(rng: random.Random) -> bytes:
    """A pickle of quantized matrices as bitsandbytes leaves them, whose names may claim each other's parts."""
    wide = rng.random() < 0.2  # few bytes, expanded to gigabytes
    raw, one, table = storage("4", "uint8", 16), tensor(size=(1,), stride=(1,)), tensor(size=(16,), stride=(0,))
    codes = tensor(raw, 0, (2**30, 1), (0, 0)) if wide else tensor(raw, 0, (2, 1), (1, 1))
    size = call(name("torch", "Size"), (2**15, 2**16) if wide else (2, 2))
    scales = tensor(size=(2**25,), stride=(0,)) if wide else one
    state = [scales, size, name("torch", "float16"), 64, None, "nf4", table]
    text = tensor(storage("2", "uint8", len(STATE)), 0, (len(STATE),), (1,))
    signed, order = tensor(storage("3", "int8", 16)), codes if wide else tensor(raw, 0, (1,), (1,))
    matrices = {}
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice(("m", "model.layers.0.mlp.up_proj")) + "".join(rng.choices(ENDS, k=rng.randrange(3)))
        matrices |= rng.choice((
            {f"{at}.data": codes, f"{at}.quant_state": state},
            {at: codes, f"{at}.quant_state.bitsandbytes__nf4": text, f"{at}.absmax": one, f"{at}.quant_map": table},
            {f"{at}.weight": signed, f"{at}.SCB": tensor(size=(2,), stride=(1,)), f"{at}.weight_format": order},
        ))  # fmt: skip
    if rng.random() < 0.3:
        matrices = {key: matrices[key] for key in rng.sample(sorted(matrices), rng.randint(1, len(matrices)))}
    return pickled(matrices)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few edits: of numbers in pickles and zip records, or bytes, opcodes, names, cuts and copies anywhere."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data))
        match rng.randrange(10):
            case 0 | 1 if numbers := [m.end() for m in re.finditer(rb"\x8a\x09", data)]:
                at = rng.choice(numbers)
                data[at : at + 9] = (rng.choice((-1, 0, 1)) + rng.choice(INTERESTING)).to_bytes(
                    9, "little", signed=True
                )
            case 2 if records := [m.start() for m in re.finditer(rb"PK[\1-\7]", data)]:
                at, width = rng.choice(records) + rng.randrange(4, 56), rng.choice((1, 2, 4))
                data[at : at + width] = (rng.choice(INTERESTING) % (1 << 8 * width)).to_bytes(width, "little")
            case 3:
                data[at] ^= 1 << rng.randrange(8)
            case 4:
                data[at] = rng.choice(list(ACTIONS))[0]
            case 5:
                data[at:at] = rng.choice(list(ACTIONS))
            case 6:
                data[at:at] = rng.choice((name(*rng.choice(PAIRS)), value(rng.choice(INTERESTING)), rng.randbytes(1)))
            case 7:
                del data[at : at + rng.randint(1, 8)]
            case 8:
                data[at:at] = data[at : at + rng.randint(1, 40)] * rng.choice((1, 1, 2, 50))
            case _:
                source = rng.randrange(len(data))
                data[at:at] = data[source : source + rng.randint(1, 60)]
    return bytes(data)


def case(rng: random.Random) -> bytes:
    """One file: the pickle is mutated and well packed, or all of the file is, or nothing."""
    pickle = rng.choice((*seeds(), quantized(rng), quantized(rng)))
    held = {key: content for key, content in STORAGES.items() if value(key) in pickle}
    pack = rng.choice((
        lambda p: saved(p, {key: content for key, (_, content) in held.items()}, flags=rng.choice((0, 8))),
        lambda p: saved_legacy(p, held),
    ))  # fmt: skip
    if rng.random() < 0.2:
        return pack(pickle)
    return pack(mutate(pickle, rng)) if rng.random() < 0.6 else mutate(pack(pickle), rng)


def check(content: bytes) -> bool:
    """True if the file is read, False if it is refused in one line; anything else is an error."""
    try:
        tensors = read_torch(np.frombuffer(content, np.uint8))
        with suppress(InputError):
            resolve(CONFIG, tensors)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 2000, "the message is not one short line"
        return False
    for entry in tensors.values():
        if isinstance(entry, np.ndarray):
            assert entry.nbytes <= max(len(content), REPEATED), "a tensor is larger than its file may make it"
            entry[tuple(slice(None, None, max(1, n - 1)) for n in entry.shape)].tobytes()  # touches every corner
            if entry.nbytes <= len(content):
                entry.tobytes()  # touches every byte
    return True


def fuzz(seconds: float, seed: int | None = None) -> int:
    """How many cases were run. Raises what a case raised, naming the file that the case was written to."""
    rng = random.Random(seed)
    started, cases, read = time.perf_counter(), 0, 0
    tracemalloc.start()
    while (began := time.perf_counter()) - started < seconds:
        content = case(rng)
        try:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            read += check(content)
            assert tracemalloc.get_traced_memory()[1] - before < MEMORY, "it took too much memory"
            assert time.perf_counter() - began < SLOW, "it took too long"
        except Exception as error:
            kept = Path(tempfile.gettempdir()) / f"fuzz-{zlib.crc32(content):08x}.bin"
            kept.write_bytes(content)
            raise AssertionError(f"case {cases}, kept as {kept}: {error!r}") from error
        cases += 1
    tracemalloc.stop()
    print(f"{cases} files in {time.perf_counter() - started:.0f} s: {read} read, {cases - read} refused in one line")
    return cases


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="makes the cases repeatable (default: new ones each time)")
    arguments = parser.parse_args()
    fuzz(arguments.seconds, arguments.seed)
    sys.exit(0)
