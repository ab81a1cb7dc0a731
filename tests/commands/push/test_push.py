"""Uploads to the Hugging Face Hub: push, and --push-to-hub of export and merge, with the Hub's own client."""

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

from t5tune.checkpoints.hub_upload import list_uploaded_files
from t5tune.errors import CheckpointError
from tests.commands.push.uploads import NAME, TRAIN, assert_token_is_nowhere, run
from tests.support.models.adapters import make_stock_adapter
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.processes.runs import Running
from tests.support.servers.hub import TOKEN, USER, Hub

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = t5tune_in_fork(*TRAIN, "--output-dir", folder)
    assert done.code == 0, done.stderr
    return folder


def test_push_uploads_what_the_adapter_needs_and_no_private_file(hub: Hub, finished_run: Path, tmp_path: Path) -> None:
    done = run(hub, "push", finished_run, "model", "--hub-private-repo", "--json", "--debug")
    assert done.code == 0, done.stderr
    assert done.json["url"] == f"{hub.url}/{NAME}"
    repo = hub.repos["model", NAME]
    assert repo.private
    uploaded = dict(repo.files)
    uploaded.pop(".gitattributes")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "template.yaml"} <= uploaded.keys()
    private = {"settings.yaml", "metrics.jsonl", "report.html", "result.json", "trainer_state.json"}
    assert not private & uploaded.keys()
    assert not [name for name in uploaded if "/" in name]
    for name, body in uploaded.items():
        if name != "README.md":
            assert body == (finished_run / name).read_bytes()
    card = uploaded["README.md"].decode()
    assert "THIS_FOLDER" not in card
    assert f'PeftModel.from_pretrained(base, "{NAME}")' in card
    assert len(uploaded) == done.json["files"]
    assert_token_is_nowhere(finished_run, done)
    assert_token_is_nowhere(hub.home, done)


def test_what_was_pushed_is_what_chat_downloads(hub: Hub, finished_run: Path) -> None:
    assert run(hub, "push", finished_run, NAME).code == 0
    ask = ("--prompt", "Two teas, please", "--max-new-tokens", 20, "--use-cpu")
    here, there = (t5tune_in_fork("chat", name, *ask, env=hub.environment) for name in (finished_run, NAME))
    assert (there.code, there.stdout) == (0, here.stdout), there.stderr


def test_push_does_not_wait_for_a_silent_hub(hub: Hub, finished_run: Path, tmp_path: Path) -> None:
    hub.hangs = True
    waited = threading.Timer(60, hub.has_ended.set)  # otherwise these commands would wait forever
    waited.start()
    environment = {**hub.environment, "HF_TOKEN": TOKEN, "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    pushed = t5tune_in_fork("push", finished_run, NAME, env=environment)
    asked = t5tune_in_fork("merge", "some/adapter", "--output-dir", tmp_path / "merged", env=environment)
    assert not hub.has_ended.is_set()
    waited.cancel()
    assert (pushed.code, asked.code) == (1, 2)
    assert "the upload failed" in pushed.errors[0]
    assert "timed out" in pushed.errors[0]
    assert "the Hub can't be reached" in asked.errors[0]


def test_a_server_without_accounts_is_pushed_to(hub: Hub, finished_run: Path) -> None:
    """The missing requests only serve to refuse a push before any work."""
    hub.missing = {"whoami-v2", "auth-check"}
    done = run(hub, "push", finished_run, NAME)
    assert done.code == 0, done.stderr
    assert "adapter_model.safetensors" in hub.repos["model", NAME].files
    hub.missing = {"repos"}
    refused = run(hub, "push", finished_run, NAME)
    assert refused.code == 2, refused.stderr


def test_a_second_push_sends_only_what_has_changed(hub: Hub, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    assert run(hub, "push", tmp_path / "run", NAME).code == 0
    commits = len(hub.repos["model", NAME].commits)
    sent = sum(method == "PUT" for method, _, _ in hub.requests)
    assert sent > 0
    assert run(hub, "push", tmp_path / "run", NAME).code == 0
    assert len(hub.repos["model", NAME].commits) == commits
    (tmp_path / "run" / "template.yaml").write_text((tmp_path / "run" / "template.yaml").read_text() + "# changed\n")
    assert run(hub, "push", tmp_path / "run", NAME).code == 0
    assert hub.repos["model", NAME].files["template.yaml"].endswith(b"# changed\n")
    assert sum(method == "PUT" for method, _, _ in hub.requests) == sent


def test_an_interrupted_push_continues_where_it_was(hub: Hub, finished_run: Path) -> None:
    """The weights arrive, and then the Hub is gone before the commit."""
    hub.allows_commit = lambda: False
    done = run(hub, "push", finished_run, NAME)
    assert done.code == 1, done.stderr
    (error,) = done.errors
    assert "the upload failed" in error
    # in a fork, huggingface_hub was imported before t5tune could switch off its progress bars
    lines = [line for line in done.stderr.splitlines() if line and "B/s]" not in line]
    assert lines == [f"uploading 8 files (0.82 MiB) to {NAME}", error]
    assert set(hub.repos["model", NAME].files) == {".gitattributes"}
    sent = sum(method == "PUT" for method, _, _ in hub.requests)
    hub.allows_commit = lambda: True
    assert run(hub, "push", finished_run, NAME).code == 0
    assert sum(method == "PUT" for method, _, _ in hub.requests) == sent
    assert "adapter_model.safetensors" in hub.repos["model", NAME].files


def test_merge_and_export_push_what_they_write(hub: Hub, finished_run: Path, tmp_path: Path) -> None:
    for command, weights in (("export", "adapter_model.safetensors"), ("merge", "model.safetensors")):
        output = tmp_path / command
        done = run(hub, command, finished_run, "--output-dir", output, "--push-to-hub", "--json")
        assert done.code == 0, done.stderr
        assert done.json["pushed"] == f"{hub.url}/{USER}/{command}"  # by default the folder's name
        uploaded = hub.repos["model", f"{USER}/{command}"].files
        assert uploaded[weights] == (output / weights).read_bytes()
        names = {path.name for path in output.iterdir()} - {"settings.yaml"}
        assert set(uploaded) - {".gitattributes"} == names


@pytest.mark.parametrize(
    ("command", "number", "code"), [("export", signal.SIGTERM, 143), ("merge", signal.SIGINT, 130)]
)
def test_a_stopped_upload_of_export_or_merge_shows_the_command(
    command: str, number: signal.Signals, code: int, hub: Hub, finished_run: Path, tmp_path: Path
) -> None:
    is_uploading, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        is_uploading.set()
        is_over.wait(60)

    hub.before_upload = hold
    output = tmp_path / "written"
    flags = ("--output-dir", output, "--push-to-hub", "--hub-model-id", NAME, "--hub-private-repo")
    arguments = [sys.executable, "-m", "t5tune", command, finished_run, *flags]
    with Running(list(map(str, arguments)), tmp_path / "process", **hub.environment, HF_TOKEN=TOKEN) as running:
        try:
            running.wait_until(is_uploading.is_set)
            running.process.send_signal(number)
            assert running.wait() == code
        finally:
            is_over.set()
    later = f"it is complete in {output}; to upload it later: t5tune push {output} {NAME} --hub-private-repo"
    assert later in " ".join(running.log.read_text().split())
    assert list(output.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        ("a b", TOKEN, ["hub_model_id: a b", "not a valid name on the Hub"]),
        ("some/other", TOKEN, ["hub_model_id: some/other", "you can't write to it", "hf auth login"]),
        ("google/flan-t5-base", TOKEN, ["google/flan-t5-base", "you can't write to it", "hf auth login"]),
        (NAME, None, ["signed in", "hf auth login", "HF_TOKEN"]),
        (NAME, "hf_wrong", ["signed in, or the token isn't valid", "hf auth login"]),
    ],
)
def test_a_refusal_comes_before_any_work(
    name: str, token: str | None, expected: list[str], hub: Hub, finished_run: Path, tmp_path: Path
) -> None:
    hub.refusals = {"some/other": (403, "")}
    hub.add("model", "google/flan-t5-base", {"config.json": b"{}"})
    hub.read_only = {"google/flan-t5-base"}
    for arguments in (
        ("push", finished_run, name),
        ("merge", finished_run, "--output-dir", tmp_path / "out", "--push-to-hub", "--hub-model-id", name),
        (*TRAIN, "--output-dir", tmp_path / "out", "--push-to-hub", "--hub-model-id", name),
    ):
        done = run(hub, *arguments, token=token)
        assert done.code == 2, done.stderr
        (error,) = done.errors
        assert [text for text in expected if text not in error] == []
        assert not (tmp_path / "out").exists()


def test_only_a_folder_with_a_model_is_pushed(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, expected in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "no adapter and no model")):
        done = run(hub, "push", folder, NAME)
        assert done.code == 2
        assert expected in done.errors[0]
    assert not hub.repos


@pytest.mark.parametrize("to", ["ctranslate2", "onnx"])
@pytest.mark.variants("ctranslate2")
def test_the_code_in_the_card_of_a_converted_model_runs(to: str, hub: Hub, finished_run: Path, tmp_path: Path) -> None:
    """CTranslate2 and onnxruntime load only folders."""
    pytest.importorskip("onnxruntime" if to == "onnx" else to)
    converted = tmp_path / "converted"
    merged = t5tune_in_fork("merge", finished_run, "--to", to, "--output-dir", converted, "--no-verify")
    assert merged.code == 0, merged.stderr
    assert run(hub, "push", converted, NAME).code == 0
    if to == "onnx":
        uploaded = {path.relative_to(converted).as_posix() for path in converted.rglob("*") if path.is_file()}
        assert hub.repos["model", NAME].files.keys() - {".gitattributes"} == uploaded
    card = hub.repos["model", NAME].files["README.md"].decode()
    printed = []
    for text, folder in (((converted / "README.md").read_text(), converted), (card, tmp_path)):
        code = text.split("```python\n")[1].partition("```")[0].replace("THIS_FOLDER", str(folder))
        output, errors = tmp_path / f"output-{len(printed)}", tmp_path / f"errors-{len(printed)}"
        with open(errors, "wb") as stderr:
            example = Running([sys.executable, "-c", code], output, stderr, **hub.environment)
            assert example.wait() == 0, errors.read_text()
        printed.append(example.log.read_text())
    assert printed[0] == printed[1] != ""


def test_a_base_that_others_do_not_have_is_mentioned(hub: Hub, untied_base: Path, tmp_path: Path) -> None:
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    done = run(hub, "push", adapter, NAME)
    assert done.code == 0, done.stderr
    assert f"the adapter's files name the base as {untied_base}, a folder on this machine" in done.stderr


def test_a_card_has_no_path_of_this_machine(hub: Hub, untied_base: Path, tmp_path: Path) -> None:
    run_folder, merged = tmp_path / "client" / "run", tmp_path / "client" / "merged"
    flags = ("--model-name-or-path", untied_base, "--output-dir", run_folder)
    assert t5tune_in_fork(*TRAIN, *flags).code == 0
    assert t5tune_in_fork("merge", run_folder, "--output-dir", merged, "--no-verify").code == 0
    for folder, titles in (
        (
            run_folder,
            ["# LoRA adapter for untied\n", "t5tune chat --model-name-or-path untied --adapter tester/model`"],
        ),
        (merged, ["# untied with a merged LoRA adapter\n", "from the adapter `run`.\n"]),
    ):
        written = (folder / "README.md").read_text()
        assert str(untied_base) in written  # the card's commands work on this machine
        done = run(hub, "push", folder, NAME)
        assert done.code == 0, done.stderr
        card = hub.repos["model", NAME].files["README.md"].decode()
        assert not [path for path in (untied_base.parent, tmp_path) if str(path) in card]
        assert [title for title in titles if title not in card] == []


def test_only_files_of_a_model_are_uploaded(tmp_path: Path) -> None:
    kept = ["adapter_model.bin", "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = (".secret", "settings.yaml", "training_args.bin", "id_rsa", "private.jsonl", "optimizer.bin", "events.out")
    for name in (*kept, *others):
        (tmp_path / name).write_text("x")
    (tmp_path / "sub").mkdir()
    assert sorted(list_uploaded_files(tmp_path)) == kept
    (tmp_path / "trainer_state.json").write_text("{}")
    assert sorted(list_uploaded_files(tmp_path)) == kept


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    for link in ("README.md", "additional_chat_templates/x.jinja"):
        os.symlink("/etc/hostname", tmp_path / link)
        with pytest.raises(CheckpointError, match="outside the folder"):
            list_uploaded_files(tmp_path)
        (tmp_path / link).unlink()


def test_old_weights_and_an_old_adapter_are_replaced(hub: Hub, finished_run: Path, tmp_path: Path) -> None:
    """transformers would load the old weights in place of the new weights."""
    assert run(hub, "push", finished_run, NAME).code == 0
    kept = {"notes.txt": b"mine", "model_old/keep.safetensors": b"mine"}
    hub.add("model", NAME, {**hub.repos["model", NAME].files, "pytorch_model.bin": b"old", **kept})
    assert t5tune_in_fork("merge", finished_run, "--output-dir", tmp_path / "merged").code == 0
    done = run(hub, "push", tmp_path / "merged", NAME)
    files = hub.repos["model", NAME].files
    assert files["model.safetensors"] == (tmp_path / "merged" / "model.safetensors").read_bytes()
    stale = {"adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin"}
    assert not stale & files.keys()
    assert not [name for name in stale if name not in done.stderr]
    assert f"warning: {NAME}: deleting replaced files: " in done.stderr
    assert kept.items() <= files.items()
    assert run(hub, "push", finished_run, NAME).code == 0
    assert not {"config.json", "model.safetensors"} & hub.repos["model", NAME].files.keys()
    assert kept.items() <= hub.repos["model", NAME].files.items()


def test_an_upload_uses_no_files_of_older_uploads(hub: Hub, finished_run: Path, tmp_path: Path) -> None:
    """The new model has no message prefix, tokenizer.json, penalties or template."""
    assert run(hub, "push", finished_run, NAME).code == 0
    read = {"training_data.json", "tokenizer.json", "tokenizer_config.json", "template.yaml"}
    assert read <= hub.repos["model", NAME].files.keys()
    more = {"generation_config.json", "spiece.model", "shared_vocabulary.json", "additional_chat_templates/rag.jinja"}
    own = ("LICENSE", "NOTICE.txt", "tokenizer_notes.txt", "my_vocabulary.txt", "notes/x.jinja")
    kept = dict.fromkeys(own, b"mine")
    hub.add("model", NAME, {**hub.repos["model", NAME].files, **dict.fromkeys(more, b"old"), **kept})
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    done = run(hub, "push", tmp_path / "model", NAME)
    assert done.code == 0, done.stderr
    files = hub.repos["model", NAME].files
    assert files.keys() == {".gitattributes", "README.md", "config.json", "model.safetensors", *kept}
    assert not [name for name in (*read, *more) if name not in " ".join(done.stderr.split())]


@pytest.mark.parametrize("tags", ["[t5]", "[t5tune, lora]"])
def test_an_upload_without_a_card_keeps_the_repositorys(tags: str, hub: Hub, tmp_path: Path) -> None:
    """Even a card that t5tune wrote may have been edited."""
    card = f"---\ntags: {tags}\n---\nWrites notes.".encode()
    hub.add("model", NAME, {"README.md": card})
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    done = run(hub, "push", tmp_path, NAME)
    assert (done.code, "deleting" in done.stderr) == (0, False)
    assert f"{NAME}: its model card (README.md) is kept, since the upload has none" in done.stderr
    assert hub.repos["model", NAME].files["README.md"] == card


def test_a_password_of_the_endpoint_is_written_nowhere(hub: Hub, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    endpoint = hub.url.replace("//", f"//me:{TOKEN}@")
    flags = ("--push-to-hub", "--hub-model-id", NAME, "--output-dir", tmp_path / "run", "--json")
    done = t5tune_in_fork(*TRAIN, *flags, env={**hub.environment, "HF_TOKEN": TOKEN, "HF_ENDPOINT": endpoint})
    assert done.code == 0, done.stderr
    assert done.json["pushed"] == f"{hub.url}/{NAME}"
    assert_token_is_nowhere(tmp_path, done)


def test_a_private_upload_to_a_public_repository_is_refused(hub: Hub, finished_run: Path) -> None:
    hub.add("model", NAME, {"README.md": b""})
    done = run(hub, "push", finished_run, NAME, "--hub-private-repo")
    assert done.code == 2
    assert f"hub_private_repo: {NAME} already exists, and everyone can see it" in done.errors[0]
