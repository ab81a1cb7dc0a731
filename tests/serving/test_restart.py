"""A server is restarted without a lost request: the old one leaves the port to the new one when that is ready."""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.serve import load_models as loading
from t5tune.commands.serve import serve
from t5tune.errors import ModelError, SettingsError
from t5tune.settings import ServeSettings
from tests.serving.raw_http import (
    CHAT,
    PATIENCE,
    connect,
    exchange,
    make_chat,
    make_request,
    read_answer,
    send,
    wait_until_running,
)
from tests.support.servers.serve_command import start as start_command

pytestmark = pytest.mark.slow


def test_a_starting_server_is_alive_but_not_ready(
    untied_base: Path, settings: Callable[..., ServeSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_loading, may_end = threading.Event(), threading.Event()
    load_all, bind_port = loading.ModelLoader.load_all, threading.Event()
    urls: list[str] = []

    def load_slowly(self: Any) -> Any:
        is_loading.set()
        assert may_end.wait(PATIENCE)
        return load_all(self)

    from t5tune.serving import server as http

    format_url = http.format_url

    def note_url(*given: Any) -> str:
        urls.append(format_url(*given))
        bind_port.set()
        return urls[0]

    monkeypatch.setattr(http, "format_url", note_url)
    monkeypatch.setattr(loading.ModelLoader, "load_all", load_slowly)
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(serve, settings({"base": untied_base}))
        assert is_loading.wait(PATIENCE)
        (url,) = urls
        assert send(url, "/health", method="GET") == (200, {"status": "ok"})
        for path, method in (("/ready", "GET"), ("/v1/models", "GET"), (CHAT, "POST")):
            status, headers, body = exchange(url, path, make_chat(), method)
            assert (status, headers["retry-after"]) == (503, "5")
            assert json.loads(body)["error"]["message"] == "the server is loading its models"
        may_end.set()
        with started.result():
            assert send(url, "/ready", method="GET") == (200, {"status": "ready"})
            assert send(url, body=make_chat())[0] == 200
        broken = pool.submit(serve, settings({"base": untied_base / "nowhere"}))
        with pytest.raises(ModelError):
            broken.result()
    with pytest.raises(ConnectionRefusedError):
        connect(urls[-1])


def test_two_servers_share_a_port_without_a_lost_request(untied_base: Path, tmp_path: Path) -> None:
    """Half of the clients keep their connections, as long as the server does."""
    arguments = [f"base={untied_base}", "--engine", "transformers", "--max-new-tokens", "3", "--reuse-port"]
    is_over = threading.Event()
    statuses: Counter[int] = Counter()
    num_after = Counter[int]()

    def be_client(number: int, url: str) -> None:
        connection = None
        while not is_over.is_set():
            connection = connection or connect(url)
            connection.sendall(make_request(CHAT, make_chat(f"{number}")))
            status, headers, _ = read_answer(connection)
            statuses[status] += 1
            num_after[number] += 1
            if number % 2 or headers.get("connection") == "close" or is_over.is_set():
                connection.close()
                connection = None

    with start_command(tmp_path / "old", *arguments) as old, ThreadPoolExecutor(16) as pool:
        port = int(old.url.rpartition(":")[2])
        clients = [pool.submit(be_client, number, old.url) for number in range(16)]
        with start_command(tmp_path / "new", *arguments, port=port) as new:
            try:
                wait_until_running(old.url)
                old.process.send_signal(signal.SIGTERM)
                assert old.process.wait(PATIENCE) == 0
                num_after.clear()
                until = time.monotonic() + PATIENCE
                while len(num_after) < 16:
                    assert time.monotonic() < until
                    for client in clients:
                        assert not client.done(), client.result()
            finally:
                is_over.set()
            for client in clients:
                client.result()
            assert set(statuses) == {200}
            assert any(line["path"] == CHAT for line in old.read_log())
            assert any(line["path"] == CHAT for line in new.read_log())


def is_listening(url: str) -> bool:
    try:
        connect(url).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_leaving_server_answers_the_next_request_of_a_connection(
    untied_base: Path, settings: Callable[..., ServeSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    from t5tune.serving import server as http

    monkeypatch.setattr(http, "SECONDS_TO_HAND_OVER", PATIENCE)
    one = settings({"base": untied_base}, reuse_port=True)
    with serve(one) as server, connect(server.url) as kept, ThreadPoolExecutor(1) as pool:
        kept.sendall(make_request(CHAT, make_chat()))
        assert read_answer(kept)[0] == 200
        stopped = pool.submit(server.stop)
        until = time.monotonic() + PATIENCE
        while is_listening(server.url):
            assert time.monotonic() < until
        kept.sendall(make_request(CHAT, make_chat()))
        status, headers, _ = read_answer(kept)
        assert (status, headers["connection"]) == (200, "close")
        stopped.result()


def test_a_port_is_shared_only_with_the_option(untied_base: Path, settings: Callable[..., ServeSettings]) -> None:
    models = {"base": untied_base}
    with serve(settings(models)) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(SettingsError, match="; both servers need --reuse-port and the same user"):
            serve(settings(models, port=port, reuse_port=True))
    with serve(settings(models, reuse_port=True)) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(SettingsError, match="; choose another port or host; --port 0 takes any free port"):
            serve(settings(models, port=port))
