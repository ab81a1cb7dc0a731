"""Read a zip archive with uncompressed members, as torch.save writes it: checked completely, then memory-mapped.

    archive = StoredZip(path)
    archive.view("data/0")          # the member's bytes, as a view of the mapped file

A crafted archive can show different files to different zip readers. So nothing is guessed here: the central directory
and its end records are at the end of the file, without gaps, and agree with each member's local header; members are
uncompressed, have unique names, and don't overlap. Format: PKWARE's APPNOTE.TXT, 4.3.
"""

import mmap
import os
import stat
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from t5tune.checkpoints.tensor_files.tensors import drop_pages
from t5tune.errors import CheckpointError
from t5tune.formatting import shorten
from t5tune.io.reasons import describe_error

MAX_DIRECTORY_BYTES = 32 << 20
CRC_CHUNK_BYTES = 16 << 20
_END_RECORD = struct.Struct("<4s4H2IH")
_END_RECORD_64 = struct.Struct("<4sQ2H2I4Q")
_END_LOCATOR_64 = struct.Struct("<4sIQI")
_DIRECTORY_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_IN_ZIP64_EXTRA = 0xFFFFFFFF  # instead of a value: it is in the zip64 extra field
_IS_ENCRYPTED = 1
_HAS_DATA_DESCRIPTOR = 8
_MAX_DATA_DESCRIPTOR_BYTES = 24


@dataclass(frozen=True)
class Member:
    """A file in the archive.

    Args:
        header: offset of the local header.
        crc: CRC-32 of the bytes; 0: the writer didn't compute it.
        has_descriptor: whether a data descriptor, which repeats the sizes, follows the bytes.
        begin: offset of the bytes.
    """

    name: str
    header: int
    size: int
    crc: int
    has_descriptor: bool
    begin: int = 0


class StoredZip:
    """The archive's members by name, without the top-level folder that torch puts them in."""

    def __init__(self, path: Path) -> None:
        """Read and check the central directory."""
        self.path = path
        try:
            # O_NONBLOCK, because opening a named pipe would block forever
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise CheckpointError(f"{path}: not a regular file")
                self.size = status.st_size
                self._descriptor = file.fileno()
                self.members = self._read_members()
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, struct.error) as error:
            raise CheckpointError(f"{path}: can't be read: {describe_error(error)}") from error

    def view(self, name: str) -> memoryview:
        """Return the member's bytes as a view of the mapped file."""
        member = self.get_member(name)
        return memoryview(self._map)[member.begin : member.begin + member.size]

    def get_member(self, name: str) -> Member:
        """Return a member by its name; raise CheckpointError if it doesn't exist."""
        if name not in self.members:
            raise CheckpointError(f"{self.path}: {name}: not in the archive")
        return self.members[name]

    def check(self, name: str) -> None:
        """Check a member's CRC-32."""
        data, crc, found = self.view(name), self.get_member(name).crc, 0
        for begin in range(0, len(data) if crc else 0, CRC_CHUNK_BYTES):
            found = zlib.crc32(data[begin : begin + CRC_CHUNK_BYTES], found)
            drop_pages(self._map)
        if found != crc:
            raise CheckpointError(f"{self.path}: {name}: differs from what was written (CRC-32)")

    def _build_error(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: not torch's zip format: {reason}",
            hint="load and save the file with a current torch, or convert it to safetensors",
        )

    def _read_bytes(self, begin: int, count: int) -> bytes:
        # not through the map: the kernel would also map the pages around each of a thousand headers
        data = os.pread(self._descriptor, count, begin) if 0 <= begin <= self.size - count else b""
        if len(data) != count:
            raise self._build_error(f"the file ends before byte {begin + count}")
        return data

    def _read_members(self) -> dict[str, Member]:
        begin, count, end = self._locate_directory()
        directory = self._read_bytes(begin, end - begin)
        members: dict[str, Member] = {}
        offset = 0
        for _ in range(count):
            member, offset = self._parse_directory_entry(directory, offset)
            if member.name in members:
                raise self._build_error(f"two members are named {shorten(member.name)!r}")
            members[member.name] = member
        if offset != len(directory):
            raise self._build_error("the central directory is longer than its entries")
        members = self._locate_members(members, begin)
        if len({name.partition("/")[0] for name in members}) != 1 or not all("/" in name for name in members):
            raise self._build_error("the members aren't in a single top-level folder")
        return {name.partition("/")[2]: member for name, member in members.items()}

    def _locate_members(self, members: dict[str, Member], end: int) -> dict[str, Member]:
        """Find the offset of each member's data. The members must fill the bytes up to `end`.

        They must follow each other without overlap and without a gap, except for a data descriptor.
        """
        located = dict(members)
        position = gap = 0
        for member in sorted(members.values(), key=lambda member: member.header):
            if not position <= member.header <= position + gap:
                raise self._build_error(f"{shorten(member.name)!r} overlaps another member or follows a gap")
            data = self._find_data(member)
            position = data + member.size
            if position > end:
                raise self._build_error(f"{shorten(member.name)!r} extends into the central directory")
            gap = _MAX_DATA_DESCRIPTOR_BYTES if member.has_descriptor else 0
            located[member.name] = replace(member, begin=data)
        if end > position + gap:
            raise self._build_error("there are unknown bytes between the members and the central directory")
        return located

    def _locate_directory(self) -> tuple[int, int, int]:
        """Return (begin, number of entries, end) of the central directory."""
        end = self.size - _END_RECORD.size
        signature, disk, first, on_this_disk, count, size, begin, comment = _END_RECORD.unpack(
            self._read_bytes(end, _END_RECORD.size)
        )
        if signature != b"PK\x05\x06" or comment:
            raise self._build_error("no end-of-central-directory record at the end of the file")
        if disk or first or on_this_disk != count:
            raise self._build_error("the archive is split into several files")
        offset = end - _END_LOCATOR_64.size
        if offset >= 0 and (locator := self._read_bytes(offset, _END_LOCATOR_64.size))[:4] == b"PK\x06\x07":
            _, _, record_begin, _ = _END_LOCATOR_64.unpack(locator)
            end = offset - _END_RECORD_64.size
            if record_begin != end:
                raise self._build_error("the zip64 end record isn't at the offset that its locator gives")
            record = _END_RECORD_64.unpack(self._read_bytes(end, _END_RECORD_64.size))
            signature, length, _, _, *disks, on_this_disk, count_64, size_64, begin_64 = record
            if signature != b"PK\x06\x06" or length != _END_RECORD_64.size - 12 or any(disks):
                raise self._build_error("the zip64 end record is invalid")
            values = {(count, 0xFFFF): count_64, (size, _IN_ZIP64_EXTRA): size_64, (begin, _IN_ZIP64_EXTRA): begin_64}
            is_same = all(short in (limit, long) for (short, limit), long in values.items())
            if not is_same or on_this_disk != count_64:
                raise self._build_error("the two end records contradict each other")
            count, size, begin = count_64, size_64, begin_64
        if begin + size != end or size > MAX_DIRECTORY_BYTES or count * _DIRECTORY_ENTRY.size > size:
            raise self._build_error("the central directory isn't at the offset that the end record gives")
        return begin, count, end

    def _parse_directory_entry(self, directory: bytes, offset: int) -> tuple[Member, int]:
        """Parse an entry of the central directory, and return it with the offset of the next entry."""
        fields = _DIRECTORY_ENTRY.unpack_from(directory, offset)
        signature, _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, _, header = fields
        name_length, extra_length, comment_length = lengths
        offset += _DIRECTORY_ENTRY.size
        name_bytes = directory[offset : offset + name_length]
        extra = directory[offset + name_length : offset + name_length + extra_length]
        offset += name_length + extra_length + comment_length
        if signature != b"PK\x01\x02" or offset > len(directory):
            raise self._build_error("an entry of the central directory is invalid")
        try:
            name = name_bytes.decode("utf-8")
        except UnicodeDecodeError:
            raise self._build_error("a member's name isn't UTF-8") from None
        size, packed, header = self._apply_zip64(extra, [size, packed, header])
        if method or flags & _IS_ENCRYPTED or packed != size or disk:
            raise self._build_error(
                f"{shorten(name)!r} is compressed, encrypted or on another disk; torch stores members uncompressed"
            )
        return Member(name, header, size, crc, bool(flags & _HAS_DATA_DESCRIPTOR)), offset

    def _apply_zip64(self, extra: bytes, values: list[int]) -> list[int]:
        """Replace the values that need more than 32 bits: extra field 1 (zip64) contains them, in this order."""
        offset = 0
        while offset + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, offset)
            body = extra[offset + 4 : offset + 4 + length]
            offset += 4 + length
            if kind != 1:
                continue
            wanted = [index for index, value in enumerate(values) if value == _IN_ZIP64_EXTRA]
            if len(body) < 8 * len(wanted):
                raise self._build_error("a member's 64-bit size is missing")
            for order, index in enumerate(wanted):
                (values[index],) = struct.unpack_from("<Q", body, 8 * order)
            return values
        if _IN_ZIP64_EXTRA in values:
            raise self._build_error("a member's 64-bit size is missing")
        return values

    def _find_data(self, member: Member) -> int:
        """Find the offset of a member's bytes, after its local header, which must agree with the central directory."""
        header = self._read_bytes(member.header, _LOCAL_HEADER.size)
        signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        name = self._read_bytes(member.header + _LOCAL_HEADER.size, name_length)
        sizes = {size, packed} - {member.size, _IN_ZIP64_EXTRA} - ({0} if flags & _HAS_DATA_DESCRIPTOR else set())
        checks = {crc} - {member.crc} - ({0} if flags & _HAS_DATA_DESCRIPTOR else set())
        if signature != b"PK\x03\x04" or method or name != member.name.encode() or sizes or checks:
            raise self._build_error(f"{shorten(member.name)!r}: its local header contradicts the central directory")
        return member.header + _LOCAL_HEADER.size + int(name_length) + int(extra_length)
