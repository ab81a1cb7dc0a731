"""Records with labels: columns, forms of labels, words that aren't learned, class names, and what is rejected."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from t5tune.data.labels import LabelTask, TextLabels
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.labeled_records import find_misfit
from t5tune.data.reading.rejections import Rejection
from t5tune.data.reading.tables import find_class_names
from t5tune.settings.groups.record_format import ReadingSettings
from tests.data.reading.records import read

WORDS = ["Two", "red", "hats"]
RESIDUES = {"objective": "tag", "source_words": "residues"}
CLASSES = {"_type": "ClassLabel", "names": ["neg", "pos"]}


def read_one(folder: Path, record: Any, **reading: Any) -> Conversation | Rejection:
    (folder / "data.jsonl").write_text(json.dumps(record))
    (parsed,) = read(folder / "data.jsonl", **reading)
    return parsed


@pytest.mark.parametrize(
    ("record", "reading", "words", "values"),
    [
        ({"text": "Hi you", "label": "good"}, {"objective": "classify"}, ["Hi you"], ("good",)),
        ({"sentence": "Hi", "label": 3, "score": 0.5}, {"objective": "classify"}, ["Hi"], ("3",)),
        ({"text": "Hi", "label": False}, {"objective": "classify"}, ["Hi"], ("false",)),
        ({"text": "Hi", "label": 2.0}, {"objective": "classify"}, ["Hi"], ("2",)),
        ({"text": "Hi", "labels": ["b", 1, "b", None]}, {"objective": "classify"}, ["Hi"], ("b", "1")),
        ({"text": "Hi", "labels": []}, {"objective": "classify"}, ["Hi"], ()),
        ({"tokens": WORDS, "label": "x"}, {"objective": "classify"}, ["Two red hats"], ("x",)),
        ({"sequence": "MKT", "label": "x"}, {"objective": "classify", "source_words": "residues"}, "MKT", ("x",)),
        ({"text": "Hi", "label": 2, "score": -100}, {"objective": "regress"}, ["Hi"], (-100.0,)),
        ({"text": "Two hats", "score": [1, None]}, {"objective": "regress"}, ["Two", "hats"], (1.0, None)),
        ({"tokens": WORDS, "ner_tags": [1, -100, "O"], "text": "x"}, {"objective": "tag"}, WORDS, ("1", None, "O")),
        ({"text": " Two  red hats", "labels": "A B A"}, {"objective": "tag"}, WORDS, ("A", "B", "A")),
        ({"sequence": "MKT", "label": "CHH", "mask": "011"}, RESIDUES, "MKT", (None, "H", "H")),
        ({"sequence": "M K T", "label": "C H H", "mask": [1, 0, 1]}, RESIDUES, "MKT", ("C", None, "H")),
        ({"sequence": "MKT", "label": "C H"}, RESIDUES, "MKT", ("C", " ", "H")),
        ({"text": "a b", "label": "xyz"}, RESIDUES | {"source_words": "characters"}, "a b", ("x", "y", "z")),
        ({"q": "a", "r": "", "y": "z"}, {"objective": "classify", "source_column": ["q", "r"], "target_column": "y"},
         ["a"], ("z",)),
    ],
)  # fmt: skip
def test_records_have_labels_of_texts_or_of_words(
    record: Any, reading: dict[str, Any], words: Any, values: tuple[Any, ...], tmp_path: Path
) -> None:
    parsed = read_one(tmp_path, record, **reading)
    assert isinstance(parsed, Conversation), parsed
    assert parsed.labels is not None
    assert (parsed.labels.words, parsed.labels.values) == (words, values)
    assert parsed.targets == []


@pytest.mark.parametrize(
    ("record", "reading", "rejection"),
    [
        ("Hi", {"objective": "tag"}, "not_an_object: expected an object, found text"),
        ({"text": "Hi", "y": 1}, {"objective": "classify"},
         "unknown_format: its keys are text, y; expected label, labels or target; or name the column with "
         "--target-column"),
        ({"txt": "Hi", "label": 1}, {"objective": "classify", "source_column": "text"},
         "unknown_format: no column text; the record has txt, label; did you mean txt?"),
        ({"text": " ", "label": 1}, {"objective": "classify"}, "no_source: text: no text to read"),
        ({"text": 7, "label": 1}, {"objective": "classify"},
         "not_text: text: expected text, found a number; write it as text: '7', or astype(str) in pandas"),
        ({"text": "Hi", "label": None}, {"objective": "classify"}, "no_label: label: no label to learn"),
        ({"text": "Hi", "label": 0.5}, {"objective": "classify"},
         "bad_label: label: expected a label (text or a whole number), found 0.5; for numbers, use --objective "
         "regress"),
        ({"text": "Hi", "label": [["a"]]}, {"objective": "classify"},
         "bad_label: label: expected a label (text or a whole number), found a list"),
        ({"text": "Hi", "score": "x"}, {"objective": "regress"}, "bad_label: score: expected a number, found 'x'"),
        ({"text": "Hi", "score": 1e39}, {"objective": "regress"}, "bad_label: score: expected a number, found 1e+39"),
        ({"text": "Hi", "score": True}, {"objective": "regress"}, "bad_label: score: expected a number, found True"),
        ({"tokens": WORDS, "tags": ["O"]}, {"objective": "tag"}, "label_count: 1 label for 3 words"),
        ({"tokens": WORDS, "tags": 3}, {"objective": "tag"},
         "bad_label: tags: expected a list of labels, or a text with a label per character, found a number"),
        ({"tokens": WORDS, "score": [1, 2]}, {"objective": "regress"}, "label_count: 2 numbers for 3 words"),
        ({"sequence": "MKT", "label": "CHH", "mask": "01"}, RESIDUES, "label_count: mask: 2 values for 3 residues"),
        ({"sequence": "MKT", "label": "CHH", "mask": "012"}, RESIDUES,
         "bad_label: mask: expected 0 or 1 for each word, found '012'"),
        ({"sequence": "MKT", "label": "CHH", "mask": "000"}, RESIDUES, "no_label: label: no label to learn"),
    ],
)  # fmt: skip
def test_a_record_that_can_not_be_used_says_why(
    record: Any, reading: dict[str, Any], rejection: str, tmp_path: Path
) -> None:
    parsed = read_one(tmp_path, record, **reading)
    assert isinstance(parsed, Rejection), parsed
    assert f"{parsed.reason}: {parsed.message}" == rejection


def test_cells_of_a_table_contain_lists_as_json(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('tokens,tags,mask\n"[""Two"",""hats""]","[""A"", null]",\nTwo hats,A B,01\n')
    records = read(tmp_path / "data.csv", objective="tag")
    assert [(each.labels.words, each.labels.values) for each in records if isinstance(each, Conversation)] == [
        (["Two", "hats"], ("A", None)), (["Two", "hats"], (None, "B")),
    ]  # fmt: skip


def write_classes(path: Path, feature: Any, labels: list[Any]) -> Path:
    """Write a Parquet file with the metadata of Hugging Face's datasets."""
    metadata = {"huggingface": json.dumps({"info": {"features": {"text": {"_type": "Value"}, "label": feature}}})}
    table = pa.table({"text": ["a b"] * len(labels), "label": labels})
    parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize(
    ("feature", "labels", "values"),
    [
        (CLASSES, [1, 0, 7], [("pos",), ("neg",), ("7",)]),
        ({"_type": "Sequence", "feature": CLASSES}, [[1, -1], [0]], [("pos",), ("neg",)]),
        ([CLASSES], [[1, 0]], [("pos", "neg")]),
        ({"_type": "Value"}, [1], [("1",)]),
    ],
)
def test_class_names_of_parquet_replace_their_numbers(
    feature: Any, labels: list[Any], values: list[Any], tmp_path: Path
) -> None:
    path = write_classes(tmp_path / "data.parquet", feature, labels)
    records = read(path, objective="classify")
    assert [each.labels and each.labels.values for each in records if isinstance(each, Conversation)] == values
    names = find_class_names([path], ReadingSettings(objective="classify"))
    assert names == (() if feature == {"_type": "Value"} else ("neg", "pos"))


def test_class_numbers_stay_numbers_in_text(tmp_path: Path) -> None:
    path = write_classes(tmp_path / "data.parquet", CLASSES, [1])
    (parsed,) = read(path, source_column="text", target_column="label")
    assert isinstance(parsed, Rejection)
    assert parsed.message.startswith("label: expected text, found a number")


def test_files_of_different_classes_give_no_order(tmp_path: Path) -> None:
    reading = ReadingSettings(objective="classify")
    other = {**CLASSES, "names": ["pos", "neg"]}
    files = [write_classes(tmp_path / name, each, [1]) for name, each in (("a.parquet", CLASSES), ("b.parquet", other))]
    assert find_class_names(files, reading) == ()
    (tmp_path / "c.jsonl").touch()
    assert find_class_names([files[0], tmp_path / "c.jsonl"], reading) == ()


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        (TextLabels(["Hi"], ("c",), False, False), LabelTask("classify", False, False, ("a", "b"), "text"),
         'label "c" isn\'t among the 2 labels'),
        (TextLabels(["Hi"], ("a", "c"), False, True), LabelTask("classify", False, False, (), "text"),
         "expected one label, as in the first records, found a list of labels"),
        (TextLabels(["Hi"], (1.0,), False, False), LabelTask("regress", True, False, (), "text"),
         "expected a list of numbers, as in the first records, found one number"),
        (TextLabels(["Hi"], (None, 2.0), True, False), LabelTask("regress", True, False, (), "text"), None),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_the_task_are_rejected(labels: TextLabels, task: LabelTask, message: str | None) -> None:
    misfit = find_misfit(labels, task, set(task.names))
    assert (misfit and misfit.message) == message
