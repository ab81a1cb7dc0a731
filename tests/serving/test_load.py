"""Many clients for a long time: no lost or mixed reply, and no growing memory."""

import json
import select
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from t5tune.commands.chat import Chatter
from t5tune.commands.serve import Server
from t5tune.serving import batching
from t5tune.settings import ChatSettings
from tests.serving.conftest import StartServer
from tests.serving.raw_http import CHAT, ask, connect, make_chat, make_request, read_answer, wait_until_running
from tests.support.processes.runs import LONG

pytestmark = pytest.mark.slow

CLIENTS = 64
COUNTS, THINGS, NAMES = ("two", "six", "ten"), ("tea", "coffees", "bread"), ("Mira", "Otto", "Aida", "Ben")
MESSAGES = [f"Hello, {count} {thing} for {name} please." for count in COUNTS for thing in THINGS for name in NAMES]
LENGTH = 12
PATTERN = "[A-Z][a-z ]+[.?]"  # of replies to each third message


def start_pocket(start: StartServer, engine: str) -> Server:
    if engine == "ctranslate2":
        pytest.importorskip("ctranslate2")
    return start("pocket", engine=engine, max_new_tokens=LENGTH)


@pytest.mark.parametrize("engine", ["ctranslate2", "transformers"])
@pytest.mark.variants("ctranslate2")
def test_sixty_four_clients_get_their_replies(engine: str, start: StartServer) -> None:
    pytest.importorskip("llguidance")
    server = start_pocket(start, engine)
    values = {"model_name_or_path": "pocket", "max_new_tokens": LENGTH, "use_cpu": True}
    free, constrained = (Chatter.load(ChatSettings(**values, regex=pattern)) for pattern in (None, PATTERN))
    bodies, expected = list[bytes](), list[str]()
    for number, message in enumerate(MESSAGES):
        constraint = {} if number % 3 else {"structured_outputs": {"regex": PATTERN}}
        bodies.append(make_chat(message, "pocket", **constraint))
        expected.append((constrained if constraint else free).reply(message).reply)
    assert len(set(expected)) > len(expected) // 2
    until = time.monotonic() + (60 if LONG else 2)
    wrong: Counter[str] = Counter()
    done = Counter[int]()
    lock = threading.Lock()

    def be_client(number: int) -> None:
        with connect(server.url) as connection:
            while time.monotonic() < until or done[number] < 2:
                index = (number * 7 + done[number]) % len(MESSAGES)
                connection.sendall(make_request(CHAT, bodies[index]))
                status, _, body = read_answer(connection)
                found = json.loads(body)["choices"][0]["message"]["content"] if status == 200 else str(status)
                with lock:
                    done[number] += 1
                    wrong[found] += found != expected[index]

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(be_client, range(CLIENTS)))
    assert +wrong == Counter()
    assert len(done) == CLIENTS
    assert max(done.values()) < 3 * min(done.values())  # no client waits much longer


@pytest.mark.parametrize("engine", ["ctranslate2", "transformers"])
@pytest.mark.variants("ctranslate2")
def test_a_large_request_neither_delays_nor_changes_small_requests(
    engine: str, chats: dict[str, Path], start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and adapter share modules, and each batch of the large request is interrupted again and again."""
    if engine == "ctranslate2":
        pytest.importorskip("ctranslate2")
    monkeypatch.setattr(batching, "SECONDS_PER_TURN", 0.0)
    server = start({name: str(chats[name]) for name in ("base", "adapter")}, engine=engine, max_batch_tokens=4000)
    small = [make_chat(text, name, max_tokens=LENGTH) for text in MESSAGES[:4] for name in ("base", "adapter")]
    large = make_chat(MESSAGES[0], "adapter", max_tokens=300)
    small_alone, large_alone = [ask(server.url, body) for body in small], ask(server.url, large)
    assert len(set(small_alone)) > 2
    many = json.dumps({**json.loads(large), "n": 24}).encode()
    with connect(server.url) as connection, ThreadPoolExecutor(4) as pool:
        connection.sendall(make_request(CHAT, many))
        wait_until_running(server.url)
        found = list(pool.map(lambda body: ask(server.url, body), small))
        streamed = list(pool.map(lambda body: read_stream(server, body), small))
        assert not select.select([connection], [], [], 0)[0]  # the large request isn't answered yet
        status, _, body = read_answer(connection)
    assert found == streamed == small_alone
    assert status == 200
    assert [choice["message"]["content"] for choice in json.loads(body)["choices"]] == [large_alone] * 24


def read_stream(server: Server, body: bytes) -> str:
    with connect(server.url) as connection:
        connection.sendall(make_request(CHAT, json.dumps({**json.loads(body), "stream": True}).encode()))
        found = receive_until(connection, b"[DONE]")
    events = [line.partition(b"data: ")[2] for line in found.splitlines() if b"data: {" in line]
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)


def receive_until(connection: socket.socket, *ends: bytes) -> bytes:
    found = b""
    while not any(end in found for end in ends):
        found += (part := connection.recv(1 << 16))
        assert part
    return found


@pytest.mark.long
def test_memory_is_flat_over_ten_thousand_requests(start: StartServer) -> None:
    server = start_pocket(start, "ctranslate2")
    sizes: list[int] = []
    with ThreadPoolExecutor(16) as pool:
        for _ in range(20):
            list(pool.map(lambda number: send_or_hang_up(server, number), range(500)))
            sizes.append(read_memory())
    # the first thousand requests fill caches: of words, threads and the allocator
    assert sizes[-1] - sizes[3] < 20 << 20, [size >> 20 for size in sizes]


def send_or_hang_up(server: Server, number: int) -> None:
    with connect(server.url) as connection:
        text = f"{MESSAGES[number % len(MESSAGES)]} {number}"
        constraint = {} if number % 4 else {"structured_outputs": {"regex": f"[a-z]{{{number}}}"}}
        connection.sendall(make_request(CHAT, make_chat(text, "pocket", stream=number % 3 == 0, **constraint)))
        if number % 10:  # else hang up
            assert receive_until(connection, b"[DONE]", b'"usage":').startswith(b"HTTP/1.1 200")


def read_memory() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024
