"""Optimizers and learning-rate schedules by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune.commands.train import train
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.errors import SettingsError
from t5tune.runs.checks import check_plan
from t5tune.training.trainer import T5Trainer
from tests.support.train_runs import make_settings


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("cosine_with_min_lr", {"min_lr": 1e-5}),
        ("warmup_stable_decay", {"num_decay_steps": 2, "num_stable_steps": 1}),
    ],
)
def test_a_schedule_gets_its_arguments(schedule: str, options: dict[str, Any], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"lr_scheduler_type": schedule, "training_args": {"lr_scheduler_kwargs": options}}
    check_plan(make_run_plan(make_settings(Path("pocket"), Path("pocket"), tmp_path / "run", **changes)))


def test_an_optimizer_whose_package_or_argument_is_missing_is_named(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    for optim, problem in (("lomo", "lomo"), ("galore_adamw", "galore|optim_target_modules")):
        with pytest.raises(SettingsError, match=f"^optim: {optim}: .*({problem})"):
            train(make_settings(untied_base, conversations, tmp_path / optim, optim=optim))


def test_an_optimizer_without_weight_decay_trains(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rprop has no weight decay, like LOMO and layer-wise GaLore, whose packages the tests don't have."""

    def choose(_args: Any, model: torch.nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        return torch.optim.Rprop, {"params": [value for value in model.parameters() if value.requires_grad]}

    monkeypatch.setattr(T5Trainer, "get_optimizer_cls_and_kwargs", staticmethod(choose))
    assert train(make_settings(untied_base, conversations, tmp_path / "run", max_steps=2)).steps == 2
