"""The files of a token cache: when they are written again, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest

from t5tune.errors import DataError
from tests.commands.prepare.ids import Prepared, decode, load_tokenizer_of, record
from tests.support.caches import find_cache, open_only


def test_a_failed_prepare_does_not_change_the_old_cache(prepared: Prepared, tmp_path: Path) -> None:
    result, _ = prepared(record("Hi", "Yes"))
    before = bytes_of(result.cache)
    with pytest.raises(DataError):
        prepared(record("Hi"))
    assert bytes_of(result.cache) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "cache.rejected.jsonl", "in"]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_inputs_give_the_same_bytes(prepared: Prepared, tmp_path: Path, conversations: Path) -> None:
    first, _ = prepared(data=conversations, output_dir=tmp_path / "a")
    second, _ = prepared(data=conversations, output_dir=tmp_path / "b")
    assert not first.up_to_date
    assert not second.up_to_date
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert len(bytes_of(tmp_path / "a")) >= 6


def test_an_up_to_date_cache_is_not_rewritten(prepared: Prepared, conversations: Path) -> None:
    first, _ = prepared(data=conversations)
    times = {path: path.stat().st_mtime_ns for path in first.cache.rglob("*")}
    again, _ = prepared(data=conversations)
    assert again.up_to_date
    assert {path: path.stat().st_mtime_ns for path in first.cache.rglob("*")} == times
    assert vars(again) | {"up_to_date": False, "seconds": 0} == vars(first) | {"seconds": 0}


def test_prepare_reports_and_repairs_a_file_with_a_flipped_byte(prepared: Prepared, conversations: Path) -> None:
    result, _ = prepared(data=conversations)
    good = bytes_of(result.cache)
    tokens = find_cache(result.cache) / "tokens.bin"
    data = bytearray(tokens.read_bytes())
    data[len(data) // 2] ^= 1
    tokens.write_bytes(data)
    with pytest.raises(DataError, match=re.escape(str(tokens))) as caught:
        open_only(result.cache)
    assert "prepare" in str(caught.value.hint)
    again, _ = prepared(data=conversations)
    assert not again.up_to_date
    assert bytes_of(result.cache) == good


def test_a_missing_file_is_reported_with_its_name(prepared: Prepared, conversations: Path) -> None:
    result, _ = prepared(data=conversations)
    (find_cache(result.cache) / "examples.bin").unlink()
    with pytest.raises(DataError, match=r"examples\.bin: missing"):
        open_only(result.cache)


@pytest.mark.parametrize(
    "change",
    [
        {"model_max_length": 100},
        {"num_data": 3},
        {"add_tokens": "none"},
        {"conversation_template": "plain"},
    ],
    ids=str,
)
def test_other_settings_rebuild_the_cache(prepared: Prepared, conversations: Path, change: dict[str, Any]) -> None:
    first, _ = prepared(data=conversations)
    before = bytes_of(first.cache)
    again, _ = prepared(data=conversations, **change)
    assert not again.up_to_date
    assert bytes_of(again.cache) != before
    assert prepared(data=conversations, **change)[0].up_to_date


def test_other_data_rebuilds_the_cache(prepared: Prepared) -> None:
    prepared(record("Hi", "Yes"))
    result, cache = prepared(record("Hi", "No"))
    assert not result.up_to_date
    assert decode(load_tokenizer_of(cache), cache[0].target_T) == "No\n"


def test_a_folder_with_other_content_is_refused_and_not_changed(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear Mira")
    (tmp_path / "file").write_text("Dear Mira")
    for name in ("mine", "file"):
        with pytest.raises(DataError, match=re.escape(str(tmp_path / name))):
            prepared(record("Hi", "Yes"), output_dir=tmp_path / name)
    assert bytes_of(tmp_path / "mine") == {"letter.txt": b"Dear Mira"}
    assert (tmp_path / "file").read_text() == "Dear Mira"
    (tmp_path / "void").mkdir()
    assert prepared(record("Hi", "Yes"), output_dir=tmp_path / "void")[0].examples == 1
