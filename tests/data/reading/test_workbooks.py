"""Excel workbooks."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from t5tune.data.reading import workbooks
from t5tune.data.reading.files import find_files
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.raw_records import parse_record
from t5tune.data.reading.readers import read_records
from t5tune.errors import DataError, DependencyError
from t5tune.progress import Note
from t5tune.settings import PrepareSettings
from t5tune.settings.dataset_list import split_weight
from t5tune.settings.groups.record_format import ReadingSettings
from tests.data.reading.records import run_prepare
from tests.support.caches import find_cache
from tests.support.workbooks import write_workbook

NAMES = ["source", "target"]


@pytest.fixture(autouse=True)
def calamine() -> None:
    pytest.importorskip("python_calamine", reason="needs python-calamine: pip install 't5tune[excel]'")


def _read(path: str | Path, **reading: Any) -> list[tuple[int, Any]]:
    """Read a sheet; return (row, texts of a conversation or the message of its rejection)."""
    settings = ReadingSettings(**reading)
    found = []
    for record in read_records(find_files([str(path)]), settings):
        parsed = parse_record(record, settings)
        texts = tuple(turn.text for turn in parsed.turns) if isinstance(parsed, Conversation) else parsed.message
        found.append((record.location.line, texts))
    return found


def test_cells_are_read_as_a_csv_file_has_them(tmp_path: Path) -> None:
    cells: list[str | float | bool] = [5.0, 0.1, 123456789012345, 0.30000000000000004, True, "x <a> & b"]
    cells += ['<s="1"><v>46082</v>', '<s="2"><v>46082.60434027778</v>', '<s="3"><v>1.25</v>', "<><f>A2</f><v>10</v>"]
    path = write_workbook(tmp_path / "data.xlsx", {"Sheet": [NAMES, *([str(n), cell] for n, cell in enumerate(cells))]})
    assert [texts[1] for _, texts in _read(path)] == [
        "5", "0.1", "123456789012345", "0.3", "TRUE", "x <a> & b",
        "2026-03-01", "2026-03-01 14:30:15", "1 day, 6:00:00", "10",
    ]  # fmt: skip


def test_rows_keep_their_numbers_and_unreadable_cells_are_rejected(tmp_path: Path) -> None:
    rows: list[list[Any]] = [[], [None, "source", "target", "note"], [None, "a", "b"], []]
    rows += [[None, "c", "<><f>1/0</f><v></v>"], [None, '<t="e"><v>#N/A</v>', "d"], [None, "e", None]]
    rows += [[None, "f", "g", '<t="e"><v>#REF!</v>'], [None, '<t="str"><f>""</f><v></v>', "h"]]
    found = _read(write_workbook(tmp_path / "data.xlsx", {"Sheet": rows}))
    assert found == [
        (3, ("a", "b")),
        (5, "target: a formula without a stored value; open the workbook in Excel, and save it"),
        (6, "source: the error #N/A"),
        (7, "the answer is empty (source-target)"),
        (8, ("f", "g")),
        (9, "no text to answer (source-target)"),
    ]


def test_merged_cells_are_refused_with_their_row(tmp_path: Path) -> None:
    rows = [NAMES, ["a", "label"], ["b", None]]
    path = write_workbook(tmp_path / "data.xlsx", {"Sheet": rows, "Other": rows}, merged="B2:B3")
    with pytest.raises(DataError, match="data.xlsx:2: merged cells; in Excel, unmerge them, .*; delete a title"):
        _read(path)
    assert _read(f"{path}:Other")[0] == (2, ("a", "label"))


def test_a_sheet_is_named_after_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sheets = {"Old": [NAMES, ["a", "1"]], "New & good": [NAMES, ["b", "2"]], "2026": [NAMES, ["c", "3"]]}
    write_workbook(tmp_path / "data.xlsx", sheets, hidden="Old")
    assert _read("data.xlsx") == _read("data.xlsx:New & good") == [(2, ("b", "2"))]
    assert _read("data.xlsx:Old") == [(2, ("a", "1"))]
    assert split_weight("data.xlsx:2026") == ("data.xlsx:2026", None)
    assert split_weight("data.xlsx:2026:3") == ("data.xlsx:2026", "3")
    with pytest.raises(DataError, match="no sheet '3'; it has New & good, 2026, Old"):
        _read("data.xlsx:3")


def test_other_sheets_are_named_and_are_other_data(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "data.xlsx", {"A": [NAMES, ["a", "1"]], "B": [NAMES, ["b", "2"]]})

    def prepare(data: str) -> tuple[dict[str, Any], list[str]]:
        notes: list[Any] = []
        values = {"model_name_or_path": "pocket", "data_path": data, "output_dir": tmp_path / "cache"}
        cache = run_prepare(PrepareSettings(**values), notes.append).cache
        manifest = json.loads((find_cache(cache) / "manifest.json").read_text())
        return manifest["inputs"]["data"][0], [note.text for note in notes if isinstance(note, Note)]

    first, notes = prepare(str(path))
    assert f"data_path: {path}: reading the sheet A; for B, add the name: '{path}:B'" in notes
    second, notes = prepare(f"{path}:B")
    assert not any("sheet" in note for note in notes)
    assert (first["file"], second["file"]) == ("data.xlsx", "data.xlsx:B")
    assert first["sha256"] == second["sha256"]


def test_tables_settings_apply_to_a_sheet(tmp_path: Path) -> None:
    rows = [["Is it on?", "yes"], ["Is it off?", "no"], ["Is it red?", "yes"]]
    path = write_workbook(tmp_path / "data.xlsx", {"Sheet": rows})
    assert _read(path, header=False)[0] == (1, ("Is it on?", "yes"))
    assert _read(path)[0][1].startswith("the first line looks like data: add --no-header")
    assert _read(path, source_column="Is it on?", target_column="yes")[0] == (2, ("Is it off?", "no"))
    labels = [[*NAMES, "label"], ["a", "b", False], ["c", "d", True]]
    assert (
        _read(write_workbook(path, {"Sheet": labels}))[0][1] == "label: false: labeled bad, so the record is left out"
    )
    write_workbook(path, {"Sheet": [["source", "target", "source"]]})
    with pytest.raises(DataError, match="data.xlsx:1: duplicate column name: source"):
        _read(path)


def test_parts_of_a_workbook_are_joined_to_the_same_cache(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "data.xlsx", {"A": [[]], "B": [NAMES, *([f"n {n}", f"{n}"] for n in range(30))]})
    values = {"model_name_or_path": "pocket", "data_path": f"{path}:B", "eval_fraction": 0.1}
    run_prepare(PrepareSettings(**values, output_dir=tmp_path / "whole"))
    for shard in ("0/2", "1/2"):
        run_prepare(PrepareSettings(**values, output_dir=tmp_path / "joined", shard=shard))
    tokens = [(find_cache(tmp_path / name) / "tokens.bin").read_bytes() for name in ("whole", "joined")]
    assert tokens[0] == tokens[1]


def test_workbooks_in_a_folder_are_read_only_by_name(tmp_path: Path) -> None:
    write_workbook(tmp_path / "data.xlsx", {"Sheet": [NAMES, ["a", "1"]]})
    (tmp_path / "data.csv").write_text("source,target\na,1\n")
    notes: list[Any] = []
    assert find_files([str(tmp_path)], notes.append) == [tmp_path / "data.csv"]
    assert notes[0].text.endswith("skipped: data.xlsx (a workbook, which is read only by its name)")
    assert find_files([str(tmp_path / "*.xlsx")]) == [tmp_path / "data.xlsx"]


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        ("MAX_XML_BYTES", "MiB of XML"),
        ("MAX_CELLS", "too large: 3 rows of 2 cells"),
        ("MAX_CHARACTERS", "too large: 3 rows of 2 cells with 2,000 characters"),
    ],
)
def test_a_workbook_that_would_take_too_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, problem: str
) -> None:
    path = write_workbook(
        tmp_path / "data.xlsx", {"Sheet": [NAMES, ["a", '<t="s"><v>0</v>'], ["b", '<t="s"><v>0</v>']]}
    )
    with zipfile.ZipFile(path, "a") as file:
        strings = f"<sst><si><t>{'x' * 1000}</t></si></sst>"
        file.writestr("xl/sharedStrings.xml", strings)
    assert len(_read(path)) == 2
    monkeypatch.setattr(workbooks, limit, {"MAX_XML_BYTES": 1000, "MAX_CELLS": 5, "MAX_CHARACTERS": 1500}[limit])
    with pytest.raises(DataError, match=problem):
        _read(path)


@pytest.mark.parametrize(
    ("far", "problem"),
    [
        ('<c r="XFD1048576"><v>1</v>', "too large: 1,048,576 rows of 16,384 cells"),
        ("<c x=\" r='A1'\" r = 'XFD1048576'><v>1</v>", "too large: 1,048,576 rows of 16,384 cells"),
        ('<c x=">" r="XFD1048576"><v>1</v>', "too large: 1,048,576 rows of 16,384 cells"),
        ('<!-- <c r="A1"> --><c r="XFD1048576"><v>1</v>', "too large: 1,048,576 rows of 16,384 cells"),
        ('<c r="XFD1048576"><c r="A1"/><v>1</v>', "too large: 1,048,576 rows of 16,384 cells"),
        ("<a>" * 99, "more than 50 nested tags"),
        ('<c r="A1" r="XFD1048576"><v>1</v>', "duplicate attribute"),
        ("<c><v>1</v>", "a cell without its row and column"),
    ],
)
def test_a_cell_far_away_is_refused_before_memory_is_reserved(tmp_path: Path, far: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        _read(write_workbook(tmp_path / "data.xlsx", {"Sheet": [NAMES, ["a", f"<><v>1</v></c>{far}"]]}))


def test_calamine_gets_no_more_than_the_checked_size(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "data.xlsx", {"Sheet": [NAMES, *([f"{n}", "x"] for n in range(1000))]})
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02", data.index(b"xl/worksheets/sheet1.xml", data.index(b"PK\x01\x02")) - 46)
    data[at + 24 : at + 28] = (100).to_bytes(4, "little")  # the declared size in the directory
    path.write_bytes(data)
    with pytest.raises(DataError, match="can't be read as a workbook: Bad CRC-32"):
        _read(path)


@pytest.mark.parametrize("index", ["7", "-1", "x"])
def test_a_shared_text_that_is_missing_is_named(tmp_path: Path, index: str) -> None:
    path = write_workbook(tmp_path / "data.xlsx", {"Sheet": [NAMES, ["a", f'< t="s"><v>{index}</v>']]})
    with pytest.raises(DataError, match=f"a workbook: cell B2 has shared text {index}, but the file has 0 of them"):
        _read(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"\xd0\xcf\x11\xe0" * 100, "File is not a zip file"), (b"", "File is not a zip file")],
)
def test_a_broken_or_encrypted_workbook_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "data.xlsx").write_bytes(content)
    with pytest.raises(DataError, match=f"can't be read as a workbook: {problem}; open it in Excel, remove a password"):
        _read(tmp_path / "data.xlsx")


def test_a_missing_library_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "python_calamine", None)
    path = write_workbook(tmp_path / "data.xlsx", {"Sheet": [NAMES, ["a", "b"]]})
    with pytest.raises(DependencyError, match=r"needs python-calamine.*; pip install 't5tune\[excel\]'"):
        _read(path)


def test_a_rejected_cell_can_be_read_in_rejected_jsonl(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "data.xlsx", {"S": [NAMES, ["a", "b"], ["c", '<t="e"><v>#N/A</v>']]})
    values = {"model_name_or_path": "pocket", "data_path": f"{path}:S", "output_dir": tmp_path / "cache"}
    cache = find_cache(run_prepare(PrepareSettings(**values, max_rejected_fraction=1)).cache)
    line = json.loads((cache / "rejected.jsonl").read_text())
    assert (line["file"], line["line"], line["reason"]) == (f"{path}:S", 3, "bad_cell")
    assert line["record"]["target"] == "the error #N/A"
