"""A zip whose members are stored uncompressed, as torch.save writes it: checked whole, then mapped.

    archive = StoredZip(path)
    archive.view("data/0")          # the member's bytes, where they lie in the mapped file

Zip readers may be led to see different files in one archive. So nothing here is guessed: the tables end the file,
follow each other without a hole, and agree with the header in front of each member; members are uncompressed, have
names of their own, and don't overlap. Format: PKWARE's APPNOTE.TXT, 4.3.
"""

import mmap
import os
import stat
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from t5tune.errors import CheckpointError
from t5tune.io.reasons import reason_of

MAX_TABLE = 32 << 20
CHUNK = 16 << 20
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_UNKNOWN = 0xFFFFFFFF
_IS_ENCRYPTED = 1
_SIZES_FOLLOW = 8
_LONGEST_COPY = 24


@dataclass(frozen=True)
class Member:
    """One file in the zip. `crc` is 0 where the writer didn't compute it; `is_followed`: its sizes follow once more."""

    name: str
    header: int
    size: int
    crc: int
    is_followed: bool
    begin: int = 0


class StoredZip:
    """Members by their names, without the folder that torch puts before them all."""

    def __init__(self, path: Path) -> None:
        """Raises: CheckpointError: no zip of this kind, or one whose parts contradict each other."""
        self.path = path
        try:
            # a pipe would let us wait for ever
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise CheckpointError(f"{path}: no regular file")
                self.size = status.st_size
                self._descriptor = file.fileno()
                self.members = self._read_members()
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, struct.error) as error:
            raise CheckpointError(f"{path}: can't be read: {reason_of(error)}") from error

    def view(self, name: str) -> memoryview:
        """The member's bytes in the mapped file.

        Raises: CheckpointError: no such member.
        """
        member = self.member(name)
        return memoryview(self._map)[member.begin : member.begin + member.size]

    def member(self, name: str) -> Member:
        """Raises: CheckpointError: no such member."""
        if name not in self.members:
            raise CheckpointError(f"{self.path}: {name}: not in it")
        return self.members[name]

    def check(self, name: str) -> None:
        """Raises: CheckpointError: the member's bytes aren't those that were written."""
        data, crc, found = self.view(name), self.member(name).crc, 0
        for begin in range(0, len(data) if crc else 0, CHUNK):
            found = zlib.crc32(data[begin : begin + CHUNK], found)
            let_go(self._map)
        if found != crc:
            raise CheckpointError(f"{self.path}: {name}: differs from what was written (CRC-32)")

    def _broken(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: not torch's zip format: {reason}",
            hint="load and save it once with a current torch, or convert it to safetensors",
        )

    def _read(self, begin: int, count: int) -> bytes:
        # not through the map: the kernel would map the pages around each of a thousand headers
        data = os.pread(self._descriptor, count, begin) if 0 <= begin <= self.size - count else b""
        if len(data) != count:
            raise self._broken(f"it ends before byte {begin + count}")
        return data

    def _read_members(self) -> dict[str, Member]:
        begin, count, end = self._table()
        table = self._read(begin, end - begin)
        members: dict[str, Member] = {}
        place = 0
        for _ in range(count):
            member, place = self._entry(table, place)
            if member.name in members:
                raise self._broken(f"two members {member.name[:100]!r}")
            members[member.name] = member
        if place != len(table):
            raise self._broken("its table is longer than its members")
        position = hole = 0
        for member in sorted(members.values(), key=lambda member: member.header):
            if not position <= member.header <= position + hole:
                raise self._broken(f"{member.name[:100]!r} lies over another member, or behind a hole")
            data = self._begin_of(member)
            position = data + member.size
            if position > begin:
                raise self._broken(f"{member.name[:100]!r} passes the end of the members")
            hole = _LONGEST_COPY if member.is_followed else 0
            members[member.name] = replace(member, begin=data)
        if begin > position + hole:
            raise self._broken("something lies between its members and their table")
        if len({name.partition("/")[0] for name in members}) != 1 or not all("/" in name for name in members):
            raise self._broken("its members don't lie in one folder")
        return {name.partition("/")[2]: member for name, member in members.items()}

    def _table(self) -> tuple[int, int, int]:
        """(begin, entries, end) of the table of members."""
        end = self.size - _END.size
        signature, disk, first, here, count, size, begin, comment = _END.unpack(self._read(end, _END.size))
        if signature != b"PK\x05\x06" or comment:
            raise self._broken("no end of a zip at its end")
        if disk or first or here != count:
            raise self._broken("it continues in another file")
        place = end - _LOCATOR_64.size
        if place >= 0 and (locator := self._read(place, _LOCATOR_64.size))[:4] == b"PK\x06\x07":
            _, _, where, _ = _LOCATOR_64.unpack(locator)
            end = place - _END_64.size
            if where != end:
                raise self._broken("the end of the zip isn't where it says")
            record = _END_64.unpack(self._read(end, _END_64.size))
            signature, length, _, _, disk, first, here, count_64, size_64, begin_64 = record
            if signature != b"PK\x06\x06" or length != _END_64.size - 12 or disk or first or here != count_64:
                raise self._broken("its end is wrong")
            for short, limit, long in (
                (count, 0xFFFF, count_64),
                (size, _UNKNOWN, size_64),
                (begin, _UNKNOWN, begin_64),
            ):
                if short not in (limit, long):
                    raise self._broken("its two ends contradict each other")
            count, size, begin = count_64, size_64, begin_64
        if begin + size != end or size > MAX_TABLE or count * _ENTRY.size > size:
            raise self._broken("the table of its members isn't where it says")
        return begin, count, end

    def _entry(self, table: bytes, place: int) -> tuple[Member, int]:
        """The entry at a place of the table, and where the next begins."""
        fields = _ENTRY.unpack_from(table, place)
        signature, _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, _, header = fields
        name_length, extra_length, comment_length = lengths
        place += _ENTRY.size
        name_bytes = table[place : place + name_length]
        extra = table[place + name_length : place + name_length + extra_length]
        place += name_length + extra_length + comment_length
        if signature != b"PK\x01\x02" or place > len(table):
            raise self._broken("a member's entry in its table is wrong")
        try:
            name = name_bytes.decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken("a member's name is no text") from None
        size, packed, header = self._long_values(extra, [size, packed, header])
        if method or flags & _IS_ENCRYPTED or packed != size or disk:
            raise self._broken(f"{name[:100]!r} is compressed, encrypted or elsewhere; torch stores its members plain")
        return Member(name, header, size, crc, bool(flags & _SIZES_FOLLOW)), place

    def _long_values(self, extra: bytes, values: list[int]) -> list[int]:
        """Those of the values that 32 bits can't hold stand, in this order, in the extra field 1."""
        place = 0
        while place + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, place)
            body = extra[place + 4 : place + 4 + length]
            place += 4 + length
            if kind != 1:
                continue
            wanted = [index for index, value in enumerate(values) if value == _UNKNOWN]
            if len(body) < 8 * len(wanted):
                raise self._broken("a member's size of 64 bits is missing")
            for order, index in enumerate(wanted):
                (values[index],) = struct.unpack_from("<Q", body, 8 * order)
            return values
        if _UNKNOWN in values:
            raise self._broken("a member's size of 64 bits is missing")
        return values

    def _begin_of(self, member: Member) -> int:
        """Where a member's bytes begin: behind its own header, which must say what the table says."""
        header = self._read(member.header, _LOCAL.size)
        signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack(header)
        name = self._read(member.header + _LOCAL.size, name_length)
        sizes = {size, packed} - {member.size, _UNKNOWN} - ({0} if flags & _SIZES_FOLLOW else set())
        checks = {crc} - {member.crc} - ({0} if flags & _SIZES_FOLLOW else set())
        if signature != b"PK\x03\x04" or method or name != member.name.encode() or sizes or checks:
            raise self._broken(f"{member.name[:100]!r}: its own header contradicts the table")
        return member.header + _LOCAL.size + int(name_length) + int(extra_length)


def let_go(mapped: mmap.mmap) -> None:
    """Give back the pages that reading a mapped file brought in, or reading all of it would keep it in memory."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
