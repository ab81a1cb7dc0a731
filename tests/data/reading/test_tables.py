"""CSV, TSV and Parquet files."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.rejections import Rejection
from t5tune.errors import DataError
from tests.data.reading.records import GOOD, LIMIT, Outcomes, make_record, prepare, read, read_raw
from tests.support.caches import find_cache


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "its keys are what was w 0, it was v 0; add --source-column 'what was w 0' --target-column 'it was v 0'"),
        ({"source_column": "q", "target_column": "a"}, "no column q, a; the record has what was w 0, it was v 0"),
        ({"objective": "span-corruption"}, "no key text for raw text; the record's keys are what was w 0, it was v 0"),
    ],
)
@pytest.mark.parametrize("name", ["data.csv", "data.tsv"])
def test_a_message_says_how_to_read_a_headerless_table(
    tmp_path: Path, name: str, columns: dict[str, Any], message: str
) -> None:
    text = "what was w 0,it was v 0\nwhat was w 1,it was v 1\n"
    (tmp_path / name).write_text(text.replace(",", "\t") if name == "data.tsv" else text)
    (rejected,) = read(tmp_path / name, **columns)
    assert isinstance(rejected, Rejection)
    advice = "the first line looks like data: add --no-header to read it as the first row; otherwise, "
    assert rejected.message.startswith(f"{advice}{message}")


def test_rows_of_a_csv_file_are_records(outcomes: Outcomes) -> None:
    text = 'source,target,id\n"a, ""b""\nc",Yes,1\nd,No,2\n'
    assert outcomes(text.encode(), "data.csv") == (['a, "b"\nc', "d"], [])
    assert outcomes(("\ufeff" + text).encode(), "data.csv") == (['a, "b"\nc', "d"], [])
    assert outcomes(b"source;target\na;b,c\n", "data.csv") == (["a"], [])
    assert outcomes(b"source\ttarget\na,b\tc\n", "data.tsv") == (["a,b"], [])
    assert outcomes(b"q,a\nx,y\n", "data.csv", source_column="q", target_column="a") == (["x"], [])


@pytest.mark.parametrize("name", ["data.csv", "data.parquet"])
def test_only_used_columns_need_different_names(tmp_path: Path, name: str) -> None:
    path, names, cells = tmp_path / name, ["note", "source", "target", "note"], ["n", "s", "t", "m"]
    if name == "data.csv":
        path.write_text(f"{','.join(names)}\n{','.join(cells)}\n")
    else:
        parquet.write_table(pyarrow.table([[cell] for cell in cells], names=names), path)
    (found,) = read(path)
    assert isinstance(found, Conversation)
    assert (found.sources, found.targets) == (["", "s"], ["t"])
    assert found.repairs == {"ignored_field_note": 1}
    with pytest.raises(DataError, match="duplicate column name: note; rename all but one of them"):
        read(path, source_column="note")


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
def test_the_delimiter_divides_header_and_rows_alike(tmp_path: Path, header: str, row: str, columns: list[str]) -> None:
    (tmp_path / "data.csv").write_text(f"{header}\n{row}\n{row}\n")
    records = [record.data for record in read_raw(tmp_path / "data.csv")]
    assert [[*record] for record in records if isinstance(record, dict)] == [columns, columns]


def test_a_line_above_the_header_names_an_unclear_delimiter(tmp_path: Path) -> None:
    text = "Satz (dt., kurz);Übersetzung\nWort 1, bitte;word 1 please\n"
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


def test_malformed_rows_are_rejected_without_affecting_others(outcomes: Outcomes) -> None:
    text = b"source,target\na,b\nonly one\nx,y,z\n\xff,b\n\nc,d\n\0,b\n"
    assert outcomes(text, "data.csv", encoding="utf-8") == (
        ["a", "c"],
        ["bad_row", "bad_row", "invalid_utf8", "control_character"],
    )


def test_a_csv_file_with_a_long_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_bytes(b"source," + b"a" * LIMIT + b"\na,b\n")
    with pytest.raises(DataError, match=r"data\.csv:1: the header is longer than"):
        read(tmp_path / "data.csv")


def test_rows_of_a_parquet_file_are_records(tmp_path: Path) -> None:
    rows = [json.loads(make_record(f"q{number}")) | {"system": None} for number in range(300)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=70)
    records = read(tmp_path / "data.parquet")
    found = [record.turns[0].text for record in records if isinstance(record, Conversation)]
    assert found == [f"q{number}" for number in range(300)]
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
