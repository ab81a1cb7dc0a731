"""Settings that can't work together are refused before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune.commands.train.run_plan import make_run_plan
from t5tune.errors import SettingsError
from t5tune.runs.checks import check_plan, list_notes
from t5tune.settings import TrainSettings, packaged_templates
from t5tune.settings.loading import load_settings


def make_settings(folder: Path, **values: Any) -> TrainSettings:
    return TrainSettings(model_name_or_path="pocket", data_path="pocket", output_dir=folder / "run", **values)


def check(settings: TrainSettings) -> None:
    check_plan(make_run_plan(settings))


@pytest.mark.parametrize("schedule", ["constant", "reduce_lr_on_plateau", "greedy"])
def test_warmup_is_refused_with_a_schedule_that_has_none(schedule: str, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, use_cpu=True, lr_scheduler_type=schedule, eval_fraction=0.1)
    check(settings)
    with pytest.raises(SettingsError, match=f"0.05: lr_scheduler_type {schedule} has no warmup") as refused:
        check(settings.replace(warmup_steps=0.05))
    assert ("constant_with_warmup" in refused.value.message) == (schedule == "constant")
    check(settings.replace(warmup_steps=0.05, lr_scheduler_type="constant_with_warmup"))


def test_only_adam_of_a_deepspeed_config_is_replaced(tmp_path: Path) -> None:
    config = tmp_path / "own.json"
    config.write_text(json.dumps({"optimizer": {"type": "Adam"}}))
    settings = make_settings(tmp_path, use_cpu=True, deepspeed=str(config), optim="adafactor")
    with pytest.raises(SettingsError, match="optimizer: Adam; remove `optimizer`: optim adafactor, learning_rate and"):
        check(settings)
    check(settings.replace(optim="adamw_torch"))


@pytest.mark.parametrize(
    ("scheduler", "own"),
    [("WarmupLR", "constant_with_warmup"), ("WarmupDecayLR", "linear"), ("WarmupCosineLR", "cosine")],
)
def test_a_deepspeed_schedule_that_settings_replace_is_noted(scheduler: str, own: str, tmp_path: Path) -> None:
    config = tmp_path / "own.json"
    config.write_text(json.dumps({"scheduler": {"type": scheduler}}))
    settings = make_settings(
        tmp_path, use_cpu=True,
        deepspeed=str(config), learning_rate=1e-3, lr_scheduler_type="polynomial",
    )  # fmt: skip
    check(settings)
    assert list_notes(make_run_plan(settings)) == [
        f"deepspeed: {config}: the scheduler {scheduler} is replaced by lr_scheduler_type polynomial; "
        f"--lr-scheduler-type {own} uses the file's schedule"
    ]
    assert list_notes(make_run_plan(settings.replace(lr_scheduler_type=own))) == []


def test_deepspeed_values_that_follow_from_settings_are_compared(tmp_path: Path) -> None:
    config = tmp_path / "own.json"
    schedule = {"warmup_max_lr": 1e-3, "warmup_num_steps": 5, "total_num_steps": 100}
    optimizer = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0}
    sections = {"optimizer": {"params": optimizer}, "scheduler": {"params": schedule}, "bf16": {"enabled": True}}
    config.write_text(json.dumps({"train_batch_size": 32, **sections}))
    settings = make_settings(
        tmp_path, deepspeed=str(config),
        learning_rate=1e-3, warmup_steps=0.05, max_steps=100, gradient_accumulation_steps=2, num_processes=2, bf16=True,
        training_args={"adam_beta2": 0.95},
    )  # fmt: skip
    check(settings)
    check(settings.replace(max_steps=None))  # the steps of three epochs aren't known yet
    with pytest.raises(SettingsError) as caught:
        check(settings.replace(num_processes=4, warmup_steps=0.1))
    assert caught.value.problems == (
        f"per_device_train_batch_size: 8: {config} has train_batch_size 32, but the settings make it 64; set "
        'it to "auto"',
        f"warmup_steps: 0.1: {config} has scheduler.params.warmup_num_steps 5, but the settings make it 10; set "
        'it to "auto"',
    )
    config.write_text(json.dumps({"scheduler": {"params": {"warmup_num_steps": 0}}}))
    check(settings.replace(warmup_steps=0))
    with pytest.raises(SettingsError, match="warmup_steps: 2: .* has scheduler.params.warmup_num_steps 0; set"):
        check(settings.replace(warmup_steps=2))


@pytest.mark.parametrize("name", sorted({*packaged_templates.list_names("runs")} - {"pocket"}))
def test_transformers_documented_deepspeed_config_suits_a_packaged_run_config(name: str, tmp_path: Path) -> None:
    config = tmp_path / "hf.json"
    optimizer = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    warmup = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
    config.write_text(json.dumps({"optimizer": optimizer, "scheduler": {"type": "WarmupLR", "params": warmup}}))
    flags = {"data_path": "pocket", "output_dir": tmp_path / "run", "deepspeed": config}
    settings, _ = load_settings(TrainSettings, name, flags={key: str(value) for key, value in flags.items()})
    if name == "qlora-paper" and not torch.cuda.is_available():  # its optimizer needs a GPU
        settings = settings.replace(optim="adamw_torch")
    if "adam" in settings.optim:
        check(settings)
        return
    with pytest.raises(SettingsError, match=f"optimizer: AdamW; remove `optimizer`: optim {settings.optim}, "):
        check(settings)


def test_unsupported_arguments_of_the_trainer_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = TrainSettings(model_name_or_path="pocket", data_path="pocket", output_dir=run, use_cpu=True)
    refused = {
        "save_only_model": "with it, a run couldn't resume exactly; leave it out",
        "ignore_data_skip": "with it, a run couldn't resume exactly; leave it out",
        "auto_find_batch_size": "with it, a run couldn't resume exactly; leave it out",
        "load_best_model_at_end": "t5tune sets this itself; leave it out",
        "resume_from_checkpoint": "t5tune sets this itself; leave it out",
        # two ranks had twice the loss without it
        "average_tokens_across_devices": "t5tune sets this itself; leave it out",
        "label_names": "t5tune sets this itself; leave it out",
        "logging_nan_inf_filter": "t5tune sets this itself; leave it out",
        "log_level": "t5tune sets this itself; leave it out",
        "neftune_noise_alpha": "NEFTune isn't supported; leave it out",
        "data_seed": "set seed instead; it determines the order of the examples",
        "dataloader_persistent_workers": "each epoch starts new workers; leave it out",
        "train_sampling_strategy": "set group_by_length instead; it determines the order of the examples",
        "length_column_name": "the lengths are in the token cache; leave it out",
        "bf16_full_eval": "evaluations compute as training does; set bf16",
        "dataloader_drop_last": "t5tune makes its own batches; leave it out",
        "dataloader_in_order": "t5tune makes its own batches; leave it out",
        "eval_accumulation_steps": "t5tune has its own evaluation loop; leave it out",
        "include_for_metrics": "t5tune has its own evaluation loop; leave it out",
        "hub_revision": "t5tune uploads the run itself; leave it out",
    }
    given = dict.fromkeys(refused, True) | {"average_tokens_across_devices": False, "dataloader_in_order": False}
    with pytest.raises(SettingsError) as caught:
        check(settings.replace(training_args=given))
    assert caught.value.problems == tuple(f"training_args.{name}: {problem}" for name, problem in refused.items())
    check(settings.replace(training_args={"full_determinism": True, "adam_beta2": 0.99}))
    same = {"dataloader_drop_last": False, "train_sampling_strategy": "random", "hub_revision": None}
    check(settings.replace(training_args=same))
    same = {"dataloader_persistent_workers": False, "neftune_noise_alpha": None, "logging_nan_inf_filter": False}
    check(settings.replace(training_args=same))
    with pytest.raises(SettingsError, match="set learning_rate directly"):  # though it is the Trainer's default
        check(settings.replace(training_args={"learning_rate": 5e-5}))
