"""Requests that are refused, and clients that misbehave without harm to other clients."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.serve import Server
from t5tune.inference.prompts import Prompt, Prompts
from t5tune.progress import Answered, Event
from t5tune.serving import app as app_module
from t5tune.serving import engines
from t5tune.serving import server as server_module
from tests.serving.conftest import StartServer
from tests.serving.raw_http import (
    CHAT,
    ask,
    connect,
    exchange,
    make_chat,
    make_request,
    read_answer,
    read_metrics,
    send,
    wait_for_metric,
)

pytestmark = pytest.mark.slow

PATIENCE = 60.0


class Log:
    """The answered requests that a server has reported, except for its metrics."""

    def __init__(self) -> None:
        self.answered: list[Answered] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Answered) and event.path != "/metrics":
            with self._changed:
                self.answered.append(event)
                self._changed.notify_all()

    def wait_for(self, count: int) -> list[Answered]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.answered) >= count, PATIENCE), self.answered
            return self.answered


@pytest.fixture(scope="module")
def start_base(start: StartServer, untied_base: Path) -> StartServer:
    """A function that starts a server of a model that never ends a reply by itself."""
    return partial(start, {"base": str(untied_base)}, engine="transformers")


@pytest.fixture(scope="module")
def server(start_base: StartServer) -> Server:
    return start_base(model_max_length=160)


@pytest.fixture(scope="module")
def keyed(start_base: StartServer) -> Server:
    return start_base(api_key="s3cret")


LONG_CHAT = [{"role": "user" if number % 2 == 0 else "assistant", "content": "x"} for number in range(10_001)]


@pytest.mark.parametrize(
    ("parts", "status", "message"),
    [
        ({"body": b"{"}, 400, "the body isn't valid JSON"),
        ({"body": make_chat("\xff").replace(b"\\u00ff", b"\xff")}, 400, "the body isn't valid JSON"),
        ({"body": make_chat(model="other")}, 404, "model: other: not served here; this server has base"),
        ({"body": make_chat(tone="kind")}, 400, "tone: unknown field"),
        ({"body": make_chat(max_tokens=161)}, 400, "max_tokens: 161: this server allows at most 160 tokens"),
        ({"body": make_chat("word " * 100)}, 400, "messages: too long"),
        ({"body": make_chat("word " * 800_000)}, 400, "messages: too long: 4,000,000 bytes in the system and the last"),
        ({"body": make_chat(messages=LONG_CHAT[:-1])}, 400, "messages: the last message isn't the user's"),
        ({"path": "/v1/embeddings"}, 404, "/v1/embeddings: no such path; this server has /v1/chat/completions"),
        ({"method": "GET"}, 405, f"GET {CHAT}: use POST"),
        ({"content_type": "text/plain"}, 415, "content-type: text/plain: expected"),
        ({"host": "example.com"}, 403, "host: example.com: not a name of this machine"),
        ({"host": "[::1"}, 403, "host: [::1: not a name of this machine"),
        ({"path": "/v1/models/other", "method": "GET"}, 404, "model: other: not served here"),
    ],
)
def test_a_wrong_request_gets_a_status_and_one_line(
    parts: dict[str, Any], status: int, message: str, server: Server
) -> None:
    found, answer = send(server.url, **{"body": make_chat(), **parts})
    assert found == status
    assert answer["error"]["message"].startswith(message)
    assert "\n" not in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert ask(server.url, make_chat())


def test_ten_thousand_messages_get_a_reply(server: Server) -> None:
    body = json.dumps({"model": "base", "messages": LONG_CHAT}).encode()
    status, headers, body = exchange(server.url, body=body)
    assert status == 200, body
    assert 9_900 < int(headers["x-t5tune-dropped-messages"]) < 10_000


def test_a_body_of_100_megabytes_is_refused_and_not_kept(server: Server) -> None:
    size = 100 << 20
    with connect(server.url) as connection:
        connection.sendall(make_request(CHAT, content_length=str(size)))
        status, _, answer = read_answer(connection)  # the body was never sent
        assert (status, json.loads(answer)["error"]["message"]) == (413, "the body is larger than 4,194,304 bytes")
    with connect(server.url) as connection:  # a chunked body, which has no length in the headers
        head = make_request(CHAT, content_length="").replace(b"content-length: \r\n", b"transfer-encoding: chunked\r\n")
        connection.sendall(head)
        for _ in range(5):
            connection.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
        assert read_answer(connection)[0] == 413


@pytest.mark.parametrize(
    ("path", "method", "headers", "status"),
    [
        (CHAT, "POST", {"authorization": "Bearer wrong"}, 401),
        (CHAT, "POST", {"content_type": "text/plain"}, 415),
        (CHAT, "POST", {"content_length": "100000000"}, 413),
        (CHAT, "POST", {"transfer_encoding": "chunked", "content_type": "text/plain"}, 415),
        ("/v1/embeddings", "POST", {}, 404),
        (CHAT, "PUT", {}, 405),
        ("/health", "GET", {}, 200),
    ],
)
def test_an_answer_before_the_body_closes_the_connection(
    path: str, method: str, headers: dict[str, str], status: int, keyed: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection closes however slowly the client sends the rest of the body, and however long it is."""
    head = make_request(
        path, method=method, **{"authorization": "Bearer s3cret", "content_length": "4000000"} | headers
    )
    if "transfer_encoding" in headers:
        head = head.replace(b"content-length: 4000000\r\n", b"")
    chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    monkeypatch.setattr(server_module, "SECONDS_AFTER_EARLY_ANSWER", 0.3)
    with connect(keyed.url) as slow, connect(keyed.url) as endless:
        for connection in (slow, endless):
            connection.sendall(head)
            found, found_headers, _ = read_answer(connection)
            assert (found, found_headers["connection"]) == (status, "close")
        slow.sendall(chunk[:8])
        assert slow.recv(1) == b""
        with pytest.raises(OSError, match="reset|Broken pipe"):
            endless.sendall(chunk * 1000)


def test_a_client_that_sends_a_large_body_gets_its_answer(keyed: Server) -> None:
    """The server reads some of it before it closes the connection, which would lose the answer."""
    with connect(keyed.url) as connection:
        connection.sendall(make_request(CHAT, bytes(3 << 20), authorization="Bearer wrong"))
        assert read_answer(connection)[0] == 401
        assert connection.recv(1) == b""


def test_half_a_body_is_given_up_and_delays_no_client(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ask(server.url, make_chat())
    monkeypatch.setattr(app_module, "SECONDS_FOR_BODY", 0.5)
    body = make_chat()
    with connect(server.url) as connection:
        connection.sendall(make_request(CHAT, body)[: -len(body) // 2])
        assert ask(server.url, body) == expected
        status, headers, answer = read_answer(connection)
        assert (status, headers["connection"]) == (408, "close")
        assert "the body didn't arrive within 0.5 seconds" in answer.decode()
        assert connection.recv(1) == b""


def test_a_client_that_hangs_up_frees_its_place(start_base: StartServer) -> None:
    """The client's reply would take minutes, and only one reply fits into a batch."""
    log = Log()
    server = start_base(log, max_new_tokens=100_000, max_batch_tokens=1)
    for streams in (False, True):
        with connect(server.url) as connection:
            connection.sendall(make_request(CHAT, make_chat(stream=streams)))
            wait_for_metric(server.url, "replies_running 1.0")
    found = send(server.url, body=make_chat(max_tokens=3))
    assert found[0] == 200
    gone, streamed, last = log.wait_for(3)
    assert [gone.status, streamed.status, last.status] == [499, 499, 200]
    assert gone.completion_tokens < 100_000
    assert last.completion_tokens == 3


@pytest.mark.long
def test_a_client_that_does_not_read_delays_no_client(start_base: StartServer) -> None:
    server = start_base(max_new_tokens=400)
    with connect(server.url) as connection:
        for _ in range(20):  # each answer has about 100 kB
            connection.sendall(make_request(CHAT, make_chat(stream=True)))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: send(server.url, body=make_chat(max_tokens=5)), range(16)))
        assert [status for status, _ in found] == [200] * 16


def test_a_full_queue_says_when_to_come_back(start_base: StartServer) -> None:
    server = start_base(max_queue=2, max_batch_delay=60_000)
    with connect(server.url) as waiting:
        waiting.sendall(make_request(CHAT, make_chat(n=2)))
        wait_for_metric(server.url, "replies_waiting 2.0")
        status, headers, body = exchange(server.url, body=make_chat())
    assert (status, headers["retry-after"]) == (429, "1")
    assert json.loads(body)["error"]["code"] == "queue_full"
    wait_for_metric(server.url, "replies_waiting 0.0")  # the waiting client is gone


@pytest.mark.parametrize(
    ("num_prompts", "n", "problem"),
    [
        (20_000, 128, "prompt: 20,000 prompts, with n 128 for each: "),
        (257, 1, "prompt: 257 prompts: "),
        (1, 101, "n: 101: "),
    ],
)
def test_too_many_replies_to_one_request_are_refused(
    num_prompts: int, n: int, problem: str, start_base: StartServer
) -> None:
    server = start_base(max_replies=100)
    body = json.dumps({"model": "base", "prompt": [""] * num_prompts, "n": n, "max_tokens": 1}).encode()
    status, answer = send(server.url, "/v1/completions", body)
    assert status == 400
    assert answer["error"]["message"] == f"{problem}this server gives at most 100 replies to one request"
    assert answer["error"]["param"] == problem.partition(":")[0]


@pytest.mark.parametrize("prompt", ["word " * 800_000, [5] * 1_900_000])
def test_a_prompt_of_megabytes_is_refused_by_its_size(prompt: str | list[int], server: Server) -> None:
    body = json.dumps({"model": "base", "prompt": [prompt, "Hello"]}, separators=(",", ":")).encode()
    status, answer = send(server.url, "/v1/completions", body)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    size = "4,000,000 bytes" if isinstance(prompt, str) else "1,900,000 ids"
    assert answer["error"]["message"] == f"prompt[0]: too long: {size}; model_max_length is 160 tokens"


def test_health_is_answered_while_a_prompt_is_encoded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    is_encoding, is_answered = threading.Event(), threading.Event()
    encode = Prompts.encode

    def encode_slowly(self: Prompts, *given: Any) -> Prompt:
        is_encoding.set()
        assert is_answered.wait(PATIENCE)
        return encode(self, *given)

    monkeypatch.setattr(Prompts, "encode", encode_slowly)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(send, server.url, body=make_chat(max_tokens=3))
        assert is_encoding.wait(PATIENCE)
        assert send(server.url, "/health", method="GET") == (200, {"status": "ok"})
        is_answered.set()
        assert found.result()[0] == 200


def test_a_stopping_server_finishes_requests_and_refuses_new_requests(
    start_base: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_base()
    is_running, may_end = threading.Event(), threading.Event()
    generate = engines.generate

    def generate_slowly(*given: Any, **options: Any) -> Any:
        is_running.set()
        assert may_end.wait(PATIENCE)
        return generate(*given, **options)

    monkeypatch.setattr(engines, "generate", generate_slowly)
    with ThreadPoolExecutor(2) as pool:
        found = pool.submit(send, server.url, body=make_chat())
        assert is_running.wait(PATIENCE)
        assert send(server.url, "/ready", method="GET") == (200, {"status": "ready"})
        stopped = pool.submit(server.stop)
        until = time.monotonic() + PATIENCE
        while send(server.url, "/ready", method="GET")[0] == 200:
            assert time.monotonic() < until
        assert send(server.url, "/health", method="GET") == (200, {"status": "ok"})
        for _ in range(3):
            status, headers, body = exchange(server.url, body=make_chat())
            assert (status, headers["retry-after"]) == (503, "5")
            assert json.loads(body)["error"]["message"] == "the server is stopping"
        assert not found.done()
        may_end.set()
        assert found.result()[0] == 200
        stopped.result()
    with pytest.raises(ConnectionRefusedError):
        connect(server.url)


def test_health_reports_a_failed_gpu(start_base: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_base()

    def fail(*given: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert send(server.url, "/health", method="GET")[0] == 200
    monkeypatch.setattr(engines, "generate", fail)
    problem = "the GPU has failed: CUDA error: an illegal memory access was encountered; restart the server"
    for path, method in ((CHAT, "POST"), ("/health", "GET"), (CHAT, "POST")):
        status, answer = send(server.url, path, make_chat() if method == "POST" else b"", method=method)
        assert (status, answer["error"]["message"]) == (503, problem)


def test_a_faulty_request_does_not_fail_its_batch(monkeypatch: pytest.MonkeyPatch, start_base: StartServer) -> None:
    server = start_base(max_batch_delay=200)
    original = engines.generate

    def fail_for_long_prompts(model: Any, sources: list[list[int]], *given: Any, **options: Any) -> Any:
        if max(map(len, sources)) > 100:
            raise ValueError("too long for me")
        return original(model, sources, *given, **options)

    monkeypatch.setattr(engines, "generate", fail_for_long_prompts)
    texts = ["Hello"] * 5 + ["word " * 200] + ["Hello"] * 2
    with ThreadPoolExecutor(len(texts)) as pool:
        found = list(pool.map(lambda text: send(server.url, body=make_chat(text, "base")), texts))
    assert [status for status, _ in found] == [200] * 5 + [500] + [200] * 2
    assert found[5][1]["error"]["message"] == "the reply couldn't be computed: ValueError: too long for me"


def test_ctranslate2_refuses_an_empty_prompt(start: StartServer) -> None:
    pytest.importorskip("ctranslate2")
    server = start({"base": "pocket"}, engine="ctranslate2")
    prompts: list[tuple[Any, str]] = [("", "prompt"), ("  ", "prompt"), ([0], "prompt"), ([[5, 6], [1]], "prompt[1]")]
    for prompt, param in prompts:
        body = json.dumps({"model": "base", "prompt": prompt}).encode()
        status, answer = send(server.url, "/v1/completions", body)
        assert (status, answer["error"]["param"]) == (400, param)
        assert answer["error"]["message"].startswith(f"{param}: nothing to reply to")
        assert "needs at least one token that isn't special" in answer["error"]["message"]


def test_a_connection_without_a_request_is_closed(start_base: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SECONDS_FOR_HEADERS", 0.3)
    server = start_base()
    with connect(server.url) as silent, connect(server.url) as slow:
        slow.sendall(make_request(CHAT, make_chat())[:30])
        assert silent.recv(1) == b""
        assert slow.recv(1) == b""
    with connect(server.url) as large:
        large.sendall(make_request(CHAT, make_chat(), cookie="x" * 200_000))
        assert large.recv(12) == b"HTTP/1.1 400"
    with connect(server.url) as second:
        second.sendall(make_request("/health", method="GET"))
        assert read_answer(second)[0] == 200
        second.sendall(make_request(CHAT, make_chat())[:30])
        assert second.recv(1) == b""


def test_a_request_that_asks_for_http_2_gets_its_reply(server: Server) -> None:
    """As Java's client does by default."""
    headers = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAARAAAAAAAIAAAAA"}
    assert send(server.url, body=make_chat(), **headers)[0] == 200


def test_all_but_page_and_health_need_the_key(start_base: StartServer) -> None:
    log = Log()
    server = start_base(log, api_key="s3cret")
    for headers, message in (
        ({}, "no API key; send it in the header Authorization: Bearer KEY"),
        ({"authorization": "Bearer wrong"}, "wrong API key"),
        ({"authorization": "Basic s3cret"}, "wrong API key"),
        ({"authorization": "Bearer s3cret2"}, "wrong API key"),
        ({"authorization": "Bearer ä"}, "wrong API key"),
    ):
        status, answer = send(server.url, body=make_chat(), **headers)
        assert (status, answer["error"]["message"]) == (401, message)
        assert answer["error"]["code"] == "invalid_api_key"
    key = {"authorization": "Bearer s3cret"}
    assert send(server.url, body=make_chat(), **key)[0] == 200
    assert send(server.url, body=make_chat(), host="example.com", **key)[0] == 200
    assert send(server.url, "/v1/models", method="GET")[0] == 401
    assert "invalid_api_key" in read_metrics(server.url)
    assert "t5tune_requests_total" in read_metrics(server.url, **key)
    assert send(server.url, "/health", method="GET") == (200, {"status": "ok"})
    assert exchange(server.url, "/", method="GET")[1]["content-type"].startswith("text/html")
    assert "s3cret" not in repr(log.answered)


def test_requests_are_counted_and_reported_without_their_text(start: StartServer) -> None:
    log = Log()
    server = start({"one": "pocket"}, log, engine="transformers")
    send(server.url, body=make_chat("a secret text", model="one"))
    send(server.url, body=make_chat("a secret text", model="two"))
    send(server.url, f"/{'x' * 50}", make_chat())
    fine, unknown, nowhere = log.wait_for(3)
    assert (fine.status, fine.model, fine.method, fine.path) == (200, "one", "POST", CHAT)
    assert fine.prompt_tokens > 0
    assert 0 < fine.completion_tokens <= 12
    assert fine.queue_seconds is not None
    assert fine.first_token_seconds is not None
    assert 0 < fine.queue_seconds < fine.first_token_seconds < fine.seconds
    assert (unknown.status, unknown.model) == (404, None)
    assert str(unknown.error).startswith("model: two: not served here")
    assert "secret" not in repr(log.answered)
    metrics = read_metrics(server.url)
    assert f't5tune_requests_total{{path="{CHAT}",status="200"}} 1.0' in metrics
    assert 't5tune_requests_total{path="other",status="404"} 1.0' in metrics
    assert f't5tune_completion_tokens_total{{model="one"}} {fine.completion_tokens}.0' in metrics
    assert "xxx" not in metrics
