"""A Hub that changes and then fails: earlier downloads are used only with a warning, or not at all."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from t5tune.checkpoints.base import find_base
from t5tune.data.reading.sources import bring_data
from t5tune.errors import DataError, ModelError, SettingsError, T5TuneError
from t5tune.hub.datasets import DatasetChoice
from t5tune.progress import Event, Note
from t5tune.settings.groups.base import BaseModelSettings
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.servers.hub import Hub, serve_hub, use_in_this_process

pytestmark = pytest.mark.slow

NAME = "some/thing"
DATE = "2026-11-03"
FILES = {"model": "model.safetensors", "dataset": "train.parquet"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(tmp_path / "home") as server:
        use_in_this_process(server, monkeypatch)
        for name in ("HUB_RETRY_SECONDS", "NO_PROXY"):
            monkeypatch.setenv(name, server.environment[name])
        server.last_modified = f"{DATE}T10:00:00.000Z"
        yield server


def add(hub: Hub, kind: str, number: int) -> str:
    """Add a commit with this number in all of its files, and return its hash."""
    files = {FILES[kind]: b"%d" % number, "config.json": json.dumps({"number": number}).encode(), "README.md": b""}
    return hub.add(kind, NAME, files).head


def read(kind: str, cache: Path, events: list[Event]) -> bytes:
    """Read the file that a command would use."""
    if kind == "model":
        settings = BaseModelSettings(model_name_or_path=NAME, cache_dir=cache)
        return (find_base(settings, report=events.append) / FILES[kind]).read_bytes()
    (file,) = bring_data([NAME], DatasetChoice(), "data_path", cache, events.append)
    return Path(file).read_bytes()


def fail_with_status(status: int) -> Callable[[Hub, pytest.MonkeyPatch], None]:
    def fail(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.status = status

    return fail


def fail_to_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.hangs = True


def redirect(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.redirects_to = "login.example"


def drop_connections(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.drops = True


OUTAGES = [
    pytest.param(fail_with_status(500), "the Hub answers with status 500", id="500"),
    pytest.param(fail_with_status(503), "the Hub answers with status 503", id="503"),
    pytest.param(fail_to_answer, "the Hub can't be reached", id="timeout"),
    pytest.param(redirect, "the Hub's address redirects to login.example", id="redirect"),
    pytest.param(drop_connections, "the connection to the Hub was lost", id="drops"),
]


@pytest.mark.parametrize("given", ["fast", "-1", "nan"])
def test_an_invalid_pause_is_refused_by_name(
    given: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(hub, "model", 1)
    monkeypatch.setenv("HUB_RETRY_SECONDS", given)
    with pytest.raises(SettingsError, match=f"^HUB_RETRY_SECONDS: '{given}' isn't a number of seconds"):
        read("model", tmp_path, [])


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(("fail", "reason"), OUTAGES)
def test_an_outage_uses_the_cached_copy_with_a_warning(
    kind: str,
    fail: Callable[[Hub, pytest.MonkeyPatch], None],
    reason: str,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[Event] = []
    first = add(hub, kind, 1)
    assert read(kind, tmp_path / "cache", events) == b"1"
    add(hub, kind, 2)
    fail(hub, monkeypatch)
    events.clear()
    assert read(kind, tmp_path / "cache", events) == b"1"
    expected = f"{NAME}: {reason}; using the copy of commit {first} of {DATE}"
    assert [event for event in events if isinstance(event, Note)] == [Note(expected, warning=True)]
    with pytest.raises(T5TuneError, match=f"{reason}, and the {kind} isn't complete in the local cache") as caught:
        read(kind, tmp_path / "empty", events)
    assert caught.value.exit_code == 2


def test_an_error_names_the_revision(hub: Hub, tmp_path: Path) -> None:
    hub.status = 500
    settings = BaseModelSettings(model_name_or_path=NAME, revision="v2", cache_dir=tmp_path)
    with pytest.raises(T5TuneError, match=f": {NAME}@v2: no such folder, "):
        find_base(settings)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("code", ["", "GatedRepo", "RepoNotFound"])
@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_an_error_even_with_a_cached_copy(
    kind: str, status: int, code: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(hub, kind, 1)
    events: list[Event] = []
    read(kind, tmp_path, events)
    hub.refusals = {NAME: (status, code)}
    asked = len(hub.requests)
    with pytest.raises(DataError if kind == "dataset" else ModelError, match=NAME) as caught:
        read(kind, tmp_path, events)
    assert caught.value.hint is not None
    assert len(hub.requests) == asked + 1  # not tried again
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read(kind, tmp_path, events) == b"1"


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("status", [500, 503])
def test_a_file_is_requested_again_after_a_server_error(kind: str, status: int, hub: Hub, tmp_path: Path) -> None:
    add(hub, kind, 1)
    events: list[Event] = []
    hub.failing = {FILES[kind]: [status, status]}
    assert read(kind, tmp_path, events) == b"1"
    assert not [event for event in events if isinstance(event, Note)]
    # a file keeps failing: the earlier commit is used, and also when the Hub can't be reached
    add(hub, kind, 2)
    hub.failing = {FILES[kind]: [status] * 20}
    assert read(kind, tmp_path, events) == b"1"
    hub.status = status
    assert read(kind, tmp_path, events) == b"1"
    hub.status, hub.failing = None, {}
    assert read(kind, tmp_path, events) == b"2"


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("is_lfs", [True, False])
def test_a_damaged_file_is_refused_and_downloaded_again(
    kind: str, is_lfs: bool, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_lfs:
        monkeypatch.setattr("tests.support.servers.hub.LFS_SUFFIXES", (".none",))
    add(hub, kind, 1)
    events: list[Event] = []
    assert read(kind, tmp_path, events) == b"1"
    add(hub, kind, 2)
    hub.damaged = {FILES[kind]}
    with pytest.raises(T5TuneError, match=f"{FILES[kind]}: damaged during the download"):
        read(kind, tmp_path, events)
    hub.damaged = set()
    assert read(kind, tmp_path, events) == b"2"


def test_a_copy_without_a_date_is_named_by_its_download(hub: Hub, tmp_path: Path) -> None:
    add(hub, "model", 1)
    events: list[Event] = []
    read("model", tmp_path, events)
    shutil.rmtree(tmp_path / "t5tune")
    hub.status = 500
    read("model", tmp_path, events)
    assert any(" downloaded on 20" in event.text for event in events if isinstance(event, Note))


TRAIN = ("--num-data", 8, "--max-steps", 2, "--save-steps", 1, "--report-samples", 0, "--use-cpu", "--lora-r", 4)


def records(count: int) -> bytes:
    return b"".join(b'{"source": "Is it %d?", "target": "Yes."}\n' % number for number in range(count))


@pytest.mark.parametrize("are_several", [True, False])
@pytest.mark.variants("True")
def test_a_resumed_run_uses_its_first_commits(are_several: bool, hub: Hub, untied_base: Path, tmp_path: Path) -> None:
    hub.add("model", "some/t5", untied_base)
    hub.add("dataset", "some/chats", {"train.jsonl": records(12)})
    (tmp_path / "own.jsonl").write_bytes(records(3))
    data = ("some/chats:1", f"{tmp_path}/own.jsonl:1") if are_several else ("some/chats",)
    run = tmp_path / "run"
    train = ("train", "--model-name-or-path", "some/t5", "--data-path", *data, *TRAIN, "--output-dir", run)
    first = t5tune_in_fork(*train, env=hub.environment)
    assert first.code == 0, first.stderr
    weights = (run / "adapter_model.safetensors").read_bytes()

    def stop_after_step_1() -> None:
        (run / "result.json").unlink()
        shutil.rmtree(run / "checkpoint-2")

    # both repositories change, and then refuse access
    hub.add("model", "some/t5", {"config.json": b"{}"})
    hub.add("dataset", "some/chats", {"train.jsonl": records(5)})
    for status in (None, 404):
        stop_after_step_1()
        hub.status = status
        again = t5tune_in_fork(*train, env=hub.environment)
        assert again.code == 0, again.stderr
        assert f"resuming from {run}/checkpoint-1" in again.stderr
        assert (run / "adapter_model.safetensors").read_bytes() == weights
    assert (run / "settings.yaml").read_text().count("@") == 0
    stop_after_step_1()
    fresh = t5tune_in_fork(*train, "--fresh", env=hub.environment)
    assert fresh.code == 2
    assert "model_name_or_path: some/t5: no such folder on this machine, and no such model on" in fresh.errors[0]


def test_a_start_while_the_hub_fails_warns_once(hub: Hub, untied_base: Path, tmp_path: Path) -> None:
    hub.add("model", "some/t5", untied_base)
    hub.add("dataset", "some/chats", {"train.jsonl": records(12)})
    train = ("train", "--model-name-or-path", "some/t5", "--data-path", "some/chats", *TRAIN)
    assert t5tune_in_fork(*train, "--output-dir", tmp_path / "a", env=hub.environment).code == 0
    hub.status = 500
    data = ("--data-path", "some/chats", "--data-split", "train")
    evaluate = ("evaluate", "some/t5", *data, "--max-new-tokens", 1, "--use-cpu")
    for command in (train, evaluate):
        done = t5tune_in_fork(*command, "--output-dir", tmp_path / command[0], env=hub.environment)
        assert done.code == 0, done.stderr
        warnings = [line for line in done.stderr.splitlines() if "the Hub answers with status 500" in line]
        assert [line.split(":")[1].strip() for line in warnings] == ["some/t5", "some/chats"]


def test_chat_with_an_adapter_without_safetensors_names_the_pickled_file(hub: Hub, untied_base: Path) -> None:
    hub.add("model", "some/pickled", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    done = t5tune_in_fork("chat", "some/pickled", "--prompt", "Hi", "--use-cpu", env=hub.environment)
    assert done.code == 2
    assert done.errors == [
        "error: model_name_or_path: some/pickled: has no adapter_model.safetensors on the Hub, only "
        "adapter_model.bin, and pickled files aren't downloaded; if you trust its owner, run "
        "`hf download some/pickled --local-dir pickled`, and give that folder"
    ]
