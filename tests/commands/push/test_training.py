"""Uploads to the Hugging Face Hub while and after a run trains: --push-to-hub of train, with the Hub's own client."""

import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from t5tune.commands.train import train
from t5tune.errors import Stopped
from t5tune.progress import Note
from t5tune.training.callbacks.push_checkpoints import PushCheckpoints
from tests.commands.push.uploads import NAME, TRAIN, assert_token_is_nowhere, run
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.processes.forks import ForkServer
from tests.support.processes.runs import start_run
from tests.support.servers.hub import TOKEN, Hub, use_in_this_process
from tests.support.train_runs import make_settings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("strategy", ["end", "every_save"])
@pytest.mark.variants("every_save")
def test_train_pushes_its_result_and_each_checkpoint_if_asked_to(strategy: str, hub: Hub, tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = ("--push-to-hub", "--hub-model-id", NAME, "--hub-strategy", strategy, "--max-steps", 3)
    done = run(hub, *TRAIN, *flags, "--output-dir", output, "--json")
    assert done.code == 0, done.stderr
    assert done.json["pushed"] == f"{hub.url}/{NAME}"
    assert json.loads((output / "result.json").read_text())["pushed"] == f"{hub.url}/{NAME}"
    repo = hub.repos["model", NAME]
    assert repo.files["adapter_model.safetensors"] == (output / "adapter_model.safetensors").read_bytes()
    weights = [files["adapter_model.safetensors"] for files in repo.commits.values() if len(files) > 1]
    checkpoints = [(output / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes() for step in (1, 2, 3)]
    assert weights[0] == checkpoints[2 if strategy == "end" else 0]
    assert set(weights) <= set(checkpoints)
    assert not list(output.glob(".saving-*"))
    assert_token_is_nowhere(tmp_path, done)


@pytest.mark.parametrize(
    ("reason", "processes"), [("refused connection", ()), ("status 503", ()), ("status 503", ("--num-processes", 2))]
)
@pytest.mark.variants("status 503-processes1")
def test_an_unreachable_hub_delays_the_push_not_the_run(
    reason: str, processes: tuple[object, ...], hub: Hub, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = (*TRAIN, "--push-to-hub", "--hub-model-id", NAME, "--hub-private-repo", "--output-dir", output)
    elsewhere = {"HF_ENDPOINT": "http://127.0.0.1:9"} if reason == "refused connection" else {}
    hub.status = None if elsewhere else 503
    done = t5tune_in_fork(*arguments, "--json", env={**hub.environment, "HF_TOKEN": TOKEN, **elsewhere})
    assert done.code == 0, done.stderr
    assert done.json["pushed"] is None
    assert (output / "adapter_model.safetensors").is_file()
    assert f"to upload it later: t5tune push {output} {NAME} --hub-private-repo\n" in done.stderr
    hub.status = None
    again = run(hub, *arguments, *processes, "--json")  # the run has finished: only the upload is left
    assert again.code == 0, again.stderr
    assert again.json["pushed"] == f"{hub.url}/{NAME}"
    assert (
        hub.repos["model", NAME].files["adapter_model.safetensors"]
        == (output / "adapter_model.safetensors").read_bytes()
    )


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's uploads
@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_a_signal_ends_an_upload_and_shows_the_command(
    strategy: str, hub: Hub, untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_in_this_process(hub, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    is_over = threading.Event()

    def hold() -> bool:
        if strategy == "end":
            os.kill(os.getpid(), signal.SIGTERM)
        is_over.wait(60)
        return False

    values = {"hub_model_id": NAME, "hub_private_repo": True, "hub_strategy": strategy, "max_steps": 2, "save_steps": 1}
    run = tmp_path / "run"
    settings = make_settings(untied_base, conversations, run, push_to_hub=True, **values)
    notes: list[Any] = []

    def report(event: Any) -> None:
        notes.append(event)
        if event == Note("waiting until checkpoint-1 is uploaded"):
            os.kill(os.getpid(), signal.SIGTERM)

    hub.allows_commit = hold
    try:
        with pytest.raises(Stopped) as stopped:
            train(settings, report)
    finally:
        is_over.set()
    later = f"to upload it later: t5tune push {run} {NAME} --hub-private-repo"
    assert stopped.value.message.endswith(
        f"stopped by SIGTERM while sending the result; it is complete in {run}; {later}"
    )
    assert not [note for note in notes if isinstance(note, Note) and "upload it later" in note.text]
    hub.allows_commit = lambda: True
    assert train(settings).pushed == f"{hub.url}/{NAME}"


@pytest.mark.long
def test_a_stopped_run_does_not_wait_for_an_upload(
    hub: Hub, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    is_uploading, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        is_uploading.set()
        is_over.wait()

    hub.before_upload = hold
    flags = (
        *("--push-to-hub", "--hub-model-id", NAME, "--hub-strategy", "every_save"),
        *("--max-steps", "1000000", "--save-steps", "20"),
    )
    environment = {**hub.environment, "HF_TOKEN": TOKEN}
    # in a new process, because huggingface_hub reads whether to show bars when it is imported
    with start_run(untied_base, conversations, tmp_path / "run", *flags, is_new=True, **environment) as running:
        try:
            running.wait_until(is_uploading.is_set)
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(60) == 143
        finally:
            is_over.set()
    log = running.log.read_text()
    assert "B/s]" not in log
    (later,) = [line for line in log.splitlines() if "to upload it later" in line]
    assert "wasn't uploaded completely" in later


@pytest.mark.long
def test_two_processes_push_once(hub: Hub, fork_server: ForkServer, tmp_path: Path) -> None:
    flags = ("--push-to-hub", "--hub-model-id", NAME, "--output-dir", tmp_path / "run", "--json")
    environment = {**os.environ, **hub.environment, "HF_TOKEN": TOKEN}
    done = fork_server.run([*map(str, (*TRAIN, *flags))], ranks=2, environment=environment)
    assert done.codes == [0, 0], done.log
    assert json.loads(done.stdout)["pushed"] == f"{hub.url}/{NAME}"
    assert len(hub.repos["model", NAME].commits) == 2  # the repository's creation, and the upload


def test_a_checkpoint_with_an_outside_link_is_not_uploaded(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    os.symlink("/etc/hostname", tmp_path / "checkpoint-1" / "README.md")
    settings = make_settings(Path("pocket"), Path("pocket"), tmp_path, push_to_hub=True, hub_strategy="every_save")
    notes: list[Any] = []
    PushCheckpoints(settings, tmp_path, notes.append).on_save(None, SimpleNamespace(global_step=1, max_steps=2), None)
    (note,) = notes
    assert note.text.startswith(f"{tmp_path / 'checkpoint-1'} isn't uploaded: ")
    assert note.warning
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
