"""What tests of runs share."""

from pathlib import Path

import pytest

from t5tune.commands.train import train
from tests.support.train_runs import make_settings, read_metrics_lines


@pytest.fixture(scope="module")
def finished_run(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "one"
    train(make_settings(untied_base, conversations, run, eval_fraction=0.2))
    return run


@pytest.fixture(scope="module")
def one_step(
    base_without_dropout: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    """Loss and gradient norm of one step on eight examples, in one process."""
    run = tmp_path_factory.mktemp("runs") / "batch"
    train(
        make_settings(
            base_without_dropout,
            conversations,
            run,
            num_data=8,
            max_steps=1,
            per_device_train_batch_size=8,
            lora_dropout=0.0,
        )
    )
    return read_metrics_lines(run)[0]
