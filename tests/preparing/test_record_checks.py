"""Too many rejected records: nothing is prepared or trained, and the records are kept next to the cache."""

import json
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import prepare
from t5tune.errors import DataError
from t5tune.settings import PrepareSettings
from tests.support.caches import open_only
from tests.support.processes.command_line import t5tune_in_fork

GOOD = [{"source": f"q{number}", "target": "Yes"} for number in range(17)]
BAD = [{"source": "q", "target": ""}, {"source": "q", "target": None}, {"question": "q"}]
LEFT_OUT = {
    "labeled_bad": {"source": "q", "target": "No", "label": False},
    "duplicate": GOOD[0],
    "zero_weight": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]},
}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_settings(data: Path, **values: Any) -> PrepareSettings:
    given = {"model_name_or_path": "pocket", "data_path": str(data), "output_dir": data.parent / "cache"}
    return PrepareSettings(**given | values)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", "train"])
def test_too_many_rejected_records_end_the_command_before_training(tmp_path: Path, command: str) -> None:
    data = write(tmp_path / "data.jsonl", GOOD + BAD)
    output = tmp_path / "output"
    done = t5tune_in_fork(command, "--model-name-or-path", "pocket", "--data-path", data, "--output-dir", output)
    kept = tmp_path / "output.rejected.jsonl"
    assert done.code == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "3 of 20 records rejected (no answer: 1, not text: 1, unknown format: 1)" in error
    assert f"; the first rejected record: {data}:18: " in error
    assert f"; all are in {kept}, with the reasons; correct the data, or allow it with --max-rejected-fraction" in error
    assert [json.loads(line)["line"] for line in kept.read_text().splitlines()] == [18, 19, 20]
    assert not output.exists()


def test_two_of_twenty_records_may_be_rejected(tmp_path: Path) -> None:
    result = prepare(make_settings(write(tmp_path / "data.jsonl", [*GOOD, *BAD[:1]])))
    assert (result.conversations, result.rejected) == (17, 1)


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_records_left_out_on_purpose_are_not_counted(tmp_path: Path, reason: str) -> None:
    data = write(tmp_path / "data.jsonl", GOOD + [LEFT_OUT[reason]] * 20)
    more = {"conversation_template": "plain", "dedupe": "exact" if reason == "duplicate" else "none"}
    prepare(make_settings(data, max_rejected_fraction=0, **more))
    assert open_only(tmp_path / "cache").manifest["rejected_by_reason"] == {reason: 20}


def test_rejected_records_are_not_data_and_a_cache_removes_them(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", GOOD + BAD)
    settings = make_settings(folder, output_dir=folder / "cache")
    for _ in range(2):
        with pytest.raises(DataError, match="3 of 20 records rejected"):
            prepare(settings)
    assert (folder / "cache.rejected.jsonl").is_file()
    write(folder / "a.jsonl", GOOD)
    assert prepare(settings).conversations == 17
    assert not (folder / "cache.rejected.jsonl").exists()


def test_a_datasets_rejected_records_are_kept_next_to_the_mixture(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / "a.jsonl", GOOD)), str(write(tmp_path / "b.jsonl", GOOD + BAD))]
    settings = make_settings(tmp_path / "unused", data_path=[f"{path}:1" for path in paths])
    with pytest.raises(DataError, match=r"3 of 20 records rejected.*/cache\.rejected\.jsonl"):
        prepare(settings)
    assert len((tmp_path / "cache.rejected.jsonl").read_text().splitlines()) == 3
    prepare(settings.replace(max_rejected_fraction=0.5))
    assert not (tmp_path / "cache.rejected.jsonl").exists()


def test_a_users_file_named_like_rejected_records_stays(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", GOOD + BAD)
    mine, kept = tmp_path / "cache.rejected.jsonl", tmp_path / "cache.1.rejected.jsonl"
    with pytest.raises(DataError, match=mine.name):
        prepare(make_settings(data))
    corrected = write(mine, GOOD[:3]).read_bytes()
    for _ in range(2):
        with pytest.raises(DataError, match=kept.name):
            prepare(make_settings(data))
        assert len(kept.read_text().splitlines()) == len(BAD)
    both = [str(write(data, GOOD)), str(mine)]
    assert prepare(make_settings(data, data_path=both)).conversations == 20
    assert mine.read_bytes() == corrected
    assert not kept.exists()
