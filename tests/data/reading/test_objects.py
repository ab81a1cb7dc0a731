"""A JSON object whose values are records, and an object that is itself one."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.rejections import Rejection
from t5tune.errors import DataError
from tests.data.reading.records import GOOD, LIMIT, Outcomes, make_record, read, read_in_chunks, read_raw

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


ONE_RECORD = {
    "a conversation": json.loads(GOOD),
    "with an id": {"id": "x", **json.loads(GOOD)},
    "after an object": {"meta": {"from": "a"}, **json.loads(GOOD)},
    "before an object": {**json.loads(GOOD), "meta": {"from": "a"}},
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("value", ONE_RECORD.values(), ids=ONE_RECORD)
def test_an_object_that_is_itself_a_record_is_one(outcomes: Outcomes, value: Any, indent: int | None) -> None:
    assert outcomes(json.dumps(value, indent=indent).encode(), "data.json") == (["Hi"], [])


def test_lines_that_are_objects_of_objects_are_not_split(outcomes: Outcomes) -> None:
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
def test_a_long_line_that_begins_an_object_is_one_record(
    outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch, ending: str, chunk: int
) -> None:
    monkeypatch.setattr("t5tune.data.reading.files.READ_CHUNK_BYTES", chunk)
    line = json.dumps({"id": {"number": 1}, "meta": {"text": "x" * LIMIT}, "source": "a", "target": "b"})
    rejected = ["too_long", "not_json"] if "not" in ending else ["too_long"]
    assert outcomes(f"{line}{ending}".encode()) == (["Hi"] * ending.count(GOOD), rejected)


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_may_have_records_that_are_too_long(outcomes: Outcomes, indent: int | None) -> None:
    good = {"source": "Hi", "target": "a"}
    records = {"a": good, "b": good, "c": {"source": "x" * LIMIT, "target": "a"}, "d": good}
    assert outcomes(json.dumps(records, indent=indent).encode()) == (["Hi"] * 3, ["too_long"])
    # a longer limit reads a file whose first record is too long
    first = {"a": records["c"], "b": good, "d": good}
    assert outcomes(json.dumps(first, indent=2).encode()) == (["Hi"] * 2, ["too_long"])
    assert outcomes(json.dumps(first).encode()) == ([], ["too_long"])


def test_a_large_object_may_contain_a_value_without_a_record(outcomes: Outcomes) -> None:
    """Only as much of it is looked at as a record may be long."""
    records: dict[str, Any] = {str(number): {"source": f"q{number}", "target": "a"} for number in range(1000)}
    records["500"] = None
    accepted, rejected = outcomes(json.dumps(records).encode())
    assert (len(accepted), rejected) == (999, ["not_an_object"])


BROKEN_OBJECTS = {
    "a comma at its end": (
        '{"a": {"b": 1}, "b": {"b": 1}, ' + f'"c": {{"d": "{"x" * LIMIT}"}}' + ",}",
        ":1: record 3: expected a key",
    ),
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
    records = read_in_chunks(path, size)
    read_back = {record.location.key: json.loads(record.data) for record in records}  # type: ignore[arg-type]
    assert read_back == values


WRAPPED = {
    "a list": {"version": 2, "data": [json.loads(GOOD)] * 3},
    "a large list": {"version": "v", "data": [json.loads(GOOD)] * 300},
}


@pytest.mark.parametrize("value", WRAPPED.values(), ids=WRAPPED)
def test_a_rejected_object_says_how_to_extract_its_list(tmp_path: Path, value: Any) -> None:
    (tmp_path / "data.json").write_text(json.dumps(value))
    for reading in ({}, COLUMNS):
        (rejection,) = read(tmp_path / "data.json", **reading)
        assert isinstance(rejection, Rejection)
        assert "if the list 'data' has the records, give it as a separate file" in rejection.message
        assert """jq '.["data"]' IN.json > OUT.json""" in rejection.message


def test_a_long_conversation_isn_t_a_list_of_records(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(make_record("x" * LIMIT))
    (rejection,) = read(tmp_path / "data.jsonl")
    assert isinstance(rejection, Rejection)
    assert rejection.message.endswith("more than max_record_bytes 10,000")
