"""The lock of a run folder, and the differences for which a run can't be resumed."""

import os
from pathlib import Path
from typing import Any

import pytest

from t5tune.errors import SettingsError
from t5tune.progress import Event
from t5tune.runs import resume_guard
from t5tune.runs.folder import lock_run_folder, read_saved_settings
from t5tune.runs.resume_guard import check_run_identity, check_steps_per_epoch
from t5tune.settings import TrainSettings, write_settings

IDENTITY = {
    "split_seed": 1,
    "eval_fraction": 0.2,
    "lora_alpha": 8,
    "data": "sha256:1",
    "world_size": 1,
    "deepspeed_stage": None,
    "training_args": {},
}


def test_a_parent_that_another_run_removes_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, events, parent = tmp_path / "new" / "run", list[Event](), tmp_path / "new"
    real_open = os.open

    def open_late(path: Any, *arguments: Any) -> int:
        monkeypatch.undo()
        parent.rmdir()  # as another run does that ends now
        return real_open(path, *arguments)

    monkeypatch.setattr(os, "open", open_late)
    with lock_run_folder(folder, events.append):
        assert [path.name for path in parent.iterdir()] == [".run.lock"]
        with pytest.raises(SettingsError, match="another run is using this folder"), lock_run_folder(folder, print):
            pass
    assert events == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"split_seed": 2}, "data: other examples of it to train on, because of split_seed"),
        (
            {"split_seed": 2, "num_data": 9},
            "data: other examples of it to train on, because of num_data and split_seed",
        ),
        ({"lora_alpha": 4}, 'data: "sha256:1" before, "sha256:2" now'),
    ],
)
def test_other_held_out_examples_are_not_called_other_data(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], line: str
) -> None:
    monkeypatch.setattr(resume_guard, "read_run_identity", lambda _: IDENTITY)
    now = IDENTITY | changes | {"data": "sha256:2"}
    with pytest.raises(SettingsError) as caught:
        check_run_identity(Path("run/checkpoint-1"), now, [], 1)
    assert line in caught.value.problems
    assert len(caught.value.problems) == 1 + len(changes)
    assert check_run_identity(Path("run/checkpoint-1"), now, ["data", *changes], 1)


def test_other_epochs_may_not_move_the_beginnings_of_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of mixtures with tokens_per_batch, whose epochs have as many steps as the longest of them."""
    then = IDENTITY | {"num_train_epochs": 3, "max_steps": None, "mixing": {"a": 3}, "tokens_per_batch": 64}
    then |= {"batch_tokens": 64, "steps_per_epoch": 10}
    monkeypatch.setattr(resume_guard, "read_run_identity", lambda _: then)
    checkpoint = Path("run/checkpoint-12")
    check_steps_per_epoch(checkpoint, then | {"num_train_epochs": 6})
    check_steps_per_epoch(checkpoint, then | {"num_train_epochs": 6, "steps_per_epoch": 5, "batch_tokens": 128})
    with pytest.raises(SettingsError) as caught:
        check_steps_per_epoch(checkpoint, then | {"num_train_epochs": 6, "steps_per_epoch": 11})
    assert caught.value.problems == (
        "num_train_epochs: with this value an epoch has 11 steps, with the previous one 10, so the run can't continue "
        "where it was stopped",
    )


@pytest.mark.parametrize(
    ("then", "changes", "is_fixed"),
    [
        ({}, {"lora_r": 16}, True),
        ({}, {"init_lora_weights": "pissa"}, True),
        ({"init_lora_weights": "olora"}, {"init_lora_weights": "default"}, True),
        ({}, {"optim": "adafactor"}, True),
        ({}, {"loraplus_lr_ratio": 16.0}, True),
        ({}, {"training_args": {"adam_beta2": 0.99}}, True),
        ({"init_lora_weights": "pissa"}, {"lora_alpha": 4}, True),
        ({"init_lora_weights": "olora"}, {"base": "sha256:2"}, True),
        ({"init_lora_weights": "pissa_niter_4"}, {"seed": 2}, True),
        ({"init_lora_weights": "pissa"}, {"seed": 2}, False),
        ({"training_args": {"adam_beta2": 0.99}}, {"training_args": {"adam_beta2": 0.99, "max_grad_norm": 2}}, False),
        ({}, {"lora_alpha": 4, "seed": 2, "base": "sha256:2", "lora_dropout": 0.1, "batch": 4}, False),
    ],
)
def test_what_decides_the_shape_or_the_meaning_of_trained_weights_cant_be_allowed_to_change(
    monkeypatch: pytest.MonkeyPatch, then: dict[str, Any], changes: dict[str, Any], is_fixed: bool
) -> None:
    before = {**IDENTITY, "base": "sha256:1", "lora_r": 8, "init_lora_weights": "default", "optim": "adamw_torch"}
    before |= {"loraplus_lr_ratio": None, "lora_dropout": 0.0, "batch": 8, **then}
    monkeypatch.setattr(resume_guard, "read_run_identity", lambda _: before)
    now, checkpoint = before | changes, Path("run/checkpoint-1")
    if not is_fixed:
        assert len(check_run_identity(checkpoint, now, [*changes], 1)) == len(changes)
        return
    for allowed in ([], [*changes]):
        with pytest.raises(SettingsError) as caught:
            check_run_identity(checkpoint, now, allowed, 1)
        (line,) = caught.value.problems
        name = next(iter(changes))
        assert line.startswith(f"{name}: ")
        assert line.endswith(" now")
        assert f"--allow-change can't allow {name}, " in str(caught.value.hint)
        assert "--adapter run/checkpoint-1" in str(caught.value.hint)
        assert "add --allow-change" not in str(caught.value.hint)


@pytest.mark.parametrize("weight", ["", ":2"])
def test_settings_with_thousands_of_files_are_read_back(tmp_path: Path, weight: str) -> None:
    paths = [f"/corpus/shards/part-{number:05}-of-05000.{'x' * 30}.jsonl{weight}" for number in range(5000)]
    settings = TrainSettings(model_name_or_path="pocket", data_path=paths, output_dir=tmp_path)
    assert write_settings(tmp_path, settings).stat().st_size > 300_000
    assert read_saved_settings(tmp_path) == settings
