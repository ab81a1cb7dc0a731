"""Read a pickle as data: an own machine for the few opcodes that torch.save writes (pickle protocol 2).

    unpickle(data, find, load_reference)

It imports nothing and calls nothing but what `find` gives it, keeps its memory within a small multiple of the
pickle's length, and never recurses. The format: Lib/pickletools.py of CPython.
"""

import struct
from collections.abc import Callable
from typing import Any

MAX_BYTES = 16 << 20
MAX_OPCODES = 1 << 20
MAX_LINE = 256


class Function:
    """What a pickle may call, and nothing else is callable in it."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class Inert:
    """Stands for an object whose class isn't loaded: keeps what the pickle says of it, and does nothing."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None


class InertClass:
    """A class by its name: making one of it gives an Inert."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Mark:
    """Where a run of items on the stack begins."""

    __slots__ = ()


_MARK = _Mark()
_KEYS = (str, int, float, type(None))


def unpickle(data: bytes, find: Callable[[str, str], Any], load_reference: Callable[[Any], Any]) -> Any:
    """The object that a pickle describes.

    Args:
        find: (module, name) -> a Function, an InertClass, or a plain value; raises for what isn't allowed.
        load_reference: a persistent id -> the object that it means.

    Raises:
        ValueError: an opcode that isn't allowed or doesn't fit, or more of them than a checkpoint has.
        what `find`, `load_reference` and the functions raise.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"its pickle is {len(data)} bytes long, more than {MAX_BYTES}")
    return _Machine(data, find, load_reference).run()


class _Machine:
    def __init__(self, data: bytes, find: Callable[[str, str], Any], load_reference: Callable[[Any], Any]) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.find = find
        self.load_reference = load_reference

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            opcode = self._take(1)
            if opcode == b".":
                if len(self.stack) != 1 or self.position != len(self.data):
                    raise ValueError("its pickle doesn't end where it says")
                return self._pop()
            operation = _OPERATIONS.get(opcode)
            if operation is None:
                raise ValueError(
                    f"opcode {opcode!r} at byte {self.position - 1} of its pickle, which torch never writes"
                )
            operation(self)
        raise ValueError(f"its pickle has more than {MAX_OPCODES} opcodes")

    # bytes

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise ValueError("its pickle ends too early")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + MAX_LINE)
        if end < 0:
            raise ValueError("a name without an end in its pickle")
        return self._take(end + 1 - self.position)[:-1].decode("ascii")

    # the stack

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("its pickle takes from an empty stack")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while place >= 0 and self.stack[place] is not _MARK:
            place -= 1
        if place < 0:
            raise ValueError("its pickle takes to a mark that isn't there")
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _top(self, kind: type[Any]) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"its pickle puts items into what is no {kind.__name__}")
        return self.stack[-1]

    # opcodes

    def protocol(self) -> None:
        if (version := self._take(1)[0]) != 2:
            raise ValueError(f"pickle protocol {version}; torch writes 2")

    def mark(self) -> None:
        self._push(_MARK)

    def unicode(self) -> None:
        self._push(self._take(self._number("<I")).decode("utf-8", "surrogatepass"))

    def long(self) -> None:
        self._push(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))

    def tuple(self, count: int) -> None:
        self._push(tuple([self._pop() for _ in range(count)][::-1]))

    def tuple_to_mark(self) -> None:
        self._push(tuple(self._pop_to_mark()))

    def append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def appends(self) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def set_items(self) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        # other keys could be nested so deep that hashing them never ends
        if len(items) % 2 or not all(isinstance(key, _KEYS) for key in items[::2]):
            raise ValueError("a key in its pickle that is no text and no number")
        target.update(zip(items[::2], items[1::2], strict=True))

    def put(self, form: str) -> None:
        place = self._number(form)
        value = self._pop()
        self.memo[place] = value
        self._push(value)

    def get(self, form: str) -> None:
        place = self._number(form)
        if place not in self.memo:
            raise ValueError("its pickle recalls what it never stored")
        self._push(self.memo[place])

    def name(self) -> None:
        module = self._line()
        self._push(self.find(module, self._line()))

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        self._push(_made(function, arguments))

    def new(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if not isinstance(kind, InertClass):
            raise ValueError("its pickle makes an object of what is no class")
        self._push(_made(kind, arguments))

    def build(self) -> None:
        state, target = self._pop(), self._pop()
        if isinstance(target, Inert):
            target.state = state
        elif type(target) is not dict:  # of a state dict: its _metadata, which nothing needs
            raise ValueError("its pickle sets the attributes of what has none")
        self._push(target)

    def reference(self) -> None:
        self._push(self.load_reference(self._pop()))


def _made(function: Any, arguments: Any) -> Any:
    if type(arguments) is not tuple:
        raise ValueError("a call in its pickle without arguments")
    if isinstance(function, InertClass):
        return Inert(function.name, arguments)
    if not isinstance(function, Function):
        raise ValueError("its pickle calls what is no function")
    return function.call(*arguments)


_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"(": _Machine.mark,
    b"}": lambda m: m._push({}),
    b"]": lambda m: m._push([]),
    b")": lambda m: m._push(()),
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"K": lambda m: m._push(m._number("<B")),
    b"M": lambda m: m._push(m._number("<H")),
    b"J": lambda m: m._push(m._number("<i")),
    b"G": lambda m: m._push(m._number(">d")),
    b"\x8a": _Machine.long,
    b"X": _Machine.unicode,
    b"\x85": lambda m: m.tuple(1),
    b"\x86": lambda m: m.tuple(2),
    b"\x87": lambda m: m.tuple(3),
    b"t": _Machine.tuple_to_mark,
    b"a": _Machine.append,
    b"e": _Machine.appends,
    b"s": _Machine.set_item,
    b"u": _Machine.set_items,
    b"q": lambda m: m.put("<B"),
    b"r": lambda m: m.put("<I"),
    b"h": lambda m: m.get("<B"),
    b"j": lambda m: m.get("<I"),
    b"c": _Machine.name,
    b"R": _Machine.reduce,
    b"\x81": _Machine.new,
    b"b": _Machine.build,
    b"Q": _Machine.reference,
}
