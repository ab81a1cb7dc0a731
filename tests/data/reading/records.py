"""Records for tests of reading, and how they are read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from t5tune.data.reading.files import find_files
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.raw_records import RawRecord, parse_record
from t5tune.data.reading.readers import read_records
from t5tune.data.reading.rejections import Rejection
from t5tune.settings.groups.record_format import ReadingSettings

GOOD = '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}'
LIMIT = 10_000


def make_record(question: str, answer: str = "Yes", **more: Any) -> str:
    """Return a record as a line of JSON; the texts are inserted without escaping."""
    turns = f'[{{"from": "human", "value": "{question}"}}, {{"from": "gpt", "value": "{answer}"}}]'
    rest = "".join(f', "{key}": {json.dumps(value)}' for key, value in more.items())
    return f'{{"conversations": {turns}{rest}}}'


def read_raw(path: Path, limit: int = LIMIT) -> list[RawRecord]:
    return list(read_records(find_files([str(path)]), ReadingSettings(max_record_bytes=limit)))


def read(path: Path, **reading: Any) -> list[Conversation | Rejection]:
    chosen = ReadingSettings(**reading)
    records = read_records(find_files([str(path)]), chosen.model_copy(update={"max_record_bytes": LIMIT}))
    return [parse_record(record, chosen) for record in records]


LINES = "".join(f"{make_record(f'question {number}')}\n" for number in range(3000)).encode()


def prepare(tmp_path: Path, *arguments: Any, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "t5tune", "prepare", "--model-name-or-path", "pocket", "--json"]
    return subprocess.run(
        [*command, "--output-dir", tmp_path / "cache", *map(str, arguments)], input=stdin, capture_output=True
    )
