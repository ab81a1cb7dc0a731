"""Read a pickle as data, with an interpreter for only the opcodes that torch.save writes (pickle protocol 2).

    unpickle(data, find_global, load_reference)

It imports nothing, calls only what `find_global` returns, keeps its memory within a small multiple of the pickle's
length, and never recurses. `pickletools` splits the pickle into opcodes, and documents them.
"""

import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

MAX_PICKLE_BYTES = 16 << 20
MAX_OPCODES = 1 << 20
_MARK = object()  # on the stack, before a sequence of items
_KEY_TYPES = (str, int, float, type(None))


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a pickle may call. A pickle can't call anything else."""

    call: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class InertClass:
    """The name of a class that isn't loaded. Calling it in a pickle gives an Inert."""

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
        ValueError: the pickle is broken, or has an opcode that isn't allowed, or more opcodes than a checkpoint needs.
            Exceptions of `find_global`, `load_reference` and the functions pass through.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(f"it has {len(data)} bytes, more than {MAX_PICKLE_BYTES}")
    with warnings.catch_warnings():
        # pickletools decodes escape sequences in names; Python warns about unknown sequences, which no allowed name has
        warnings.simplefilter("ignore", DeprecationWarning)
        return _Machine(data, find_global, load_reference).run()


@dataclass
class _Machine:
    data: bytes
    find_global: Callable[[str, str], Any]
    load_reference: Callable[[Any], Any]
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)  # not a list, which a large index would make huge

    def run(self) -> Any:
        for opcode, argument, position in islice(pickletools.genops(self.data), MAX_OPCODES):
            assert position is not None
            if opcode.name == "STOP":
                if len(self.stack) != 1 or position + 1 != len(self.data):
                    raise ValueError("it doesn't end at its STOP opcode with one object")
                return self.pop()
            if opcode.name not in _OPERATIONS:
                raise ValueError(f"opcode {opcode.name} at byte {position}, which torch never writes")
            _OPERATIONS[opcode.name](self, argument)
        raise ValueError(f"it has more than {MAX_OPCODES} opcodes")

    # the stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("it pops from an empty stack")
        return self.stack.pop()

    def pop_several(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def pop_to_mark(self) -> list[Any]:
        index = len(self.stack) - 1
        while index >= 0 and self.stack[index] is not _MARK:
            index -= 1
        if index < 0:
            raise ValueError("it pops to a mark that doesn't exist")
        items = self.stack[index + 1 :]
        del self.stack[index:]
        return items

    def peek(self, kind: type[Any]) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"it adds items to something that isn't a {kind.__name__}")
        return self.stack[-1]

    # opcodes

    def check_protocol(self, version: int) -> None:
        if version != 2:
            raise ValueError(f"it has protocol {version}, but torch writes protocol 2")

    def append_items(self, items: list[Any]) -> None:
        self.peek(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.peek(dict)
        # hashing other keys, such as deeply nested tuples, could take forever
        if len(items) % 2 or not all(isinstance(key, _KEY_TYPES) for key in items[::2]):
            raise ValueError("it has a key that is neither a string nor a number")
        target.update(zip(items[::2], items[1::2], strict=True))

    def put_memo(self, index: int) -> None:
        self.memo[index] = self.pop()
        self.push(self.memo[index])

    def get_memo(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("it gets a memo entry that it never put")
        self.push(self.memo[index])

    def construct(self, only_classes: bool) -> None:
        function, arguments = self.pop_several(2)
        if only_classes and not isinstance(function, InertClass):
            raise ValueError("it instantiates something that isn't a class")
        if type(arguments) is not tuple:
            raise ValueError("it makes a call without an argument tuple")
        if isinstance(function, InertClass):
            self.push(Inert(function.name, arguments))
        elif isinstance(function, Function):
            self.push(function.call(*arguments))
        else:
            raise ValueError("it calls something that isn't a function")

    def set_state(self) -> None:
        target, state = self.pop_several(2)
        if isinstance(target, Inert):
            target.state = state
        elif type(target) is not dict:  # a state dict's attribute _metadata isn't needed
            raise ValueError("it sets attributes of an object without attributes")
        self.push(target)


# the second parameter is the opcode's argument in the pickle, None if it has no argument
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.check_protocol,
    "MARK": lambda m, _: m.push(_MARK),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "NONE": _Machine.push,
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    **dict.fromkeys(("BININT1", "BININT2", "BININT", "BINFLOAT", "LONG1", "BINUNICODE"), _Machine.push),
    "TUPLE1": lambda m, _: m.push(tuple(m.pop_several(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.pop_several(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.pop_several(3))),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "APPEND": lambda m, _: m.append_items(m.pop_several(1)),
    "APPENDS": lambda m, _: m.append_items(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pop_several(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "BINPUT": _Machine.put_memo,
    "LONG_BINPUT": _Machine.put_memo,
    "BINGET": _Machine.get_memo,
    "LONG_BINGET": _Machine.get_memo,
    "GLOBAL": lambda m, names: m.push(m.find_global(*names.split(" ", 1))),
    "REDUCE": lambda m, _: m.construct(only_classes=False),
    "NEWOBJ": lambda m, _: m.construct(only_classes=True),
    "BUILD": lambda m, _: m.set_state(),
    "BINPERSID": lambda m, _: m.push(m.load_reference(m.pop())),
}
