"""Results of runs without interruption."""

from pathlib import Path

import pytest

from t5tune.commands.train import train
from tests.support.runs import ZERO3, make_settings, read_adapter, start_run


@pytest.fixture(scope="session")
def uninterrupted(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of an uninterrupted run in one process."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(make_settings(untied_base, conversations, run))
    return read_adapter(run)


@pytest.fixture(scope="session")
def zero3_run(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks under ZeRO-3."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    with start_run(untied_base, conversations, run, *ZERO3) as running:
        assert running.wait() == 0, running.log.read_text()[-3000:]
    return run


@pytest.fixture(scope="session")
def uninterrupted_zero3(zero3_run: Path) -> bytes:
    """The adapter of an uninterrupted run of two ranks under ZeRO-3."""
    return read_adapter(zero3_run)
