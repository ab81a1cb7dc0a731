"""Read a pickle as data, with an interpreter for only the opcodes that torch.save writes (pickle protocol 2).

    unpickle(data, find_global, load_reference)

It imports nothing, calls only what `find_global` returns, keeps its memory within a small multiple of the pickle's
length, and never recurses. The format is described in CPython's Lib/pickletools.py.
"""

import struct
from collections.abc import Callable
from typing import Any

MAX_PICKLE_BYTES = 16 << 20
MAX_OPCODES = 1 << 20
MAX_NAME_BYTES = 256


class Function:
    """A function that a pickle may call. A pickle can't call anything else."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class Inert:
    """Placeholder for an object whose class isn't loaded: keeps the arguments and the state, and does nothing."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None


class InertClass:
    """A class of which only the name is known. Calling it in a pickle gives an Inert."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Mark:
    """Marks the beginning of a sequence of items on the stack."""

    __slots__ = ()


_MARK = _Mark()
_KEY_TYPES = (str, int, float, type(None))


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


class _Machine:
    def __init__(
        self, data: bytes, find_global: Callable[[str, str], Any], load_reference: Callable[[Any], Any]
    ) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}  # not a list, which a large index would make huge
        self.find_global = find_global
        self.load_reference = load_reference

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            opcode = self._read_bytes(1)
            if opcode == b".":
                if len(self.stack) != 1 or self.position != len(self.data):
                    raise ValueError("its pickle doesn't end at its STOP opcode with one object")
                return self._pop()
            operation = _OPERATIONS.get(opcode)
            if operation is None:
                raise ValueError(
                    f"its pickle has opcode {opcode!r} at byte {self.position - 1}, which torch never writes"
                )
            operation(self)
        raise ValueError(f"its pickle has more than {MAX_OPCODES} opcodes")

    # reading bytes

    def _read_bytes(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise ValueError("its pickle ends too early")
        data = self.data[self.position : end]
        self.position = end
        return data

    def _read_number(self, form: str) -> Any:
        return struct.unpack(form, self._read_bytes(struct.calcsize(form)))[0]

    def _read_line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + MAX_NAME_BYTES)
        if end < 0:
            raise ValueError("its pickle has an unterminated name")
        return self._read_bytes(end + 1 - self.position)[:-1].decode("ascii")

    # the stack

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("its pickle pops from an empty stack")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        index = len(self.stack) - 1
        while index >= 0 and self.stack[index] is not _MARK:
            index -= 1
        if index < 0:
            raise ValueError("its pickle pops to a mark that doesn't exist")
        items = self.stack[index + 1 :]
        del self.stack[index:]
        return items

    def _peek(self, kind: type[Any]) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"its pickle adds items to something that isn't a {kind.__name__}")
        return self.stack[-1]

    # opcodes, named as in CPython's pickle.py

    def load_proto(self) -> None:
        if (version := self._read_bytes(1)[0]) != 2:
            raise ValueError(f"its pickle has protocol {version}, but torch writes protocol 2")

    def load_mark(self) -> None:
        self._push(_MARK)

    def load_binunicode(self) -> None:
        self._push(self._read_bytes(self._read_number("<I")).decode("utf-8", "surrogatepass"))

    def load_long1(self) -> None:
        self._push(int.from_bytes(self._read_bytes(self._read_bytes(1)[0]), "little", signed=True))

    def load_tuple(self, count: int) -> None:
        self._push(tuple([self._pop() for _ in range(count)][::-1]))

    def load_tuple_to_mark(self) -> None:
        self._push(tuple(self._pop_to_mark()))

    def load_append(self) -> None:
        value = self._pop()
        self._peek(list).append(value)

    def load_appends(self) -> None:
        values = self._pop_to_mark()
        self._peek(list).extend(values)

    def load_setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self._peek(dict)
        # hashing other keys, such as deeply nested tuples, could take forever
        if len(items) % 2 or not all(isinstance(key, _KEY_TYPES) for key in items[::2]):
            raise ValueError("its pickle has a key that is neither a string nor a number")
        target.update(zip(items[::2], items[1::2], strict=True))

    def load_binput(self, form: str) -> None:
        index = self._read_number(form)
        value = self._pop()
        self.memo[index] = value
        self._push(value)

    def load_binget(self, form: str) -> None:
        index = self._read_number(form)
        if index not in self.memo:
            raise ValueError("its pickle gets a memo entry that it never put")
        self._push(self.memo[index])

    def load_global(self) -> None:
        module = self._read_line()
        self._push(self.find_global(module, self._read_line()))

    def load_reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        self._push(_construct(function, arguments))

    def load_newobj(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if not isinstance(kind, InertClass):
            raise ValueError("its pickle instantiates something that isn't a class")
        self._push(_construct(kind, arguments))

    def load_build(self) -> None:
        state, target = self._pop(), self._pop()
        if isinstance(target, Inert):
            target.state = state
        elif type(target) is not dict:  # a state dict's attribute _metadata isn't needed
            raise ValueError("its pickle sets attributes of an object without attributes")
        self._push(target)

    def load_binpersid(self) -> None:
        self._push(self.load_reference(self._pop()))


def _construct(function: Any, arguments: Any) -> Any:
    if type(arguments) is not tuple:
        raise ValueError("its pickle makes a call without an argument tuple")
    if isinstance(function, InertClass):
        return Inert(function.name, arguments)
    if not isinstance(function, Function):
        raise ValueError("its pickle calls something that isn't a function")
    return function.call(*arguments)


_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.load_proto,
    b"(": _Machine.load_mark,
    b"}": lambda m: m._push({}),
    b"]": lambda m: m._push([]),
    b")": lambda m: m._push(()),
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"K": lambda m: m._push(m._read_number("<B")),
    b"M": lambda m: m._push(m._read_number("<H")),
    b"J": lambda m: m._push(m._read_number("<i")),
    b"G": lambda m: m._push(m._read_number(">d")),
    b"\x8a": _Machine.load_long1,
    b"X": _Machine.load_binunicode,
    b"\x85": lambda m: m.load_tuple(1),
    b"\x86": lambda m: m.load_tuple(2),
    b"\x87": lambda m: m.load_tuple(3),
    b"t": _Machine.load_tuple_to_mark,
    b"a": _Machine.load_append,
    b"e": _Machine.load_appends,
    b"s": _Machine.load_setitem,
    b"u": _Machine.load_setitems,
    b"q": lambda m: m.load_binput("<B"),
    b"r": lambda m: m.load_binput("<I"),
    b"h": lambda m: m.load_binget("<B"),
    b"j": lambda m: m.load_binget("<I"),
    b"c": _Machine.load_global,
    b"R": _Machine.load_reduce,
    b"\x81": _Machine.load_newobj,
    b"b": _Machine.load_build,
    b"Q": _Machine.load_binpersid,
}
