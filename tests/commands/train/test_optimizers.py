"""Optimizers and learning-rate schedules by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune.commands.run_plan import make_run_plan
from t5tune.commands.train import train
from t5tune.errors import DataError, SettingsError
from t5tune.runs.checks import check_plan
from t5tune.training.trainer import T5Trainer
from tests.support.train_runs import make_settings


def test_wrong_names_are_refused_before_anything_is_written(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SettingsError, match="training_args.adam_beta: no such field.*did you mean adam_beta"):
        train(make_settings(untied_base, conversations, run, training_args={"adam_beta": 0.9}))
    with pytest.raises(SettingsError, match="training_args.torch_compile_mode: .*; set torch_compile"):
        train(make_settings(untied_base, conversations, run, training_args={"torch_compile_mode": "max-autotune"}))
    with pytest.raises(
        SettingsError, match="training_args.learning_rate: set learning_rate directly, not under training_args"
    ):
        train(make_settings(untied_base, conversations, run, training_args={"learning_rate": 0.9}))
    with pytest.raises(SettingsError, match="deepspeed: zero5"):
        train(make_settings(untied_base, conversations, run, deepspeed="zero5"))
    assert not run.exists()
    with pytest.raises(SettingsError, match="lora_target_modules: query: no such linear layer"):
        train(make_settings(untied_base, conversations, run, lora_target_modules=["query"]))


def test_errors_name_unknown_optimizers_and_schedules_and_the_eval_data(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SettingsError) as caught:
        train(make_settings(untied_base, conversations, run, optim="adamw_torhc", lr_scheduler_type="cosin"))
    assert [line.rpartition("; ")[2] for line in caught.value.problems] == [
        "did you mean adamw_torch?", "did you mean cosine?"
    ]  # fmt: skip
    assert not run.exists()
    (tmp_path / "dev.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"^eval_data_path: .*dev\.jsonl: no conversation"):
        train(make_settings(untied_base, conversations, run, eval_data_path=str(tmp_path / "dev.jsonl")))


@pytest.mark.parametrize(
    ("schedule", "options", "problem"),
    [
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate should be set"),
        ("cosine_warmup_with_min_lr", {}, "min_lr"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("linear", {"min_lr": 1e-5}, "unexpected keyword argument 'min_lr'"),
        ("cosine_with_min_lr", {"min_lr": 1e-5}, None),
        ("warmup_stable_decay", {"num_decay_steps": 2, "num_stable_steps": 1}, None),
    ],
)
def test_a_schedule_that_lacks_an_argument_is_refused_before_anything_is_written(
    schedule: str, options: dict[str, Any], problem: str | None, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"lr_scheduler_type": schedule, "training_args": {"lr_scheduler_kwargs": options}}
    settings = make_settings(Path("pocket"), Path("pocket"), tmp_path / "run", **changes)
    if problem is None:
        check_plan(make_run_plan(settings))
        return
    with pytest.raises(SettingsError, match=f"lr_scheduler_type: {schedule}: .*{problem}.*; set lr_scheduler_kwargs"):
        train(settings)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_whose_package_or_argument_is_missing_is_named(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    for optim, problem in (("lomo", "lomo"), ("galore_adamw", "galore|optim_target_modules")):
        with pytest.raises(SettingsError, match=f"^optim: {optim}: .*({problem})"):
            train(make_settings(untied_base, conversations, tmp_path / optim, optim=optim))


def test_an_optimizer_without_weight_decay_trains(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LOMO's and those of layer-wise GaLore, whose packages the tests don't have, the groups of Rprop have none."""

    def choose(_args: Any, model: torch.nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        return torch.optim.Rprop, {"params": [value for value in model.parameters() if value.requires_grad]}

    monkeypatch.setattr(T5Trainer, "get_optimizer_cls_and_kwargs", staticmethod(choose))
    assert train(make_settings(untied_base, conversations, tmp_path / "run", max_steps=2)).steps == 2
