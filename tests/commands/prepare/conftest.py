"""What tests of preparing share."""

from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import PrepareResult, prepare
from t5tune.data.caches.cache import Cache
from t5tune.progress import Report, silent
from t5tune.settings import PrepareSettings
from tests.commands.prepare.ids import Prepared, write_lines
from tests.support.caches import open_only


@pytest.fixture
def prepared(tmp_path: Path, untied_base: Path) -> Prepared:
    def run(
        *records: Any, data: Path | None = None, base: Path = untied_base, report: Report = silent, **more: Any
    ) -> tuple[PrepareResult, Cache]:
        data = data or write_lines(tmp_path / "in" / "data.jsonl", *records)
        values = {"model_name_or_path": str(base), "data_path": str(data), "output_dir": tmp_path / "cache"}
        values |= {"max_rejected_fraction": None, **more}
        result = prepare(PrepareSettings(**values), report)
        return result, open_only(result.cache)

    return run
