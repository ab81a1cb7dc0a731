"""Settings that can't work together are refused before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune.errors import SettingsError
from t5tune.runs.checks import check_settings, list_notes
from t5tune.settings import TrainSettings, packaged_templates
from t5tune.settings.loading import load_settings


def test_a_deepspeed_config_with_which_weights_would_be_saved_under_other_names_is_refused(tmp_path: Path) -> None:
    """With DeepSpeed 0.19.8, the adapter of two ranks differed from that of the same run without it by 0.19."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    settings = TrainSettings(
        model_name_or_path="pocket",
        data_path="pocket",
        output_dir=tmp_path / "run",
        deepspeed=str(config),
        use_cpu=True,
    )
    with pytest.raises(SettingsError, match=r"config\.json: round_robin_gradients: DeepSpeed saves the weights under"):
        check_settings(settings)


@pytest.mark.parametrize("schedule", ["constant", "reduce_lr_on_plateau", "greedy"])
def test_warmup_is_refused_with_a_schedule_that_has_none(schedule: str, tmp_path: Path) -> None:
    settings = TrainSettings(
        model_name_or_path="pocket", data_path="pocket", output_dir=tmp_path / "run", use_cpu=True,
        lr_scheduler_type=schedule, eval_fraction=0.1,
    )  # fmt: skip
    check_settings(settings)
    with pytest.raises(SettingsError, match=f"0.05: lr_scheduler_type {schedule} has no warmup") as refused:
        check_settings(settings.replace(warmup_steps=0.05))
    assert ("constant_with_warmup" in refused.value.message) == (schedule == "constant")
    check_settings(settings.replace(warmup_steps=0.05, lr_scheduler_type="constant_with_warmup"))


def test_settings_that_a_deepspeed_config_replaces_are_refused_or_noted(tmp_path: Path) -> None:
    config = tmp_path / "own.json"
    config.write_text(json.dumps({"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}))
    settings = TrainSettings(
        model_name_or_path="pocket", data_path="pocket", output_dir=tmp_path / "run", use_cpu=True,
        deepspeed=str(config), learning_rate=1e-3,
    )  # fmt: skip
    check_settings(settings)
    assert list_notes(settings) == [
        f"optim: {config} has its own optimizer, AdamW, in its place",
        f"lr_scheduler_type: {config} has its own scheduler, WarmupLR, in its place",
    ]
    with pytest.raises(SettingsError) as caught:
        check_settings(settings.replace(optim="sgd", lr_scheduler_type="cosine", warmup_steps=0.1))
    assert caught.value.problems == (
        f"optim: sgd: {config} defines its own optimizer; remove `optimizer` from it, or set optim to its default, "
        "adamw_torch",
        f"lr_scheduler_type: cosine: {config} defines its own scheduler; remove `scheduler` from it, or set "
        "lr_scheduler_type to its default, linear",
        f'warmup_steps: 0.1: the scheduler of {config}, WarmupLR, has no warmup_num_steps; set it to "auto"',
    )
    config.write_text(json.dumps({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}))
    check_settings(settings.replace(optim="sgd", warmup_steps=0.1))
    config.write_text(json.dumps({"scheduler": {"type": "OneCycle"}}))
    with pytest.raises(SettingsError, match="OneCycle, has no warmup_num_steps; set warmup_steps to 0$"):
        check_settings(settings.replace(warmup_steps=0.1))
    check_settings(settings.replace(warmup_steps=0))
    config.write_text(json.dumps({"scheduler": "WarmupLR"}))
    with pytest.raises(SettingsError, match=r"own\.json: scheduler: expected an object with type and params"):
        check_settings(settings)


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"optimizer": {"params": {"lr": 1e-3}}}, "learning_rate: 5e-05: {} has optimizer.params.lr 0.001"),
    "decay": (
        {"optimizer": {"params": {"weight_decay": 0.01}}}, "weight_decay: 0: {} has optimizer.params.weight_decay 0.01"
    ),
    "betas": (
        {"optimizer": {"params": {"betas": [0.9, 0.95]}}},
        "training_args.adam_beta1 and adam_beta2: [0.9, 0.999]: {} has optimizer.params.betas [0.9, 0.95]",
    ),
    "eps": (
        {"optimizer": {"params": {"eps": 1e-6}}}, "training_args.adam_epsilon: 1e-08: {} has optimizer.params.eps 1e-06"
    ),
    "max_lr": (
        {"scheduler": {"params": {"warmup_max_lr": 1e-3}}},
        "learning_rate: 5e-05: {} has scheduler.params.warmup_max_lr 0.001",
    ),
    "warmup": (
        {"scheduler": {"params": {"warmup_num_steps": 2}}},
        "warmup_steps: 0: {} has scheduler.params.warmup_num_steps 2",
    ),
    "total": (
        {"scheduler": {"params": {"total_num_steps": 9}}}, "max_steps: 4: {} has scheduler.params.total_num_steps 9"
    ),
    "micro": (
        {"train_micro_batch_size_per_gpu": 4},
        "per_device_train_batch_size: 8: {} has train_micro_batch_size_per_gpu 4",
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1: {} has gradient_accumulation_steps 2"
    ),
    "clipping": ({"gradient_clipping": 0.5}, "max_grad_norm: 1: {} has gradient_clipping 0.5"),
    "bf16": ({"bf16": {"enabled": True}}, "bf16: false: {} has bf16.enabled true"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISMATCHES)
def test_other_values_in_a_deepspeed_config_than_the_settings_are_refused(name: str, tmp_path: Path) -> None:
    config, (sections, problem) = tmp_path / "own.json", MISMATCHES[name]
    settings = TrainSettings(
        model_name_or_path="pocket", data_path="pocket", output_dir=tmp_path / "run", use_cpu=True, max_steps=4,
        deepspeed=str(config),
    )  # fmt: skip
    config.write_text(json.dumps(sections))
    with pytest.raises(SettingsError) as caught:
        check_settings(settings)
    assert caught.value.problems == (f'{problem.format(config)}; set "auto" there, or the same value here',)


def test_the_values_of_a_deepspeed_config_that_follow_from_several_settings_are_compared(tmp_path: Path) -> None:
    config = tmp_path / "own.json"
    schedule = {"warmup_max_lr": 1e-3, "warmup_num_steps": 5, "total_num_steps": 100}
    optimizer = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0}
    sections = {"optimizer": {"params": optimizer}, "scheduler": {"params": schedule}, "bf16": {"enabled": True}}
    config.write_text(json.dumps({"train_batch_size": 32, **sections}))
    settings = TrainSettings(
        model_name_or_path="pocket", data_path="pocket", output_dir=tmp_path / "run", deepspeed=str(config),
        learning_rate=1e-3, warmup_steps=0.05, max_steps=100, gradient_accumulation_steps=2, num_processes=2, bf16=True,
        training_args={"adam_beta2": 0.95},
    )  # fmt: skip
    check_settings(settings)
    check_settings(settings.replace(max_steps=None))  # the steps of three epochs aren't known yet
    with pytest.raises(SettingsError) as caught:
        check_settings(settings.replace(num_processes=4, warmup_steps=0.1))
    assert caught.value.problems == (
        f"per_device_train_batch_size: 8: {config} has train_batch_size 32, but the settings make it 64; set "
        '"auto" there',
        f"warmup_steps: 0.1: {config} has scheduler.params.warmup_num_steps 5, but the settings make it 10; set "
        '"auto" there',
    )
    config.write_text(json.dumps({"scheduler": {"params": {"warmup_num_steps": 1}}}))
    check_settings(settings.replace(warmup_steps=0))  # as transformers fills it in
    config.write_text(json.dumps({"scheduler": {"params": {"warmup_num_steps": 0}}}))
    with pytest.raises(SettingsError, match='warmup_num_steps: 0: DeepSpeed needs at least 1; set "auto" there'):
        check_settings(settings.replace(warmup_steps=0))


@pytest.mark.parametrize("name", sorted({*packaged_templates.list_names("runs")} - {"pocket"}))
def test_the_advice_of_a_refused_deepspeed_config_helps_with_a_packaged_run_config(name: str, tmp_path: Path) -> None:
    config = tmp_path / "hf.json"
    optimizer = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    warmup = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
    sections = {"optimizer": optimizer, "scheduler": {"type": "WarmupLR", "params": warmup}}
    config.write_text(json.dumps(sections))
    flags = {"data_path": "pocket", "output_dir": tmp_path / "run", "deepspeed": config}
    settings, _ = load_settings(TrainSettings, name, flags={key: str(value) for key, value in flags.items()})
    with pytest.raises(SettingsError) as caught:
        check_settings(settings)
    removed = {section for section in sections if f"remove `{section}` from it" in caught.value.message}
    assert "scheduler" in removed
    assert "leave out" not in caught.value.message
    config.write_text(json.dumps({section: sections[section] for section in sections.keys() - removed}))
    if name == "qlora-paper" and not torch.cuda.is_available():  # whose optimizer needs a GPU
        settings = settings.replace(optim="adamw_torch")
    check_settings(settings)


def test_arguments_of_the_trainer_that_would_break_a_run_or_have_no_effect_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = TrainSettings(model_name_or_path="pocket", data_path="pocket", output_dir=run, use_cpu=True)
    refused = {
        "save_only_model": "with it, a run couldn't resume exactly; leave it out",
        "ignore_data_skip": "with it, a run couldn't resume exactly; leave it out",
        "auto_find_batch_size": "with it, a run couldn't resume exactly; leave it out",
        "load_best_model_at_end": "t5tune sets this itself",
        "resume_from_checkpoint": "t5tune sets this itself",
        "average_tokens_across_devices": "t5tune sets this itself",  # two ranks had twice the loss without it
        "label_names": "t5tune sets this itself",
        "logging_nan_inf_filter": "t5tune sets this itself",
        "log_level": "t5tune sets this itself",
        "neftune_noise_alpha": "NEFTune isn't supported; leave it out",
        "data_seed": "seed determines the order of the examples; set that",
        "dataloader_persistent_workers": "each epoch has workers of its own; leave it out",
        "train_sampling_strategy": "group_by_length determines the order of the examples; set that",
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
        check_settings(settings.replace(training_args=given))
    assert caught.value.problems == tuple(f"training_args.{name}: {problem}" for name, problem in refused.items())
    check_settings(settings.replace(training_args={"full_determinism": True, "adam_beta2": 0.99}))
    same = {"dataloader_drop_last": False, "train_sampling_strategy": "random", "hub_revision": None}
    check_settings(settings.replace(training_args=same))
    same = {"dataloader_persistent_workers": False, "neftune_noise_alpha": None, "logging_nan_inf_filter": False}
    check_settings(settings.replace(training_args=same))
    with pytest.raises(SettingsError, match="set learning_rate directly"):  # though it is the Trainer's default
        check_settings(settings.replace(training_args={"learning_rate": 5e-5}))
