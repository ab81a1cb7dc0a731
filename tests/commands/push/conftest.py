"""The Hub that the commands of these tests upload to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers.hub import Hub, serve_hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve_hub(tmp_path / "home") as server:
        yield server
