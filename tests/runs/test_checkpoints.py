"""chat, evaluate and merge use the newest complete checkpoint of a run that was stopped."""

import re
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from t5tune.checkpoints.model_folder import is_trained_file
from t5tune.commands.chat import chat
from t5tune.commands.evaluate import evaluate
from t5tune.commands.export import export
from t5tune.commands.merge import merge
from t5tune.commands.train import train
from t5tune.errors import CheckpointError, SettingsError, Stopped
from t5tune.file_names import CHECKPOINT_MANIFEST_FILE
from t5tune.progress import Advanced, Event, Note
from t5tune.runs.checkpoints import find_newest, list_checkpoints, read_run_identity, write_manifest
from t5tune.runs.folder import RunFolder
from t5tune.settings import ChatSettings, EvaluateSettings, ExportSettings, MergeSettings
from tests.support.processes.runs import stop_at
from tests.support.train_runs import make_settings

PROMPT = "Hello, two tea for Mira please."


@pytest.fixture(scope="module")
def stopped(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 3, stopped in the third of six steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    settings = make_settings(untied_base, conversations, run, save_steps=2, learning_rate=2e-2)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 2)))
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-3", "checkpoint-2"]
    return run


def select_notes(events: list[Event], word: str) -> list[str]:
    return [event.text for event in events if isinstance(event, Note) and word in event.text]


@pytest.mark.slow
def test_chat_and_evaluate_use_the_newest_checkpoint_and_name_it(
    stopped: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    newest = stopped / "checkpoint-3"
    replies = {}
    for name, model, adapter in [
        ("stopped", stopped, None),
        ("as the adapter", untied_base, stopped),
        ("newest", newest, None),
        ("older", stopped / "checkpoint-2", None),
        ("base", untied_base, None),
    ]:
        events: list[Event] = []
        settings = ChatSettings(
            model_name_or_path=str(model), adapter=adapter, prompt=PROMPT, max_new_tokens=12, use_cpu=True
        )
        replies[name] = chat(settings, events.append).reply
        expected = [f"{stopped}: this run hasn't finished; using its newest complete checkpoint, {newest}"]
        assert select_notes(events, "hasn't finished") == (expected if stopped in (model, adapter) else [])
    assert replies["stopped"] == replies["as the adapter"] == replies["newest"]
    assert replies["stopped"] not in (replies["older"], replies["base"])

    losses = [
        evaluate(
            EvaluateSettings(
                model_name_or_path=str(model),
                data_path=str(conversations),
                output_dir=tmp_path / str(index),
                num_data=4,
                max_new_tokens=2,
                use_cpu=True,
            )
        ).loss
        for index, model in enumerate((stopped, newest, stopped / "checkpoint-2"))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_merge_uses_the_newest_checkpoint_and_its_named_base(stopped: Path, untied_base: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    merge(MergeSettings(adapter=stopped, output_dir=tmp_path / "a", verify=False), events.append)
    assert len(select_notes(events, f"{stopped / 'checkpoint-3'} is an adapter; its base is {untied_base}")) == 1
    assert len(select_notes(events, "hasn't finished")) == 1
    given = {"model_name_or_path": str(untied_base), "adapter": stopped / "checkpoint-3"}
    merge(MergeSettings(**given, output_dir=tmp_path / "b", verify=False))
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert merged.keys() == expected.keys()
    assert all(merged[name].equal(expected[name]) for name in expected)
    assert (tmp_path / "a" / "settings.yaml").read_text() == (tmp_path / "b" / "settings.yaml").read_text().replace(
        str(tmp_path / "b"), str(tmp_path / "a")
    )


@pytest.mark.slow
@pytest.mark.parametrize("train_mode", ["lora", "full"])
def test_a_run_killed_while_copying_its_result_counts_as_stopped(
    train_mode: Literal["lora", "full"], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(make_settings(untied_base, conversations, run, learning_rate=2e-2, train_mode=train_mode))

    def reply(model: Path) -> tuple[str, list[str]]:
        events: list[Event] = []
        settings = ChatSettings(model_name_or_path=str(model), prompt=PROMPT, max_new_tokens=12, use_cpu=True)
        return chat(settings, events.append).reply, select_notes(events, "hasn't finished")

    finished, notes = reply(run)
    assert notes == []
    (newest, *_) = list_checkpoints(run)
    copied = sorted(file.name for file in run.iterdir() if is_trained_file(file.name))
    first = "adapter_config.json" if train_mode == "lora" else "config.json"
    assert {first, "template.yaml", "tokenizer.json"} < set(copied)
    (run / "result.json").unlink()
    for name in reversed(copied):  # each may have been the last one
        assert reply(run) == (
            finished,
            [f"{run}: this run hasn't finished; using its newest complete checkpoint, {newest}"],
        )
        (run / name).unlink()
        if name == "adapter_model.safetensors":
            merge(MergeSettings(adapter=run, output_dir=tmp_path / "merged", verify=False))
            assert reply(tmp_path / "merged")[0] == finished
    assert reply(run)[0] == finished


def test_damaged_checkpoints_are_skipped_or_refused_if_none_is_left(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "checkpoint-3" / "adapter_model.safetensors").write_bytes(b"damaged")
    events: list[Event] = []
    merge(MergeSettings(adapter=run, output_dir=tmp_path / "merged", verify=False), events.append)
    assert len(select_notes(events, "skipped a damaged checkpoint")) == 1
    assert len(select_notes(events, f"using its newest complete checkpoint, {run / 'checkpoint-2'}")) == 1
    (run / "checkpoint-2" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"adapter: {run}: none of its checkpoints is complete"):
        merge(MergeSettings(adapter=run, output_dir=tmp_path / "merged-2", verify=False))
    assert not (tmp_path / "merged-2").exists()


class RunsCode:
    """Pickles as a call of eval."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return eval, (self.code,)


def test_a_deepspeed_checkpoint_with_code_is_never_unpickled(stopped: Path, tmp_path: Path) -> None:
    run, marker = shutil.copytree(stopped, tmp_path / "run"), tmp_path / "marker"
    newest = run / "checkpoint-3"
    shard = newest / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.parent.mkdir()
    torch.save({"optimizer_state_dict": RunsCode(f"open({str(marker)!r}, 'w').close()")}, shard)
    identity = read_run_identity(newest)
    (newest / CHECKPOINT_MANIFEST_FILE).unlink()
    write_manifest(newest, 3, 1, identity)
    found, problems = find_newest(run)
    assert found == run / "checkpoint-2"
    assert re.fullmatch(rf"{shard}: its pickle refers to \S+\.eval, which no checkpoint needs", problems[0])
    assert not marker.exists()
    torch.load(shard, weights_only=False)  # as DeepSpeed reads it
    assert marker.exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_doesnt_count_among_those_that_are_kept(
    stopped: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "checkpoint-3").rename(run / "checkpoint-5")  # later than the next checkpoint's step
    (run / "checkpoint-5" / "optimizer.pt").write_bytes(b"damaged")
    settings = make_settings(untied_base, conversations, run, save_steps=3, save_total_limit=1, learning_rate=2e-2)
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        stop_at(Advanced("train", 3))(event)

    with pytest.raises(Stopped):
        train(settings, report)
    assert len(select_notes(events, f"skipped a damaged checkpoint: {run / 'checkpoint-5'}")) == 1
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-4"]
    assert train(settings).resumed_from == run / "checkpoint-4"


def test_overwrite_replaces_earlier_output_but_never_a_checkpoint(stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "runs" / "one" / "run")
    (tmp_path / "runs" / "links").mkdir()
    (tmp_path / "runs" / "links" / "run").symlink_to(run)

    def export_into(folder: Path) -> None:
        export(ExportSettings(checkpoint=run, output_dir=folder, overwrite=True))

    def merge_into(folder: Path) -> None:
        merge(MergeSettings(adapter=[stopped], output_dir=folder, verify=False, overwrite=True))

    before = sorted(run.rglob("*"))
    newest, older = run / "checkpoint-3", run / "checkpoint-2"
    for folder in (newest, older, run, tmp_path / "runs"):
        for command in (export_into, merge_into):
            with pytest.raises(SettingsError, match=f"output_dir: {folder}: contains .*{run}"):
                command(folder)
    renamed = older.rename(run / "older")  # its files say what it is
    with pytest.raises(SettingsError, match=f"contains a checkpoint of a run, {renamed}"):
        merge_into(renamed)
    renamed.rename(older)
    assert sorted(run.rglob("*")) == before
    for folder in (run / "adapter", run.parent / "merged", tmp_path / "runs" / "links"):
        for command in (export_into, merge_into, export_into):
            command(folder)
        assert (folder / "adapter_config.json").is_file()
    assert set(before) < set(run.rglob("*"))
    training = tmp_path / "new" / "run"
    training.mkdir(parents=True)
    (training / "settings.yaml").touch()
    with RunFolder(training).lock(print):  # before its first checkpoint
        for folder in (training, training.parent):
            with pytest.raises(SettingsError, match=f"output_dir: {folder}: contains a run in progress, {training}"):
                merge_into(folder)
