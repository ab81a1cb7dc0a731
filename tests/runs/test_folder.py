"""The lock of a run folder, and the differences for which a run can't be resumed."""

import os
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.train.run_plan import make_run_plan
from t5tune.errors import SettingsError
from t5tune.progress import Event
from t5tune.runs import resume_guard
from t5tune.runs.folder import RunFolder
from t5tune.runs.plan import RunPlan
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


def make_plan(*allowed: str) -> RunPlan:
    given = {"model_name_or_path": "pocket", "data_path": ["pocket"], "output_dir": Path("run")}
    return make_run_plan(TrainSettings(**given, allow_change=[*allowed]))


def test_a_parent_that_another_run_removes_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, events, parent = tmp_path / "new" / "run", list[Event](), tmp_path / "new"
    real_open = os.open

    def open_late(path: Any, *arguments: Any) -> int:
        monkeypatch.undo()
        parent.rmdir()  # as another run does that ends now
        return real_open(path, *arguments)

    monkeypatch.setattr(os, "open", open_late)
    with RunFolder(folder).lock(events.append):
        assert [path.name for path in parent.iterdir()] == [".run.lock"]
        with pytest.raises(SettingsError, match="another run is using this folder"), RunFolder(folder).lock(print):
            pass
    assert events == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"split_seed": 2}, "data: different training examples, because of split_seed"),
        (
            {"split_seed": 2, "num_data": 9},
            "data: different training examples, because of num_data and split_seed",
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
        check_run_identity(Path("run/checkpoint-1"), now, make_plan())
    assert line in caught.value.problems
    assert len(caught.value.problems) == 1 + len(changes)


def test_other_epochs_may_not_move_the_beginnings_of_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In mixtures with tokens_per_batch, all epochs have as many steps as the longest epoch."""
    then = IDENTITY | {"num_train_epochs": 3, "max_steps": None, "mixing": {"a": 3}, "tokens_per_batch": 64}
    then |= {"batch_tokens": 64, "steps_per_epoch": 10}
    monkeypatch.setattr(resume_guard, "read_run_identity", lambda _: then)
    checkpoint = Path("run/checkpoint-12")
    check_steps_per_epoch(checkpoint, then | {"num_train_epochs": 6})
    check_steps_per_epoch(checkpoint, then | {"num_train_epochs": 6, "steps_per_epoch": 5, "batch_tokens": 128})
    with pytest.raises(SettingsError) as caught:
        check_steps_per_epoch(checkpoint, then | {"num_train_epochs": 6, "steps_per_epoch": 11})
    assert caught.value.problems == (
        "num_train_epochs: with this value an epoch has 11 steps, with the previous value 10, so the run can't "
        "continue where it was stopped",
    )


@pytest.mark.parametrize("is_adapter", [True, False])
def test_a_length_is_allowed_only_by_its_name(
    is_adapter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = IDENTITY | {"max_steps": 3, "num_train_epochs": 1.0}
    monkeypatch.setattr(resume_guard, "read_run_identity", lambda _: then)
    if is_adapter:
        (tmp_path / "adapter_config.json").touch()
    flag, line = "--adapter" if is_adapter else "--model-name-or-path", "max_steps: 3 before, 5 now"
    longer = then | {"max_steps": 5}
    assert check_run_identity(tmp_path, longer, make_plan("max_steps")) == [line]
    for now, allowed, problems, allow in (
        (longer, [], (line,), ["to resume anyway, add --allow-change max_steps"]),
        (longer, ["num_train_epochs"], (line,), ["to resume anyway, add --allow-change max_steps"]),
        (longer | {"lora_alpha": 4}, ["max_steps"], ("lora_alpha: 8 before, 4 now",), []),
    ):
        with pytest.raises(SettingsError) as caught:
            check_run_identity(tmp_path, now, make_plan(*allowed))
        assert caught.value.problems == problems
        assert caught.value.choices == (
            "to resume, use the previous settings and data",
            *allow,
            f"to start a new run from these weights, use {flag} {tmp_path} and a new output_dir",
            "to start over, add --fresh; the old run is kept under a new name",
        )


@pytest.mark.parametrize("weight", ["", ":2"])
def test_settings_with_many_files_are_read_back(tmp_path: Path, weight: str) -> None:
    paths = [f"/corpus/{'shards/' * 40}part-{number:05}-of-01000.jsonl{weight}" for number in range(1000)]
    settings = TrainSettings(model_name_or_path="pocket", data_path=paths, output_dir=tmp_path)
    assert write_settings(tmp_path, settings).stat().st_size > 300_000
    assert RunFolder(tmp_path).read_settings(TrainSettings) == settings
