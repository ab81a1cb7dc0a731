"""Read a pickle as data, with an interpreter for only the opcodes that torch.save writes (pickle protocol 2).

    unpickle(data, find_global, load_reference)

It imports nothing, calls only what `find_global` returns, keeps its memory within a small multiple of the pickle's
length, and never recurses. The format is described in CPython's Lib/pickletools.py.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_PICKLE_BYTES = 16 << 20
MAX_OPCODES = 1 << 20
MAX_NAME_BYTES = 256
_MARK = object()  # on the stack, before a sequence of items
_KEY_TYPES = (str, int, float, type(None))


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a pickle may call. A pickle can't call anything else."""

    call: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class InertClass:
    """A class of which only the name is known. Calling it in a pickle gives an Inert."""

    name: str


@dataclass(eq=False, slots=True)
class Inert:
    """Placeholder for an object whose class isn't loaded: keeps the arguments and the state, and does nothing."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


def unpickle(data: bytes, find_global: Callable[[str, str], Any], load_reference: Callable[[Any], Any]) -> Any:
    """Build the object that a pickle describes.

    Args:
        find_global: (module, name) -> a Function, an InertClass, or a plain value; raises if the name isn't allowed.
        load_reference: a persistent id -> the object that it refers to.

    Raises:
        ValueError: an opcode isn't allowed or isn't valid at its place, or there are more than a checkpoint needs.
            Exceptions of `find_global`, `load_reference` and the functions pass through.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is {len(data)} bytes long, more than {MAX_PICKLE_BYTES}")
    return _Machine(data, find_global, load_reference).run()


@dataclass
class _Machine:
    data: bytes
    find_global: Callable[[str, str], Any]
    load_reference: Callable[[Any], Any]
    position: int = 0
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)  # not a list, which a large index would make huge

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            opcode = self.read_bytes(1)
            if opcode == b".":
                if len(self.stack) != 1 or self.position != len(self.data):
                    raise ValueError("its pickle doesn't end at its STOP opcode with one object")
                return self.pop()
            operation = _OPERATIONS.get(opcode)
            if operation is None:
                raise ValueError(
                    f"its pickle has opcode {opcode!r} at byte {self.position - 1}, which torch never writes"
                )
            operation(self)
        raise ValueError(f"its pickle has more than {MAX_OPCODES} opcodes")

    # reading bytes

    def read_bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise ValueError("its pickle ends too early")
        data = self.data[self.position : end]
        self.position = end
        return data

    def read_number(self, form: str) -> Any:
        return struct.unpack(form, self.read_bytes(struct.calcsize(form)))[0]

    def read_line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + MAX_NAME_BYTES)
        if end < 0:
            raise ValueError("its pickle has an unterminated name")
        return self.read_bytes(end + 1 - self.position)[:-1].decode("ascii")

    # the stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("its pickle pops from an empty stack")
        return self.stack.pop()

    def pop_several(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def pop_to_mark(self) -> list[Any]:
        index = len(self.stack) - 1
        while index >= 0 and self.stack[index] is not _MARK:
            index -= 1
        if index < 0:
            raise ValueError("its pickle pops to a mark that doesn't exist")
        items = self.stack[index + 1 :]
        del self.stack[index:]
        return items

    def peek(self, kind: type[Any]) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"its pickle adds items to something that isn't a {kind.__name__}")
        return self.stack[-1]

    # opcodes

    def check_protocol(self) -> None:
        if (version := self.read_number("<B")) != 2:
            raise ValueError(f"its pickle has protocol {version}, but torch writes protocol 2")

    def append_items(self, items: list[Any]) -> None:
        self.peek(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.peek(dict)
        # hashing other keys, such as deeply nested tuples, could take forever
        if len(items) % 2 or not all(isinstance(key, _KEY_TYPES) for key in items[::2]):
            raise ValueError("its pickle has a key that is neither a string nor a number")
        target.update(zip(items[::2], items[1::2], strict=True))

    def put_memo(self, index: int) -> None:
        value = self.pop()
        self.memo[index] = value
        self.push(value)

    def get_memo(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("its pickle gets a memo entry that it never put")
        self.push(self.memo[index])

    def construct(self, only_classes: bool) -> None:
        function, arguments = self.pop_several(2)
        if only_classes and not isinstance(function, InertClass):
            raise ValueError("its pickle instantiates something that isn't a class")
        if type(arguments) is not tuple:
            raise ValueError("its pickle makes a call without an argument tuple")
        if isinstance(function, InertClass):
            self.push(Inert(function.name, arguments))
        elif isinstance(function, Function):
            self.push(function.call(*arguments))
        else:
            raise ValueError("its pickle calls something that isn't a function")

    def set_state(self) -> None:
        target, state = self.pop_several(2)
        if isinstance(target, Inert):
            target.state = state
        elif type(target) is not dict:  # a state dict's attribute _metadata isn't needed
            raise ValueError("its pickle sets attributes of an object without attributes")
        self.push(target)


# CPython's pickle.py has the names of these opcodes
_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.check_protocol,
    b"(": lambda m: m.push(_MARK),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.read_number("<B")),
    b"M": lambda m: m.push(m.read_number("<H")),
    b"J": lambda m: m.push(m.read_number("<i")),
    b"G": lambda m: m.push(m.read_number(">d")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.read_bytes(m.read_number("<B")), "little", signed=True)),
    b"X": lambda m: m.push(m.read_bytes(m.read_number("<I")).decode("utf-8", "surrogatepass")),
    b"\x85": lambda m: m.push(tuple(m.pop_several(1))),
    b"\x86": lambda m: m.push(tuple(m.pop_several(2))),
    b"\x87": lambda m: m.push(tuple(m.pop_several(3))),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"a": lambda m: m.append_items(m.pop_several(1)),
    b"e": lambda m: m.append_items(m.pop_to_mark()),
    b"s": lambda m: m.set_items(m.pop_several(2)),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"q": lambda m: m.put_memo(m.read_number("<B")),
    b"r": lambda m: m.put_memo(m.read_number("<I")),
    b"h": lambda m: m.get_memo(m.read_number("<B")),
    b"j": lambda m: m.get_memo(m.read_number("<I")),
    b"c": lambda m: m.push(m.find_global(m.read_line(), m.read_line())),
    b"R": lambda m: m.construct(only_classes=False),
    b"\x81": lambda m: m.construct(only_classes=True),
    b"b": _Machine.set_state,
    b"Q": lambda m: m.push(m.load_reference(m.pop())),
}
