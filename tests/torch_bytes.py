"""Files as `torch.save` writes them, byte by byte and without torch: for tests that need odd ones."""

import struct
import zlib

import numpy as np

from refimpl.checkpoint.torch_files import STORAGE_TYPES

PROTO, STOP, MARK = b"\x80\x02", b".", b"("
TYPES = {dtype: name for name, dtype in STORAGE_TYPES.items()}


def value(x) -> bytes:
    """The opcodes of a Python value; bytes stand for themselves."""
    match x:
        case bytes():
            return x
        case None:
            return b"N"
        case bool():
            return b"\x88" if x else b"\x89"
        case int():
            return b"\x8a\x09" + x.to_bytes(9, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", x)
        case str():
            return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
        case tuple():
            return MARK + b"".join(map(value, x)) + b"t"
        case list():
            return b"](" + b"".join(map(value, x)) + b"e"
        case dict():
            return b"}(" + b"".join(value(k) + value(v) for k, v in x.items()) + b"u"
    raise TypeError(x)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments) -> bytes:
    return function + value(arguments) + b"R"


EMPTY = call(name("collections", "OrderedDict"))
REBUILD = name("torch._utils", "_rebuild_tensor_v2")


def storage(key="0", dtype="float32", count=4, *rest) -> bytes:
    return value(("storage", name("torch", TYPES[dtype]), key, "cuda:0", count, *rest)) + b"Q"


def tensor(held=None, offset=0, size=(2, 2), stride=(2, 1), hooks=EMPTY) -> bytes:
    return call(REBUILD, held or storage(), offset, tuple(size), tuple(stride), False, hooks)


def pickled(x) -> bytes:
    return PROTO + value(x) + STOP


def archive(members: dict[str, bytes], flags=0, method=0, **changed) -> bytes:
    """A stored zip archive. `changed`: NAME_FIELD=number, to make one field of one copy say something else."""
    out, entries = b"", []
    for path, content in members.items():
        fields = dict(crc=zlib.crc32(content), packed=len(content), size=len(content), name=path.encode())
        fields |= dict(extra=b"")
        local = fields | {k.removeprefix("local_"): v for k, v in changed.items() if k.startswith("local_")}
        entry = dict(offset=len(out), mode=0, comment=0) | fields
        entry |= {k.removeprefix("entry_"): v for k, v in changed.items() if k.startswith("entry_")}
        out += struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 0, flags, method, 0, 0, local["crc"], local["packed"],
                           local["size"], len(local["name"]), len(local["extra"]))  # fmt: skip
        out += local["name"] + local["extra"] + content
        if flags & 8:
            out += struct.pack("<4sIII", b"PK\7\10", fields["crc"], len(content), len(content))
        entries.append(struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 0, 0, flags, method, 0, 0, entry["crc"],
                                   entry["packed"], entry["size"], len(entry["name"]), len(entry["extra"]),
                                   entry["comment"], 0, 0, entry["mode"], entry["offset"])
                       + entry["name"] + entry["extra"])  # fmt: skip
    return out + directory(entries, len(out), changed.get("end_count"), changed.get("end_comment", b""))


def directory(entries: list[bytes], start: int, count: int | None = None, comment: bytes = b"") -> bytes:
    body = b"".join(entries)
    count = len(entries) if count is None else count
    return body + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(body), start, len(comment)) + comment


def saved(pickle: bytes, storages: dict[str, bytes] | None = None, **changed) -> bytes:
    """A `.bin` of this pickle and these storages (by default one of 16 bytes, called "0")."""
    storages = {"0": bytes(range(16))} if storages is None else storages
    members = {"m/data.pkl": pickle, "m/byteorder": b"little", "m/version": b"3\n"}
    return archive(members | {f"m/data/{key}": content for key, content in storages.items()}, **changed)


def saved_legacy(pickle: bytes, storages: dict[str, tuple[int, bytes]] | None = None, keys=None, magic=None) -> bytes:
    """The same in the layout before PyTorch 1.6: storages are (count, bytes)."""
    storages = {"0": (4, bytes(range(16)))} if storages is None else storages
    magic = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19" if magic is None else magic
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = PROTO + magic + STOP + pickled(1001) + pickled(machine) + pickle
    head += pickled(list(storages) if keys is None else keys)
    return head + b"".join(struct.pack("<q", count) + content for count, content in storages.values())


def state_dict(tensors: dict[str, np.ndarray]) -> bytes:
    """A `.bin` of whole tensors, as `torch.save(model.state_dict())` makes it."""
    entries, storages = {}, {}
    for key, (tensor_name, array) in enumerate(tensors.items()):
        strides = tuple(step // array.itemsize for step in array.copy().strides)
        entries[tensor_name] = tensor(storage(str(key), array.dtype.name, array.size), 0, array.shape, strides)
        storages[str(key)] = array.tobytes()
    metadata = value({"_metadata": {"": {"version": 1}}})
    return saved(PROTO + EMPTY + value(entries)[1:] + metadata + b"b" + STOP, storages)
