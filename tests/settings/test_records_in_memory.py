"""Records in memory: every kind becomes the same file, and what isn't records is refused by name."""

import dataclasses
import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pydantic
import pytest

from t5tune.settings import records_in_memory
from t5tune.settings.dataset_list import DatasetSettings, name_datasets
from t5tune.settings.records_in_memory import CallerError, find_kept_path, is_in_memory, is_stored_table, store_records


@dataclasses.dataclass
class Row:
    """A record as a dataclass."""

    source: str
    target: str | None
    n: int


class Model(pydantic.BaseModel):
    """A record as a pydantic model."""

    source: str
    target: str | None
    n: int


RECORDS = [{"source": "Zoë?", "target": "a", "n": 1}, {"source": "b", "target": None, "n": 2}]
KINDS: dict[str, Callable[[], Any]] = {
    "list": lambda: RECORDS,
    "tuple": lambda: tuple(RECORDS),
    "generator": lambda: (record for record in RECORDS),
    "DataFrame": lambda: pd.DataFrame(RECORDS, index=[7, 3]),
    "records of a DataFrame": lambda: pd.DataFrame(RECORDS).to_dict("records"),
    "missing as NaN": lambda: [RECORDS[0], {**RECORDS[1], "target": math.nan, "n": np.int64(2)}],
    "Dataset": lambda: datasets.Dataset.from_list(RECORDS),
    "Arrow table": lambda: pyarrow.Table.from_pylist(RECORDS),
    "dataclasses": lambda: [Row(**record) for record in RECORDS],  # type: ignore[arg-type]
    "pydantic models": lambda: [Model(**record) for record in RECORDS],  # type: ignore[arg-type]
}


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_records_is_the_same_file(kind: str) -> None:
    data = KINDS[kind]()
    assert is_in_memory(data)
    path = store_records(data)
    assert read_lines(path) == RECORDS
    assert path == store_records(RECORDS)
    assert [path.name] == [other.name for other in path.parent.glob(path.name[:12] + "*")]


def test_numbers_of_classes_become_their_names() -> None:
    classes = datasets.ClassLabel(names=["O", "B-city"])
    features = datasets.Features(
        {
            "n": datasets.Value("int64"),
            "label": classes,
            "tags": datasets.Sequence(datasets.ClassLabel(names=["b", "a"])),
        }
    )
    rows = [{"n": 1, "label": 1, "tags": [0, 1, -1]}, {"n": 0, "label": None, "tags": None}]
    data = datasets.Dataset.from_list(rows, features=features)
    expected = [{"n": 1, "label": "B-city", "tags": ["b", "a", None]}, rows[1]]
    for given in (
        data,
        data.to_iterable_dataset(),
        data.with_format("numpy", columns=["tags"], output_all_columns=True),
    ):
        assert read_lines(store_records(given)) == expected


def test_different_records_are_different_files() -> None:
    assert store_records(RECORDS) != store_records(RECORDS[:1])


def test_all_rows_of_a_large_table_are_written_in_order() -> None:
    table = pyarrow.Table.from_pylist([{"n": number} for number in range(2500)])
    for data in (table, table.to_pandas()):
        assert [record["n"] for record in read_lines(store_records(data))] == [*range(2500)]


def test_nested_values_survive() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    for data in ([{"conversations": turns}], pd.DataFrame([{"conversations": turns}])):
        assert read_lines(store_records(data)) == [{"conversations": turns}]


def test_the_file_name_marks_tables_with_tool_calls(tmp_path: Path) -> None:
    calls = [{"call": [{"arguments": {"a": 1}, "name": "f"}]}]  # pyarrow 17 sorts the names
    plain, stored = store_records(calls), store_records(pyarrow.Table.from_pylist(calls))
    assert plain.read_bytes() == stored.read_bytes()
    assert (is_stored_table(plain), is_stored_table(stored)) == (False, True)
    kept = find_kept_path(str(stored), tmp_path / "run" / "records")
    assert kept == tmp_path / "run" / "records" / stored.name
    assert is_stored_table(kept)
    datasets_of = [DatasetSettings(path=[str(path)]) for path in (stored, kept)]
    assert name_datasets(datasets_of) == ["records", "records-2"]


def test_a_value_that_json_lacks_does_not_become_a_text() -> None:
    (record,) = read_lines(
        store_records([{"a": b"x", "b": np.array([1.5, math.nan]), "c": pd.Timestamp("2026-01-02")}])
    )
    assert record == {"a": {"bytes": "b'x'"}, "b": [1.5, None], "c": {"Timestamp": "2026-01-02 00:00:00"}}


def test_a_data_frame_may_hold_what_arrow_cannot() -> None:
    turns = [{"from": "human", "value": "Hi", "name": "Bo"}, {"from": "gpt", "value": "Hello."}]
    columns = {
        "mixed": pd.Series(["a", 3, None], dtype=object),
        "lone surrogate": pd.Series(["\ud800", "b", "c"], dtype=object),
        "sparse": pd.arrays.SparseArray([1, 0, 0]),
        "number": [1j, 2j, 3j],
        "date": pd.to_datetime(["2026-01-02", None, None]),
        "turns": [turns, turns, None],
    }
    text = store_records(pd.DataFrame(columns)).read_bytes().decode(errors="surrogatepass")
    assert [[*json.loads(line).values()] for line in text.splitlines()] == [
        ["a", "\ud800", 1, {"complex": "1j"}, {"Timestamp": "2026-01-02 00:00:00"}, turns],
        [3, "b", 0, {"complex": "2j"}, None, turns],
        [None, "c", 0, {"complex": "3j"}, None, None],
    ]


def fail_after_one(error: Exception) -> Iterator[dict[str, str]]:
    yield {"source": "a"}
    raise error


def test_a_generator_that_fails_leaves_nothing() -> None:
    folder = store_records(RECORDS).parent
    before = set(folder.iterdir())
    with pytest.raises(RuntimeError, match="no more"):
        store_records(fail_after_one(RuntimeError("no more")))
    error = ValueError("no more")
    with pytest.raises(CallerError) as caught:
        store_records(fail_after_one(error))
    assert caught.value.__cause__ is error
    assert set(folder.iterdir()) == before


def make_circular() -> dict[str, Any]:
    record: dict[str, Any] = {"source": "a"}
    record["target"] = record
    return record


class Lazy:
    """Records that are computed on request, like polars' LazyFrame."""

    def collect(self) -> list[dict[str, Any]]:
        """Compute it."""
        return RECORDS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"source": ["a"]},
            "a dict; expected a path, or records: a list of dicts, a DataFrame or a datasets.Dataset; ",
        ),
        ({"source": ["a"]}, "if it has columns, pass pandas.DataFrame(data); if it is a record, [data]"),
        (
            datasets.DatasetDict(dev=datasets.Dataset.from_list(RECORDS)),
            "choose one of its splits, such as data['dev']",
        ),
        (5, "of type int; expected a path"),
        ([RECORDS[0], "b"], "item 1 is of type str; expected a path"),
        ([{("a", "b"): 1}], "keys must be str"),
        ([RECORDS[0], make_circular()], "item 1 contains itself, or is nested too deeply"),
        (iter([]), "there are no records in it; it yields records only once, and paths must be a list"),
        (iter([Path("a.jsonl")]), "put paths into a list, such as list(…)"),
        (np.array(["a.jsonl"]), "put paths into a list, such as list(…)"),
        (pd.Series(["a", "b"]), "of type Series; expected a path"),
        (pd.DataFrame([["a", "b"]], columns=["source", "source"]), "duplicate column name: source, source"),
        (pyarrow.table([["a"], ["b"]], names=["source", "source"]), "duplicate column name: source, source"),
        (
            Lazy(),
            "of type Lazy; expected a path, or records: a list of dicts, a DataFrame or a datasets.Dataset; call ",
        ),
        (pd.DataFrame({"source": []}), "there are no records in it"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        store_records(data)
    assert message in str(caught.value)


def test_paths_are_not_records() -> None:
    assert not any(map(is_in_memory, ("a.jsonl", Path("a"), ["a", Path("b")], [], None)))


# ---------------------------------------------------------------- the temporary folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files, in which this process has made nothing yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    records_in_memory._make_folder.cache_clear()
    yield tmp_path
    records_in_memory._make_folder.cache_clear()


def test_records_of_another_process_are_recognized_without_making_a_folder(temporary: Path) -> None:
    stored = temporary / "t5tune-records-k3_x9a0b" / "records-0123456789ab.jsonl"
    stored.parent.mkdir()
    stored.touch()
    assert find_kept_path(str(stored), Path("run/records")) == Path("run/records/records-0123456789ab.jsonl")
    for other in (stored.with_name("train.jsonl"), temporary / stored.name):
        other.touch()
        assert find_kept_path(str(other), Path("run/records")) is None
    assert sorted(temporary.iterdir()) == [temporary / stored.name, stored.parent]


def test_records_that_are_gone_are_found_where_they_are_kept(tmp_path: Path) -> None:
    """Records of a process that has ended, and of a run that was moved later."""
    kept, name = tmp_path / "moved" / "records", "records-0123456789ab.jsonl"
    gone = [str(tmp_path / folder / name) for folder in ("t5tune-records-k3_x9a0b", "run/records")]
    assert [find_kept_path(path, kept) for path in gone] == [None, None]
    kept.mkdir(parents=True)
    (kept / name).touch()
    assert [find_kept_path(path, kept) for path in gone] == [kept / name] * 2


def test_a_temporary_folder_that_was_removed_is_made_again(temporary: Path) -> None:
    shutil.rmtree(store_records(RECORDS).parent)
    again = store_records(RECORDS)
    assert read_lines(again) == RECORDS
    assert again.parent.stat().st_mode & 0o777 == 0o700


def test_the_records_of_processes_that_are_gone_are_removed(temporary: Path) -> None:
    gone, alive, other = (temporary / name for name in ("t5tune-records-a", "t5tune-records-b", "t5tune-a"))
    for folder in (gone, alive, other):
        folder.mkdir()
    descriptor = os.open(alive, os.O_RDONLY)  # as the process does that uses it
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    own = store_records(RECORDS).parent
    records_in_memory._make_folder.cache_clear()
    second = store_records(RECORDS).parent  # as another process does
    os.close(descriptor)
    assert sorted(temporary.iterdir()) == sorted([alive, other, own, second])
