"""Text files: pairs of lines of two files."""

import gzip
import json
from pathlib import Path

import pytest

from t5tune.commands.prepare import prepare
from t5tune.data.reading.files import find_files
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.raw_records import parse_record
from t5tune.data.reading.readers import read_records
from t5tune.data.reading.rejections import Rejection
from t5tune.settings import PrepareSettings
from t5tune.settings.groups.record_format import ReadingSettings
from tests.support.caches import find_cache

ENGLISH = ["The sun is shining.", "Good morning!", "", "How are you?", "I have two cats."]
GUARANI = ["Kuarahy omimbi.", "Mba\u2019eichapa nde py\u2019areve!", "Heẽ.", "", "Areko mokõi mbarakaja."]


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Two text files: Windows' line ends and a compressed file; no line end after the last line."""
    (tmp_path / "train.en.gz").write_bytes(gzip.compress("\r\n".join(ENGLISH).encode("utf-16")))
    (tmp_path / "train.gn").write_text("\n".join(GUARANI) + "\n", encoding="utf-8")
    return [str(tmp_path / "train.en.gz"), str(tmp_path / "train.gn")]


def _prepare(folder: Path, **values: object) -> Path:
    given = {"model_name_or_path": "pocket", "output_dir": folder, "max_rejected_fraction": 0.5}
    return prepare(PrepareSettings(**given | values)).cache


def test_lines_are_paired_and_empty_lines_rejected(tmp_path: Path, pair: list[str]) -> None:
    reading = ReadingSettings(pair_lines=True)
    records = [*read_records(find_files(pair, pair=True), reading)]
    parsed = [parse_record(record, reading) for record in records]
    texts = [tuple(turn.text for turn in each.turns) for each in parsed if isinstance(each, Conversation)]
    assert texts == [(ENGLISH[number], GUARANI[number]) for number in (0, 1, 4)]
    rejected = [
        (str(record.location), each.reason)
        for record, each in zip(records, parsed, strict=True)
        if isinstance(each, Rejection)
    ]
    assert rejected == [(f"{pair[0]}:3", "no_source"), (f"{pair[0]}:4", "no_answer")]


def test_both_files_of_a_pair_identify_its_cache(tmp_path: Path, pair: list[str]) -> None:
    values = {"data_path": pair, "pair_lines": True}
    cache = _prepare(tmp_path / "cache", **values)
    before = (find_cache(cache) / "manifest.json").stat().st_mtime_ns
    assert (find_cache(_prepare(cache, **values)) / "manifest.json").stat().st_mtime_ns == before
    Path(pair[1]).write_text("\n".join(["a", *GUARANI[1:]]))
    assert (find_cache(_prepare(cache, **values)) / "manifest.json").stat().st_mtime_ns != before


@pytest.mark.slow
@pytest.mark.parametrize("is_compressed", [True, False])
def test_parts_of_paired_files_are_joined_to_the_same_cache(
    tmp_path: Path, pair: list[str], is_compressed: bool
) -> None:
    if not is_compressed:
        pair[0] = pair[0].removesuffix(".gz")
        Path(pair[0]).write_text("\n".join(ENGLISH))
    values = {"data_path": pair, "pair_lines": True}
    whole = _prepare(tmp_path / "whole", **values)
    for shard in ("1/2", "0/2"):
        _prepare(tmp_path / "joined", **values, shard=shard)
    assert (find_cache(tmp_path / "joined") / "tokens.bin").read_bytes() == (
        find_cache(whole) / "tokens.bin"
    ).read_bytes()


def test_paired_files_are_mixed_with_a_table_of_named_columns(tmp_path: Path, pair: list[str]) -> None:
    (tmp_path / "more.csv").write_text("q,a\nhello,maitei\n")
    cache = _prepare(
        tmp_path / "cache",
        data=[
            {"path": pair, "pair_lines": True, "name": "lines"},
            {"path": str(tmp_path / "more.csv"), "name": "table"},
        ],
        source_column="q",
        target_column="a",
    )
    counts = {name: json.loads((cache / name / "manifest.json").read_text())["examples"] for name in ("lines", "table")}
    assert counts == {"lines": 3, "table": 1}
