"""GGUF files as data: what they say, where their tensors lie, and what a damaged or hostile one costs."""

import struct
import time
import tracemalloc

import numpy as np
import pytest

from refimpl import InputError
from refimpl.gguf_files import KINDS, MOST_TEXTS, read_gguf


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def fact(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def written(path, facts=(), tensors=(), data: bytes = b"", version: int = 3, counts=None):
    """A GGUF file of these records, put together here and not by the reader's author alone: see the engine's below."""
    numbers = counts or (len(tensors), len(facts))
    raw = b"GGUF" + struct.pack("<IQQ", version, *numbers) + b"".join(facts) + b"".join(tensors)
    path.write_bytes(raw + bytes(-len(raw) % 32) + data)
    return path


WORDS = fact("words", 9, struct.pack("<IQ", 8, 2) + text("登") + text(""))
GOOD = dict(
    facts=[fact("a", 4, struct.pack("<I", 7)), WORDS, fact("scores", 9, struct.pack("<IQ2f", 6, 2, 0.5, -1))],
    tensors=[tensor("w", (2, 32), 2, 0), tensor("norm", (8,), 0, 64)],
    data=bytes(range(36)) + bytes(28) + np.arange(8, dtype="<f4").tobytes(),
)


def test_facts_and_tensors(tmp_path):
    found = read_gguf(written(tmp_path / "m.gguf", **GOOD))
    assert found.facts["a"] == 7 and found.facts["words"] == ["登", ""]
    assert found.facts["scores"].tolist() == [0.5, -1]
    w, norm = found.tensors["w"], found.tensors["norm"]
    assert (w.shape, w.kind, w.data.shape) == ((2, 32), "q4_0", (2, 18)) and w.data.reshape(-1).tolist() == [*range(36)]
    assert norm.data.view("<f4").tolist() == [*range(8)] and not norm.data.flags.writeable


def test_kinds_are_the_engine_s():
    gguf = pytest.importorskip("gguf")
    for number, kind in KINDS.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (theirs.name.lower(), *gguf.GGML_QUANT_SIZES[theirs]) == kind


def test_a_file_that_the_engine_wrote(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer, rng = gguf.GGUFWriter(tmp_path / "m.gguf", "baichuan"), np.random.default_rng(0)
    writer.add_context_length(64)
    writer.add_token_list(["<unk>", "登", "a"])
    writer.add_layer_norm_rms_eps(1e-6)
    values = rng.standard_normal((3, 256)).astype(np.float32)
    for kind in ("Q4_K", "Q8_0", "F16"):
        number = gguf.GGMLQuantizationType[kind]
        raw = values.astype(np.float16) if kind == "F16" else np.zeros((3, 144), np.uint8)
        raw = gguf.quants.quantize(values, number) if kind == "Q8_0" else raw
        writer.add_tensor(kind, raw, raw_dtype=None if kind == "F16" else number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "m.gguf")
    assert found.facts["general.architecture"] == "baichuan" and found.facts["tokenizer.ggml.tokens"][1] == "登"
    assert {name: one.shape for name, one in found.tensors.items()} == dict.fromkeys(("Q4_K", "Q8_0", "F16"), (3, 256))
    assert (found.tensors["F16"].data.view("<f2") == values.astype("<f2")).all()
    kind = gguf.GGMLQuantizationType.Q8_0
    assert (found.tensors["Q8_0"].data == gguf.quants.quantize(values, kind)).all()


def test_a_model_in_several_files(tmp_path):
    def part(number, facts=(), **changes):
        return written(tmp_path / f"m-{number:05}-of-00002.gguf", **{**GOOD, "facts": facts, **changes})

    count = fact("split.count", 2, struct.pack("<H", 2))
    first = part(1, [count])
    with pytest.raises(InputError, match=r"m-00002-of-00002\.gguf is missing"):
        read_gguf(first)
    second = part(2, [count], tensors=[tensor("v", (2, 32), 2, 0)])
    assert set(read_gguf(first).tensors) == {"w", "norm", "v"}
    with pytest.raises(InputError, match="give the first"):
        read_gguf(second)
    part(2, [count])
    with pytest.raises(InputError, match="has norm, w once more"):
        read_gguf(first)
    part(1, [count, fact("split.tensors.count", 4, struct.pack("<I", 5))])
    part(2, [count], tensors=[tensor("v", (2, 32), 2, 0)])
    with pytest.raises(InputError, match="have 3 tensors, expected 5"):
        read_gguf(first)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(version=4), "version is 4, expected 2 or 3"),
        (dict(counts=(1 << 40, 0)), "has 1099511627776 tensors"),
        (dict(counts=(0, 1 << 40)), "has 1099511627776 facts"),
        (dict(facts=[fact("a", 0, b"\1")] * 2), "says 'a' twice"),
        (dict(facts=[fact("a", 77, b"")]), "kind 77"),
        (dict(facts=[fact("a", 9, struct.pack("<IQ", 9, 1))]), "lists of lists"),
        (dict(facts=[fact("a", 9, struct.pack("<IQ", 8, 1 << 60))]), "expected at most"),
        (dict(facts=[fact("a", 9, struct.pack("<IQ", 6, 1 << 60))]), "ends within"),
        (dict(facts=[fact("a", 8, struct.pack("<Q", 1 << 62))]), "ends within"),
        (dict(facts=[fact("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")]), "not UTF-8"),
        (dict(facts=[fact("general.alignment", 4, struct.pack("<I", 24))]), "expected a power of two"),
        (dict(tensors=[tensor("w", (2, 33), 2, 0)]), "a multiple of 32"),
        (dict(tensors=[tensor("w", (1 << 41,), 0, 0)]), "has shape"),
        (dict(tensors=[tensor("w", (2, 32), 5, 0)]), "of kind 5"),
        (dict(tensors=[tensor("w", (1,) * 5, 0, 0)]), "5 dimensions"),
        (dict(tensors=[tensor("w\x1b[2J", (2, 32), 2, 0)]), "is called"),
        (dict(tensors=[tensor("w", (2, 32), 2, 0), tensor("v", (2, 32), 2, 32)]), "within another"),
        (dict(tensors=[tensor("w", (2, 32), 2, 8)]), "not aligned"),
        (dict(tensors=[tensor("w", (2000, 32), 2, 0)]), "cut short"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, changes, said):
    with pytest.raises(InputError, match=said) as error:
        read_gguf(written(tmp_path / "m.gguf", **{**GOOD, **changes}))
    assert str(error.value).isprintable()


def test_no_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(InputError, match="not a GGUF file"):
        read_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"")
    for path in (tmp_path / "m.gguf", tmp_path / "gone.gguf", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            read_gguf(path)


def test_cut_and_changed_anywhere(tmp_path):
    """Whatever byte is changed, and wherever the file ends: a line, or an answer whose tensors lie in the file."""
    whole, path = written(tmp_path / "m.gguf", **GOOD).read_bytes(), tmp_path / "damaged.gguf"
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        with pytest.raises(InputError):
            read_gguf(path)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole) - 100, rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            found = read_gguf(path)
        except InputError as error:
            assert str(error).isprintable()
        else:
            assert all(one.data.size <= len(whole) for one in found.tensors.values())


def test_a_hostile_header_is_refused_in_seconds_and_in_little_memory(tmp_path):
    worst = [fact("a", 9, struct.pack("<IQ", 8, MOST_TEXTS) + bytes(8 * MOST_TEXTS))]
    path = written(tmp_path / "m.gguf", facts=worst, tensors=[tensor("w", (2, 32), 2, 8)])
    tracemalloc.start()
    with pytest.raises(InputError):
        read_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    start = time.process_time()
    with pytest.raises(InputError):
        read_gguf(path)
    assert time.process_time() - start < 10, "half a second, on a machine that does nothing else"
