"""The sample of the data is parsed once, and its records are encoded as all others are."""

import json
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import prepare
from t5tune.data import raw_records
from t5tune.settings import PrepareSettings

LONG = "two hats, " * 100
RECORDS = [
    {"source": LONG, "target": "猫 {x}"},
    {"text": "not a conversation"},
    {"source": LONG, "target": "猫 {x}", "id": 2},
    {"source": LONG + "😀", "target": "Yes"},  # takes four times as much memory as the record, which is kept instead
]


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.parametrize("dedupe", ["none", "exact"])
def test_a_sampled_record_gives_the_same_files_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedupe: str
) -> None:
    parsed: list[bytes] = []
    parse_json = raw_records.parse_json

    def parse_and_count(data: bytes) -> Any:
        parsed.append(data)
        return parse_json(data)

    monkeypatch.setattr(raw_records, "parse_json", parse_and_count)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS))
    values = {"model_name_or_path": "pocket", "data_path": str(tmp_path / "data.jsonl"), "num_workers": 1}
    files, counts = [], []
    for name, size in (("sampled", 8 << 20), ("first", 1)):
        monkeypatch.setattr("t5tune.data.sample.SAMPLE_BYTES", size)
        parsed.clear()
        prepare(PrepareSettings(**values, output_dir=tmp_path / name, dedupe=dedupe))
        files.append(read_files(tmp_path / name))
        counts.append(len(parsed))
    assert files[0] == files[1]
    # records of the sample whose conversation takes more memory, or that may still be rejected, are parsed again
    assert counts == ({"none": [5, 4], "exact": [7, 5]}[dedupe])
