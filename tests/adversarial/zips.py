"""Crafted zip archives and pickles with false values in any field.

`hostile_zips` and `hostile_pickles` return name -> (the file's bytes, a regular expression that the error matches).
"""

import pickle
import pickletools
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Corpus = dict[str, tuple[bytes, str]]
VALUES = struct.pack("<6f", *range(6))
BIG = 1 << 62


@dataclass(frozen=True)
class Member:
    """A member and what its headers say about it; None: the true value."""

    name: bytes
    data: bytes
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    packed: int | None = None
    local_name: bytes | None = None
    local_size: int | None = None
    extra: bytes = b""
    header: int | None = None
    gap: bytes = b""


def zip_of(members: list[Member], end: Callable[[int, int, int], bytes] | None = None, before: bytes = b"") -> bytes:
    """Build a zip archive. `end` makes the end records from (entries, directory's size, directory's offset)."""
    file, directory = bytearray(before), bytearray()
    for member in members:
        header = len(file) if member.header is None else member.header
        crc = zlib.crc32(member.data) if member.crc is None else member.crc
        size = len(member.data) if member.size is None else member.size
        packed = len(member.data) if member.packed is None else member.packed
        local = len(member.data) if member.local_size is None else member.local_size
        name = member.name if member.local_name is None else member.local_name
        file += struct.pack(
            "<4s5H3I2H", b"PK\3\4", 20, member.flags, member.method, 0, 0, crc, local, local, len(name), 0
        )
        file += name + member.data + member.gap
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 20, 20, member.flags, member.method, 0, 0, crc, packed, size,
            len(member.name), len(member.extra), 0, 0, 0, 0, header,
        )  # fmt: skip
        directory += member.name + member.extra
    begin = len(file)
    return bytes(file + directory) + (end or plain_end)(len(members), len(directory), begin)


def plain_end(count: int, size: int, begin: int, comment: bytes = b"", disk: int = 0) -> bytes:
    return struct.pack("<4s4H2IH", b"PK\5\6", disk, 0, count, count, size, begin, len(comment)) + comment


def zip64_end(
    count: int, size: int, begin: int, error: int = 0, entries: int | None = None, where: int | None = None
) -> bytes:
    entries = count if entries is None else entries
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 30, 45, 0, 0, entries, entries, size + error, begin)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, begin + size if where is None else where, 1)
    return record + locator + plain_end(count, size, begin)


def state_pickle(shape: bytes = b"K\2K\3\x86", strides: bytes = b"K\3K\1\x86", **changes: bytes) -> bytes:
    """Pickle {"w": a tensor of shape 2 x 3} as torch does."""
    parts = {
        "key": b"X\1\0\0\0w",
        "reference": b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\6tQ",
        "offset": b"K\0",
        "rebuild": b"ctorch._utils\n_rebuild_tensor_v2\n",
        **changes,
    }
    arguments = parts["reference"] + parts["offset"] + shape + strides + b"\x89}"
    return b"\x80\2}" + parts["key"] + parts["rebuild"] + b"(" + arguments + b"tRs."


def members_of(pickled: bytes | None = None, values: bytes = VALUES) -> list[Member]:
    return [
        Member(b"archive/data.pkl", state_pickle() if pickled is None else pickled),
        Member(b"archive/byteorder", b"little"),
        Member(b"archive/version", b"3\n"),
        Member(b"archive/data/0", values),
    ]


def torch_file(pickled: bytes | None = None) -> bytes:
    """Build a good file around a pickle."""
    return zip_of(members_of(pickled))


def hostile_zips() -> Corpus:
    good = members_of()
    pkl, order, version, data = good

    def with_data(**changes: Any) -> bytes:
        return zip_of([pkl, order, version, replace(data, **changes)])

    deflated = zlib.compress(VALUES)[2:-4]
    longer = struct.pack("<2H3Q", 1, 24, BIG, BIG, 0)
    return {
        "empty": (b"", "ends before"),
        "plain text": (b"hello " * 20, "no end-of-central-directory"),
        "torch before 1.6": (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"x" * 40, "no end-of-central-directory"),
        "a pickle alone": (state_pickle(), "no end-of-central-directory"),
        "compressed": (with_data(data=deflated, method=8), "compressed"),
        "compressed pickle": (zip_of([replace(pkl, method=8), order, data]), "compressed"),
        "encrypted": (with_data(flags=1), "compressed, encrypted"),
        "another compressed size": (with_data(packed=4), "compressed"),
        "a member twice": (zip_of([pkl, order, data, replace(data, name=b"archive/data/1", header=0)]), "overlaps"),
        "overlap: header in a member": (with_data(header=20), "overlaps another|header contradicts"),
        "overlap: size reaches into the next member": (
            zip_of([replace(pkl, size=300, packed=300), order, data]),
            "overlaps another|contradicts",
        ),
        "size beyond the file": (with_data(size=1 << 30, packed=1 << 30), "contradicts|extends into"),
        "size smaller than the local header says": (with_data(size=12, packed=12), "contradicts"),
        "size of 2^62": (with_data(size=0xFFFFFFFF, packed=0xFFFFFFFF, extra=longer), "contradicts|extends into"),
        "size of 2^62, with a data descriptor": (
            with_data(size=0xFFFFFFFF, packed=0xFFFFFFFF, extra=longer, flags=8, local_size=0),
            "extends into the central directory",
        ),
        "a missing 64-bit size": (with_data(size=0xFFFFFFFF, packed=0xFFFFFFFF), "64-bit size is missing"),
        "two members of the same name": (zip_of([pkl, order, data, data]), "two members are named"),
        "two pickles": (zip_of([pkl, *good]), "two members are named"),
        "another name in the local header": (with_data(local_name=b"archive/data/9"), "contradicts"),
        "no local header": (zip_of([pkl, replace(order, header=1), data]), "overlaps another|contradicts|gap"),
        "header beyond the file": (with_data(header=1 << 31), "gap|ends before"),
        "bytes before the archive": (zip_of(good, before=b"#!/bin/sh\n"), "follows a gap"),
        "bytes between members": (zip_of([pkl, replace(order, gap=b"x" * 40), data]), "follows a gap"),
        "bytes before the central directory": (with_data(gap=b"x" * 40), "between the members and"),
        "bytes after the archive": (zip_of(good) + b"x", "no end-of-central-directory"),
        "an archive after the archive": (zip_of(good) + zip_of(good), "central directory isn't|gap|ends"),
        "a comment": (zip_of(good, lambda *a: plain_end(*a, comment=zip_of(good)[-22:])), "end-of-central|isn't at"),
        "another disk": (zip_of(good, lambda *a: plain_end(*a, disk=1)), "split into several files"),
        "too few members": (zip_of(good, lambda n, s, b: plain_end(n - 1, s, b)), "longer than its entries"),
        "too many members": (zip_of(good, lambda n, s, b: plain_end(n + 9, s, b)), "central directory|read"),
        "a central directory elsewhere": (zip_of(good, lambda n, s, b: plain_end(n, s, b - 1)), "isn't at the offset"),
        "zip64: sizes that contradict": (zip_of(good, lambda *a: zip64_end(*a, error=1)), "contradict"),
        "zip64: 2^60 members": (zip_of(good, lambda *a: zip64_end(*a, entries=1 << 60)), "contradict|at the offset"),
        "zip64: an end record elsewhere": (zip_of(good, lambda *a: zip64_end(*a, where=0)), "that its locator gives"),
        "members without a folder": (zip_of([replace(m, name=m.name[8:]) for m in good]), "single top-level folder"),
        "two folders": (zip_of([pkl, order, replace(data, name=b"other/data/0")]), "single top-level folder"),
        "a name that isn't UTF-8": (zip_of([*good, Member(b"archive/\xff", b"")]), "isn't UTF-8"),
        "no pickle": (zip_of([order, data]), "data.pkl: not in the archive"),
        "no members": (zip_of([]), "single top-level folder"),
        "no storage": (zip_of([pkl, order]), "data/0: not in the archive"),
        "big-endian": (zip_of([pkl, replace(order, data=b"big"), data]), "big-endian"),
        "a pickle with another checksum": (zip_of([replace(pkl, crc=7), order, data]), "differs from what was written"),
        "storage too short": (zip_of(members_of(values=VALUES[:-4])), "20 bytes, expected 24"),
        "storage too long": (zip_of(members_of(values=VALUES + b"1234")), "28 bytes, expected 24"),
    }


def hostile_pickles() -> Corpus:
    """Return pickles that are refused where a state dict is expected."""
    pickles = (
        malformed_pickles()
        | pickled_calls()
        | pickled_storages()
        | pickled_tensors()
        | pickled_names()
        | pickled_opcodes()
    )
    return {name: (torch_file(pickled), expected) for name, (pickled, expected) in pickles.items()}


def refers(count: bytes = b"K\6", kind: bytes = b"X\7\0\0\0storage", key: bytes = b"X\1\0\0\x000") -> bytes:
    return state_pickle(reference=b"(" + kind + b"ctorch\nFloatStorage\n" + key + b"X\3\0\0\0cpu" + count + b"tQ")


def calls(function: bytes, arguments: bytes = b")") -> bytes:
    return b"\x80\2}X\1\0\0\0w" + function + arguments + b"Rs."


def number(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def malformed_pickles() -> Corpus:
    """Return pickles whose structure is wrong, too deep or too large."""
    return {
        "nested tuples": (b"\x80\2)" + b"\x85" * 500_000 + b".", "state dict"),
        "nested lists": (b"\x80\2" + b"]" * 400_000 + b"a" * 399_999 + b".", "state dict"),
        "nested dicts": (b"\x80\2" + b"}K\0" * 200_000 + b"N" + b"s" * 200_000 + b".", "state dict"),
        "a nested tuple as a key": (b"\x80\2})" + b"\x85" * 500_000 + b"Ns.", "has a key"),
        "nested parameters": (
            b"\x80\2ctorch._utils\n_rebuild_parameter\nq\0" + b"h\0" * 200_000 + b")" + b"R" * 200_000 + b".",
            "",
        ),
        "a list that contains itself": (b"\x80\2]q\0h\0a.", "state dict"),
        "a dict that contains itself": (b"\x80\2}q\0X\1\0\0\0wh\0s.", "state dict"),
        "lists that double": (b"\x80\2]q\0" + b"](h\0h\0eq\0" * 5000 + b".", "doesn't end|state dict"),
        "a memo index of 2^32": (b"\x80\2]r\xff\xff\xff\xff.", "state dict"),
        "a million memo entries": (
            b"\x80\2]" + b"".join(b"r" + struct.pack("<I", i * 4001 % 2**32) for i in range(1 << 20)) + b".",
            "opcodes",
        ),
        "two million numbers": (b"\x80\2](" + b"J\0\0\0\1" * (1 << 21) + b"e.", "opcodes"),
        "a million dicts": (b"\x80\2](" + b"}" * (1 << 21) + b"e.", "opcodes"),
        "a pickle of 20 MiB": (b"\x80\2X" + struct.pack("<I", 20 << 20) + b"x" * (20 << 20) + b".", "bytes, more"),
        "a string of 4 GiB": (b"\x80\2X\xff\xff\xff\xffx.", "but only 2 remain"),
        "a number that ends too early": (b"\x80\2\x8a\xff\1.", "not enough data"),
        "no end": (b"\x80\2}", "before seeing STOP"),
        "bytes after the end": (state_pickle() + b"x", "doesn't end"),
        "two values": (b"\x80\2}}.", "doesn't end"),
        "an empty stack": (b"\x80\2.", "doesn't end|empty stack"),
        "a mark instead of a value": (b"\x80\2(.", "pops from an empty stack"),
        "no mark": (b"\x80\2t.", "a mark that doesn't exist"),
        "a memo entry that doesn't exist": (b"\x80\2h\7.", "memo entry that it never put"),
        "an odd number of items": (b"\x80\2}(X\1\0\0\0wu.", "has a key"),
        "items into a list": (b"\x80\2]X\1\0\0\0wNs.", "isn't a dict"),
        "items into a tuple": (b"\x80\2)Na.", "isn't a list"),
        "a string that isn't UTF-8": (b"\x80\2X\1\0\0\0\xff.", "utf-8|decode"),
        "an unterminated name": (b"\x80\2c" + b"x" * 1000, "no newline found"),
        "a name that isn't ASCII": (b"\x80\2c\xff\nx\n.", "ascii|decode|refers to"),
        "protocol 4": (pickle.dumps({"w": 1}, 4), "protocol 4"),
        "protocol 5": (pickle.dumps({"w": 1}, 5), "protocol 5"),
        "protocol 0": (pickle.dumps({"w": 1}, 0), "opcode"),
    }


def pickled_calls() -> Corpus:
    """Return pickles with calls that build no tensor."""
    tensor = state_pickle()[9:-2]
    return {
        "a call of a tensor": (calls(tensor), "isn't a function"),
        "a call of a string": (calls(b"X\4\0\0\0exec"), "isn't a function"),
        "a call of a storage's type": (calls(b"ctorch\nFloatStorage\n"), "isn't a function"),
        "a call of a dtype": (calls(b"ctorch\nfloat32\n"), "isn't a function"),
        "a call without a tuple": (calls(b"ccollections\nOrderedDict\n", b"]"), "without an argument tuple"),
        "OrderedDict with arguments": (calls(b"ccollections\nOrderedDict\n", b"]\x85"), "argument"),
        "Size of a number": (calls(b"ctorch\nSize\n", b"K\1\x85"), "invalid torch.Size"),
        "a parameter of None": (calls(b"ctorch._utils\n_rebuild_parameter\n", b"N\x85"), "isn't a tensor"),
        "a tensor of nothing": (calls(b"ctorch._utils\n_rebuild_tensor_v2\n"), "argument"),
        "a rebuild of a rebuild": (
            calls(b"ctorch._tensor\n_rebuild_from_type_v2\n", b"(ctorch._tensor\n_rebuild_from_type_v2\nN)Nt"),
            "isn't a tensor",
        ),
        "an instance of a function": (b"\x80\2}X\1\0\0\0wccollections\nOrderedDict\n)\x81s.", "isn't a class"),
        "attributes of a tensor": (b"\x80\2}X\1\0\0\0w" + tensor + b"}bs.", "sets attributes"),
        "attributes of a function": (calls(b"ccollections\nOrderedDict\n}b"), "sets attributes"),
    }


def pickled_storages() -> Corpus:
    """Return pickles whose storage is wrong."""
    return {
        "another kind of reference": (refers(kind=b"X\6\0\0\0module"), "isn't a storage"),
        "a reference that is a number": (state_pickle(reference=b"K\1Q"), "isn't a storage"),
        "a reference with three items": (state_pickle(reference=b"X\7\0\0\0storageNN\x87Q"), "isn't a storage"),
        "a storage without a type": (
            state_pickle(reference=b"(X\7\0\0\0storageNX\1\0\0\x000NK\6tQ"),
            "isn't a storage",
        ),
        "a storage whose name is a number": (refers(key=b"K\0"), "isn't a storage"),
        "a storage elsewhere": (refers(key=b"X\x0b\0\0\0../../../.."), "not in the archive"),
        "a storage of -1 elements": (refers(b"J\xff\xff\xff\xff"), "expected -4"),
        "a storage of 2^400 elements": (refers(number(1 << 400)), "bytes, expected"),
        "a storage of True elements": (refers(b"\x88"), "isn't a storage"),
    }


def pickled_tensors() -> Corpus:
    """Return pickles of a tensor whose shape, strides or offset are wrong."""
    return {
        "an offset beyond": (state_pickle(offset=b"K\1"), "exceeds its storage"),
        "an offset of -1": (state_pickle(offset=b"J\xff\xff\xff\xff"), "invalid shape"),
        "an offset of 2^400": (state_pickle(offset=number(1 << 400)), "invalid shape"),
        "a shape beyond": (state_pickle(b"K\3K\3\x86"), "exceeds its storage"),
        "a shape of -2": (state_pickle(b"J\xfe\xff\xff\xffK\3\x86"), "invalid shape"),
        "a shape with a string": (state_pickle(b"X\1\0\0\x002K\3\x86"), "invalid shape"),
        "a shape with floats": (state_pickle(b"G?\xf0\0\0\0\0\0\0K\3\x86"), "invalid shape"),
        "a shape with True": (state_pickle(b"\x88K\3\x86"), "invalid shape"),
        "empty and huge": (state_pickle(b"K\0" + number(1 << 47) + number(1 << 47) + b"\x87", b"K\0K\0K\0\x87"), ""),
        "strides beyond": (state_pickle(strides=b"K\6K\1\x86"), "exceeds its storage"),
        "a stride of -3": (state_pickle(strides=b"J\xfd\xff\xff\xffK\1\x86"), "invalid shape"),
        "a stride of 2^62": (state_pickle(strides=number(BIG) + b"K\1\x86"), "invalid shape"),
        "one stride": (state_pickle(strides=b"K\1\x85"), "strides"),
        "a hundred dimensions": (state_pickle(b"(" + b"K\1" * 100 + b"t", b"(" + b"K\1" * 100 + b"t"), "dimensions"),
        "six values 2^40 times": (state_pickle(number(1 << 20) * 2 + b"\x86", b"K\0K\0\x86"), "repeats a storage"),
        "a tensor without a storage": (state_pickle(reference=b"N"), "without a storage"),
        "a list instead of a shape": (state_pickle(b"]"), "without a storage, a shape"),
    }


def pickled_names() -> Corpus:
    """Return pickles that refer to a function that could do harm."""
    pickles = {}
    for name in ("os system", "posix system", "builtins eval", "__builtin__ getattr", "builtins __import__",
                 "subprocess Popen", "torch.storage _load_from_bytes", "torch.hub load", "torch load", "pickle loads",
                 "functools partial", "operator attrgetter", "collections OrderedDict.fromkeys", "codecs open",
                 "torch._utils _rebuild_tensor", "torch._utils _rebuild_wrapper_subclass", "numpy load", "_io open",
                 "t5tune.errors T5TuneError", "torch.jit.unsupported_tensor_ops execWrapper"):  # fmt: skip
        module, function = name.split()
        pickles[f"refers to {name}"] = (
            calls(f"c{module}\n{function}\n".encode(), b"X\2\0\0\0id\x85"),
            f"its pickle refers to {module}.{function}, which no checkpoint needs",
        )
    return pickles


def pickled_opcodes() -> Corpus:
    """Return pickles with each opcode that a state dict doesn't need."""
    pickles = {}
    known = b"\x80(})].N\x88\x89KMJG\x8aX\x85\x86\x87taesuqrhjcR\x81bQ"
    for opcode in pickletools.opcodes:
        code = opcode.code.encode("latin-1")
        if code not in known:
            pickled = b"\x80\2}" + code + b"\0\0\0\0\0\0\0\0\n\n."
            pickles[f"opcode {opcode.name}"] = (pickled, "can't be read")
    return pickles
