"""PyTorch's files without PyTorch: what they hold is read bit for bit, and what they try is refused by name."""

import builtins
import importlib
import io
import json
import os
import pickletools
import struct
import sys
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch_bytes as tb
from conftest import write_checkpoint
from fuzz_pickles import fuzz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch_bytes import (
    EMPTY,
    MARK,
    PROTO,
    STOP,
    archive,
    call,
    name,
    pickled,
    saved,
    state_dict,
    storage,
    tensor,
    value,
)

import refimpl
from refimpl import InputError
from refimpl.checkpoint.folder import read_checkpoint
from refimpl.checkpoint.pickles import ACTIONS, PICKLE_LIMIT
from refimpl.checkpoint.safetensors_files import map_safetensors
from refimpl.checkpoint.torch_files import DTYPES, STORAGE_TYPES, map_torch, read_torch
from refimpl.cli import main


@pytest.fixture
def mapped(tmp_path):
    """bytes -> what `map_torch` makes of a file of them."""

    def read(content: bytes):
        (tmp_path / "x.bin").write_bytes(content)
        return map_torch(tmp_path / "x.bin")

    return read


def test_recorded_files_equal_their_safetensors(shared):
    files = sorted(shared.glob("models/*/*.bin"))
    assert len(files) == 6
    for path in files:
        tensors = map_torch(path)
        if not (path.parent / "model.safetensors").exists():  # the 4-bit one, which test_bitsandbytes reads
            continue
        expected = map_safetensors(path.parent / "model.safetensors")
        assert tensors.keys() == expected.keys()
        for key, array in expected.items():
            assert (tensors[key].dtype, tensors[key].shape) == (array.dtype, array.shape)
            assert tensors[key].tobytes() == array.tobytes(), f"{path} {key}"


@pytest.mark.parametrize("stored", sorted(STORAGE_TYPES.values()))
def test_every_number_format(mapped, stored):
    expected = np.arange(24).reshape(2, 3, 4).astype(DTYPES[stored])
    found = mapped(
        state_dict({"a.weight": expected, "none": expected[:0], "scalar": np.array(7).astype(DTYPES[stored])})
    )
    assert found["a.weight"].dtype == expected.dtype and np.array_equal(found["a.weight"], expected)
    assert found["none"].shape == (0, 3, 4) and found["scalar"].shape == () and found["scalar"] == DTYPES[stored](7)
    assert not found["a.weight"].flags.writeable


def test_untyped_storages(mapped):
    raw = value(("storage", name("torch.storage", "UntypedStorage"), "0", "cpu", 16)) + b"Q"
    make = name("torch._utils", "_rebuild_tensor_v3")
    for dtype, count in (("uint16", 8), ("float8_e4m3fn", 16), ("uint64", 2)):
        view = call(make, raw, 0, (count,), (1,), False, EMPTY, name("torch", dtype))
        found = mapped(saved(pickled({"a": view})))["a"]
        assert found.dtype == DTYPES[dtype] and found.tobytes() == bytes(range(16))
        with pytest.raises(InputError, match="does not fit"):
            mapped(saved(pickled({"a": view.replace(value((count,)), value((count + 1,)))})))


def test_views_share_their_storage(mapped):
    whole = np.frombuffer(bytes(range(16)), np.float32)
    views = {
        "whole": tensor(size=(4,), stride=(1,)),
        "transposed": tensor(stride=(1, 2)),
        "every other": tensor(size=(2,), stride=(2,)),
        "last": tensor(offset=3, size=(), stride=()),
        "parameter": call(name("torch._utils", "_rebuild_parameter"), tensor(), True, EMPTY),
        "expanded": tensor(offset=1, size=(3, 5), stride=(1, 0)),
        "windows": tensor(size=(3, 2), stride=(1, 1)),
        "vast": tensor(size=(2**15, 2**15), stride=(0, 0)),
    }
    found = mapped(saved(pickled(views)))
    expected = {"whole": whole, "transposed": whole.reshape(2, 2).T, "every other": whole[::2], "last": whole[3],
                "parameter": whole.reshape(2, 2), "expanded": np.repeat(whole[1:], 5).reshape(3, 5),
                "windows": whole[[[0, 1], [1, 2], [2, 3]]]}  # fmt: skip
    for key, array in expected.items():
        assert np.array_equal(found[key], array)
    assert np.shares_memory(found["whole"], found["transposed"])
    assert found["vast"].nbytes == 4 << 30 and found["vast"][-1, -1] == whole[0], "no memory is taken for it"


def test_a_tied_tensor_is_stored_once(mapped):
    """The pickle fetches the second from its memo."""
    content = MARK + value("embed") + tensor() + b"q\0" + value("head") + b"h\0" + b"u"
    found = mapped(saved(PROTO + b"}" + content + STOP))
    assert np.shares_memory(found["embed"], found["head"]) and np.array_equal(found["embed"], found["head"])


def test_the_legacy_layout(mapped):
    content = tb.saved_legacy(pickled({"a": tensor(storage("0", "float32", 4, None), 1, (3,), (1,))}))
    assert np.array_equal(mapped(content)["a"], np.frombuffer(bytes(range(16)), np.float32)[1:])


def test_a_misaligned_member(mapped):
    """PyTorch aligns storages; who packs an archive again may not."""
    for pad in range(8):
        members = {"m/data.pkl": pickled({"a": tensor()}), "m/version": bytes(pad), "m/data/0": bytes(range(16))}
        assert mapped(archive(members))["a"].tobytes() == bytes(range(16))


def test_a_bin_loads_as_its_safetensors(tmp_path, family):
    folder = write_checkpoint(tmp_path / "whole", family)
    tensors = load_file(folder / "model.safetensors")
    expected = refimpl.load(folder)([5, 17, 9])
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    assert np.array_equal(refimpl.load(folder)([5, 17, 9]), expected), "safetensors come first"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(state_dict(tensors))
    assert np.array_equal(refimpl.load(folder)([5, 17, 9]), expected)

    (folder / "pytorch_model.bin").unlink()
    places = {key: f"pytorch_model-0000{k % 2 + 1}-of-00002.bin" for k, key in enumerate(tensors)}
    for shard in set(places.values()):
        (folder / shard).write_bytes(state_dict({k: a for k, a in tensors.items() if places[k] == shard}))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert np.array_equal(refimpl.load(folder)([5, 17, 9]), expected)


def test_a_step_s_folder_in_the_cache(tmp_path, capsys):
    """The intermediate checkpoints lie one level deeper in Hugging Face's cache, and link to the same blobs."""
    cache = tmp_path / "models--baichuan-inc--Baichuan2-7B-Intermediate-Checkpoints"
    step = write_checkpoint(cache / "snapshots" / "abc" / "train_00220B", "Baichuan2-7B")
    (cache / "blobs").mkdir()
    (step / "model.safetensors").rename(cache / "blobs" / "1")
    (step / "model.safetensors").symlink_to("../../../blobs/1")
    refimpl.load(step)
    for folder in (cache, cache / "snapshots" / "abc"):
        assert main(["info", str(folder)]) == 0
        assert "train_00220B: after 220 billion tokens" in capsys.readouterr().out
    (step / "model.safetensors").unlink()
    (step / "model.safetensors").symlink_to(tmp_path / "blobs" / "1")
    (cache / "blobs").rename(tmp_path / "blobs")
    with pytest.raises(InputError, match="is not a file of this folder"):
        refimpl.load(step)


def test_links_stay_inside(tmp_path):
    """As Hugging Face's cache has them, and no further."""
    home = tmp_path / "models--x" / "snapshots" / "1"
    folder = write_checkpoint(home, "Baichuan2-7B")
    (tmp_path / "models--x" / "blobs").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "models--x" / "blobs" / "abc")
    (folder / "model.safetensors").symlink_to("../../blobs/abc")
    refimpl.load(folder)
    (tmp_path / "models--x" / "blobs" / "abc").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is not a file of this folder"):
        read_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(InputError, match="is not a file of this folder"):
        read_checkpoint(folder)


# What has been used against readers of pickles, none of it armed: the commands would be `true`.


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


OS_SYSTEM = name("os", "system")
IN = {
    "GLOBAL os.system": (OS_SYSTEM + value(("true",)) + b"R", "names 'os' 'system'"),
    "GLOBAL under its other name": (name("posix", "system") + value(("true",)) + b"R", "names 'posix' 'system'"),
    "GLOBAL builtins.eval": (name("builtins", "eval"), "names 'builtins' 'eval'"),
    "GLOBAL getattr chain": (call(name("builtins", "getattr"), name("os", "x"), "system"), "names 'builtins' 'ge"),
    "GLOBAL operator.attrgetter": (name("operator", "attrgetter"), "names 'operator'"),
    "GLOBAL functools.partial": (name("functools", "partial"), "names 'functools'"),
    "GLOBAL dotted attribute": (name("torch", "serialization.os.system"), "names 'torch' 'serialization.os.system'"),
    "GLOBAL dotted into an allowed one": (name("collections", "OrderedDict.__init__"), "names 'collections' 'Ordered"),
    "GLOBAL module with the attribute in it": (name("torch._utils._rebuild_tensor_v2", "__globals__"), "names 'torch"),
    "GLOBAL allowed halves of two pairs": (name("torch", "OrderedDict"), "names 'torch' 'OrderedDict'"),
    "GLOBAL in other case": (name("Torch", "FloatStorage"), "names 'Torch'"),
    "GLOBAL with a trailing blank": (name("torch ", "FloatStorage"), "names 'torch ' 'FloatStorage'"),
    "GLOBAL with a carriage return": (name("torch", "FloatStorage\r"), r"names 'torch' 'FloatStorage\\r'"),
    "GLOBAL with a look-alike letter": (name("tоrch", "FloatStorage"), r"names 't\\u043erch'"),
    "GLOBAL with a terminal's escape codes": (name("os\x1b[2K", "system"), r"names 'os\\x1b"),
    "GLOBAL that does not end": (b"c" + b"o" * 5000, "does not end within"),
    "GLOBAL not UTF-8": (b"c\xff\n\n", "not UTF-8"),
    "GLOBAL torch.load": (name("torch", "load"), "names 'torch' 'load'"),
    "GLOBAL torch.storage._load_from_bytes": (name("torch.storage", "_load_from_bytes"), "names 'torch.storage'"),
    "GLOBAL torch._utils._rebuild_device_tensor": (name("torch._utils", "_rebuild_device_tensor_from_numpy"), "names"),
    "GLOBAL torch.jit": (name("torch.jit", "load"), "names 'torch.jit'"),
    "GLOBAL torch inductor": (name("torch._inductor.codecache", "compile_file"), "names 'torch._inductor"),
    "GLOBAL numpy's reconstruct": (name("numpy.core.multiarray", "_reconstruct"), "names 'numpy.core.multiarray'"),
    "GLOBAL runpy": (name("runpy", "_run_code"), "names 'runpy'"),
    "GLOBAL pip.main": (name("pip", "main"), "names 'pip'"),
    "GLOBAL asyncio subprocess": (name("asyncio.unix_events", "_UnixSubprocessTransport._start"), "names 'asyncio"),
    "GLOBAL importlib": (name("importlib", "import_module"), "names 'importlib'"),
    "STACK_GLOBAL": (short("os") + short("system") + b"\x93", "names 'os' 'system'"),
    "STACK_GLOBAL of known strings": (value("os") + value("system") + b"\x93", "names 'os' 'system'"),
    "STACK_GLOBAL through the memo": (value("os") + b"q\0" + value("system") + b"q\1h\0h\1\x93", "names 'os' 'system'"),
    "STACK_GLOBAL of a number": (b"K\1K\2\x93", "has a int where a str is needed"),
    "INST": (MARK + value("true") + b"ios\nsystem\n", "opcode INST"),
    "OBJ": (MARK + name("torch", "Size") + value("true") + b"o", "opcode OBJ"),
    "NEWOBJ": (name("torch", "Size") + b")\x81", "opcode NEWOBJ"),
    "NEWOBJ_EX": (name("torch", "Size") + b")}\x92", "opcode NEWOBJ_EX"),
    "EXT1": (b"\x82\x01", "opcode EXT1"),
    "EXT2": (b"\x83\x01\0", "opcode EXT2"),
    "EXT4": (b"\x84\x01\0\0\0", "opcode EXT4"),
    "PERSID": (b"Pos.system\n", "opcode PERSID"),
    "BINPERSID of something else": (value(("module", "os")) + b"Q", "persistent id is not that of a storage"),
    "BINPERSID of a string": (value("storage") + b"Q", "a str where a tuple is needed"),
    "BINPERSID with a name for a type": (value(("storage", "os.system", "0", "cpu", 4)) + b"Q", "persistent id is not"),
    "BINPERSID of a view of a view": (storage("0", "float32", 4, ("1", 0, 4)), "persistent id is not"),
    "BUILD __setstate__ on a tensor": (tensor() + value({"_metadata": 1}) + b"b", "a TensorView where a dict"),
    "BUILD __dict__": (EMPTY + value({"__class__": 1}) + b"b", "sets the attributes '__class__'"),
    "BUILD slots": (EMPTY + value((None, {"x": 1})) + b"b", "a tuple where a dict is needed"),
    "BUILD on a constructor": (name("torch", "Size") + value({}) + b"b", "a Constructor where a dict is needed"),
    "REDUCE of a string": (value("os.system") + b")R", "a str where a Constructor is needed"),
    "REDUCE of a type": (name("torch", "FloatStorage") + b")R", "a StorageType where a Constructor is needed"),
    "REDUCE of a dtype": (name("torch", "float32") + b")R", "where a Constructor is needed"),
    "REDUCE with a list": (name("torch", "Size") + b"]R", "a list where a tuple is needed"),
    "REDUCE of a result": (EMPTY + b")R", "a dict where a Constructor is needed"),
    "REDUCE OrderedDict of pairs": (call(name("collections", "OrderedDict"), [("a", 1)]), "made with arguments"),
    "REDUCE Size of a list": (call(name("torch", "Size"), [1]), "something else than a tuple"),
    "tensor with hooks": (tensor(hooks=value({"0": 1})), "no hooks"),
    "tensor of a path": (call(tb.REBUILD, "/etc/passwd", 0, (2,), (1,), False, EMPTY), "made of other things"),
    "tensor with metadata": (call(tb.REBUILD, storage(), 0, (2,), (1,), False, EMPTY, {"a": 1}), "made of other"),
    "parameter of a list": (call(name("torch._utils", "_rebuild_parameter"), [], True, EMPTY), "made of other things"),
    "tensor too long": (tensor(size=(5,), stride=(1,)), "does not fit into storage"),
    "tensor too far": (tensor(offset=1), "does not fit into storage"),
    "tensor far and empty": (tensor(offset=5, size=(0,), stride=(1,)), "does not fit into storage"),
    "tensor at a negative place": (tensor(offset=-1), "not numbers from 0 on"),
    "tensor of negative size": (tensor(size=(-1, -4)), "not numbers from 0 on"),
    "tensor of negative stride": (tensor(offset=3, stride=(-2, -1)), "not numbers from 0 on"),
    "tensor whose size overflows": (tensor(size=(2**32, 2**32), stride=(2**32, 1)), "does not fit into storage"),
    "tensor whose stride overflows": (tensor(stride=(2**61, 2**61)), "not numbers from 0 on"),
    "tensor beyond 64 bits": (tensor(size=(2**64, 1)), "not numbers from 0 on"),
    "tensor that grows by stride 0": (tensor(size=(2**30 + 1,), stride=(0,)), "repeats 4 elements beyond 4 GiB"),
    "tensor empty and vast": (tensor(size=(0, 2**40, 2**40), stride=(1, 1, 1)), "does not fit into storage"),
    "tensor empty with a vast stride": (tensor(size=(0, 1), stride=(1, 2**61)), "not numbers from 0 on"),
    "tensor of many dimensions": (tensor(size=(1,) * 9, stride=(1,) * 9), "in up to 8 pairs"),
    "tensor with a stride too few": (tensor(stride=(1,)), "not numbers"),
    "tensor with a flag for a size": (tensor(size=(True, 1)), "not numbers"),
    "tensor of floats for sizes": (tensor(size=(1.0, 1)), "not numbers"),
    "storage of two formats": ([tensor(), tensor(storage("0", "int32", 4))], "had others before"),
    "storage of negative length": (tensor(storage("0", "float32", -4)), "had others before"),
    "storage that is not there": (tensor(storage("1")), "has no bytes"),
    "storage on another path": (tensor(storage("../data.pkl")), "has no bytes"),
    "storage longer than its member": (tensor(storage("0", "float32", 2**40)), "has 16 bytes in the archive, expected"),
    "storage shorter than its member": (tensor(storage("0", "float32", 3), size=(3,), stride=(1,)), "expected 12"),
    "LONG4": (b"\x8b" + struct.pack("<i", 2**31 - 1), "opcode LONG4"),
    "LONG1 of many digits": (b"\x8a\xff" + b"\x7f" * 255, "integer of 255 bytes"),
    "LONG in text, quadratic": (b"L" + b"9" * 10000 + b"L\n", "opcode LONG"),
    "INT in text": (b"I01\n", "opcode INT"),
    "STRING with an escape": (b"S'\\x6f'\n", "opcode STRING"),
    "UNICODE with an escape": (b"V\\u006f\n", "opcode UNICODE"),
    "FRAME that lies": (b"\x95" + struct.pack("<Q", 2**63), "frame is longer than the pickle"),
    "BINBYTES8 beyond the file": (b"\x8e" + struct.pack("<Q", 2**62), "opcode BINBYTES8"),
    "BYTEARRAY8 of terabytes": (b"\x96" + struct.pack("<Q", 2**40), "opcode BYTEARRAY8"),
    "NEXT_BUFFER": (b"\x97", "opcode NEXT_BUFFER"),
    "BINUNICODE beyond the file": (b"X\xff\x0f\0\0a", "ends in the middle"),
    "BINUNICODE of gigabytes": (b"X\xff\xff\xff\xff", "a string of 4294967295 bytes"),
    "BINUNICODE not UTF-8": (b"X\1\0\0\0\xff", "not UTF-8"),
    "BINUNICODE of half a surrogate pair": (b"X\3\0\0\0\xed\xa0\x80", "not UTF-8"),
    "memo bomb": (b"N" + b"r\xff\xff\xff\x7f", "memo goes from 0 to 2147483647"),
    "memo set twice": (b"Nq\0q\0", "memo goes from 1 to 0"),
    "memo of nothing": (b"(q\0", "from an empty stack"),
    "memo fetched before it is set": (b"h\7", "fetches memo 7 of 0"),
    "MEMOIZE": (b"]\x94h\0", "uses one list twice"),
    "DUP": (b"N2", "opcode DUP"),
    "POP": (b"N0", "opcode POP"),
    "a list in itself": (b"]q\0h\0a", "uses one list twice"),
    "a tuple of itself": (b"]q\0(h\0t", "uses one list twice"),
    "billion laughs": (b"]q\0" + b"".join(b"(h%ch%ctq%c" % (i, i, i + 1) for i in range(100)), "uses one list twice"),
    "a tuple for a key": (b"})\x85Ns", "a tuple for a key"),
    "two values for one key": ({"x": value({"a": 1})[:-1] + value("a") + value(2) + b"u"}, "two values for 'a'"),
    "a key without a value": (b"}(" + value("a") + b"u", "a key without a value"),
    "a value below the mark": (b"](a", "from an empty stack"),
    "a mark that is not open": (b"Nt", "closes a mark"),
    "an empty stack": (b"a", "from an empty stack"),
    "deep tuples": (b")" + b"\x85" * 1000000, "more than two tuples"),
    "deep tuples between others": (b"(" * 9 + b"Nt" * 9, "more than two tuples"),
    "deep lists": ([tensor(), b"]" * 10 + b"a" * 9], "deeper than 3"),
    "many opcodes": (b"]" + tensor() + b"a" + b"Na" * 500000, "longer than 16"),
    "deep marks": (MARK * 100000, "more than 65536 values"),
    "deep stack": (b"N" * 100000, "more than 65536 values"),
    "wide lists": ([tensor(), [0] * 17], "longer than 16"),
    "a constructor in a list": ([tensor(), tb.REBUILD], "a list holds a Constructor"),
    "a storage in a list": ([1, storage()], "a list holds a Storage,"),
    "a storage's type in a tuple": ([tensor(), (name("torch", "FloatStorage"),)], "a list holds a StorageType"),
    "a dict in a list": ([{"b": tensor()}], "a list holds a dict"),
    "protocol 4": (b"\x80\4", "opcode PROTO"),
}  # fmt: skip


@pytest.fixture
def nothing_happens(monkeypatch):
    """Fails if anything is imported, opened or run while a file is read."""
    calls = []
    for module, attribute in ((os, "system"), (builtins, "eval"), (builtins, "exec"), (importlib, "import_module")):
        monkeypatch.setattr(module, attribute, lambda *a, what=attribute: calls.append(what))
    before = set(sys.modules)
    assert pickletools.__name__ in before, "which names a refused opcode"
    yield
    assert not calls and set(sys.modules) <= before


@pytest.mark.parametrize("trick", IN)
def test_what_a_pickle_may_not_do(mapped, nothing_happens, trick):
    content, message = IN[trick]
    started = time.process_time()
    with pytest.raises(InputError, match=message) as error:
        mapped(saved(pickled({"a": content})))
    said = str(error.value)
    assert said.isprintable() and len(said) < 600, "one line, without control codes from the file"
    assert time.process_time() - started < 2


def test_every_other_opcode_is_refused(mapped):
    for code in range(256):
        if bytes([code]) not in ACTIONS and code != ord("."):
            with pytest.raises(InputError, match="has the opcode"):
                mapped(saved(pickled({"a": bytes([code]) + bytes(16)})))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved(pickled({"a": tensor()}) + b"garbage"), "goes on for 7 bytes"),
        (saved(pickled({"a": tensor()}) + PROTO + OS_SYSTEM + b")R" + STOP), "goes on for"),
        (saved(PROTO + b"}}" + STOP), "stops with 2 values"),
        (saved(PROTO + b"}(" + STOP), "1 marks"),
        (saved(PROTO + STOP), "stops with 0 values"),
        (saved(b"}."), "protocol 2"),
        (saved(PROTO + b"}"), "ends in the middle"),
        (saved(pickled([tensor()])), "it holds a list"),
        (saved(pickled({"model": {"a": tensor()}, "module": {"a": tensor()}})), "'model' is a dict"),
        (saved(pickled({"model": {"a": {"b": tensor()}}})), "'a' is a dict"),
        (saved(pickled({"model": {"a": tensor()}, "b": tensor()})), "'model' is a dict"),
        (saved(b" " * (PICKLE_LIMIT + 1)), "expected at most"),
        (saved(pickled({"a": tensor()}), method=8), "is compressed"),
        (saved(pickled({"a": tensor()}), flags=1), "encrypted"),
        (saved(pickled({"a": tensor()}), flags=0x20), "flags 0x20"),
        (saved(PROTO + b"}" + b"K\1" * PICKLE_LIMIT), "expected at most"),
        (tb.saved_legacy(PROTO + b"]" + b"K\1a" * PICKLE_LIMIT), "the pickle has more than 1048576"),
        (saved(pickled({"a": tensor()}), local_name=b"m/other.pkl"), "two headers"),
        (saved(pickled({"a": tensor()}), local_size=3), "two headers"),
        (saved(pickled({"a": tensor()}), local_crc=3), "two headers"),
        (saved(pickled({"a": tensor()}), local_crc=3, entry_crc=3), "not what its checksum says"),
        (saved(pickled({"a": tensor()}), entry_packed=3), "is compressed"),
        (saved(pickled({"a": tensor()}), entry_offset=0), "a gap or overlap"),
        (saved(pickled({"a": tensor()}), entry_size=2**31, entry_packed=2**31, local_size=2**31, local_packed=2**31),
         "ends at byte"),
        (saved(pickled({"a": tensor()}), entry_size=2**32 - 1), "lacks the zip64 record"),
        (saved(pickled({"a": tensor()}), entry_extra=b"up\1\0x"), "extra records"),
        (saved(pickled({"a": tensor()}), entry_mode=0o120777 << 16), "is a link"),
        (saved(pickled({"a": tensor()}), entry_comment=1), "is a link, commented"),
        (saved(pickled({"a": tensor()}), entry_name=b"m/../data.pkl", local_name=b"m/../data.pkl"), "not a name"),
        (saved(pickled({"a": tensor()}), entry_name=b"m/\xff", local_name=b"m/\xff"), "not UTF-8"),
        (saved(pickled({"a": tensor()}), end_count=2), "directory's 2 entries"),
        (saved(pickled({"a": tensor()}), end_count=40000), "has 40000 members, expected at most 32768"),
        (saved(pickled({"a": tensor()}), end_comment=b"x" * 22), "no end record"),
        (b"x" + saved(pickled({"a": tensor()})), "begins with b'xPK"),
        (saved(pickled({"a": tensor()})) + b"x", "no end record"),
        (saved(pickled({"a": tensor()}))[:-30], "no end record"),
        (saved(pickled({"a": tensor()}))[:-2] + b"\1\0", "split over disks or has a comment"),
        (saved(pickled({"a": tensor()}))[:-18] + b"\1" + saved(pickled({"a": tensor()}))[-17:], "split over disks"),
        (saved(pickled({"a": tensor()}), flags=8)[: -30] + bytes(30), "no end record"),
        (archive({"m/data.pkl": pickled({}), "n/data.pkl": pickled({})}), "expected the members of one torch.save"),
        (archive({"m/data.pkl": pickled({}), "m/code/x.py": b""}), "torch.save writes no such member"),
        (archive({"m/data.pkl": pickled({}), "m/byteorder": b"big"}), "little-endian"),
        (archive({"m/data.pkl": pickled({}), "m/version": b"3" * 65}), "'m/version' has more than 64 bytes"),
        (archive({"m/data.pkl": pickled({}), "m/.hidden": b""}), "'m/.hidden'; torch.save writes no such member"),
        (saved(pickled({}), {"7": archive({"x": b"y"})}), "'m/data/7'; torch.save writes no such member"),
        (archive({"m/x": b""}), "expected the members of one torch.save"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(40), "begins with b'7z"),
        (b"\x1f\x8b" + bytes(40), "expected a zip archive or a pickle"),
        (b"Rar!" + bytes(40), "expected a zip archive or a pickle"),
        (b"", "cannot read"),
        (b"PK\3\4", "ends inside its end record"),
        (tb.saved_legacy(pickled({"a": tensor()}), magic=value(7)), "magic number"),
        (tb.saved_legacy(pickled({"a": tensor()}), magic=OS_SYSTEM + b")R"), "names 'os' 'system'"),
        (tb.saved_legacy(pickled({"a": tensor()}), keys=["1"]), "the list of storages"),
        (tb.saved_legacy(pickled({"a": tensor()}), keys=["0", "0"]), "the list of storages"),
        (tb.saved_legacy(pickled({"a": tensor()}), keys=[0]), "the list of storages"),
        (tb.saved_legacy(pickled({"a": tensor()}), {"0": (5, bytes(20))}), "has 5 elements"),
        (tb.saved_legacy(pickled({"a": tensor()}), {"0": (4, bytes(15))}), "or is cut"),
        (tb.saved_legacy(pickled({"a": tensor()}), {"0": (4, bytes(17))}), "goes on for 1 bytes"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_be(mapped, content, message):
    with pytest.raises(InputError, match=message) as error:
        mapped(content)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("padding", [b"", b"FB\0\0", b"FB\5\0ZZZZZ"])
@pytest.mark.parametrize(
    ("record", "changed"),
    [
        (b"", {}),
        (lambda n: (1, 16, n, n), dict(local_size=2**32 - 1, local_packed=2**32 - 1)),
        (lambda n: (1, 16, n, n), {}),
        (lambda n: (1, 16, n, 0), dict(flags=8, local_crc=0, local_size=0, local_packed=0)),
        (lambda n: (1, 8, 0), {}),
        (lambda n: (1, 24, n, n, 0), dict(local_size=2**32 - 1, local_packed=2**32 - 1)),
    ],
)
def test_what_a_local_header_may_say_besides(mapped, record, changed, padding):
    pickle = pickled({})
    extra = record and struct.pack(f"<HH{len(record(0)) - 2}Q", *record(len(pickle)))
    assert mapped(archive({"m/data.pkl": pickle}, local_extra=extra + padding, **changed)) == {}


@pytest.mark.parametrize(
    ("extra", "changed"),
    [
        (b"", dict(local_size=2**32 - 1, local_packed=2**32 - 1)),  # zip64 without its record
        (struct.pack("<HHQQ", 1, 16, 4, 5), dict(local_size=2**32 - 1, local_packed=2**32 - 1)),
        (struct.pack("<HHQQ", 1, 16, 9, 9), {}),
        (struct.pack("<HHQ", 1, 8, 7), {}),  # another place
        (struct.pack("<HHBI", 0x7075, 9, 1, 0) + b"evil", {}),  # another name, in Unicode
        (b"FB\4\0evil", {}),
        (b"FB\5\0ZZZZ", {}),
        (b"FB\3\0ZZZZ", {}),
        (b"FB", {}),
        (struct.pack("<2sH", b"FB", len(saved(PROTO + b"}."))) + saved(PROTO + b"}."), {}),  # an archive
    ],
)
def test_what_a_local_header_may_not_say_besides(mapped, extra, changed):
    with pytest.raises(InputError, match="other extra records than its sizes and padding"):
        mapped(archive({"m/data.pkl": pickled({})}, local_extra=extra, **changed))


def test_notes_are_not_read_before_their_size_is(mapped):
    content = archive({"m/data.pkl": pickled({}), "m/byteorder": b"little" + bytes(64 << 20)})
    data = np.frombuffer(content, np.uint8)
    tracemalloc.start()
    with pytest.raises(InputError, match="'m/byteorder' has more than 64 bytes"):
        read_torch(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_archive_can_be_read_in_one_way_only(mapped):
    """A second data.pkl, by either directory, a member inside another and one between two: all are refused."""
    good, evil = pickled({"a": tensor()}), pickled({"a": OS_SYSTEM})
    parts = {"m/data.pkl": good, "m/data/0": bytes(16)}
    whole = archive(parts)
    directory_at = whole.index(b"PK\1\2")
    records = ["PK\1\2" + r for r in whole[directory_at:-22].decode("latin-1").split("PK\1\2")[1:]]
    entries = [record.encode("latin-1") for record in records]

    twice = whole[:directory_at] + tb.directory([entries[0], *entries], directory_at)
    with pytest.raises(InputError, match="a gap or overlap"):
        mapped(twice)
    first = archive({"m/data.pkl": evil}).partition(b"PK\1\2")[0]
    moved = [e[:42] + struct.pack("<I", struct.unpack("<I", e[42:46])[0] + len(first)) + e[46:] for e in entries]
    hidden = first + whole[:directory_at] + tb.directory(moved, directory_at + len(first))
    with pytest.raises(InputError, match="expected 0: a gap"):
        mapped(hidden)
    both = archive({"m/data.pkl": evil})[:-22].partition(b"PK\1\2")
    doubled = both[0] + whole[:directory_at] + tb.directory([both[1] + both[2], *moved], directory_at + len(first))
    with pytest.raises(InputError, match=r"two members 'm/data.pkl'"):
        mapped(doubled)
    before = whole[:directory_at] + b"hidden" + tb.directory(entries, directory_at + 6)
    with pytest.raises(InputError, match="but its directory begins at"):
        mapped(before)
    inside = archive({"m/data.pkl": good, "m/data/0": archive({"m/data.pkl": evil})})
    with pytest.raises(InputError, match="in the archive, expected 16"):
        mapped(inside)


def test_wide_zip_records(mapped):
    pickle = pickled({"a": tensor()})
    whole = saved(pickle)
    start = whole.index(b"PK\1\2")
    body, (count, size) = whole[start:-22], (whole.count(b"PK\1\2"), len(whole[start:-22]))

    def ended(count64=count, size64=size, start64=start, at=None, plain=None):
        wide = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 0, 0, 0, 0, count64, count64, size64, start64)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(whole) - 22 if at is None else at, 1)
        count16, size32, start32 = plain or (count, size, start)
        end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count16, count16, size32, start32, 0)
        return whole[:start] + body + wide + locator + end

    assert mapped(ended())["a"].tobytes() == bytes(range(16))
    for wrong in (
        dict(count64=count + 1), dict(start64=start + 1), dict(at=7), dict(plain=(count, size, 0)),
        dict(start64=2**63), dict(size64=2**63, plain=(count, 2**32 - 1, start)),
    ):  # fmt: skip
        with pytest.raises(InputError):
            mapped(ended(**wrong))


def test_wide_descriptors_and_offsets(mapped):
    """Beyond 4 GiB miniz moves sizes and offsets into zip64 records, and widens the descriptors."""
    pickle = pickled({})
    full = 2**32 - 1
    extra = struct.pack("<HHQ", 1, 8, 0)
    narrow = archive({"m/data.pkl": pickle}, flags=8, entry_extra=extra, entry_offset=full)
    assert mapped(narrow) == {}
    descriptor = struct.pack("<II", len(pickle), len(pickle))
    wide = narrow.replace(descriptor + b"PK\1\2", struct.pack("<QQ", len(pickle), len(pickle)) + b"PK\1\2")
    end = struct.unpack("<I", wide[-6:-2])[0] + 8
    assert mapped(wide[:-6] + struct.pack("<I", end) + wide[-2:]) == {}
    with pytest.raises(InputError, match="descriptor after"):
        mapped(narrow.replace(descriptor + b"PK\1\2", struct.pack("<II", 1, 1) + b"PK\1\2"))


# Properties


@st.composite
def views(draw):
    """A storage's length, and size, stride and offset that may or may not fit it."""
    size = draw(st.lists(st.integers(0, 4), max_size=4))
    stride = [draw(st.integers(0, 12)) for _ in size]
    return draw(st.integers(0, 40)), tuple(size), tuple(stride), draw(st.integers(0, 12))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(view=views())
def test_a_view_is_what_its_numbers_say_or_is_refused(mapped, view):
    """Against the definition: element (i, j, …) is storage[offset + i * stride₀ + j * stride₁ …]."""
    count, size, stride, offset = view
    whole = np.arange(count, dtype=np.float32)
    content = saved(
        pickled({"a": tensor(storage("0", "float32", count), offset, size, stride)}), {"0": whole.tobytes()}
    )
    places = [offset + sum(i * s for i, s in zip(at, stride, strict=True)) for at in np.ndindex(*size)]
    if max(places, default=offset - 1) >= count:
        with pytest.raises(InputError, match="does not fit"):
            mapped(content)
    else:
        assert np.array_equal(mapped(content)["a"], np.array(places, np.float32).reshape(size))


tensors = st.dictionaries(
    st.text("abc.0", min_size=1, max_size=8),
    st.tuples(st.sampled_from(sorted(STORAGE_TYPES.values())), st.lists(st.integers(0, 3), max_size=3)),
    max_size=5,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=tensors, seed=st.integers(0, 99))
def test_what_is_saved_is_read(mapped, kinds, seed):
    rng = np.random.default_rng(seed)
    made = {k: rng.integers(0, 2, shape).astype(DTYPES[dtype]) for k, (dtype, shape) in kinds.items()}
    found = mapped(state_dict(made))
    assert found.keys() == made.keys()
    for key, array in made.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape)
        assert found[key].tobytes() == array.tobytes()


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=200))
def test_noise_is_refused_in_one_line(mapped, noise):
    for content in (noise, saved(PROTO + noise), tb.saved_legacy(PROTO + noise)):
        with pytest.raises(InputError):
            mapped(content)


def test_a_moment_of_fuzzing():
    assert fuzz(seconds=2.0, seed=0) > 100


# Against PyTorch itself, where it is installed


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def test_torch_saves_what_is_read(mapped, torch):
    """Views, tied tensors, parameters, modules, every format, both layouts."""
    base = torch.arange(24.0).reshape(4, 6)
    module = torch.nn.Linear(3, 2)
    things = {
        "base": base, "transposed": base.T, "slice": base[1:3, ::2], "tied": base, "expanded": base[:1].expand(9, 6),
        "permuted": base.reshape(2, 3, 4).permute(2, 0, 1),
        "parameter": torch.nn.Parameter(base[0]), "scalar": torch.tensor(3.5), "empty": torch.empty(0, 3),
        **{dtype: torch.arange(6).to(getattr(torch, dtype)) for dtype in DTYPES},
    }  # fmt: skip
    legacy = {k: v for k, v in things.items() if k not in ("uint16", "uint32", "uint64") and "float8" not in k}
    for new, state in ((True, things), (False, legacy), (True, module.state_dict()), (False, module.state_dict())):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=new)
        found = mapped(buffer.getvalue())
        assert found.keys() == state.keys()
        for key, expected in state.items():
            bits = expected.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert found[key].shape == tuple(expected.shape) and found[key].tobytes() == bits, key
            assert str(found[key].dtype) == str(expected.dtype).removeprefix("torch."), key
    assert found["weight"].dtype == np.float32 and ml_dtypes.bfloat16 in DTYPES.values()


def test_torch_reads_what_the_tests_write(tmp_path, torch):
    """The files that the tests above are about are PyTorch's, not only ours."""
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int8)}
    (tmp_path / "x.bin").write_bytes(state_dict(arrays))
    read = torch.load(tmp_path / "x.bin", weights_only=True, map_location="cpu")
    assert all(np.array_equal(read[k].numpy(), arrays[k]) for k in arrays) and read.keys() == arrays.keys()
    content = pickled({"a": tensor(storage("0", "float32", 4, None))})
    (tmp_path / "x.bin").write_bytes(tb.saved_legacy(content))
    assert torch.load(tmp_path / "x.bin", weights_only=True, map_location="cpu")["a"].shape == (2, 2)
