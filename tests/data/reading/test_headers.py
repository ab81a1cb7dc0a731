"""Tables without a header: they are noticed, and --no-header loses no row."""

from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import prepare
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.raw_records import parse_record
from t5tune.data.reading.readers import read_records
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.progress import Event, Note
from t5tune.settings import PrepareSettings
from t5tune.settings.groups.record_format import ReadingSettings
from tests.data.reading.records import read
from tests.support.caches import open_only

SENTENCES = [(f"Where is order {number} of mine?", f"Order {number} is on its way.") for number in range(40)]
REVIEWS = [(f"{word} film {number}", word) for number, word in enumerate(["good", "bad"] * 20)]


def write_rows(path: Path, rows: list[tuple[str, ...]]) -> Path:
    separator = "\t" if path.suffix == ".tsv" else ","
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    return path


def prepare_table(path: Path, **values: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Prepare a table, and return its pairs and the notes."""
    events: list[Event] = []
    given = {"model_name_or_path": "pocket", "data_path": str(path), "output_dir": path.parent / "cache"}
    cache = open_only(prepare(PrepareSettings(**given | values), events.append).cache)
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    decoded = [tuple(tokenizer.decode(ids.tolist()[:-1]) for ids in (each.source_S, each.target_T)) for each in cache]
    return decoded, [event.text for event in events if isinstance(event, Note)]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
@pytest.mark.parametrize("rows", [SENTENCES, REVIEWS], ids=["sentences", "reviews"])
def test_no_header_reads_the_first_line_as_the_first_row(
    tmp_path: Path, suffix: str, rows: list[tuple[str, ...]]
) -> None:
    path = write_rows(tmp_path / f"data{suffix}", rows)
    decoded, notes = prepare_table(path, header=False, conversation_template="plain", source_prefix="say: ")
    assert decoded == [(f"say: {source}", target) for source, target in rows]
    assert not any("first line" in note for note in notes)


def test_a_doubtful_header_whose_columns_are_named_is_reported(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.tsv", SENTENCES)
    names = {"source_column": SENTENCES[0][0], "target_column": SENTENCES[0][1]}
    decoded, notes = prepare_table(path, **names)
    assert len(decoded) == len(SENTENCES) - 1
    problem = "the first line looks like data, but is read as the names of the columns"
    assert f"{path}: {problem}; --no-header reads it as the first row" in notes
    assert not any(problem in note for note in prepare_table(path, **names, header=True)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "header",
    [("source", "target"), ("Ticket Text", "Category"), ("How satisfied are you with us?", "Rating"), ("en", "de")],
)
def test_names_of_columns_are_no_data(tmp_path: Path, header: tuple[str, str]) -> None:
    answers = [(f"{'very ' * 20}satisfied {number}", "5") for number in range(30)]
    path = write_rows(tmp_path / "data.csv", [header, *answers])
    decoded, notes = prepare_table(path, source_column=header[0], target_column=header[1])
    assert len(decoded) == 30
    assert not any("first line" in note for note in notes)


def test_further_columns_and_other_objectives_have_names_too(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.csv", [("a", "b", "c", "d")] * 2)
    for reading, expected in (
        ({"target_column": "column 4"}, ("a", "d")),
        ({"objective": "orpo"}, ("a", "b")),
        ({"objective": "span-corruption"}, ("a",)),
    ):
        records = read(path, header=False, **reading)
        texts = [tuple(turn.text for turn in each.turns) for each in records if isinstance(each, Conversation)]
        assert texts == [expected] * 2


def test_rows_without_a_header_have_their_lines_and_offsets(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('\n"a\nb",c\nd,e\nf\n')
    records = list(read_records([tmp_path / "data.csv"], ReadingSettings(header=False)))
    assert [(record.location.line, record.location.offset) for record in records] == [(2, 0), (4, 9), (5, 13)]
    rejected = parse_record(records[2], ReadingSettings())
    assert not isinstance(rejected, Conversation)
    assert rejected.message.startswith("1 cell in a row, 2 in the first row")


def test_a_long_first_row_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "data.tsv").write_text("x" * 200 + "\ty\na\tb\n")
    first, second = read_records([tmp_path / "data.tsv"], ReadingSettings(header=False, max_record_bytes=100))
    rejected = parse_record(first, ReadingSettings())
    assert not isinstance(rejected, Conversation)
    assert (rejected.reason, first.location.line) == ("too_long", 1)
    assert second.data == {"source": "a", "target": "b"}
