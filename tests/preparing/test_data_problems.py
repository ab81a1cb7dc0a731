"""What prepare reports of the data: repairs, unused columns, and characters that aren't in the vocabulary."""

import json
import re
from pathlib import Path
from typing import Any

from t5tune.commands.prepare import prepare
from t5tune.progress import Event, Note
from t5tune.settings import PrepareSettings
from tests.support.caches import find_cache


def list_notes(folder: Path, *records: Any, **changes: Any) -> list[str]:
    """Prepare the records, and return the notes."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    values = {"model_name_or_path": "pocket", "data_path": str(data), "output_dir": folder / "cache"}
    values |= {"max_rejected_fraction": None, **changes}
    events: list[Event] = []
    prepare(PrepareSettings(**values), events.append)
    return [event.text for event in events if isinstance(event, Note)]


def make_pair(source: str = "Hi", target: str = "Yes", **more: Any) -> dict[str, Any]:
    return {"source": source, "target": target, **more}


def test_repairs_are_reported_in_words_in_singular_and_plural(tmp_path: Path) -> None:
    assert "cleaned up: 1 carriage return" in list_notes(tmp_path, make_pair("a\r\nb"))
    turns = [("human", "a"), ("gpt", ""), ("human", "b\u200b\u200b"), ("gpt", "c"), ("human", "d")]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    (tmp_path / "more").mkdir()
    notes = list_notes(tmp_path / "more", record)
    assert "cleaned up: 2 zero-width characters, 1 blank turn, 1 question without an answer" in notes


def test_unused_columns_are_named_by_how_many_records_have_them(tmp_path: Path) -> None:
    notes = list_notes(tmp_path, *[make_pair(ID=1, section_header="x")] * 2, make_pair(note="y"), make_pair(ID=None))
    assert "2 records: unused columns ID, section_header; 1 record: unused column note" in notes
    repaired = json.loads((find_cache(tmp_path / "cache") / "manifest.json").read_text())["repaired"]
    assert repaired == {"ignored_field_ID": 2, "ignored_field_note": 1, "ignored_field_section_header": 2}


def test_unused_keys_of_turns_are_named(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi", "name": "Aida"}, {"from": "gpt", "value": "Yes"}]
    assert "1 turn: unused key name" in list_notes(tmp_path, {"conversations": turns})


def test_so_many_unused_columns_are_summed_up(tmp_path: Path) -> None:
    records = [make_pair(**{f"c{number}": 1 for number in range(index)}) for index in range(8, 0, -1)]
    (note,) = [note for note in list_notes(tmp_path, *records) if "unused" in note]
    assert note.startswith("8 records: unused column c0; 7 records: unused column c1; ")
    assert note.endswith("; 4 records: unused column c4; and 3 more")
    (tmp_path / "wide").mkdir()
    (note,) = [note for note in list_notes(tmp_path / "wide", records[0]) if "unused" in note]
    assert note == "1 record: unused columns c0, c1, c2, c3, c4 and 3 more"


def test_left_out_and_rejected_records_are_counted_with_plurals(tmp_path: Path) -> None:
    notes = list_notes(
        tmp_path, make_pair(target="a"), make_pair(target="long enough to stay"), {"x": 1}, min_target_tokens=4
    )
    assert "examples left out: 1 target shorter than min_target_tokens" in notes
    assert any(note.startswith("1 record rejected (unknown format: 1): ") for note in notes)
    (tmp_path / "cut").mkdir()
    notes = list_notes(
        tmp_path / "cut", make_pair("word " * 50, "word " * 50), make_pair("word " * 50), model_max_length=16
    )
    assert any(note.startswith("2 sources truncated to model_max_length 16; ") for note in notes)
    assert any(note.startswith("1 target truncated to model_max_length 16; ") for note in notes)


def test_many_unknown_tokens_cause_a_warning_with_better_vocabularies(tmp_path: Path) -> None:
    chinese, english = make_pair("你好吗朋友", "Yes"), make_pair("Is this a text?", "Yes")
    (note,) = [note for note in list_notes(tmp_path, chinese) if "unknown" in note]
    assert re.fullmatch(
        r"\d+ of \d+ tokens \(\d+%\) are unknown to the vocabulary; mT5's .*--unknown shows an example", note
    )
    (tmp_path / "few").mkdir()
    assert not [note for note in list_notes(tmp_path / "few", *[english] * 200, chinese) if "unknown" in note]


def test_characters_that_the_tokenizer_cannot_write_are_counted_by_targets(tmp_path: Path) -> None:
    notes = list_notes(
        tmp_path,
        make_pair(target="a ² b"),
        make_pair(target="\u2603 \u2603"),
        make_pair(target="\u2603"),
        add_tokens="none",
    )
    assert "not in the vocabulary: '\u2603' (2 targets)" in notes
    assert "the tokenizer changes '²' in 1 target" in notes
    (tmp_path / "list").mkdir()
    notes = list_notes(tmp_path / "list", make_pair(target="a\nb"), add_tokens=["=>"])
    assert "the tokenizer changes '\\n' in 1 target; to keep them, list them in add_tokens" in notes
