"""Models by their name on the Hugging Face Hub, which a small local server imitates."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.adapters import make_stock_adapter
from tests.support.command_line import CommandResult, t5tune

pytestmark = pytest.mark.slow

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves the folders in `models`, and refuses a name in `refusals` with its status and error code."""

    models: dict[str, Path] = {}
    refusals = {
        "some/private": (401, "RepoNotFound"),
        "some/gated": (403, "GatedRepo"),
        "some/broken": (500, ""),
    }

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if name in self.refusals:
            status, code = self.refusals[name]
            return self._send(b"{}", status, {"X-Error-Code": code})
        if name not in self.models:
            return self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        if "no-such" in path:
            return self._send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        folder = self.models[name]
        files = [file for file in folder.iterdir() if file.is_file()]
        if "/tree/" in path:
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": oid(f)} for f in files]
            return self._send(json.dumps(tree).encode())
        if path.startswith("api/"):
            siblings = [{"rfilename": file.name} for file in files]
            return self._send(json.dumps({"id": name, "sha": SHA, "siblings": siblings}).encode())
        file = folder / path.rpartition("/")[2]
        return self._send(file.read_bytes(), headers={"ETag": f'"{oid(file)}"', "X-Repo-Commit": SHA})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment variables that make huggingface_hub use the server."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(untied_base, folder / "pickled")
    torch.save(load_file(untied_base / "model.safetensors"), folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "model.safetensors").unlink()
    Hub.models = {"some/t5": untied_base, "some/pickled-t5": folder / "pickled"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    server.shutdown()
    server.server_close()
    thread.join()


def prepare(name: str, env: dict[str, str], output: Path, *flags: str) -> CommandResult:
    arguments = ("--data-path", "pocket", "--num-data", "4", "--output-dir", output)
    return t5tune("prepare", "--model-name-or-path", name, *arguments, *flags, env=env)


def test_a_hub_model_is_downloaded_once_and_then_available_offline(hub: dict[str, str], tmp_path: Path) -> None:
    assert prepare("some/t5", hub, tmp_path / "online").code == 0
    done = prepare("some/t5", hub | {"HF_HUB_OFFLINE": "1"}, tmp_path / "offline")
    assert done.code == 0, done.stderr
    assert (tmp_path / "offline" / "tokens.bin").read_bytes() == (tmp_path / "online" / "tokens.bin").read_bytes()


def test_pickled_weights_are_downloaded_if_there_are_no_others(hub: dict[str, str], untied_base: Path) -> None:
    ask = ("--prompt", "Hi", "--max-new-tokens", "3", "--use-cpu")
    local = t5tune("chat", "--model-name-or-path", untied_base, *ask)
    for offline in ("0", "1"):
        done = t5tune("chat", "--model-name-or-path", "some/pickled-t5", *ask, env=hub | {"HF_HUB_OFFLINE": offline})
        assert (done.code, done.stdout) == (0, local.stdout), done.stderr


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("some/nothing", (), ["some/nothing", "no such model on the Hub", "hf auth login"]),
        ("some/private", (), ["some/private", "or a private one", "hf auth login"]),
        ("some/gated", (), ["some/gated", "access to this model is restricted", "hf auth login"]),
        ("some/t5", ("--revision", "no-such"), ["revision: no-such", "some/t5"]),
        ("some/t5 base", (), ["some/t5 base", "not a valid name of a model"]),
    ],
)
def test_a_refusal_of_the_hub_is_reported_in_one_line(
    name: str, flags: tuple[str, ...], expected: list[str], hub: dict[str, str], tmp_path: Path
) -> None:
    assert_one_error(prepare(name, hub, tmp_path / "cache", *flags), expected)


def test_an_unreachable_hub_is_reported_in_one_line(hub: dict[str, str], tmp_path: Path) -> None:
    nowhere = hub | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    assert_one_error(
        prepare("some/other", nowhere, tmp_path / "cache"), ["some/other", "can't be reached", "check the network"]
    )
    offline = nowhere | {"HF_HUB_OFFLINE": "1"}
    assert_one_error(prepare("some/other", offline, tmp_path / "cache"), ["some/other", "HF_HUB_OFFLINE"])


@pytest.mark.parametrize("command", ["plan", "chat", "merge"])
def test_without_a_network_only_one_line_is_printed(command: str, hub: dict[str, str], tmp_path: Path) -> None:
    flags = {"plan": (), "chat": ("--prompt", "Hi"), "merge": ("--adapter", tmp_path, "--output-dir", tmp_path / "out")}
    nowhere = hub | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = t5tune(command, "--model-name-or-path", "some/other", *flags[command], env=nowhere)
    assert_one_error(done, ["some/other", "can't be reached", "check the network"])
    assert done.stderr.splitlines() == done.errors


def test_planning_with_a_hub_model_downloads_no_weights(hub: dict[str, str], tmp_path: Path) -> None:
    done = t5tune("plan", "--model-name-or-path", "some/t5", "--json", env=hub | {"HF_HOME": str(tmp_path)})
    assert done.code == 0, done.stderr
    assert done.json["total_parameters"] > 0
    assert {path.name for path in tmp_path.rglob("*.*") if path.is_symlink()} == {"config.json"}


def test_merge_uses_a_downloaded_base_that_the_adapter_names_and_downloads_none(
    hub: dict[str, str], untied_base: Path, tmp_path: Path
) -> None:
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/t5"}))
    arguments = ("merge", adapter, "--no-verify", "--output-dir", tmp_path / "merged")
    environment = hub | {"HF_HOME": str(tmp_path / "home")}
    assert_one_error(t5tune(*arguments, env=environment), ["some/t5, isn't on this machine", "--model-name-or-path"])
    assert not list((tmp_path / "home").rglob("models--*"))
    t5tune("plan", "--model-name-or-path", "some/t5", env=environment)  # downloads config.json alone
    assert_one_error(t5tune(*arguments, env=environment), ["some/t5, isn't on this machine"])
    assert t5tune(*arguments, "--model-name-or-path", "some/t5", env=environment).code == 0
    done = t5tune(*arguments, "--overwrite", env=environment | {"HF_HUB_OFFLINE": "1"})
    assert done.code == 0, done.stderr
    assert f"{adapter} is an adapter; its base is some/t5" in done.stderr


def assert_one_error(done: CommandResult, expected: list[str]) -> None:
    assert done.code == 2, done.stderr
    (error,) = done.errors
    for text in expected:
        assert text in error
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
