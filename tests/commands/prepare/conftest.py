"""What tests of preparing share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import PrepareResult, prepare
from t5tune.data.caches.cache import Cache
from t5tune.settings import PrepareSettings
from tests.commands.prepare.ids import write_lines
from tests.support.caches import open_only


@pytest.fixture
def prepared(tmp_path: Path, untied_base: Path) -> Callable[..., tuple[PrepareResult, Cache]]:
    """Return a function that prepares records or a data file and opens the cache."""

    def run(
        *records: Any, data: Path | None = None, base: Path = untied_base, **more: Any
    ) -> tuple[PrepareResult, Cache]:
        data = data or write_lines(tmp_path / "in" / "data.jsonl", *records)
        values = {"model_name_or_path": str(base), "data_path": str(data), "output_dir": tmp_path / "cache"}
        values |= {"max_rejected_fraction": None, **more}
        result = prepare(PrepareSettings(**values))
        return result, open_only(result.cache)

    return run
