"""A raw HTTP client, for requests that no library would send."""

import json
import re
import socket
import time
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 120.0
CHAT = "/v1/chat/completions"


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname is not None
    return socket.create_connection((parts.hostname, parts.port or 80), timeout=PATIENCE)


def make_request(path: str, body: bytes = b"", method: str = "POST", **headers: str) -> bytes:
    """Make the bytes of a request. `content_type="…"` sets the header Content-Type."""
    values = {"host": "localhost", "content_type": "application/json", "content_length": str(len(body))} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in values.items()]
    return f"{method} {path} HTTP/1.1\r\n".encode() + "\r\n".join([*lines, "", ""]).encode() + body


def make_chat(text: str = "Hello", model: str = "base", **values: Any) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": text}]} | values).encode()


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read an answer that has a Content-Length, or that ends with the connection."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += _receive(connection)
    head, _, body = found.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    while len(body) < int(headers["content-length"]):
        body += _receive(connection)
    return int(first.split()[1]), headers, body


def _receive(connection: socket.socket) -> bytes:
    found = connection.recv(1 << 16)
    assert found, "the server has closed the connection"
    return found


def exchange(
    url: str, path: str = CHAT, body: bytes = b"", method: str = "POST", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Send one request. Return the status, the headers and the body of its answer."""
    with connect(url) as connection:
        connection.sendall(make_request(path, body, method, **headers))
        return read_answer(connection)


def send(url: str, path: str = CHAT, body: bytes = b"", method: str = "POST", **headers: str) -> Any:
    """Send one request. Return its status and the JSON of its answer."""
    status, _, answer = exchange(url, path, body, method, **headers)
    return status, json.loads(answer)


def ask(url: str, body: bytes) -> str:
    """Send one chat, and return its reply."""
    status, answer = send(url, body=body)
    assert status == 200, answer
    return str(answer["choices"][0]["message"]["content"])


def read_metrics(url: str, **headers: str) -> str:
    return exchange(url, "/metrics", method="GET", **headers)[2].decode()


def wait_for_metric(url: str, pattern: str) -> None:
    until = time.monotonic() + PATIENCE
    while not re.search(f"^t5tune_{pattern}$", read_metrics(url), re.MULTILINE):
        assert time.monotonic() < until, pattern


def wait_until_running(url: str) -> None:
    wait_for_metric(url, r"replies_running [1-9]\S*")
