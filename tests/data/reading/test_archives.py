"""Compressed files, and large ones, which need little memory."""

import gzip
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t5tune.errors import DataError
from tests.data.reading.records import GOOD, LINES, Outcomes, make_record, read

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


CHECKED = {zstd.CompressionParameter.checksum_flag: 1}  # as the zstd command does
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": lambda data: zstd.compress(data, options=CHECKED),
}


@pytest.mark.slow
@pytest.mark.parametrize("packing", PACK)
def test_archives_are_decompressed(outcomes: Outcomes, packing: str) -> None:
    pack = PACK[packing]
    accepted, rejected = outcomes(pack(LINES), f"data.jsonl.{packing}")
    assert (len(accepted), rejected) == (3000, [])
    # archives may be concatenated, and have a name without a compression suffix
    assert len(outcomes(pack(LINES) + pack(LINES), f"data.jsonl.{packing}")[0]) == 6000
    assert len(outcomes(pack(LINES), "data.jsonl")[0]) == 3000
    assert outcomes(pack(f"[{GOOD}]".encode()), f"data.json.{packing}") == (["Hi"], [])
    assert outcomes(pack(b'source,target\na,"b\nc"\n'), f"data.csv.{packing}") == (["a"], [])


@pytest.mark.parametrize("packing", PACK)
def test_a_broken_archive_is_refused_with_its_name_and_position(tmp_path: Path, packing: str) -> None:
    random.seed(3)
    noise = "".join(f"{make_record(random.randbytes(30).hex())}\n" for _ in range(5000)).encode()
    whole = PACK[packing](noise)
    path = tmp_path / f"data.jsonl.{packing}"
    middle = len(whole) // 2
    broken = {
        "cut off": whole[:middle],
        "without its last bytes": whole[:-3],
        "with a byte flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "followed by something else": whole + b"more",
    }
    if packing == "gz":
        broken["with a wrong checksum"] = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
    for data in broken.values():
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"data\.jsonl\.{packing}: broken .* archive after \d+ decompressed bytes"):
            read(path)
    for data in (LINES, b""):
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"the name ends in \\.{packing}, but the file begins with"):
            read(path)


BOMB = """
import sys
from pathlib import Path
from t5tune.data.reading.readers import read_records
from t5tune.settings.groups.record_format import ReadingSettings
count = sum(1 for _ in read_records([Path(sys.argv[1])], ReadingSettings()))
status = Path("/proc/self/status").read_text()
print(count, int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unit", "times", "records"),
    [
        ("blank.jsonl.gz", b"\n" * (1 << 20), 300, 0),
        ("long.jsonl.gz", b"x" * (1 << 20), 300, 1),
        ("long.json.zst", b"[" + b" " * ((1 << 20) - 1), 200, 0),
        ("turn.jsonl", make_record("x" * (100 << 20)).encode(), 1, 1),
    ],
)
@pytest.mark.variants("long.json.zst-unit2-200-0", "turn.jsonl-unit3-1-1")
def test_large_and_compressed_garbage_needs_little_memory(
    tmp_path: Path, name: str, unit: bytes, times: int, records: int
) -> None:
    path = tmp_path / name
    opener: Any = {".gz": gzip.open, ".zst": zstd.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        for _ in range(times):
            file.write(unit)
    done = subprocess.run([sys.executable, "-c", BOMB, path], capture_output=True, text=True)
    if name == "long.json.zst":
        assert "the array has no end" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    count, megabytes = map(int, done.stdout.split())
    assert count == records
    assert megabytes < 120


@pytest.mark.long
@pytest.mark.slow
def test_a_large_object_of_records_needs_little_memory(tmp_path: Path) -> None:
    records = b"".join(b', "%06d": {"source": "a", "target": "b"}' % number for number in range(20_000))
    with gzip.open(tmp_path / "object.json.gz", "wb") as file:
        file.write(b'{"a": {"source": "a"}, "b": {"source": "b"}, "long": {"source": "' + b"x" * (60 << 20) + b'"}')
        for _ in range(50):
            file.write(records)
        file.write(b"}")
    done = subprocess.run([sys.executable, "-c", BOMB, tmp_path / "object.json.gz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, megabytes = map(int, done.stdout.split())
    assert count == 3 + 50 * 20_000
    assert megabytes < 120
