"""What tests of merging share."""

from pathlib import Path

import pytest

from tests.support.models.adapters import make_stock_adapter


@pytest.fixture(scope="module")
def untied_adapter(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stock_adapter(untied_base, tmp_path_factory.mktemp("adapters") / "untied")
