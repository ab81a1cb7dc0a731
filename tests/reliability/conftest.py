"""Results of runs without interruption."""

from pathlib import Path

import pytest

from t5tune.commands.train import train
from tests.support.processes.forks import ForkServer
from tests.support.processes.runs import make_arguments, make_settings, read_adapter


@pytest.fixture(scope="session")
def uninterrupted(inputs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of an uninterrupted run in one process."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(make_settings(*inputs, run))
    return read_adapter(run)


@pytest.fixture(scope="session")
def zero3_run(fork_server: ForkServer, inputs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks under ZeRO-3."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = fork_server.run(make_arguments(*inputs, run, "--deepspeed=zero3"), 2)
    assert done.codes == [0, 0], done.log[-3000:]
    return run


@pytest.fixture(scope="session")
def uninterrupted_zero3(zero3_run: Path) -> bytes:
    """The adapter of an uninterrupted run of two ranks under ZeRO-3."""
    return read_adapter(zero3_run)
