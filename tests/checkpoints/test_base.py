"""Models by their name on the Hugging Face Hub, which a small local server imitates."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.caches import find_cache
from tests.support.models.adapters import make_stock_adapter
from tests.support.processes.command_line import CommandResult, t5tune_in_fork
from tests.support.servers.hub import serve_hub

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment variables that make huggingface_hub use the server."""
    folder = tmp_path_factory.mktemp("hub")
    with serve_hub(folder / "home") as server:
        server.add("model", "some/t5", untied_base)
        weights = io.BytesIO()
        torch.save(load_file(untied_base / "model.safetensors"), weights)
        pickled = {file.name: file.read_bytes() for file in untied_base.iterdir() if file.name != "model.safetensors"}
        server.add("model", "some/pickled-t5", {**pickled, "pytorch_model.bin": weights.getvalue()})
        server.refusals = {"some/private": (401, "RepoNotFound"), "some/gated": (403, "GatedRepo")}
        yield server.environment


def prepare(name: str, env: dict[str, str], output: Path, *flags: str) -> CommandResult:
    arguments = ("--data-path", "pocket", "--num-data", "4", "--output-dir", output)
    return t5tune_in_fork("prepare", "--model-name-or-path", name, *arguments, *flags, env=env)


def test_a_hub_model_is_downloaded_once_and_then_available_offline(hub: dict[str, str], tmp_path: Path) -> None:
    assert prepare("some/t5", hub, tmp_path / "online").code == 0
    done = prepare("some/t5", hub | {"HF_HUB_OFFLINE": "1"}, tmp_path / "offline")
    assert done.code == 0, done.stderr
    online, offline = ((find_cache(tmp_path / name) / "tokens.bin").read_bytes() for name in ("online", "offline"))
    assert online == offline


def test_pickled_weights_are_downloaded_if_there_are_no_others(hub: dict[str, str], untied_base: Path) -> None:
    ask = ("--prompt", "Hi", "--max-new-tokens", "3", "--use-cpu")
    local = t5tune_in_fork("chat", "--model-name-or-path", untied_base, *ask)
    for offline in ("0", "1"):
        environment = hub | {"HF_HUB_OFFLINE": offline}
        done = t5tune_in_fork("chat", "--model-name-or-path", "some/pickled-t5", *ask, env=environment)
        assert (done.code, done.stdout) == (0, local.stdout), done.stderr


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("some/nothing", (), ["some/nothing", "no such model on the Hub", "hf auth login"]),
        ("some/private", (), ["some/private", "or a private one", "hf auth login"]),
        ("some/gated", (), ["some/gated", "access to this model is restricted", "hf auth login"]),
        ("some/t5", ("--revision", "no-such"), ["revision: no-such", "some/t5"]),
        ("some/t5@no-such", (), ["revision: no-such", "some/t5"]),
        ("some/t5 base", (), ["some/t5 base", "not a valid name of a model"]),
    ],
)
def test_a_refusal_of_the_hub_is_reported_in_one_line(
    name: str, flags: tuple[str, ...], expected: list[str], hub: dict[str, str], tmp_path: Path
) -> None:
    assert_one_error(prepare(name, hub, tmp_path / "cache", *flags), expected)


def test_without_a_hub_similar_folders_are_suggested(hub: dict[str, str], tmp_path: Path) -> None:
    nowhere = hub | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    (tmp_path / "answers").mkdir()
    done = t5tune_in_fork("chat", "answer", "--prompt", "Hi", env=nowhere, cwd=tmp_path)
    assert_one_error(done, ["answer: no such folder", "did you mean answers?"])
    offline = nowhere | {"HF_HUB_OFFLINE": "1"}
    assert_one_error(prepare("some/other", offline, tmp_path / "cache"), ["some/other", "HF_HUB_OFFLINE"])


@pytest.mark.parametrize("command", ["plan", "chat", "merge"])
def test_without_a_network_only_one_line_is_printed(command: str, hub: dict[str, str], tmp_path: Path) -> None:
    flags = {"plan": (), "chat": ("--prompt", "Hi"), "merge": ("--adapter", tmp_path, "--output-dir", tmp_path / "out")}
    nowhere = hub | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = t5tune_in_fork(command, "--model-name-or-path", "some/other", *flags[command], env=nowhere)
    assert_one_error(done, ["some/other", "can't be reached", "check the network"])
    assert done.stderr.splitlines() == done.errors


def test_planning_with_a_hub_model_downloads_no_weights(hub: dict[str, str], tmp_path: Path) -> None:
    done = t5tune_in_fork("plan", "--model-name-or-path", "some/t5", "--json", env=hub | {"HF_HOME": str(tmp_path)})
    assert done.code == 0, done.stderr
    assert done.json["total_parameters"] > 0
    downloaded = {path.name for path in tmp_path.rglob("*.*") if path.is_symlink()}
    assert downloaded == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_merge_uses_the_adapters_base_only_if_it_is_downloaded(
    hub: dict[str, str], untied_base: Path, tmp_path: Path
) -> None:
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/t5"}))
    arguments = ("merge", adapter, "--no-verify", "--output-dir", tmp_path / "merged")
    environment = hub | {"HF_HOME": str(tmp_path / "home")}
    assert_one_error(
        t5tune_in_fork(*arguments, env=environment), ["some/t5, isn't on this machine", "--model-name-or-path"]
    )
    assert not list((tmp_path / "home").rglob("models--*"))
    plan = t5tune_in_fork("plan", "--model-name-or-path", "some/t5", env=environment)  # downloads no weights
    assert plan.code == 0, plan.stderr
    assert_one_error(t5tune_in_fork(*arguments, env=environment), ["some/t5, isn't on this machine"])
    assert t5tune_in_fork(*arguments, "--model-name-or-path", "some/t5", env=environment).code == 0
    done = t5tune_in_fork(*arguments, "--overwrite", env=environment | {"HF_HUB_OFFLINE": "1"})
    assert done.code == 0, done.stderr
    assert f"{adapter} is an adapter; its base is some/t5" in done.stderr


def assert_one_error(done: CommandResult, expected: list[str]) -> None:
    assert done.code == 2, done.stderr
    (error,) = done.errors
    for text in expected:
        assert text in error
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
