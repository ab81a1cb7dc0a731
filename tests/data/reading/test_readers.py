"""Reading data files of any content: which records are accepted, which are rejected, why, and at which location.

Every record is either accepted or rejected.
"""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5tune.data.reading.files import find_files
from t5tune.data.reading.readers import read_records
from t5tune.data.reading.rejections import (
    Rejection,
    RejectionError,
    can_contain_forbidden,
    check_characters,
    parse_json,
)
from t5tune.errors import DataError
from t5tune.settings.groups.record_format import ReadingSettings
from tests.data.reading.records import GOOD, LIMIT, LINES, Outcomes, make_record, prepare, read_in_chunks, read_raw
from tests.support.caches import find_cache

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


# each is placed between two good records, as a line and as an element of an array
UNUSABLE_RECORDS = {
    "NaN": (make_record("Hi", score=1).replace(": 1}", ": NaN}"), "bad_number"),
    "minus infinity": (make_record("Hi", score=1).replace(": 1}", ": -Infinity}"), "bad_number"),
    "float beyond 64 bits": (make_record("Hi", score=1).replace(": 1}", ": 1e999}"), "bad_number"),
    "integer beyond 64 bits": (make_record("Hi", score=1 << 64), "bad_number"),
    "integer below 64 bits": (make_record("Hi", score=-(1 << 63) - 1), "bad_number"),
    "integer of 5,000 digits": (make_record("Hi", score=0).replace(": 0}", ": " + "9" * 5000 + "}"), "bad_number"),
    "duplicate key": (make_record("Hi")[:-1] + ', "conversations": []}', "duplicate_key"),
    "nested duplicate key": (make_record("Hi").replace('"Yes"', '"Yes", "value": "No"'), "duplicate_key"),
    "control character": (make_record("a\\u0000b"), "control_character"),
    "unescaped control character": (make_record("a\x07b"), "control_character"),
    "escape character": (make_record("a\\u001b[1mb"), "control_character"),
    "lone surrogate": (make_record("a\\ud800b"), "lone_surrogate"),
    "surrogates in the wrong order": (make_record("\\udc00\\ud800"), "lone_surrogate"),
    "too long": (make_record("x" * LIMIT), "too_long"),
    "too long, of escapes": (make_record("\\n" * LIMIT), "too_long"),
    "too long, of quotes": (make_record('\\"' * LIMIT), "too_long"),
    "too deep": (make_record("Hi")[:-1] + ', "x": ' + "[" * 4000 + "]" * 4000 + "}", "too_deep"),
    "a number": ("3", "not_an_object"),
    "null": ("null", "not_an_object"),
    "a list": ('["a"]', "not_an_object"),
    "a text of brackets": (json.dumps("[" * 500), "not_an_object"),
    "no known keys": ('{"text": "Hi"}', "unknown_format"),
    "conversations are text": ('{"conversations": "Hi"}', "unknown_format"),
    "a turn is text": ('{"conversations": ["Hi"]}', "bad_turn"),
    "a turn without text": ('{"conversations": [{"from": "human"}]}', "bad_turn"),
    "a speaker of another kind": (make_record("Hi").replace('"gpt"', '"narrator"'), "unknown_role"),
    "text is a number": (make_record("Hi").replace('"Yes"', "3"), "not_text"),
    "text is null": (make_record("Hi").replace('"Yes"', "null"), "not_text"),
    "system is a list": (make_record("Hi", system=[1]), "not_text"),
    "one role twice": (make_record("Hi").replace('"gpt"', '"human"'), "same_role_twice"),
    "no answer": ('{"conversations": [{"from": "human", "value": "Hi"}]}', "no_answer"),
    "a blank answer": (make_record("Hi", "  \\n"), "no_answer"),
    "only an answer": ('{"conversations": [{"from": "gpt", "value": "Hi"}]}', "no_answer"),
    "nothing": ('{"conversations": []}', "no_answer"),
    "an empty source": ('{"source": " ", "target": "Yes"}', "no_source"),
    "an empty prompt": ('{"prompt": "", "completion": "Yes"}', "no_source"),
}


@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize(("bad", "reason"), UNUSABLE_RECORDS.values(), ids=UNUSABLE_RECORDS)
def test_an_unusable_record_is_rejected_without_affecting_others(
    outcomes: Outcomes, bad: str, reason: str, form: str
) -> None:
    records = [make_record("first"), bad, make_record("last")]
    text = "\n".join(records) if form == "lines" else f"[{', '.join(records)}]"
    assert outcomes(text.encode()) == (["first", "last"], [reason])


INVALID_LINES = {
    "cut off": GOOD[:-4],
    "two values": GOOD + GOOD,
    "single quotes": GOOD.replace('"', "'"),
    "a comma too many": GOOD[:-2] + ",]}",
    "bare words": "{conversations: []}",
    "a word": "hello",
    "a comment": "// none",
}


@pytest.mark.parametrize("bad", INVALID_LINES.values(), ids=INVALID_LINES)
def test_an_invalid_line_is_rejected_at_any_position(outcomes: Outcomes, bad: str) -> None:
    good = [make_record("first"), make_record("last")]
    for place in range(3):
        lines = [*good[:place], bad, *good[place:]]
        assert outcomes("\n".join(lines).encode()) == (["first", "last"], ["not_json"])


def test_invalid_utf8_rejects_only_its_own_record(outcomes: Outcomes) -> None:
    bad = make_record("caf\u00e9").encode("latin-1")
    good = make_record("café").encode()
    assert outcomes(b"\n".join([good, bad, good])) == (["café", "café"], ["invalid_utf8"])
    assert outcomes(b"[" + b",".join([good, bad, good]) + b"]") == (["café", "café"], ["invalid_utf8"])
    assert outcomes(b"\n".join([good, b"\x80\x81", good])) == (["café", "café"], ["invalid_utf8"])


# files with the same two records
EQUAL_FILES = {
    "lines": f"{make_record('a')}\n{make_record('b')}\n",
    "lines without an end": f"{make_record('a')}\n{make_record('b')}",
    "lines of Windows": f"{make_record('a')}\r\n{make_record('b')}\r\n",
    "blank lines": f"\n\n  \n{make_record('a')}\n\t\n\n{make_record('b')}\n \n",
    "byte order mark": f"\ufeff{make_record('a')}\n{make_record('b')}\n",
    "array": f"[{make_record('a')},{make_record('b')}]",
    "array over lines": f"[\n  {make_record('a')},\n  {make_record('b')}\n]\n",
    "array with byte order mark": f"\ufeff\n[{make_record('a')},{make_record('b')}]",
    "array spread out": json.dumps([json.loads(make_record("a")), json.loads(make_record("b"))], indent=4),
}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.ndjson"])
@pytest.mark.parametrize("text", EQUAL_FILES.values(), ids=EQUAL_FILES)
def test_arrays_and_lines_are_recognized_by_their_content(outcomes: Outcomes, text: str, name: str) -> None:
    assert outcomes(text.encode(), name) == (["a", "b"], [])


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff", "[]", "[ \n ]", "\ufeff[]"])
def test_an_empty_file_has_no_records(outcomes: Outcomes, text: str) -> None:
    assert outcomes(text.encode()) == ([], [])


def test_record_locations_are_correct(tmp_path: Path) -> None:
    records = [make_record("a"), '{"text": 1}', make_record("é" * 40), '{"text": 2}', make_record("x" * LIMIT), "null"]
    for name, text in {
        "lines.jsonl": "\ufeff\n\n" + "\n\n".join(records) + "\n",
        "array.json": "\n[\n" + ",\n\n ".join(records) + "]",
    }.items():
        data = text.encode()
        (tmp_path / name).write_bytes(data)
        locations = [record.location for record in read_raw(tmp_path / name)]
        assert [location.index for location in locations] == list(range(6))
        for location, record in zip(locations, records, strict=True):
            assert data[location.offset :].startswith(record.encode())
            assert location.line == 1 + data[: location.offset].count(b"\n")
            assert location.file == str(tmp_path / name)


@settings(deadline=None, max_examples=60, database=None, derandomize=True)
@given(
    values=st.lists(
        st.recursive(
            st.none() | st.integers(-9, 9) | st.text('"\\[]{},:a é\n', max_size=12),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"]}a', max_size=3), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=6,
    ),
    size=st.integers(1, 40),
    indent=st.none() | st.integers(0, 2),
)
def test_an_array_is_split_as_json_requires_wherever_chunks_end(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], size: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("array") / "data.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False))
    records = read_in_chunks(path, size)
    assert [json.loads(record.data) for record in records] == values  # type: ignore[arg-type]


PIECES = [
    "\\", "\\u", "\\u001B", "\\u000c", "\\u0041", "\\ud8", "0", "00", "1", "B", "3d", "b", "f", "n", "é",
    "\x07", "\t", "\n", "\x1f", "\x7f",
]  # fmt: skip


@pytest.mark.slow
@settings(deadline=None, max_examples=600, database=None, derandomize=True)
@given(text=st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_characters_are_checked_whenever_one_may_be_forbidden(text: str) -> None:
    data = b'{"said": "' + text.encode() + b'"}'
    try:
        check_characters(parse_json(data))
    except RejectionError as error:
        is_forbidden = error.rejection.reason != "not_json"
    else:
        is_forbidden = False
    assert can_contain_forbidden(data) or not is_forbidden


@pytest.mark.parametrize("chunk_size", [3, 4000, 1 << 20])
def test_a_long_record_keeps_its_size_and_beginning(
    tmp_path: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t5tune.data.reading.files.READ_CHUNK_BYTES", chunk_size)
    long = make_record("é" * LIMIT + '\\"}],[')
    row = f'"{"é" * LIMIT}\n""",x'
    files = {
        "data.jsonl": (f"{GOOD}\n{long}\n{GOOD}", long),
        "data.json": (f"[{GOOD},{long},{GOOD}]", long),
        "data.csv": (f"source,target\na,b\n{row}\nc,d\n", f"{row}\n"),
    }
    for name, (text, expected) in files.items():
        (tmp_path / name).write_text(text)
        before, rejected, after = read_raw(tmp_path / name)
        size = len(expected.encode())
        assert (before.parsed, after.parsed, rejected.data) == (None, None, expected[:1000])
        assert rejected.parsed == Rejection("too_long", f"{size:,} bytes, more than max_record_bytes 10,000")
        assert after.location.index == 2
        assert text.encode()[after.location.offset :].startswith((GOOD.encode(), b"c,d"))


def test_a_long_record_with_broken_characters_keeps_its_beginning(tmp_path: Path) -> None:
    long = b'{"source": "' + b"\xff\xe2\x82" * LIMIT + b'"}'
    (tmp_path / "data.jsonl").write_bytes(long)
    reading = ReadingSettings(max_record_bytes=LIMIT, encoding="utf-8")
    (record,) = read_records([tmp_path / "data.jsonl"], reading)
    assert isinstance(record.data, str)
    assert record.data.encode(errors="surrogateescape") == long[:1000]


def test_files_of_folders_and_patterns_are_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.json", "c.csv.gz", "notes.txt", "deep/d.jsonl", "e.JSONL"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    names = lambda *paths: [str(path) for path in find_files(list(paths))]  # noqa: E731
    assert names(".") == ["a.json", "b.jsonl", "c.csv.gz", "e.JSONL"]
    assert names("*.json*") == ["a.json", "b.jsonl"]
    assert names("**/*.jsonl") == ["b.jsonl", "deep/d.jsonl"]
    assert names("b.jsonl", "deep") == ["b.jsonl", "deep/d.jsonl"]
    for wrong in ("nowhere.json", "notes.txt", "*.xml"):
        with pytest.raises(DataError, match="data_path: "):
            find_files([wrong])
    with pytest.raises(DataError, match="once"):
        find_files(["-", "-"])


def test_a_file_name_with_pattern_characters_is_taken_literally(tmp_path: Path) -> None:
    path = tmp_path / "chats[1].jsonl"
    path.write_text(GOOD)
    assert find_files([str(path)]) == [path]


@pytest.mark.slow
@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstd.compress])
@pytest.mark.variants("compress0")
def test_standard_input_is_read(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    done = prepare(tmp_path, "--data-path", "-", stdin=pack(LINES))
    assert done.code == 0, done.stderr
    assert done.json["examples"] == 3000


def test_rejected_records_are_written_with_their_locations(tmp_path: Path) -> None:
    bad = {"text": "é\ud800"}
    undecodable = make_record("caf\u00e9").encode("latin-1")
    long = make_record("x" * 500)
    (tmp_path / "data.jsonl").write_bytes(
        b"\n".join([GOOD.encode(), json.dumps(bad).encode(), b"{", undecodable, long.encode(), GOOD.encode()])
    )
    limits = "--max-record-bytes", 400, "--max-rejected-fraction", 1, "--encoding", "utf-8"
    done = prepare(tmp_path, "--data-path", tmp_path / "data.jsonl", *limits)
    assert (done.json["conversations"], done.json["rejected"]) == (2, 4)
    lines = [json.loads(line) for line in (find_cache(tmp_path / "cache") / "rejected.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["lone_surrogate", "not_json", "invalid_utf8", "too_long"]
    assert [line["line"] for line in lines] == [2, 3, 4, 5]
    assert lines[0]["record"] == bad
    assert lines[1]["record"] == "{"
    assert lines[2]["record"].encode(errors="surrogateescape") == undecodable
    assert lines[3]["message"] == f"{len(long)} bytes, more than max_record_bytes 400"
    assert lines[3]["record"] == long
    for line in lines:
        assert line.keys() == {"file", "line", "index", "offset", "reason", "message", "record"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, bytes(range(256)) * 40]
)
def test_garbage_data_gives_a_one_line_error_and_no_cache(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "data.json").write_bytes(data)
    done = prepare(tmp_path, "--data-path", tmp_path / "data.json")
    assert done.code == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert str(tmp_path / "data.json") in error
    assert {path.name for path in tmp_path.iterdir()} <= {"data.json", "cache.rejected.jsonl"}
