"""Which answers are learned: examples labeled bad are left out, with their number and their place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from t5tune.data.files import find_files
from t5tune.data.formats import Conversation
from t5tune.data.pipeline import read_record
from t5tune.data.readers import read_records
from t5tune.data.records import REASONS, Rejected
from t5tune.errors import DataError
from t5tune.prepare import prepare
from t5tune.progress import Event, Note
from t5tune.settings import PrepareSettings
from t5tune.settings.data import ReadingSettings
from tests.conftest import REPOSITORY, t5tune

HI, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
ALL_FORMATS: dict[str, dict[str, Any]] = {
    "sharegpt": {"conversations": TURNS},
    "openai": {"messages": [HI, YES]},
    "alpaca": {"instruction": "Hi", "output": "Yes"},
    "prompt/completion": {"prompt": "Hi", "completion": "Yes"},
    "prompt/completion of messages": {"prompt": [HI], "completion": [YES]},
    "source/target": {"source": "Hi", "target": "Yes"},
}
GOOD = {"prompt": "Hi", "completion": "Yes", "label": True}
BAD = {"prompt": "Hi", "completion": "Go away", "label": False}


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path, **reading: Any) -> list[Conversation | Rejected]:
    settings = ReadingSettings(**reading)
    return [read_record(record, settings) for record in read_records(find_files([str(path)]), 10_000)]


def outcomes(path: Path, **reading: Any) -> list[str | dict[str, int]]:
    """What becomes of each record: the reason why it is left out, or its repairs."""
    records = read(path, **reading)
    return [record.reason if isinstance(record, Rejected) else dict(record.repairs) for record in records]


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def prepared(tmp_path: Path, told: list[Event]) -> Callable[..., dict[str, Any]]:
    """The manifest of the cache that these records give; `told` gets the notes."""

    def run(*records: Any, **more: Any) -> dict[str, Any]:
        data = write_lines(tmp_path / "data.jsonl", *records)
        values = {"model_name_or_path": "pocket", "data_path": str(data), "output_dir": tmp_path / "cache", **more}
        made = prepare(PrepareSettings(**values), told.append)
        manifest: dict[str, Any] = json.loads((made.cache / "manifest.json").read_text())
        return manifest

    return run


# ---------------------------------------------------------------- labels of whole records


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("value", ALL_FORMATS.values(), ids=ALL_FORMATS)
def test_a_record_labeled_bad_is_left_out_in_every_format(tmp_path: Path, value: dict[str, Any], key: str) -> None:
    path = write_lines(tmp_path / "data.jsonl", {**value, key: True}, {**value, key: False}, {**value, key: None})
    assert outcomes(path) == [{}, "labeled_bad", {}]


def test_a_number_or_a_word_is_a_class_and_no_label(tmp_path: Path) -> None:
    values = [0, 1, 0.0, "false", "False", "negative", "", [False]]
    path = write_lines(
        tmp_path / "data.jsonl", *[{"source": "Hi", "target": "Yes", "label": value} for value in values]
    )
    ignored: dict[str, int] = {"ignored_field_label": 1}
    assert outcomes(path) == [{} if value == "" else ignored for value in values]


def test_the_words_of_a_csv_are_labels(tmp_path: Path) -> None:
    words = ["true", "True", "TRUE", "false", "False", "FALSE", "0", "no", "falsehood", ""]
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion,label\n" + "".join(f"Hi,Yes,{word}\n" for word in words))
    ignored: dict[str, int] = {"ignored_field_label": 1}
    expected = [{}, {}, {}, "labeled_bad", "labeled_bad", "labeled_bad", ignored, ignored, ignored, {}]
    assert outcomes(path) == expected
    (tmp_path / "data.tsv").write_text("prompt\tcompletion\tkto_tag\nHi\tYes\tfalse\n")
    assert outcomes(tmp_path / "data.tsv") == ["labeled_bad"]


def test_the_booleans_of_a_parquet_file_are_labels(tmp_path: Path) -> None:
    rows = [{"prompt": [HI], "completion": [YES], "label": label} for label in (True, False, None)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert outcomes(tmp_path / "data.parquet") == [{}, "labeled_bad", {}]


def test_a_column_that_the_user_names_is_text(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label,kto_tag\nThe sky is green.,false,true\nThe sky is blue.,true,false\n")
    assert outcomes(path, source_column="text", target_column="label") == [{}, "labeled_bad"]
    assert outcomes(path, source_column="kto_tag", target_column="label") == [{"ignored_field_text": 1}] * 2
    (first, _) = read(path, source_column="text", target_column="label")
    assert isinstance(first, Conversation)
    assert first.turns[1].text == "false"


def test_a_record_of_no_known_format_is_rejected_for_that(tmp_path: Path) -> None:
    assert outcomes(write_lines(tmp_path / "data.jsonl", {"text": "Hi", "label": False})) == ["unknown_format"]


def test_what_is_labeled_bad_is_counted_reported_and_kept_whole(
    prepared: Callable[..., dict[str, Any]], told: list[Event], tmp_path: Path
) -> None:
    manifest = prepared(GOOD, BAD, {"x": 1}, {"messages": [HI, YES], "kto_tag": False})
    assert (manifest["conversations"], manifest["rejected"]) == (1, 3)
    assert manifest["rejected_by_reason"] == {"labeled_bad": 2, "unknown_format": 1}
    assert manifest["repaired"] == {}
    lines = [json.loads(line) for line in (tmp_path / "cache" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"]) for line in lines] == [
        *((2, "labeled_bad"), (3, "unknown_format"), (4, "labeled_bad"))
    ]
    assert lines[0]["record"] == BAD
    assert "kto_tag: false" in lines[2]["message"]
    place = tmp_path / "cache" / "rejected.jsonl"
    notes = [event.text for event in told if isinstance(event, Note)]
    assert f"2 examples labeled bad (label: false, kto_tag: false) left out of supervised training: {place}" in notes
    assert f"1 records refused (unknown_format 1): {place}" in notes


def test_what_is_labeled_bad_is_no_part_of_the_rejected_fraction(
    prepared: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [BAD, GOOD, GOOD, GOOD, {"x": 1}, BAD]
    for _ in range(2):  # the second time the cache is up to date
        assert prepared(*records, max_rejected_fraction=0.25)["rejected"] == 3
        with pytest.raises(DataError, match=r"1 of 4 records refused \(unknown_format 1\)") as caught:
            prepared(*records, max_rejected_fraction=0.2)
        assert "2 more are labeled bad, which does not count" in caught.value.message
    monkeypatch.setattr("t5tune.prepare.CHECK_REJECTED", 2)  # it is checked while records are still coming
    assert prepared(BAD, {"x": 1}, BAD, GOOD, max_rejected_fraction=0.5)["rejected"] == 3
    assert prepared(BAD, GOOD, BAD, max_rejected_fraction=0)["rejected"] == 2
    with pytest.raises(DataError) as caught:
        prepared(BAD, {"x": 1}, GOOD, max_rejected_fraction=0.2)
    assert "data.jsonl:2" in str(caught.value.hint)


def test_data_that_is_all_labeled_bad_is_refused_with_that_reason(tmp_path: Path) -> None:
    write_lines(tmp_path / "bad.jsonl", BAD, BAD)
    write_lines(tmp_path / "good.jsonl", GOOD)
    arguments = ["--model-name-or-path", "pocket", "--output-dir", tmp_path / "cache", "--data-path"]
    done = t5tune("prepare", *arguments, tmp_path / "bad.jsonl")
    assert (done.code, len(done.errors)) == (2, 1)
    assert "bad.jsonl: all 2 examples are labeled bad (label: false, kto_tag: false)" in done.errors[0]
    done = t5tune("prepare", *arguments, tmp_path / "good.jsonl", tmp_path / "bad.jsonl")
    assert (done.code, len(done.errors)) == (2, 1)
    assert "bad.jsonl: no conversation to train on in it; all 2 examples are labeled bad" in done.errors[0]
    assert not (tmp_path / "cache").exists()


def test_train_says_what_it_leaves_out_and_evaluate_does_not_score_it(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", GOOD, BAD, BAD)
    arguments = ["--model-name-or-path", "pocket", "--data-path", data, "--output-dir"]
    done = t5tune("train", *arguments, tmp_path / "run", "--max-steps", "1")
    assert done.code == 0, done.stderr
    left_out = "2 examples labeled bad (label: false, kto_tag: false) left out of supervised training"
    assert f"warning: {left_out}: {tmp_path / 'run' / 'data' / 'rejected.jsonl'}" in done.stderr
    done = t5tune("evaluate", *arguments, tmp_path / "scores", "--max-new-tokens", "1", "--json")
    assert done.code == 0, done.stderr
    assert done.json["examples"] == 1
    assert f"2 records refused, the first: {data}:2: label: false: labeled bad, so it is left out" in done.stderr


def test_the_page_of_inspect_tells_left_out_from_refused(prepared: Callable[..., Any], tmp_path: Path) -> None:
    prepared(GOOD, BAD, BAD, {"x": 1})
    done = t5tune("inspect", tmp_path / "cache", "--html", tmp_path / "page.html")
    assert done.code == 0, done.stderr
    assert "1 records refused; 2 labeled bad and left out; " in (tmp_path / "page.html").read_text()


def test_every_reason_is_documented() -> None:
    page = (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")
    assert [reason for reason in REASONS if f"`{reason}`" not in page] == []
