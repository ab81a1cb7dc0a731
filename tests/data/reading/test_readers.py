"""Reading data files of any content: which records are accepted, which are rejected, why, and at which location.

The accepted and the rejected records are always all of them.
"""

import gzip
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from t5tune.data.reading.files import find_files
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.raw_records import RawRecord, parse_record
from t5tune.data.reading.readers import read_records
from t5tune.data.reading.rejections import (
    REJECTION_REASONS,
    Rejection,
    RejectionError,
    can_contain_forbidden,
    check_characters,
    parse_json,
)
from t5tune.errors import DataError
from t5tune.settings.dataset_list import DatasetSettings
from t5tune.settings.groups.record_format import ReadingSettings
from tests.support.caches import find_cache

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

GOOD = '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}'
LIMIT = 10_000


def make_record(question: str, answer: str = "Yes", **more: Any) -> str:
    """Return a record as a line of JSON; the texts are inserted without escaping."""
    turns = f'[{{"from": "human", "value": "{question}"}}, {{"from": "gpt", "value": "{answer}"}}]'
    rest = "".join(f', "{key}": {json.dumps(value)}' for key, value in more.items())
    return f'{{"conversations": {turns}{rest}}}'


def read_raw(path: Path, limit: int = LIMIT) -> list[RawRecord]:
    return list(read_records(find_files([str(path)]), ReadingSettings(max_record_bytes=limit)))


def read(path: Path, **reading: Any) -> list[Conversation | Rejection]:
    chosen = ReadingSettings(**reading)
    records = read_records(find_files([str(path)]), chosen.model_copy(update={"max_record_bytes": LIMIT}))
    return [parse_record(record, chosen) for record in records]


@pytest.fixture
def outcomes(tmp_path: Path) -> Callable[..., tuple[list[str], list[str]]]:
    """Write bytes to a file and read it; return (human turns of accepted records, reasons of rejected records)."""

    def run(data: bytes, name: str = "data.jsonl", **reading: Any) -> tuple[list[str], list[str]]:
        (tmp_path / name).write_bytes(data)
        records = read(tmp_path / name, **reading)
        accepted = [record.turns[0].text for record in records if isinstance(record, Conversation)]
        rejected = [record.reason for record in records if isinstance(record, Rejection)]
        assert len(accepted) + len(rejected) == len(records)
        assert set(rejected) <= set(REJECTION_REASONS)
        return accepted, rejected

    return run


# each is placed between two good records, as a line and as an element of an array
UNUSABLE_RECORDS = {
    "NaN": (make_record("Hi", score=1).replace(": 1}", ": NaN}"), "bad_number"),
    "minus infinity": (make_record("Hi", score=1).replace(": 1}", ": -Infinity}"), "bad_number"),
    "float beyond 64 bits": (make_record("Hi", score=1).replace(": 1}", ": 1e999}"), "bad_number"),
    "integer beyond 64 bits": (make_record("Hi", score=1 << 64), "bad_number"),
    "integer below 64 bits": (make_record("Hi", score=-(1 << 63) - 1), "bad_number"),
    "integer of 5,000 digits": (make_record("Hi", score=0).replace(": 0}", ": " + "9" * 5000 + "}"), "bad_number"),
    "duplicate key": (make_record("Hi")[:-1] + ', "conversations": []}', "duplicate_key"),
    "nested duplicate key": (
        make_record("Hi").replace('"value": "Yes"', '"value": "Yes", "value": "No"'),
        "duplicate_key",
    ),
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
    outcomes: Callable[..., tuple[list[str], list[str]]], bad: str, reason: str, form: str
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
def test_a_line_that_is_not_json_is_rejected_at_any_position_without_affecting_others(
    outcomes: Callable[..., tuple[list[str], list[str]]], bad: str
) -> None:
    good = [make_record("first"), make_record("last")]
    for place in range(3):
        lines = [*good[:place], bad, *good[place:]]
        assert outcomes("\n".join(lines).encode()) == (["first", "last"], ["not_json"])


def test_invalid_utf8_rejects_only_its_own_record(
    outcomes: Callable[..., tuple[list[str], list[str]]], tmp_path: Path
) -> None:
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
def test_arrays_and_lines_are_recognized_by_their_content(
    outcomes: Callable[..., tuple[list[str], list[str]]], text: str, name: str
) -> None:
    assert outcomes(text.encode(), name) == (["a", "b"], [])


def test_a_multi_line_object_is_one_record(outcomes: Callable[..., tuple[list[str], list[str]]]) -> None:
    assert outcomes(json.dumps(json.loads(GOOD), indent=2).encode()) == (["Hi"], [])
    assert outcomes(b"\n" + json.dumps(json.loads(GOOD), indent=2).encode() + b"\n", "one.json") == (["Hi"], [])


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff", "[]", "[ \n ]", "\ufeff[]"])
def test_an_empty_file_has_no_records(outcomes: Callable[..., tuple[list[str], list[str]]], text: str) -> None:
    assert outcomes(text.encode()) == ([], [])


BROKEN_FILES = {
    "array without an end": (f"[{GOOD},".encode(), r":1: the array has no end"),
    "array cut in a string": (f"[\n{GOOD},\n{GOOD[:-12]}".encode(), r":3: the array has no end"),
    "array cut after a backslash": (b'[{"a": "b\\', r":1: the array has no end"),
    "array cut at its start": (b"[", r":1: the array has no end"),
    "text after an array": (f"[{GOOD}]\n{GOOD}".encode(), r":2: there is text after the end of the array"),
    "array without a value": (
        f"[{GOOD},,{GOOD}]".encode(),
        r":1: record 1: not valid JSON: expected a value, found nothing",
    ),
    "array with a comma at its end": (f"[{GOOD},]".encode(), r":1: record 1: not valid JSON: expected a value, found"),
    "array without a comma": (
        f"[{GOOD}\n{GOOD}]".encode(),
        r":1: record 0: not valid JSON: there is text after the end of the value at line 2, character 1 of the record",
    ),
    "array with two values": (
        f"[{GOOD} {GOOD}]".encode(),
        rf":1: record 0: not valid JSON: there is text after .* at character {len(GOOD) + 2} of the record",
    ),
    "array with a broken value": (f"[{GOOD},\n{{'a': 1}}]".encode(), r":2: record 1: not valid JSON"),
    "array with a brace too many": (f"[{GOOD}}},{GOOD}]".encode(), r":1: not valid JSON"),
    "array with a bracket too many": (f"[{GOOD}],{GOOD}]".encode(), r":1: there is text after the end of the array"),
    "UTF-16 without a mark": (GOOD.encode("utf-16-le"), r"UTF-16"),
    "UTF-16, big endian": (GOOD.encode("utf-16-be"), r"UTF-16"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_file_is_refused_with_its_name_and_position(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "data.json").write_bytes(data)
    with pytest.raises(DataError, match=f"data\\.json.*{message}"):
        read(tmp_path / "data.json")


# ---------------------------------------------------------------- objects of records

RECORDS = {"5a": {"original": "a", "disfluent": "a, no, a"}, "5b": {"original": "b", "disfluent": "b uh b"}}
COLUMNS = {"source_column": "disfluent", "target_column": "original"}


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("start", ["", "\ufeff", " \n"])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.json.gz"])
def test_an_object_whose_values_are_objects_is_read_as_records(
    tmp_path: Path, name: str, start: str, indent: int | None
) -> None:
    data = (start + json.dumps(RECORDS, indent=indent)).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    first, second = read(tmp_path / name, **COLUMNS)
    assert isinstance(first, Conversation)
    assert isinstance(second, Conversation)
    assert [turn.text for turn in first.turns] == ["a, no, a", "a"]
    assert [turn.text for turn in second.turns] == ["b uh b", "b"]
    mark = {"byte_order_mark": 1} if start == "\ufeff" else {}
    assert (first.repairs, second.repairs) == ({"records_keyed_by_id": 1, **mark}, {"records_keyed_by_id": 1})
    # the key is the record's id
    (as_id, _) = read(tmp_path / name, source_column="id", target_column="original")
    assert isinstance(as_id, Conversation)
    assert as_id.turns[0].text == "5a"


def test_conversations_keyed_by_id_are_read(outcomes: Callable[..., tuple[list[str], list[str]]]) -> None:
    records = {str(number): json.loads(make_record(f"q{number}")) for number in range(3)}
    assert outcomes(json.dumps(records).encode(), "data.json") == (["q0", "q1", "q2"], [])


ONE_RECORD = {
    "a conversation": json.loads(GOOD),
    "with an id": {"id": "x", **json.loads(GOOD)},
    "after an object": {"meta": {"from": "a"}, **json.loads(GOOD)},
    "before an object": {**json.loads(GOOD), "meta": {"from": "a"}},
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("value", ONE_RECORD.values(), ids=ONE_RECORD)
def test_an_object_that_is_itself_a_record_is_one(
    outcomes: Callable[..., tuple[list[str], list[str]]], value: Any, indent: int | None
) -> None:
    assert outcomes(json.dumps(value, indent=indent).encode(), "data.json") == (["Hi"], [])


def test_lines_that_are_objects_of_objects_are_not_split(
    outcomes: Callable[..., tuple[list[str], list[str]]],
) -> None:
    line = json.dumps(RECORDS)
    assert outcomes(f"{line}\n{GOOD}\n".encode()) == (["Hi"], ["unknown_format"])
    cut = '{"a": {"b": 1}, "c": {"d":'
    assert outcomes(f"{cut}\n{GOOD}\n{GOOD}\n".encode()) == (["Hi", "Hi"], ["not_json"])
    assert outcomes(b"{}") == ([], ["unknown_format"])


def test_unusable_records_of_an_object_are_named_by_their_keys(tmp_path: Path) -> None:
    good = RECORDS["5a"]
    values = {
        "a": json.dumps(good),
        "b": json.dumps({"original": "b"}),
        "c": json.dumps({"original": "x" * LIMIT, "disfluent": "c"}),
        "d\\ud800": json.dumps(good),
        "a\\n": json.dumps(good),
        "e": '{"original": "a", "original": "b"}',
        "f": '{"deep": ' + "[" * 300 + "]" * 300 + "}",
    }
    path = tmp_path / "data.json"
    path.write_text("{\n" + ",\n".join(f'"{key}": {value}' for key, value in values.items()) + "}")
    found = read(path, **COLUMNS)
    reasons = [each.reason if isinstance(each, Rejection) else None for each in found]
    assert reasons == [None, "unknown_format", "too_long", "lone_surrogate", None, "duplicate_key", "too_deep"]
    raw = read_raw(path)
    assert [record.location.line for record in raw] == list(range(2, 9))
    assert str(raw[1].location) == f"{path}:3: 'b'"
    assert str(raw[4].location) == f"{path}:6: 'a\\n'"
    data = path.read_bytes()
    assert all(data[record.location.offset :].startswith(b"{") for record in raw)
    # ids need not be unique: no record is dropped silently
    path.write_text('{"a": {"source": "x", "target": "y"}, "a": {"source": "z", "target": "y"}}')
    assert [each.turns[0].text for each in read(path) if isinstance(each, Conversation)] == ["x", "z"]


@pytest.mark.parametrize("ending", ["", "\n", "\nnot JSON\n", f"\n{GOOD}\n{GOOD}\n"])
@pytest.mark.parametrize("chunk", [3000, 1 << 20])
def test_a_line_that_begins_with_an_object_and_is_too_long_is_one_record(
    outcomes: Callable[..., tuple[list[str], list[str]]], monkeypatch: pytest.MonkeyPatch, ending: str, chunk: int
) -> None:
    monkeypatch.setattr("t5tune.data.reading.files.READ_CHUNK_BYTES", chunk)
    line = json.dumps({"id": {"number": 1}, "meta": {"text": "x" * LIMIT}, "source": "a", "target": "b"})
    rejected = ["too_long", "not_json"] if "not" in ending else ["too_long"]
    assert outcomes(f"{line}{ending}".encode()) == (["Hi"] * ending.count(GOOD), rejected)


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_of_records_may_have_records_that_are_too_long(
    outcomes: Callable[..., tuple[list[str], list[str]]], indent: int | None
) -> None:
    good = {"source": "Hi", "target": "a"}
    records = {"a": good, "b": good, "c": {"source": "x" * LIMIT, "target": "a"}, "d": good}
    assert outcomes(json.dumps(records, indent=indent).encode()) == (["Hi"] * 3, ["too_long"])
    # a longer limit reads a file whose first record is too long
    first = {"a": records["c"], "b": good, "d": good}
    assert outcomes(json.dumps(first, indent=2).encode()) == (["Hi"] * 2, ["too_long"])
    assert outcomes(json.dumps(first).encode()) == ([], ["too_long"])


def test_a_large_object_may_have_a_value_that_is_no_record(
    outcomes: Callable[..., tuple[list[str], list[str]]],
) -> None:
    """Only as much of it is looked at as a record may be long."""
    records: dict[str, Any] = {str(number): {"source": f"q{number}", "target": "a"} for number in range(1000)}
    records["500"] = None
    accepted, rejected = outcomes(json.dumps(records).encode())
    assert (len(accepted), rejected) == (999, ["not_an_object"])


BROKEN_OBJECTS = {
    "without an end": ('{"a": {"b": 1}, "c": {"d": 1}', ":1: the object has no end"),
    "cut in a record": ('{"a": {"b": 1},\n"c": {"d": "', ":2: the object has no end"),
    "cut in a key": ('{"a": {"b": 1},\n"c', ":2: record 1: expected a key in double quotes, and a colon"),
    "cut after a colon": ('{"a": {"b": 1},\n"c":', ":2: the object has no end"),
    "a comma at its end": (
        '{"a": {"b": 1}, "b": {"b": 1}, ' + f'"c": {{"d": "{"x" * LIMIT}"}}' + ",}",
        ":1: record 3: expected a key",
    ),
    "a record that isn't JSON": ('{"a": {"b": 1}, "c": {"d" 1}}', ":1: record 1: not valid JSON: expected a colon"),
    "a bracket too many": (
        '{"a": {"b": 1}, "b": {"b": 1}' + f', "c": {{"d": "{"x" * LIMIT}"}}]}}',
        ":1: not valid JSON here",
    ),
    "text after it": (
        '{"a": {}, "b": {}, "c": {"b": "' + "x" * LIMIT + '"}}\nmore',
        ":2: there is text after the end of the object",
    ),
    "a long key": ('{"a": {}, "b": {}, "' + "k" * LIMIT + '": {"d": 1}}', ":1: record 2: expected a key"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN_OBJECTS.values(), ids=BROKEN_OBJECTS)
def test_a_broken_object_of_records_is_refused_with_its_position(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=rf"data\.json{re.escape(message)}"):
        read(tmp_path / "data.json")


@settings(deadline=None, max_examples=60, database=None, derandomize=True)
@given(
    values=st.dictionaries(
        st.text('"\\[]{},:a é\n', max_size=4),
        st.dictionaries(st.text('"]}a\\:', max_size=3), st.none() | st.text('"\\[]{},:a é\n', max_size=12), max_size=3),
        min_size=1,
        max_size=6,
    ),
    size=st.integers(1, 40),
    indent=st.none() | st.integers(0, 2),
)
def test_an_object_is_split_as_json_requires_wherever_chunks_end(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], size: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("object") / "data.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t5tune.data.reading.files.READ_CHUNK_BYTES", size)
        records = list(read_records([path], ReadingSettings(max_record_bytes=LIMIT)))
    read_back = {record.location.key: json.loads(record.data) for record in records}  # type: ignore[arg-type]
    assert read_back == values


WRAPPED = {
    "a list": {"version": 2, "data": [json.loads(GOOD)] * 3},
    "a large list": {"version": "v", "data": [json.loads(GOOD)] * 300},
}


@pytest.mark.parametrize("value", WRAPPED.values(), ids=WRAPPED)
def test_a_list_of_records_in_an_object_is_refused_with_the_way_to_take_it_out(tmp_path: Path, value: Any) -> None:
    (tmp_path / "data.json").write_text(json.dumps(value))
    for reading in ({}, COLUMNS):
        (rejection,) = read(tmp_path / "data.json", **reading)
        assert isinstance(rejection, Rejection)
        assert "if the list 'data' has the records, give it as a file of its own" in rejection.message
        assert """jq '.["data"]' IN.json > OUT.json""" in rejection.message


def test_an_object_of_records_with_other_values_is_refused_with_the_way_to_remove_them(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"version": 2, **RECORDS}))
    (rejection,) = read(tmp_path / "data.json", **COLUMNS)
    assert isinstance(rejection, Rejection)
    assert "2 of its 3 values are objects; if these are the records, remove the others" in rejection.message


def test_a_conversation_that_is_too_long_is_no_list_of_records(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(make_record("x" * LIMIT))
    (rejection,) = read(tmp_path / "data.jsonl")
    assert isinstance(rejection, Rejection)
    assert rejection.message.endswith("more than max_record_bytes 10,000")


# ---------------------------------------------------------------- archives

LINES = "".join(f"{make_record(f'question {number}')}\n" for number in range(3000)).encode()
CHECKED = {zstd.CompressionParameter.checksum_flag: 1}  # as the zstd command does
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": lambda data: zstd.compress(data, options=CHECKED),
}


@pytest.mark.slow
@pytest.mark.parametrize("packing", PACK)
def test_archives_are_decompressed(outcomes: Callable[..., Any], packing: str) -> None:
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
        "with a byte flipped": whole[: len(whole) // 2]
        + bytes([whole[len(whole) // 2] ^ 255])
        + whole[len(whole) // 2 + 1 :],
        "followed by something else": whole + b"more",
    }
    if packing == "gz":
        broken["with a wrong checksum"] = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
    for data in broken.values():
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"data\.jsonl\.{packing}: broken .* archive after \d+ decompressed bytes"):
            read(path)
    path.write_bytes(LINES)
    with pytest.raises(DataError, match=f"the name ends in \\.{packing}, but the file begins with"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="the name ends in"):
        read(path)


# ---------------------------------------------------------------- locations


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t5tune.data.reading.files.READ_CHUNK_BYTES", size)
        records = list(read_records([path], ReadingSettings(max_record_bytes=LIMIT)))
    assert [json.loads(record.data) for record in records] == values  # type: ignore[arg-type]


PIECES = [
    "\\",
    "\\u",
    "\\u001B",
    "\\u000c",
    "\\u0041",
    "\\ud8",
    "0",
    "00",
    "1",
    "B",
    "3d",
    "b",
    "f",
    "n",
    "é",
    "\x07",
    "\t",
    "\n",
    "\x1f",
    "\x7f",
]


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
def test_of_a_long_record_the_size_and_the_beginning_are_kept(
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


def test_of_a_long_record_of_broken_characters_the_beginning_is_kept(tmp_path: Path) -> None:
    long = b'{"source": "' + b"\xff\xe2\x82" * LIMIT + b'"}'
    (tmp_path / "data.jsonl").write_bytes(long)
    reading = ReadingSettings(max_record_bytes=LIMIT, encoding="utf-8")
    (record,) = read_records([tmp_path / "data.jsonl"], reading)
    assert isinstance(record.data, str)
    assert record.data.encode(errors="surrogateescape") == long[:1000]


# ---------------------------------------------------------------- formats

HI, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
FORMATS: dict[str, Any] = {
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
    "sharegpt, loud": {"conversations": [{"from": " Human ", "value": "Hi"}, {"from": "GPT", "value": "Yes"}]},
    "openai": {"messages": [HI, YES]},
    "openai in conversations": {"conversations": [HI, YES]},
    "openai in parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, YES]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Yes"},
    "prompt/completion": {"prompt": "Hi", "completion": "Yes"},
    "prompt/completion of messages": {"prompt": [HI], "completion": [YES]},
    "source/target": {"source": "Hi", "target": "Yes"},
    "a pair of answers": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    "a pair of answers to a conversation": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Yes"},
        "rejected": {"from": "gpt", "value": "No"},
    },
}


def read_conversation(path: Path, value: Any, **reading: Any) -> Conversation:
    path.write_text(json.dumps(value) + "\n")
    (record,) = read(path, **reading)
    assert isinstance(record, Conversation), record
    return record


def list_turns(record: Conversation) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in record.turns]


@pytest.mark.parametrize("value", FORMATS.values(), ids=FORMATS)
def test_each_format_is_detected_by_its_keys(tmp_path: Path, value: Any) -> None:
    record = read_conversation(tmp_path / "data.jsonl", value)
    assert list_turns(record) == [("human", "Hi"), ("assistant", "Yes")]
    ignored = {"ignored_field_rejected": 1} if "rejected" in value else {}
    assert record.repairs == ignored


def test_all_fields_of_alpaca_are_used(tmp_path: Path) -> None:
    value = {"instruction": "Add", "input": "1 1", "output": "2", "system": "Short.", "history": [["a", "b"]]}
    record = read_conversation(tmp_path / "data.jsonl", value)
    assert record.system == "Short."
    assert list_turns(record) == [("human", "a"), ("assistant", "b"), ("human", "Add\n1 1"), ("assistant", "2")]


def test_tool_calls_are_targets_and_tool_results_are_sources(tmp_path: Path) -> None:
    speakers = [
        "system",
        "human",
        "function_call",
        "observation",
        "gpt",
        "tool",
        "bing",
        "user",
        "chatgpt",
        "human",
        "bard",
    ]
    value = {"conversations": [{"from": speaker, "value": str(n)} for n, speaker in enumerate(speakers)]}
    record = read_conversation(tmp_path / "data.jsonl", value)
    assert record.system == "0"
    assert [turn.role for turn in record.turns] == ["human", "assistant"] * 5


def test_openai_tool_calls_become_the_json_of_function_call_turns(tmp_path: Path) -> None:
    def answer(**message: Any) -> str:
        record = read_conversation(tmp_path / "data.jsonl", {"messages": [HI, {"role": "assistant", **message}]})
        assert record.repairs == {"tool_calls_as_text": 1}
        return record.turns[1].text

    def call(arguments: Any) -> dict[str, Any]:
        return {"id": "a", "type": "function", "function": {"name": "añadir", "arguments": arguments}}

    as_text = '{"name": "añadir", "arguments": {"x":  [1]}}'
    assert answer(content=None, tool_calls=[call('{"x":  [1]}')]) == as_text
    assert answer(tool_calls=[call('{"x":  [1]}')]) == as_text
    assert answer(content="I see.", tool_calls=[call({"x": "é"})]) == (
        'I see.\n{"name": "añadir", "arguments": {"x": "é"}}'
    )
    assert json.loads(answer(content="", tool_calls=[call("{}"), call("not {JSON")])) == [
        {"name": "añadir", "arguments": {}},
        {"name": "añadir", "arguments": "not {JSON"},
    ]
    assert answer(content=None, function_call={"name": "f"}) == '{"name": "f", "arguments": null}'
    for wrong in ([{"id": 1}], [{"function": "f"}], ["f"], "f"):
        (rejected,) = read_record(
            tmp_path, {"messages": [HI, {"role": "assistant", "content": "x", "tool_calls": wrong}]}
        )
        assert (rejected.reason, "without a function's name" in rejected.message) == ("bad_turn", True)
    for nothing in (None, [], {"name": None, "arguments": None}):
        (rejected,) = read_record(
            tmp_path, {"messages": [HI, {"role": "assistant", "content": None, "tool_calls": nothing}]}
        )
        assert rejected.reason == "not_text"


CALL_ARGUMENTS: list[Any] = [
    {"a": 1},
    {"to": "x", "near": {"city": "Bonn"}},
    {},
    {"near": {"zip": 5}, "stops": [{"m": 1}, {"n": 2}]},
]


def make_call(arguments: Any) -> dict[str, Any]:
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"messages": [{**HI, "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [call]}]}


def store_parquet(records: list[Any], folder: Path) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(records), folder / "calls.parquet")
    return str(folder / "calls.parquet")


TABLES: dict[str, Callable[[list[Any], Path], Any]] = {
    "Parquet": store_parquet,
    "Arrow table": lambda records, folder: pyarrow.Table.from_pylist(records),
    "Dataset": lambda records, folder: datasets.Dataset.from_list(records),
    "streamed Dataset": lambda records, folder: datasets.Dataset.from_list(records).to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tool_calls_of_a_table_do_not_get_each_others_arguments(tmp_path: Path, kind: str) -> None:
    data = TABLES[kind]([make_call(arguments) for arguments in CALL_ARGUMENTS], tmp_path)
    (path,) = DatasetSettings(path=data).path
    records = [record for record in read(Path(path)) if isinstance(record, Conversation)]
    assert [json.loads(record.turns[1].text)["arguments"] for record in records] == CALL_ARGUMENTS
    # each of a, to, near, stops that a call lacks, and one of the two keys of near, m, n
    left_out = [record.repairs["null_arguments_left_out"] for record in records]
    assert left_out == [3, 3, 4, 5]
    kept = tmp_path / f"run.{Path(path).name}"  # where train keeps records that were in memory
    shutil.copy(path, kept)
    assert read(kept) == [replace(record, location=replace(record.location, file=str(kept))) for record in records]


def test_null_arguments_that_are_not_of_a_table_are_learned(tmp_path: Path) -> None:
    records = [make_call({"a": None}), make_call('{"a": null, "b":  1}')]
    (path,) = DatasetSettings(path=records).path
    (tmp_path / "calls.jsonl").write_text("\n".join(map(json.dumps, records)))
    for file in (Path(path), tmp_path / "calls.jsonl", Path(store_parquet(records[1:], tmp_path))):
        found = [record for record in read(file) if isinstance(record, Conversation)]
        texts = ['{"name": "f", "arguments": {"a": null}}', '{"name": "f", "arguments": {"a": null, "b":  1}}']
        assert [record.turns[1].text for record in found] == texts[-len(found) :]
        assert [record.repairs for record in found] == [{"tool_calls_as_text": 1}] * len(found)


def test_columns_can_have_other_names_and_a_prefix(tmp_path: Path) -> None:
    named = {"source_column": "dialogue", "target_column": "note", "source_prefix": "summarize: "}
    record = read_conversation(tmp_path / "data.jsonl", {"dialogue": "Hi", "note": "Yes", "id": 3}, **named)
    assert list_turns(record) == [("human", "summarize: Hi"), ("assistant", "Yes")]
    (rejected,) = read_record(tmp_path, {"dialogue": "Hi"}, **named)
    assert (rejected.reason, "note" in rejected.message) == ("unknown_format", True)
    (rejected,) = read_record(tmp_path, {"dialogue": "", "note": "Yes"}, **named)
    assert rejected == Rejection("no_source", "no text to answer (columns)")


def test_a_mistyped_column_is_suggested(tmp_path: Path) -> None:
    value = {"disfluent": "a, no, b", "original": "b"}
    (rejected,) = read_record(tmp_path, value, source_column="disfluent", target_column="orignal")
    message = "no column orignal; the record has disfluent, original; did you mean original?"
    assert rejected.message == message
    value = {" disfluent ": "a, no, b", "its original": "b"}
    (rejected,) = read_record(tmp_path, value, source_column="disfluent", target_column="its original")
    message = "no column disfluent; the record has ' disfluent ', its original; did you mean ' disfluent '?"
    assert rejected.message == message
    (tmp_path / "data.csv").write_text(" disfluent ,its original\na uh b,a b\n")
    (rejected,) = read(tmp_path / "data.csv", source_column="disfluent", target_column="its original")
    assert rejected == Rejection("unknown_format", message)


def test_two_columns_of_unknown_names_are_filled_in(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("id,disfluent,its original\n1,a uh b,a b\n")
    (rejected,) = read(tmp_path / "pairs.csv")
    assert isinstance(rejected, Rejection)
    assert rejected.message == (
        "if the first line is data, add --no-header; otherwise, its keys are id, disfluent, its original; "
        "add --source-column disfluent --target-column 'its original', or the other way round"
    )
    expected = (
        "expected conversations, or messages, or instruction + output, or completion + prompt, or source + target"
    )
    (rejected,) = read_record(tmp_path, {"text": "a", "number": 1})
    assert rejected.message == f"its keys are text, number; {expected}"
    (rejected,) = read_record(tmp_path, {"c": "a", "b": "b", "a": "c"})
    named = "or name two columns with --source-column and --target-column"
    assert rejected.message == f"its keys are c, b, a; {expected}; {named}"
    (rejected,) = read_record(tmp_path, dict.fromkeys(("a, b", *"hgfedcb"), 1))
    assert rejected.message == f"its keys are 'a, b', h, g, f, e and 3 more; {expected}"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {},
            "its keys are what was w 0, it was v 0; add --source-column 'what was w 0' --target-column 'it was v 0'",
        ),
        ({"source_column": "q", "target_column": "a"}, "no column q, a; the record has what was w 0, it was v 0"),
        ({"objective": "span-corruption"}, "no key text, which raw text has; its keys are what was w 0, it was v 0"),
    ],
)
@pytest.mark.parametrize("name", ["data.csv", "data.tsv"])
def test_a_message_about_a_table_without_a_header_first_says_how_to_read_it(
    tmp_path: Path, name: str, columns: dict[str, Any], message: str
) -> None:
    text = "what was w 0,it was v 0\nwhat was w 1,it was v 1\n"
    (tmp_path / name).write_text(text.replace(",", "\t") if name == "data.tsv" else text)
    (rejected,) = read(tmp_path / name, **columns)
    assert isinstance(rejected, Rejection)
    advice = "the first line looks like data: add --no-header to read it as the first row; otherwise, "
    assert rejected.message.startswith(f"{advice}{message}")


def read_record(folder: Path, value: Any, **reading: Any) -> list[Any]:
    (folder / "line.jsonl").write_text(json.dumps(value) + "\n")
    return read(folder / "line.jsonl", **reading)


def test_a_named_format_rejects_the_others(tmp_path: Path) -> None:
    both = FORMATS["sharegpt"] | {"source": "a", "target": "b"}
    assert list_turns(read_conversation(tmp_path / "a.jsonl", both, data_format="source-target"))[0] == ("human", "a")
    (rejected,) = read_record(tmp_path, FORMATS["openai"], data_format="alpaca")
    assert (rejected.reason, "instruction" in rejected.message) == ("unknown_format", True)


def test_a_content_part_that_is_not_text_is_rejected(tmp_path: Path) -> None:
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    (rejected,) = read_record(tmp_path, {"messages": [picture, YES]})
    assert (rejected.reason, "image_url" in rejected.message) == ("not_text", True)


# ---------------------------------------------------------------- repairs


def test_repairs_are_counted_by_kind(tmp_path: Path) -> None:
    turns = [
        ("gpt", "I go first"),
        ("human", "a\r\nb\rc"),
        ("gpt", "\u200bYes\ufeff"),
        ("human", " "),
        ("gpt", "x"),
        ("human", "y"),
    ]
    value = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns], "tags": ["t"]}
    (tmp_path / "data.jsonl").write_text("\ufeff" + json.dumps(value))
    (record,) = read(tmp_path / "data.jsonl")
    assert isinstance(record, Conversation)
    assert list_turns(record) == [("human", "a\nb\nc"), ("assistant", "Yes"), ("human", " "), ("assistant", "x")]
    assert record.repairs == {
        "byte_order_mark": 1,
        "leading_assistant_turns": 1,
        "carriage_returns": 2,
        "zero_width_characters": 2,
        "blank_turns": 1,
        "trailing_human_turns": 1,
        "ignored_field_tags": 1,
    }


def test_merge_same_role_merges_consecutive_turns_of_a_role(tmp_path: Path) -> None:
    turns = [("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d"), ("gpt", "e")]
    value = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    record = read_conversation(tmp_path / "data.jsonl", value, merge_same_role=True)
    assert list_turns(record) == [("human", "a\nb"), ("assistant", "c\nd\ne")]
    assert record.repairs == {"merged_same_role_turns": 3}


def test_clean_removes_html_and_backslashes_but_keeps_code(tmp_path: Path) -> None:
    html = (
        '<div class="markdown prose"><p>Use <code>a &lt; b</code>:</p><pre><div>python<button>Copy code</button>'
        "</div><div><code>    def f(x):\n        return x_1 * 2\n</code></div></pre>"
        "<ol><li>one</li><li>two</li></ol></div>"
    )
    value = {"conversations": [{"from": "human", "value": "snake\\_case and `a\\_b`"}, {"from": "gpt", "value": html}]}
    untouched = read_conversation(tmp_path / "data.jsonl", value)
    assert [turn.text for turn in untouched.turns] == [turn["value"] for turn in value["conversations"]]
    record = read_conversation(tmp_path / "data.jsonl", value, clean=True)
    question, answer = (turn.text for turn in record.turns)
    assert question == "snake_case and `a\\_b`"
    assert "```python\n    def f(x):\n        return x_1 * 2\n```" in answer
    assert "`a < b`" in answer
    assert "1. one\n2. two" in answer
    assert "<" not in answer.replace("a < b", "")
    assert "Copy code" not in answer
    assert record.repairs == {"html_turns": 1, "markdown_escapes": 1}


@pytest.mark.parametrize("prefix", ["", "<b>&amp;: "])
def test_clean_repairs_a_source_before_the_prefix_is_prepended(tmp_path: Path, prefix: str) -> None:
    html = "<p>Hello <b>big</b> world</p><p>A &amp; B</p>"
    value = {"source": html, "target": html}
    record = read_conversation(tmp_path / "data.jsonl", value, clean=True, source_prefix=prefix)
    text = "Hello **big** world\n\nA & B"
    assert list_turns(record) == [("human", prefix + text), ("assistant", text)]
    assert record.repairs == {"html_turns": 2}


def test_clean_repairs_what_was_said_and_not_the_tool_calls_after_it(tmp_path: Path) -> None:
    arguments = {"body": "say &quot;hi&quot;  there", "x": "a <b>bold</b> \\_ end"}
    call = json.dumps({"name": "send", "arguments": arguments})
    calling = {"tool_calls": [{"function": {"name": "send", "arguments": arguments}}]}
    part = {"type": "tool_call", "value": call}
    messages: list[tuple[dict[str, Any], str]] = [
        ({"role": "assistant", "content": None, **calling}, call),
        ({"role": "assistant", "content": "<p>Let me &amp; see.</p>", **calling}, f"Let me & see.\n{call}"),
        ({"role": "assistant", "content": [{"type": "text", "text": "A &amp; B"}, part]}, f"A & B\n{call}"),
        ({"role": "assistant", "content": "<p></p>", **calling}, call),
        ({"from": "function_call", "value": call}, call),
    ]
    for message, target in messages:
        record = read_conversation(tmp_path / "data.jsonl", {"messages": [HI, message]}, clean=True)
        assert record.turns[1].text == target


def test_text_with_angle_brackets_is_not_taken_as_html(tmp_path: Path) -> None:
    text = "if a < b and b > c: print(<x>) # std::vector<int> & more"
    record = read_conversation(tmp_path / "data.jsonl", {"source": text, "target": text}, clean=True)
    assert [turn.text for turn in record.turns] == [text, text]


# ---------------------------------------------------------------- tables


def test_rows_of_a_csv_file_are_records(outcomes: Callable[..., tuple[list[str], list[str]]]) -> None:
    text = 'source,target,id\n"a, ""b""\nc",Yes,1\nd,No,2\n'
    assert outcomes(text.encode(), "data.csv") == (['a, "b"\nc', "d"], [])
    assert outcomes(("\ufeff" + text).encode(), "data.csv") == (['a, "b"\nc', "d"], [])
    assert outcomes(b"source;target\na;b,c\n", "data.csv") == (["a"], [])
    assert outcomes(b"source\ttarget\na,b\tc\n", "data.tsv") == (["a,b"], [])
    assert outcomes(b"q,a\nx,y\n", "data.csv", source_column="q", target_column="a") == (["x"], [])


@pytest.mark.parametrize(
    ("header", "row", "columns"),
    [
        (
            "question;answer (short, one word, lowercase)",
            "Who?;me",
            ["question", "answer (short, one word, lowercase)"],
        ),
        ('"Frage, deutsch";"Antwort, Korpus, engl."', "Wer?;me", ["Frage, deutsch", "Antwort, Korpus, engl."]),
        ("Satz (dt., kurz);Übersetzung", "Wort, ja, bitte;word", ["Satz (dt., kurz)", "Übersetzung"]),
        ("question,answer (a; b; or c)", "Who?,a", ["question", "answer (a; b; or c)"]),
        ("source\ttarget, short", "Wort, bitte\tword", ["source", "target, short"]),
        ("sep=;\nfrage,de;antwort", "1,5;2,5", ["frage,de", "antwort"]),
        ('"SEP=|"\nfrage,de|antwort', "1,5|2;5", ["frage,de", "antwort"]),
        ("\ufeffsep=,\nfrage;de,antwort", "1;5,2;5", ["frage;de", "antwort"]),
    ],
)
def test_the_delimiter_of_a_csv_file_is_the_one_that_divides_header_and_rows_alike(
    tmp_path: Path, header: str, row: str, columns: list[str]
) -> None:
    (tmp_path / "data.csv").write_text(f"{header}\n{row}\n{row}\n")
    records = [record.data for record in read_raw(tmp_path / "data.csv")]
    assert [[*record] for record in records if isinstance(record, dict)] == [columns, columns]


def test_a_csv_file_whose_delimiter_is_not_clear_is_refused_until_it_is_named(tmp_path: Path) -> None:
    text = "Satz (dt., kurz);Übersetzung\nWort 1, bitte;word 1 please\n"
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        read(tmp_path / "data.csv")
    assert str(caught.value) == (
        f"{tmp_path / 'data.csv'}: not clear where the cells end: commas and semicolons divide its rows equally well; "
        "name the right one in a line above the header: sep=, or sep=;"
    )
    (tmp_path / "data.csv").write_text("sep=;\n" + text)
    (record,) = read_raw(tmp_path / "data.csv")
    assert record.data == {"Satz (dt., kurz)": "Wort 1, bitte", "Übersetzung": "word 1 please"}
    assert (record.location.line, record.location.index) == (3, 0)


@pytest.mark.parametrize(("delimiter", "name"), [(",", "commas"), (";", "semicolons")])
def test_messages_of_a_csv_file_name_its_delimiter(tmp_path: Path, delimiter: str, name: str) -> None:
    text = "source,target\na,b\nonly one\n".replace(",", delimiter)
    (tmp_path / "data.csv").write_text(text)
    assert read(tmp_path / "data.csv")[1] == Rejection(
        "bad_row", f"1 cell in a row, 2 in the header, divided at {name}"
    )
    (tmp_path / "data.csv").write_text(text + '"a"b')
    with pytest.raises(DataError, match=f":4: not valid CSV: there is text after a closing quote, divided at {name}"):
        read(tmp_path / "data.csv")


def test_columns_without_a_name_are_unused_and_counted(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("question,answer,,\nWho?,me,,\nWhy?,so,,yes\n")
    records = read(tmp_path / "data.csv", source_column="question", target_column="answer")
    repairs = [record.repairs for record in records if isinstance(record, Conversation)]
    assert repairs == [{}, {"ignored_field_unnamed 4": 1}]
    (rejected, _) = read(tmp_path / "data.csv")
    assert isinstance(rejected, Rejection)
    assert "add --source-column question --target-column answer" in rejected.message


def test_malformed_rows_are_rejected_without_affecting_others(
    outcomes: Callable[..., tuple[list[str], list[str]]],
) -> None:
    text = b"source,target\na,b\nonly one\nx,y,z\n\xff,b\n\nc,d\n\0,b\n"
    assert outcomes(text, "data.csv", encoding="utf-8") == (
        ["a", "c"],
        ["bad_row", "bad_row", "invalid_utf8", "control_character"],
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "data.csv",
            "Frage,Übersetzung\na,b\n",
            "bytes that are not text in the file's encoding (a key: the byte 0xDC at character 0)",
        ),
        (
            "data.csv",
            "source,target\nna,schön\n",
            "bytes that are not text in the file's encoding (target: the byte 0xF6 at character 3)",
        ),
        (
            "data.jsonl",
            '{"source": "schön"}\n',
            "the byte 0xF6 at character 15 of the record is not text in the file's encoding",
        ),
    ],
)
def test_records_that_are_not_utf_8_are_rejected_if_this_is_given(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    done = prepare(tmp_path, "--data-path", tmp_path / name, "--encoding", "utf-8")
    assert done.returncode == 2
    assert f"{message}; save the file as UTF-8, or name the right encoding with --encoding" in done.stderr.decode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'source,target\na,"b\n', r":\d+: not valid CSV"),
        (
            b"id,source,target,source\n1,a,b,c\n",
            ":1: duplicate column name: source; rename .*; if .* data, add --no-header",
        ),
        (b"source," + b"a" * LIMIT + b"\na,b\n", ":1: the header is longer than"),
        ("source,target\na,b\n".encode("utf-16-le"), "UTF-16"),
    ],
)
def test_a_broken_csv_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "data.csv").write_bytes(data)
    with pytest.raises(DataError, match=f"data\\.csv.*({message})"):
        read(tmp_path / "data.csv")


def test_rows_of_a_parquet_file_are_records(tmp_path: Path) -> None:
    rows = [json.loads(make_record(f"q{number}")) | {"system": None} for number in range(300)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=70)
    records = read(tmp_path / "data.parquet")
    assert [record.turns[0].text for record in records if isinstance(record, Conversation)] == [
        f"q{n}" for n in range(300)
    ]
    whole = (tmp_path / "data.parquet").read_bytes()
    for broken in (whole[:-20], whole[: len(whole) // 2], b"PAR1", GOOD.encode()):
        (tmp_path / "data.parquet").write_bytes(broken)
        with pytest.raises(DataError, match=r"data\.parquet: row \d+: broken Parquet"):
            read(tmp_path / "data.parquet")


def test_rejected_table_rows_are_written_as_json(tmp_path: Path) -> None:
    rows = [{"source": "a", "target": "b", "score": 1.0}, {"source": "c", "target": None, "score": float("nan")}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    done = prepare(tmp_path, "--data-path", tmp_path / "data.parquet", "--max-rejected-fraction", 1)
    assert json.loads(done.stdout)["rejected"] == 1
    line = (find_cache(tmp_path / "cache") / "rejected.jsonl").read_text()
    rejected = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert rejected["record"] == {"source": "c", "target": None, "score": "NaN"}
    assert rejected["reason"] == "not_text"


# ---------------------------------------------------------------- finding files


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


def test_a_spreadsheet_is_to_be_exported_as_csv(tmp_path: Path) -> None:
    (tmp_path / "pairs.XLSX").write_bytes(b"PK")
    for path in (tmp_path / "pairs.XLSX", tmp_path):
        with pytest.raises(DataError, match=re.escape(f"{path}: ")) as caught:
            find_files([str(path)])
        assert caught.value.hint == "export pairs.XLSX as CSV"
    (tmp_path / "pairs.xml").write_text("")
    with pytest.raises(DataError, match="xml: expected one of") as caught:
        find_files([str(tmp_path / "pairs.xml")])
    assert caught.value.hint is None


def test_a_file_name_with_pattern_characters_is_taken_literally(tmp_path: Path) -> None:
    path = tmp_path / "chats[1].jsonl"
    path.write_text(GOOD)
    assert find_files([str(path)]) == [path]


# ---------------------------------------------------------------- the whole command


def prepare(tmp_path: Path, *arguments: Any, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "t5tune", "prepare", "--model-name-or-path", "pocket", "--json"]
    return subprocess.run(
        [*command, "--output-dir", tmp_path / "cache", *map(str, arguments)], input=stdin, capture_output=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstd.compress])
@pytest.mark.variants("compress0")
def test_standard_input_is_read(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    done = prepare(tmp_path, "--data-path", "-", stdin=pack(LINES))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 3000


def test_rejected_records_are_written_with_their_locations(tmp_path: Path) -> None:
    bad = {"text": "é\ud800"}
    undecodable = make_record("caf\u00e9").encode("latin-1")
    long = make_record("x" * 500)
    (tmp_path / "data.jsonl").write_bytes(
        b"\n".join([GOOD.encode(), json.dumps(bad).encode(), b"{", undecodable, long.encode(), GOOD.encode()])
    )
    limits = "--max-record-bytes", 400, "--max-rejected-fraction", 1, "--encoding", "utf-8"
    done = prepare(tmp_path, "--data-path", tmp_path / "data.jsonl", *limits)
    result = json.loads(done.stdout)
    assert (result["conversations"], result["rejected"]) == (2, 4)
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
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b"",
        b"\0" * 100,
        bytes(range(256)) * 40,
        b'"',
        b"{}" * 1000,
    ],
)
def test_garbage_data_gives_a_one_line_error_and_no_cache(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "data.json").write_bytes(data)
    done = prepare(tmp_path, "--data-path", tmp_path / "data.json")
    assert done.returncode == 2
    (error,) = done.stderr.decode().splitlines()
    assert error.startswith("error: ")
    assert str(tmp_path / "data.json") in error
    assert {path.name for path in tmp_path.iterdir()} <= {"data.json", "cache.rejected.jsonl"}


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
    if name.endswith(".gz"):
        with gzip.open(path, "wb") as file:
            for _ in range(times):
                file.write(unit)
    elif name.endswith(".zst"):
        with zstd.open(path, "wb") as file:
            for _ in range(times):
                file.write(unit)
    else:
        path.write_bytes(unit)
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
