"""Which records each part reads: every one exactly once, whatever the format, the line ends and the number of parts."""

import gzip
import json
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t5tune.data.reading.readers import read_records
from t5tune.data.reading.rejections import RecordLocation
from t5tune.preparing.parts.record_range import find_line_start, read_range
from t5tune.settings.groups.record_format import ReadingSettings
from t5tune.settings.groups.shard import Shard
from tests.support.corpora import MAX_RECORD_BYTES, write_corpus

Found = list[tuple[RecordLocation, object, object]]


def read_parts(files: list[Path], count: int, max_bytes: int = 1 << 20) -> Found:
    """Read all parts, one after the other."""
    reading = ReadingSettings(max_record_bytes=max_bytes)
    records = chain.from_iterable(read_range(files, Shard(index, count), reading) for index in range(count))
    return [(record.location, record.data, record.repairs) for record in records]


def read_whole(files: list[Path], max_bytes: int = 1 << 20) -> Found:
    records = read_records(files, ReadingSettings(max_record_bytes=max_bytes))
    return [(record.location, record.data, record.repairs) for record in records]


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_each_record_of_any_format_is_in_one_part(tmp_path: Path, count: int) -> None:
    files = sorted(write_corpus(tmp_path / "data").iterdir())
    expected = read_whole(files, MAX_RECORD_BYTES)
    assert len(expected) > 400
    assert read_parts(files, count, MAX_RECORD_BYTES) == expected


line = st.one_of(
    st.integers(0, 99).map(lambda number: json.dumps({"source": "q" * (number % 9), "target": str(number)})),
    st.sampled_from(["", " ", "\t \t", "\f", "{broken", "\ufeff", '\ufeff{"a": 1}', '{"t": "a\\nb"}', "é猫", "x" * 50]),
)


@example(lines=["", '{"a": 1}'], ends=["\n"], is_ended=False, mark=True, count=7)  # a mark without a record
@settings(max_examples=80, deadline=None)
@given(
    lines=st.lists(line, max_size=12),
    ends=st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=1, max_size=3),
    is_ended=st.booleans(),
    mark=st.booleans(),
    count=st.integers(1, 12),
)
def test_lines_are_cut_into_parts_without_losing_any(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ends: list[str], is_ended: bool, mark: bool, count: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    text = "".join(f"{line}{ends[number % len(ends)]}" for number, line in enumerate(lines))
    text = text if is_ended else text.removesuffix(ends[(len(lines) - 1) % len(ends)])
    path.write_bytes((("\ufeff" if mark else "") + text).encode())
    for max_bytes in (1 << 20, 30):
        assert read_parts([path], count, max_bytes) == read_whole([path], max_bytes)


def test_a_line_belongs_to_its_first_bytes_part(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"ab\n\ncd\nef")
    assert [find_line_start(path, position, b"\n") for position in range(10)] == [0, 3, 3, 3, 4, 7, 7, 7, 9, 9]


def test_parts_of_a_line_file_have_similar_sizes(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"source": "q", "target": str(number)}) + "\n" for number in range(1000)))
    sizes = [len(list(read_range([path], Shard(index, 3), ReadingSettings()))) for index in range(3)]
    assert sum(sizes) == 1000
    assert max(sizes) - min(sizes) < 20


def test_a_compressed_file_belongs_to_its_first_bytes_part(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"source": "q", "target": "a"}\n' * 500))
    sizes = [len(list(read_range([path], Shard(index, 3), ReadingSettings()))) for index in range(3)]
    assert sizes == [500, 0, 0]
