"""A pickle machine that builds data and calls nothing.

Python's own unpickler imports and calls what a file names, so whoever loads a checkpoint runs its author's program.
This machine knows the opcodes that `torch.save` writes (protocol 2, and 3 to 5 if asked) and builds numbers, strings,
tuples, lists and dicts. It looks a name up in a table of the caller's, by the exact pair (module, name). The
table gives an inert value or one of the caller's own constructors. Nothing is imported; no attribute is looked up.

    pickle   = PROTO 2 to 5, value, STOP; FRAME may stand anywhere, and says nothing that is needed
    value    = NONE | NEWTRUE | NEWFALSE | BININT | BININT1 | BININT2 | LONG1 (to 16 bytes) | BINFLOAT
             | BINUNICODE | SHORT_BINUNICODE | BINUNICODE8
             | EMPTY_TUPLE | TUPLE1 | TUPLE2 | TUPLE3 | MARK value* TUPLE; a tuple in a tuple holds no third one
             | EMPTY_LIST, each APPEND or MARK value* APPENDS
             | EMPTY_DICT, each SETITEM or MARK (string value)* SETITEMS; a key comes once
             | GLOBAL module name, or two strings and STACK_GLOBAL: of a pair in the table
             | a constructor of the table, a tuple, REDUCE
             | a tuple, BINPERSID: what the caller makes of it
             | a dict, a dict {"_metadata": value}, BUILD: the dict; PyTorch's notes on module versions are dropped
             | BINGET, LONG_BINGET: a string or an object of the table again, never a tuple, list or dict
    memo     = BINPUT, LONG_BINPUT: numbered 0, 1, 2, ... without gaps or repeats; MEMOIZE: the next number

Containers are never fetched again. So values are trees with at most one node for each byte: they cannot outgrow the
pickle, and none contains itself. Anything else is refused, and the message names what was found.

Source: the opcodes as documented in CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from refimpl.errors import InputError

PICKLE_LIMIT = 1 << 20  # bytes, read in a second; the pickle of Baichuan2-13B in 4 bits has a fifth of it
STRING_LIMIT = 4096  # bytes
STACK_LIMIT = 1 << 16  # values that are not in a container yet; Python's pickler fills those 1000 values at a time
LONG_LIMIT = 16  # bytes
PROTOCOLS = range(2, 6)


@dataclass(frozen=True)
class Constructor:
    """Stands for a name that a pickle calls. `build` gets the arguments, and checks them."""

    build: Callable[[tuple], Any]


def read_pickle(
    data: bytes, start: int, names: Mapping[tuple[str, str], Any], persistent: Callable[[tuple], Any]
) -> tuple[Any, int]:
    """The value of the pickle in `data` from byte `start` on, and the place of the first byte after it.

    `names`: (module, name) -> a Constructor, or any value that the name stands for. `persistent` gets the tuple of
    each persistent id and returns what it stands for.

    Raises InputError for whatever the module's grammar does not describe.
    """
    machine = _Machine(data, start, names, persistent)
    return machine.run(), machine.at


class _Machine:
    """A stack of values, the stack's heights at open marks, and the memo: what may be fetched again, by number."""

    def __init__(self, data: bytes, at: int, names: Mapping, persistent: Callable[[tuple], Any]):
        self.data, self.at, self.names, self.persistent = data, at, names, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        if self.take(1) != b"\x80" or self.take(1)[0] not in PROTOCOLS:
            raise InputError("the pickle does not begin as one of protocol 2 to 5, which torch.save writes")
        while (code := self.take(1)) != b".":
            action = ACTIONS.get(code)
            if action is None:
                raise InputError(f"the pickle has the opcode {_opcode_name(code)}, which no tensor file needs; refused")
            action(self)
            if len(self.stack) > STACK_LIMIT or len(self.marks) > STACK_LIMIT:
                raise InputError(f"the pickle holds more than {STACK_LIMIT} values outside of containers; refused")
        if len(self.stack) != 1 or self.marks:
            raise InputError(f"the pickle stops with {len(self.stack)} values, {len(self.marks)} marks; expected one")
        return self.stack[0]

    # What the bytes say

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            if len(self.data) >= PICKLE_LIMIT:  # readers pass at most that, even of a larger file
                raise InputError(f"the pickle has more than {PICKLE_LIMIT} bytes, expected a state dict's")
            raise InputError("the pickle ends in the middle; download the file again")
        self.at += count
        return self.data[self.at - count : self.at]

    def frame(self) -> None:
        if self.number(8) > len(self.data) - self.at:
            raise InputError("the pickle's frame is longer than the pickle; download the file again")

    def number(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "little", signed=signed)

    def long(self) -> int:
        length = self.number(1)
        if length > LONG_LIMIT:
            raise InputError(f"the pickle has an integer of {length} bytes, expected at most {LONG_LIMIT}")
        return self.number(length, signed=True)

    def string(self, width: int = 4) -> str:
        length = self.number(width)
        if length > STRING_LIMIT:
            raise InputError(f"the pickle has a string of {length} bytes, expected at most {STRING_LIMIT}")
        return self.decoded(self.take(length))

    def line(self) -> str:
        stop = self.data.find(b"\n", self.at, self.at + STRING_LIMIT)
        if stop < 0:
            raise InputError(f"the pickle has a name that does not end within {STRING_LIMIT} bytes")
        line = self.take(stop + 1 - self.at)
        return self.decoded(line[:-1])

    @staticmethod
    def decoded(text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise InputError(f"the pickle has a string {text!a:.80}, which is not UTF-8") from None

    # What is done with values

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, *kinds: type) -> Any:
        """The top value, which must be of one of these kinds and above the open mark."""
        value = self.top(*kinds)
        self.stack.pop()
        return value

    def top(self, *kinds: type) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise InputError("the pickle takes a value from an empty stack")
        if kinds and not isinstance(self.stack[-1], kinds):
            found, expected = type(self.stack[-1]).__name__, " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"the pickle has a {found} where a {expected} is needed")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise InputError("the pickle closes a mark that it has not opened")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pack(self, count: int) -> None:
        self.push_tuple([self.pop() for _ in range(count)][::-1])

    def push_tuple(self, values: list[Any]) -> None:
        if any(isinstance(part, tuple) for value in values if isinstance(value, tuple) for part in value):
            raise InputError("the pickle nests more than two tuples, which no tensor file needs; refused")
        self.push(tuple(values))

    def extend(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def fill(self, values: list[Any]) -> None:
        target = self.top(dict)
        if len(values) % 2:
            raise InputError("the pickle has a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str):  # hashing a nested tuple may take for ever
                raise InputError(f"the pickle has a dict with a {type(key).__name__} for a key, expected strings")
            if key in target:
                raise InputError(f"the pickle has a dict with two values for {key!a:.80}")
            target[key] = value

    def named(self) -> None:
        self.look_up((self.line(), self.line()))

    def named_on_stack(self) -> None:
        name, module = self.pop(str), self.pop(str)
        self.look_up((module, name))

    def look_up(self, pair: tuple[str, str]) -> None:
        if pair[0].startswith("torch_npu"):
            raise InputError(
                f"the pickle names {pair[0]!a:.80}: the tensors were saved on a Huawei Ascend NPU; save them there "
                "once more, moved to the CPU: torch.save({name: tensor.cpu() for name, tensor in state.items()}, file)"
            )
        if pair not in self.names:
            raise InputError(f"the pickle names {pair[0]!a:.80} {pair[1]!a:.80}, which no tensor file needs; refused")
        self.push(self.names[pair])

    def reduce(self) -> None:
        arguments = self.pop(tuple)
        self.push(self.pop(Constructor).build(arguments))

    def build(self) -> None:
        state = self.pop(dict)
        self.top(dict)
        if set(state) - {"_metadata"}:
            raise InputError(f"the pickle sets the attributes {', '.join(map(ascii, state)):.80} of an object; refused")

    def put(self, index: int) -> None:
        if index != len(self.memo):
            raise InputError(f"the pickle's memo goes from {len(self.memo)} to {index}, expected no gap and no repeat")
        self.memo.append(self.top())

    def get(self, index: int) -> None:
        if index >= len(self.memo):
            raise InputError(f"the pickle fetches memo {index} of {len(self.memo)}")
        value = self.memo[index]
        if isinstance(value, tuple | list | dict):
            raise InputError(f"the pickle uses one {type(value).__name__} twice; it grows or contains itself; refused")
        self.push(value)


# Every opcode that is known.
ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"N": lambda m: m.push(None),  # NONE
    b"\x88": lambda m: m.push(True),  # NEWTRUE
    b"\x89": lambda m: m.push(False),  # NEWFALSE
    b"J": lambda m: m.push(m.number(4, signed=True)),  # BININT
    b"K": lambda m: m.push(m.number(1)),  # BININT1
    b"M": lambda m: m.push(m.number(2)),  # BININT2
    b"\x8a": lambda m: m.push(m.long()),  # LONG1
    b"G": lambda m: m.push(*struct.unpack(">d", m.take(8))),  # BINFLOAT
    b"X": lambda m: m.push(m.string()),  # BINUNICODE
    b"\x8c": lambda m: m.push(m.string(1)),  # SHORT_BINUNICODE
    b"\x8d": lambda m: m.push(m.string(8)),  # BINUNICODE8
    b"(": lambda m: m.marks.append(len(m.stack)),  # MARK
    b")": lambda m: m.pack(0),  # EMPTY_TUPLE
    b"\x85": lambda m: m.pack(1),  # TUPLE1
    b"\x86": lambda m: m.pack(2),  # TUPLE2
    b"\x87": lambda m: m.pack(3),  # TUPLE3
    b"t": lambda m: m.push_tuple(m.since_mark()),  # TUPLE
    b"]": lambda m: m.push([]),  # EMPTY_LIST
    b"a": lambda m: m.extend([m.pop()]),  # APPEND
    b"e": lambda m: m.extend(m.since_mark()),  # APPENDS
    b"}": lambda m: m.push({}),  # EMPTY_DICT
    b"s": lambda m: m.fill([m.pop(), m.pop()][::-1]),  # SETITEM
    b"u": lambda m: m.fill(m.since_mark()),  # SETITEMS
    b"c": lambda m: m.named(),  # GLOBAL
    b"\x93": lambda m: m.named_on_stack(),  # STACK_GLOBAL
    b"R": lambda m: m.reduce(),  # REDUCE
    b"b": lambda m: m.build(),  # BUILD
    b"Q": lambda m: m.push(m.persistent(m.pop(tuple))),  # BINPERSID
    b"q": lambda m: m.put(m.number(1)),  # BINPUT
    b"r": lambda m: m.put(m.number(4)),  # LONG_BINPUT
    b"\x94": lambda m: m.put(len(m.memo)),  # MEMOIZE
    b"\x95": lambda m: m.frame(),  # FRAME
    b"h": lambda m: m.get(m.number(1)),  # BINGET
    b"j": lambda m: m.get(m.number(4)),  # LONG_BINGET
}


def _opcode_name(code: bytes) -> str:
    import pickletools  # for its table of names; nothing here runs a pickle

    names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
    return names.get(code.decode("latin-1"), repr(code))
