"""plan: what it shows, its notes and refusals, and the time of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.plan import plan
from t5tune.errors import ModelError
from t5tune.progress import Event, Note
from t5tune.settings import PlanSettings
from tests.planning.plans import NO_SUGGESTION, make_plan, write_short_model
from tests.support.processes.command_line import t5tune_in_fork

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("machine", "stages"),
    [
        ({"use_cpu": True}, ["none"]),
        ({"num_processes": 2}, ["none", "zero1", "zero2", "zero3"]),
        ({"num_gpus": 1}, ["none", "zero3-offload"]),
        ({"use_cpu": True, "deepspeed": "zero2"}, ["zero2", "none"]),
    ],
)
def test_a_plan_shows_only_what_the_machine_can_use(machine: dict[str, Any], stages: list[str], tmp_path: Path) -> None:
    result = make_plan(write_short_model(tmp_path), source_length=8, target_length=8, **machine)
    assert [stage.stage for stage in result.stages] == stages


@pytest.mark.long
def test_a_plan_says_that_it_leaves_out_the_teacher(tmp_path: Path) -> None:
    keys = "model_name_or_path: pocket\ndata_path: pocket\noutput_dir: run\nteacher_model_name_or_path: pocket\n"
    (tmp_path / "run.yaml").write_text(keys)
    for arguments, note in (
        (("train", "--dry-run"), "teacher_model_name_or_path: pocket: the plan doesn't include the teacher's memory"),
        (("plan", "--gpu-memory", "1MiB"), "plan does not use teacher_model_name_or_path"),
    ):
        done = t5tune_in_fork(*arguments, "--config", tmp_path / "run.yaml", "--use-cpu")
        assert done.code == 0, done.stderr
        assert note in done.stderr


@pytest.mark.slow
def test_the_terminal_says_why_a_given_setting_is_left_out(tmp_path: Path) -> None:
    done = t5tune_in_fork("plan", write_short_model(tmp_path), "--q-lora", "--gpu-memory", "16GiB", "--bf16")
    assert done.code == 0, done.stderr
    flags, reason = done.stdout.partition("suggested: ")[2].splitlines()[:2]
    assert "--no-q-lora" in flags
    assert reason.startswith("  without --q-lora: the run fits without it, and it rounds the base's weights")


@pytest.mark.long
def test_the_command_accepts_a_run_config_and_refuses_other_models(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model_name_or_path: google/flan-t5-small\ndata_path: x.jsonl\noutput_dir: y\n")
    done = t5tune_in_fork("plan", "--config", tmp_path / "run.yaml", "--gpu-memory", "16GiB")
    assert done.code == 0, done.stderr
    assert "76,961,152" not in done.stdout  # the adapters are counted, too
    assert "no DeepSpeed *" in done.stdout
    assert "suggested: --bf16" in done.stdout
    assert all(len(line) < 120 for line in done.stdout.splitlines())
    bart = tmp_path / "config.json"
    bart.write_text(json.dumps({"model_type": "bart"}))
    with pytest.raises(ModelError, match="bart"):
        make_plan(bart)


def test_the_first_steps_of_a_run_are_timed(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t5tune.commands.plan.timing.MAX_SECONDS", 1000)
    before = sorted(tmp_path.rglob("*"))
    planned = make_plan(
        untied_base, data_path=str(conversations), use_cpu=True, eval_fraction=0.2, per_device_train_batch_size=2,
        num_train_epochs=100, save_steps=10, report_samples=0, gradient_checkpointing=False, preprocessed_path=tmp_path,
    )  # fmt: skip
    assert planned.time_unknown is None
    time, steps = planned.time, planned.steps
    assert 4 <= time.timed_steps <= 30
    assert (time.evaluations, time.checkpoints) == (100, -(-steps // 10))
    others = time.preparing + time.start + time.evaluations * time.evaluation + time.checkpoints * time.checkpoint
    assert time.low <= others + (steps - 1) * time.step <= time.high
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.long
def test_notes_of_a_plan_name_no_temporary_folder(tmp_path: Path) -> None:
    records = [{"source": "a b c d e f g h i j k l", "target": "b"}] * 20 + [{"source": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    notes = list[Event]()
    settings = PlanSettings(
        model_name_or_path="pocket", data_path=[str(tmp_path / "a.jsonl")], model_max_length=8, time_run=False
    )
    plan(settings, notes.append)
    texts = [note.text for note in notes if isinstance(note, Note) and note.warning]
    assert texts == ["1 record rejected (unknown format: 1)", "20 sources truncated to model_max_length 8"]


def test_an_unknown_model_is_reported_once(conversations: Path) -> None:
    notes = list[Event]()
    with pytest.raises(ModelError, match="no such folder"):
        plan(PlanSettings(model_name_or_path="no/model", data_path=[str(conversations)]), notes.append)
    assert not notes


@pytest.mark.long
@pytest.mark.distributed
def test_a_timed_run_prints_nothing(conversations: Path) -> None:
    """It runs in forks of the command's process."""
    words = ("--model-name-or-path", "pocket", "--data-path", conversations, "--num-processes", 2, "--json", "--quiet")
    done = t5tune_in_fork("plan", *words)
    assert done.stderr == ""
    assert done.json["time_unknown"] is None
    assert done.json["time"]["timed_steps"] > 3


def test_a_plan_says_why_there_is_no_time(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    data, model = {"data_path": str(conversations)}, write_short_model(tmp_path)
    for base, changes, reason in (
        (untied_base, {"use_cpu": True}, "no data is given"),
        (untied_base, {**data, "time_run": False}, "no steps were run; t5tune plan runs some, unless time_run is off"),
        (untied_base, {**data, **NO_SUGGESTION}, "the run doesn't fit"),
        (untied_base, {**data, "gpu_memory": "24GiB"}, "the plan is for a different machine"),
        (model, {"use_cpu": True}, "no data is given"),
        (model, {**data, "use_cpu": True}, "the model isn't on this machine"),
    ):
        planned = make_plan(base, source_length=8, target_length=8, per_device_train_batch_size=1, **changes)
        assert (planned.time, planned.time_unknown) == (None, reason)


@pytest.mark.long
def test_a_run_that_fails_is_not_timed(conversations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--model-name-or-path", "pocket", "--data-path", conversations, "--optim", "adamw_apex_fused", "--json")
    planned = t5tune_in_fork("plan", *words).json
    assert planned["time"] is None
    assert planned["time_unknown"].startswith("optim: adamw_apex_fused: ")
    monkeypatch.setattr("t5tune.commands.plan.timing.MAX_SECONDS", 0)
    planned = make_plan("pocket", data_path=str(conversations), use_cpu=True)
    assert (planned.time, planned.time_unknown) == (None, "the first steps took more than 0 seconds, or more memory")
