"""What tests of reading share."""

from pathlib import Path
from typing import Any

import pytest

from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.rejections import REJECTION_REASONS, Rejection
from tests.data.reading.records import Outcomes, read


@pytest.fixture
def outcomes(tmp_path: Path) -> Outcomes:
    """Write bytes to a file and read it; return (human turns of accepted records, reasons of rejected records)."""

    def run(data: bytes, name: str = "data.jsonl", **reading: Any) -> tuple[list[str], list[str]]:
        (tmp_path / name).write_bytes(data)
        records = read(tmp_path / name, **reading)
        accepted = [record.turns[0].text for record in records if isinstance(record, Conversation)]
        rejected = [record.reason for record in records if isinstance(record, Rejection)]
        assert len(accepted) + len(rejected) == len(records)
        assert set(rejected) <= set(REJECTION_REASONS)
        return accepted, rejected

    return run
