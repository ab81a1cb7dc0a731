"""`t5tune serve` as a command: its start, its log and its end."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from t5tune.commands.serve import serve
from t5tune.commands.train import train
from t5tune.errors import ModelError
from t5tune.settings import ServeSettings, TrainSettings
from tests.serving.raw_http import CHAT, connect, make_chat, make_request, read_answer, send, wait_until_running
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.processes.forks import get_fork_server
from tests.support.processes.trials import ENDLESS, list_trials
from tests.support.servers.serve_command import PATIENCE, start

pytestmark = pytest.mark.slow
pytest.importorskip("starlette", reason="the extra `serve` isn't installed")


def test_serve_prints_the_address_and_requests_as_json_lines(untied_base: Path, tmp_path: Path) -> None:
    with start(tmp_path, f"base={untied_base}", "pocket", "--engine", "transformers") as server:
        assert server.address["models"] == {"base": "transformers", "pocket": "transformers"}
        assert server.address["needs_key"] is False
        assert send(server.url, body=make_chat(max_tokens=4))[0] == 200
        assert send(server.url, body=make_chat(model="nothing"))[0] == 404
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0
        assert len(server.out.read_text().splitlines()) == 1
        found, refused = server.read_log()
        assert found.keys() == refused.keys()
        assert (found["status"], found["model"], found["completion_tokens"]) == (200, "base", 4)
        assert (refused["status"], refused["error"]) == (
            404,
            "model: nothing: not served here; this server has base, pocket",
        )
        assert found["time"] < refused["time"]
        assert found["id"] != refused["id"]


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.variants("15")
def test_a_signal_under_load_ends_with_whole_replies(
    stop_signal: signal.Signals, untied_base: Path, tmp_path: Path
) -> None:
    """Replies that are computed or wait are complete; requests that come later are refused."""
    with start(tmp_path, f"base={untied_base}", "--engine", "transformers", "--max-batch-tokens", "2000") as server:
        expected = [send(server.url, body=make_chat(max_tokens=200 + number))[1]["usage"] for number in range(3)]
        connections = [connect(server.url) for _ in range(12)]
        for number, connection in enumerate(connections):
            connection.sendall(make_request(CHAT, make_chat(max_tokens=200 + number % 3)))
        wait_until_running(server.url)
        server.process.send_signal(stop_signal)
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(read_answer, connections))
        assert [status for status, _, _ in answers] == [200] * 12
        usages = [json.loads(body)["usage"] for _, _, body in answers]
        assert usages == [expected[number % 3] for number in range(12)]
        assert server.process.wait(PATIENCE) == 0
        with pytest.raises(ConnectionRefusedError):
            connect(server.url)
        assert "stopping: refusing new requests" in server.log.read_text()
        assert sum(line["status"] == 200 and line["path"] == CHAT for line in server.read_log()) == 15
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_leaves_no_process_of_an_endless_constraint(
    stop_signal: signal.Signals, untied_base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llguidance")
    with (
        start(tmp_path, f"base={untied_base}", "--engine", "transformers") as server,
        connect(server.url) as connection,
    ):
        connection.sendall(make_request(CHAT, make_chat(structured_outputs={"json": ENDLESS})))
        while len(trials := list_trials(server.process.pid)) < 2:
            assert server.process.poll() is None
        assert send(server.url, body=make_chat(structured_outputs={"regex": "[a-c]"}))[0] == 200
        server.process.send_signal(stop_signal)
        if stop_signal == signal.SIGTERM:
            status, _, body = read_answer(connection)  # before the trial has used all of its time
            assert (status, "the server is stopping" in body.decode()) == (503, True)
        assert server.process.wait(PATIENCE) == (0 if stop_signal == signal.SIGTERM else -signal.SIGKILL)
        assert psutil.wait_procs(trials, PATIENCE)[1] == []
        assert "Traceback" not in server.log.read_text()


def test_replies_that_take_too_long_are_cut_off_and_counted(untied_base: Path, tmp_path: Path) -> None:
    options = ["--engine", "transformers", "--max-new-tokens", 1_000_000, "--shutdown-timeout", "0.3"]
    with start(tmp_path, f"base={untied_base}", *options) as server, connect(server.url) as connection:
        connection.sendall(make_request(CHAT, make_chat(n=2)))
        wait_until_running(server.url)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0
        assert "warning: 2 replies cut off after 0.3 seconds" in server.log.read_text()


@pytest.mark.parametrize("engine", ["transformers", "ctranslate2"])
@pytest.mark.variants("ctranslate2")
def test_a_second_signal_stops_at_once(engine: str, untied_base: Path, tmp_path: Path) -> None:
    """This needs a separate interpreter, since a thread may still compute when the interpreter exits."""
    if engine == "ctranslate2":
        pytest.importorskip("ctranslate2")
    command = [sys.executable, "-m", "t5tune", "serve", f"base={untied_base}", "--port", "0", "--use-cpu", "--json"]
    command += ["--engine", engine, "--max-new-tokens", "1000000", "--shutdown-timeout", "600"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = json.loads(process.stdout.readline())["url"]
        with connect(url) as connection:
            connection.sendall(make_request(CHAT, make_chat()))
            wait_until_running(url)
            process.send_signal(signal.SIGTERM)
            while "a second signal stops at once" not in process.stderr.readline():
                assert process.poll() is None
            while process.poll() is None:  # signals in the first second are ignored
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
            assert process.returncode == 128 + signal.SIGTERM
        assert "terminate called" not in process.stderr.read()


@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGTERM, signal.SIGINT)])
def test_signals_that_arrive_together_are_one(
    signals: tuple[signal.Signals, ...], untied_base: Path, tmp_path: Path
) -> None:
    """GNU timeout signals its child, and then its whole group."""
    with (
        start(tmp_path, f"base={untied_base}", "--engine", "transformers") as server,
        connect(server.url) as connection,
    ):
        connection.sendall(make_request(CHAT, make_chat(max_tokens=200)))
        wait_until_running(server.url)
        for number in signals:
            server.process.send_signal(number)
        assert read_answer(connection)[0] == 200
        assert server.process.wait(PATIENCE) == 0


def test_the_base_of_an_adapter_can_be_named(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    train(
        TrainSettings(
            model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=tmp_path / "run",
            max_steps=3, learning_rate=2e-2, use_cpu=True, report_samples=0,
        )
    )  # fmt: skip
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    (tmp_path / "run" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "moved")})
    )
    values: dict[str, Any] = {"models": str(tmp_path / "run"), "port": 0, "use_cpu": True, "engine": "transformers"}
    with pytest.raises(ModelError, match="moved: no such folder"):
        serve(ServeSettings(**values))
    with serve(ServeSettings(**values, model_name_or_path=str(untied_base))) as server:
        assert server.address.models == {"run": "transformers"}
        assert send(server.url, body=make_chat(model="run", max_tokens=4))[0] == 200


def test_a_used_port_is_refused_before_loading_a_model(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = t5tune_in_fork("serve", "nowhere", "--port", other.getsockname()[1], cwd=tmp_path)
    assert done.code == 2
    assert (
        done.errors == [f"error: port: {other.getsockname()[1] if other.fileno() >= 0 else 0}: Address already in use"]
        or "Address already in use; choose another port or host; --port 0 takes any free port" in done.errors[0]
    )


def test_without_the_packages_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
for name in [name for name in sys.modules if name.startswith(("starlette", "t5tune.serving"))]:
    del sys.modules[name]
sys.modules["starlette"] = None
sys.argv = ["t5tune", "serve", "pocket"]
from t5tune.cli import main
main()
"""
    log = tmp_path / "log"
    log.touch()
    assert get_fork_server().start(["-c", code], log, log, os.environ).wait(PATIENCE) == 1
    assert log.read_text().splitlines()[-1] == (
        "error: serve: starlette isn't installed; pip install starlette uvicorn prometheus-client"
    )


def test_a_reload_signal_during_the_imports_ends_nothing(tmp_path: Path) -> None:
    """The settings are read after it, so the changed file counts."""
    code = """
import signal, sys
from pathlib import Path
class Signaller:
    def find_spec(self, name, *_):
        if name == "t5tune.cli.serve":
            Path("serve.yaml").write_text("models: changed")
            os.kill(os.getpid(), signal.SIGUSR1)
sys.modules.pop("t5tune.cli.serve", None)
sys.meta_path.insert(0, Signaller())
sys.argv = ["t5tune", "serve", "--config", "serve.yaml", "--port", "0"]
from t5tune.cli import main
main()
"""
    (tmp_path / "serve.yaml").write_text("models: nowhere")
    log = tmp_path / "log"
    log.touch()
    code = f"import os; os.chdir({str(tmp_path)!r}){code}"
    assert get_fork_server().start(["-c", code], log, log, os.environ).wait(PATIENCE) == 2
    assert "changed: no such folder" in log.read_text()
