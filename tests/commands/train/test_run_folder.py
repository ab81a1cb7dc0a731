"""Which folder a run takes, and what happens to what is there."""

import os
import re
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.chat import load_model
from t5tune.commands.evaluate import evaluate
from t5tune.commands.export import export
from t5tune.commands.merge import merge
from t5tune.commands.push import push
from t5tune.commands.serve import serve
from t5tune.commands.train import set_up_run_folder, train
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.errors import CheckpointError, DataError, SettingsError
from t5tune.progress import Advanced, Event, Note, silent
from t5tune.runs.folder import RunFolder
from t5tune.settings import (
    ChatSettings,
    EvaluateSettings,
    ExportSettings,
    MergeSettings,
    PushSettings,
    ServeSettings,
)
from tests.commands.train.commands import TWO, make_command
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.train_runs import make_settings


@pytest.mark.slow
def test_a_finished_run_is_not_repeated_and_fresh_renames_it(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = train(make_settings(untied_base, conversations, run, max_steps=1))
    before = (run / "metrics.jsonl").read_bytes()
    assert train(make_settings(untied_base, conversations, run, max_steps=1)) == first
    assert (run / "metrics.jsonl").read_bytes() == before
    assert train(make_settings(untied_base, conversations, run, max_steps=1, logging_steps=5)) == first
    with pytest.raises(SettingsError, match=f"{run}: this run has already finished.*\nlora_r: 8 before, 4 now"):
        train(make_settings(untied_base, conversations, run, max_steps=1, lora_r=4))
    with pytest.raises(SettingsError, match=r"data_path: .*conversations\.jsonl before, .*other\.jsonl now"):
        train(make_settings(untied_base, tmp_path / "other.jsonl", run, max_steps=1))
    train(make_settings(untied_base, conversations, run, max_steps=1, fresh=True))
    assert (tmp_path / "run.1" / "result.json").is_file()
    assert (run / "result.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "job"),
    [
        ("TORCHELASTIC_RESTART_COUNT", None),
        ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"),
        ("SLURM_RESTART_COUNT", "SLURM_JOB_ID"),
    ],
)
@pytest.mark.variants("TORCHELASTIC_RESTART_COUNT-None", "SLURM_RESTART_COUNT-SLURM_JOB_ID")
def test_a_launchers_restart_resumes_the_run_of_fresh(
    variable: str,
    job: str | None,
    untied_base: Path,
    conversations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, notes = tmp_path / "run", list[Event]()
    settings = make_settings(untied_base, conversations, run, max_steps=2, save_steps=1, fresh=True)
    monkeypatch.setenv(variable, "0")
    if job is not None:
        monkeypatch.setenv(job, "7")
    train(settings)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoint-2")
    monkeypatch.setenv(variable, "1")
    assert train(settings, notes.append).resumed_from == run / "checkpoint-1"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    texts = [note.text for note in notes if isinstance(note, Note) and note.warning]
    assert any(text.startswith("fresh: ignored, since torchrun or SLURM has restarted") for text in texts)
    monkeypatch.setenv(variable, "0")
    assert train(settings).resumed_from is None
    assert (tmp_path / "run.1" / "result.json").is_file()
    if job is not None:  # a different job, which was restarted before it began the run
        monkeypatch.setenv(variable, "1")
        monkeypatch.setenv(job, "8")
        assert train(settings).resumed_from is None
        assert (tmp_path / "run.2" / "result.json").is_file()
        assert train(settings).resumed_from is None
        assert not (tmp_path / "run.3").exists()
        # another call in the same job, whose first start fails, so that the old run is moved back
        monkeypatch.setenv(variable, "0")
        with pytest.raises(DataError):
            train(settings.replace(eval_data_path=str(tmp_path / "none.jsonl")))
        monkeypatch.setenv(variable, "1")
        assert train(settings).resumed_from is None
        assert (tmp_path / "run.3" / "result.json").is_file()


def test_fresh_renames_a_links_target_and_keeps_the_link(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    (disk / "run").mkdir(parents=True)
    link.symlink_to(disk / "run")
    settings = make_settings(untied_base, conversations, link)
    with ExitStack() as locks:
        set_up_run_folder(settings, locks)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": 1}\n')
    with ExitStack() as locks, pytest.raises(DataError, match="nothing to train on"):
        set_up_run_folder(settings.replace(data_path=str(bad), fresh=True), locks)
    (disk / "run" / "old").touch()  # the old run has been moved back
    with ExitStack() as locks:
        set_up_run_folder(settings.replace(fresh=True), locks)
        with ExitStack() as more, pytest.raises(SettingsError, match="another run is using this folder"):
            set_up_run_folder(settings, more)
    assert link.is_symlink()
    assert sorted(path.name for path in disk.iterdir()) == ["run", "run.1"]
    assert sorted(path.name for path in link.iterdir()) == ["data", "run.json", "settings.yaml"]
    assert (disk / "run.1" / "old").is_file()


@pytest.mark.slow
def test_fresh_refuses_inputs_in_the_folder_that_it_would_rename(
    finished_run: Path, untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.copy(conversations, run / "more.jsonl")
    (run / "metric.py").write_text("def count(predictions, references):\n    return {'count': len(predictions)}\n")
    (tmp_path / "link.jsonl").symlink_to(run / "more.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of the metric's file
    before = sorted(run.rglob("*"))
    inputs: list[tuple[str, Any]] = [
        ("adapter", "run"),
        ("adapter", run / "checkpoint-3"),
        ("data_path", "run/data"),
        ("data_path", "run/*.jsonl"),
        ("data_path", "link.jsonl"),
        ("data_path", [f"{conversations}:1", "run/more.jsonl:2"]),
        ("eval_data_path", "run/more.jsonl"),
        ("teacher_model_name_or_path", "run"),
        ("conversation_template", "run/template.yaml"),
        ("metric", "run/metric.py:count"),
    ]
    for name, value in inputs:
        changes = {"fresh": True, "eval_fraction": 0.2, "eval_generate": 1, name: value}
        changes |= {"eval_fraction": 0} if name == "eval_data_path" else {}
        settings = make_settings(untied_base, conversations, Path("run"), **changes)
        with ExitStack() as locks, pytest.raises(SettingsError) as refused:
            set_up_run_folder(settings, locks)
        (problem,) = refused.value.problems
        assert problem.startswith(f"{name}: ")
        assert problem.endswith(": is in output_dir run, which --fresh renames")
    assert sorted(run.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl", "run"]
    # the run's own token cache is made again
    own = make_settings(untied_base, conversations, Path("run"), fresh=True, preprocessed_path=Path("run/data"))
    with ExitStack() as locks:
        set_up_run_folder(own, locks)
    assert sorted(path.name for path in run.iterdir()) == ["data", "run.json", "settings.yaml"]


@pytest.mark.slow
def test_a_copied_runs_settings_name_the_used_folder(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(finished_run, tmp_path / "copy")
    (copied / "result.json").unlink()
    warning = (
        f"warning: {copied / 'settings.yaml'}: is in the run folder {copied}, but its output_dir is {finished_run}, "
        f"which this command uses; add --output-dir {copied} to use that run instead"
    )

    def run_config(config: Path, *more: Any) -> str:
        done = t5tune_in_fork("train", "--config", config, *more)
        assert done.code == 0, done.stderr
        return done.stderr

    lines = run_config(copied / "settings.yaml").splitlines()
    assert warning in lines
    assert any(f"{finished_run}: this run has already finished" in line for line in lines)
    assert "is in the run folder" not in run_config(copied / "settings.yaml", "--output-dir", copied)
    assert (copied / "result.json").is_file()
    assert "is in the run folder" not in run_config(finished_run / "settings.yaml")
    (tmp_path / "mine").mkdir()  # a file of the user's that has the same name
    shutil.copy(copied / "settings.yaml", tmp_path / "mine")
    assert "is in the run folder" not in run_config(tmp_path / "mine" / "settings.yaml")


def test_fresh_renames_only_runs_without_a_run_in_progress(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "experiments"
    (folder / "run" / "data").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    settings = make_settings(untied_base, conversations, folder, fresh=True)
    before = sorted(tmp_path.rglob("*"))
    with ExitStack() as locks, pytest.raises(SettingsError, match=r"experiments: isn't empty and isn't a t5tune run; "):
        set_up_run_folder(settings, locks)
    assert sorted(tmp_path.rglob("*")) == before
    (folder / "settings.yaml").write_text("learning_rate: [")  # still a run's settings, although broken
    with RunFolder(folder / "run").lock(print):
        problem = rf"{folder}: --fresh can't rename it while another run is using {folder}/run; wait until it ends"
        with ExitStack() as locks, pytest.raises(SettingsError, match=problem):
            set_up_run_folder(settings, locks)
    with ExitStack() as locks:
        set_up_run_folder(settings, locks)
    assert (tmp_path / "experiments.1" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["data", "run.json", "settings.yaml"]


def test_fresh_names_a_folder_that_cant_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "data").mkdir(parents=True)

    def begin(path: Path) -> None:
        with RunFolder(path).begin(make_run_plan(make_settings(tmp_path, tmp_path, path, fresh=True)), print):
            pass

    with pytest.raises(SettingsError, match=r"^output_dir: /proc: is a mount point, which --fresh can't rename"):
        begin(Path("/proc"))
    for folder in (tmp_path / "run", tmp_path / "run" / "data"):
        monkeypatch.chdir(folder)
        for path in (Path(os.path.relpath(tmp_path / "run")), tmp_path / "run"):
            with pytest.raises(SettingsError, match=r"^output_dir: .*: --fresh can't rename the current folder or"):
                begin(path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_run_with_broken_settings_explains_the_repair(
    finished_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "result.json").unlink()
    path, settings = run / "settings.yaml", make_settings(untied_base, conversations, run, eval_fraction=0.2)
    command = make_command(untied_base, conversations, run, "--eval-fraction", "0.2", "--use-cpu", "--dry-run")
    for content, problem in (
        ("", "missing or broken: not the settings of a run"),
        ("learning_rate: [", "the file ends inside brackets"),
    ):
        path.write_text(content)
        with pytest.raises(SettingsError, match=re.escape(problem)) as refused:
            train(settings)
        assert str(path) in refused.value.message
        assert f"--dry-run >{path}" in str(refused.value.hint)
    done = t5tune_in_fork(*[word for word in command if word != "--json"])
    assert done.code == 0, done.stderr
    path.write_text(done.stdout)
    assert train(settings).resumed_from == run / "checkpoint-6"


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), TWO])
def test_a_second_run_in_a_used_folder_is_refused(
    more: tuple[str, ...], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run, refused = tmp_path / "run", []
    flags = ("--model-name-or-path", untied_base, "--data-path", conversations, "--output-dir", run, "--use-cpu")

    def meanwhile(event: Event) -> None:
        if event == Advanced("train", 2):
            refused.append(t5tune_in_fork("train", *flags, *more))
            refused.append(t5tune_in_fork("train", *flags, *more, "--fresh"))

    train(make_settings(untied_base, conversations, run), meanwhile)
    message = (
        f"error: output_dir: {run}: another run is using this folder; wait until it ends, or choose another folder"
    )
    assert [(done.code, done.errors) for done in refused] == [(2, [message])] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert train(make_settings(untied_base, conversations, run)).steps == 6


@pytest.mark.slow
def test_a_start_with_bad_data_leaves_only_rejected_records(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    data, run = tmp_path / "bad.jsonl", tmp_path / "new" / "parent" / "run"
    data.write_text('{"text": 1}\n')
    with pytest.raises(DataError, match="nothing to train on"):
        train(make_settings(untied_base, data, run))
    assert [path.name for path in run.parent.iterdir()] == ["run.rejected.jsonl"]
    # an empty folder of the user's stays
    run.mkdir(parents=True)
    with pytest.raises(DataError, match="nothing to train on"):
        train(make_settings(untied_base, data, run))
    assert list(run.iterdir()) == []
    # a cache that took its time to prepare is kept for the next start, with the settings that make the folder a run
    with pytest.raises(DataError, match="nothing to evaluate on"):
        train(make_settings(untied_base, conversations, run, eval_data_path=str(data)))
    assert sorted(path.name for path in run.iterdir()) == ["data", "run.json", "settings.yaml"]
    # a start with --fresh that fails moves the old run back
    (run / "data" / "old").touch()
    with pytest.raises(DataError, match="nothing to evaluate on"):
        train(make_settings(untied_base, conversations, run, eval_data_path=str(data), fresh=True))
    assert sorted(path.name for path in run.parent.iterdir()) == ["run", "run.rejected.jsonl"]
    (run / "data" / "old").unlink()
    # files that existed before the run are kept, too
    with pytest.raises(DataError, match="nothing to train on"):
        train(make_settings(untied_base, data, run))
    assert sorted(path.name for path in run.iterdir()) == ["data", "run.json", "settings.yaml"]


@pytest.mark.slow
def test_commands_say_that_a_run_has_no_checkpoint_yet(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    models = [
        ("model_name_or_path", lambda: load_model(ChatSettings(model_name_or_path="run", use_cpu=True), silent)),
        ("model_name_or_path", lambda: evaluate(EvaluateSettings(model_name_or_path="run", data_path="pocket"))),
        ("models", lambda: serve(ServeSettings(models=["run"], port=0, use_cpu=True))),
        ("adapter", lambda: merge(MergeSettings(adapter=[run], output_dir=Path("merged")))),
        ("checkpoint", lambda: export(ExportSettings(checkpoint=run, output_dir=Path("adapter")))),
        ("folder", lambda: push(PushSettings(folder=run, hub_model_id="owner/name"))),
    ]
    with ExitStack() as locks:
        set_up_run_folder(make_settings(untied_base, conversations, run), locks)
        problem = "run: still training; no checkpoint yet; try again when the run has saved its first checkpoint"
        for setting, use in models:
            with pytest.raises(CheckpointError) as refused:
                use()
            assert str(refused.value) == f"{setting}: {problem}"
    problem = "run: this run was stopped before its first checkpoint; start it again: t5tune train --config"
    for setting, use in models:
        with pytest.raises(CheckpointError) as refused:
            use()
        assert str(refused.value) == f"{setting}: {problem} run/settings.yaml"
