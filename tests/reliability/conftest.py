"""What an undisturbed run comes to."""

from pathlib import Path

import pytest

from t5tune.commands.train import train
from tests.support.runs import ZERO3, adapter, settings, start


@pytest.fixture(scope="session")
def straight(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of one process."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(settings(untied_base, conversations, run))
    return adapter(run)


@pytest.fixture(scope="session")
def zero3_run(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks under ZeRO-3."""
    run = tmp_path_factory.mktemp("straight") / "run"
    with start(untied_base, conversations, run, *ZERO3) as running:
        assert running.end() == 0, running.log.read_text()[-3000:]
    return run


@pytest.fixture(scope="session")
def straight_zero3(zero3_run: Path) -> bytes:
    """The adapter of two ranks under ZeRO-3."""
    return adapter(zero3_run)
