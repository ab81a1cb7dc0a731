"""Records for tests of reading, and how they are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import prepare as run_prepare
from t5tune.data.caches.cache import Cache
from t5tune.data.reading.files import find_files
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.raw_records import RawRecord, parse_record
from t5tune.data.reading.readers import read_records
from t5tune.data.reading.rejections import Rejection
from t5tune.progress import Report, silent
from t5tune.settings import PrepareSettings
from t5tune.settings.groups.record_format import ReadingSettings
from tests.support.caches import open_only
from tests.support.processes.command_line import CommandResult, t5tune_in_fork

GOOD = '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}'
LIMIT = 10_000
HI, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
FORMATS: dict[str, Any] = {
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
    "sharegpt, loud": {"conversations": [{"from": " Human ", "value": "Hi"}, {"from": "GPT", "value": "Yes"}]},
    "openai": {"messages": [HI, YES]},
    "openai in conversations": {"conversations": [HI, YES]},
    "openai in parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, YES]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Yes"},
    "prompt/completion": {"prompt": "Hi", "completion": "Yes"},
    "prompt/completion of messages": {"prompt": [HI], "completion": [YES]},
    "source/target": {"source": "Hi", "target": "Yes"},
    "a pair of answers": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    "a pair of answers to a conversation": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Yes"},
        "rejected": {"from": "gpt", "value": "No"},
    },
}
Outcomes = Callable[..., tuple[list[str], list[str]]]  # of the fixture `outcomes`


def make_record(question: str, answer: str = "Yes", **more: Any) -> str:
    """Return a record as a line of JSON; the texts are inserted without escaping."""
    turns = f'[{{"from": "human", "value": "{question}"}}, {{"from": "gpt", "value": "{answer}"}}]'
    rest = "".join(f', "{key}": {json.dumps(value)}' for key, value in more.items())
    return f'{{"conversations": {turns}{rest}}}'


def read_raw(path: Path, limit: int = LIMIT) -> list[RawRecord]:
    return list(read_records(find_files([str(path)]), ReadingSettings(max_record_bytes=limit)))


def read_in_chunks(path: Path, size: int) -> list[RawRecord]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t5tune.data.reading.files.READ_CHUNK_BYTES", size)
        return read_raw(path)


def read(path: Path, **reading: Any) -> list[Conversation | Rejection]:
    chosen = ReadingSettings(**reading)
    records = read_records(find_files([str(path)]), chosen.model_copy(update={"max_record_bytes": LIMIT}))
    return [parse_record(record, chosen) for record in records]


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_one(folder: Path, value: Any, **reading: Any) -> Any:
    (record,) = read(write_lines(folder / "one.jsonl", value), **reading)
    return record


def prepare_records(folder: Path, *records: Any, report: Report = silent, **values: Any) -> Cache:
    """Prepare records for the built-in model, and open their cache."""
    data = write_lines(folder / "data.jsonl", *records)
    given = {"model_name_or_path": "pocket", "data_path": str(data), "output_dir": folder / "cache"}
    return open_only(run_prepare(PrepareSettings(**given | values), report).cache)


LINES = "".join(f"{make_record(f'question {number}')}\n" for number in range(3000)).encode()


def prepare(tmp_path: Path, *arguments: Any, stdin: bytes = b"") -> CommandResult:
    command = ("prepare", "--model-name-or-path", "pocket", "--json", "--output-dir", tmp_path / "cache")
    return t5tune_in_fork(*command, *arguments, stdin=stdin)
