"""A server that runs in a thread of its own: uvicorn's, so that this process keeps its signal handlers.

server = HttpServer(service, bind("127.0.0.1", 8000))
server.wait()
server.stop(timeout=30.0)
"""

import asyncio
import errno
import socket
import sys
import threading
from contextlib import suppress

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from t5tune.errors import SettingsError, T5TuneError
from t5tune.serving.app import Service
from t5tune.serving.batching import Batcher

BACKLOG = 2048
SECONDS_TO_KEEP_IDLE = 30  # a connection after an answer
SECONDS_FOR_HEADERS = 30.0  # of a connection's first request
MILLISECONDS_TO_READ = 60_000  # a client that doesn't take what was sent to it for so long is disconnected


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address, on which nothing is accepted yet.

    Raises:
        SettingsError: the address can't be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise SettingsError(f"host: {host}: no such address: {error.strerror}") from None
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":  # connections inherit it
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, MILLISECONDS_TO_READ)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        setting = f"port: {port}" if error.errno in (errno.EADDRINUSE, errno.EACCES) else f"host: {host}"
        raise SettingsError(f"{setting}: {error.strerror}", hint="choose another, or --port 0 for any") from None
    return found


def format_url(listener: socket.socket, host: str) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


class HttpServer:
    """Accepts requests from its creation on.

    Raises:
        T5TuneError: it couldn't start.
    """

    def __init__(self, service: Service, listener: socket.socket, batcher: Batcher) -> None:
        self._service = service
        self._batcher = batcher
        config = uvicorn.Config(
            service,
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            lifespan="off",
            http=_Connection,
            backlog=BACKLOG,
            timeout_keep_alive=SECONDS_TO_KEEP_IDLE,
        )
        self._server = _NotifyingServer(config)
        threading.Thread(target=self._server.run, args=([listener],), name="http", daemon=True).start()
        self._server.has_started.wait()
        if not self._server.started:
            raise T5TuneError("the server couldn't start")

    def wait(self) -> None:
        """Wait until the server has ended, or a signal raises KeyboardInterrupt."""
        # not Thread.join: in Python 3.11, a signal in it marks the thread as ended (python/cpython#90882)
        self._server.has_ended.wait()

    def stop(self, timeout: float) -> int:
        """Refuse new requests, finish those that are being answered, and end.

        Args:
            timeout: seconds after which those that aren't complete are cut off.

        Returns:
            How many replies were cut off.
        """
        self._service.is_stopping = True
        self._server.config.timeout_graceful_shutdown = timeout  # type: ignore[assignment]
        self._server.should_exit = True
        self.wait()
        self._batcher.close(0)
        return self._service.num_cut_off


class _Connection(H11Protocol):
    """uvicorn's connection, which is closed if no request arrives.

    h11, unlike httptools, limits the size of headers, and reads the body of a request that asks for HTTP/2, as that of
    Java's client does.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(SECONDS_FOR_HEADERS, self._close_without_request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()  # which would keep this object, and what it has read
        super().connection_lost(exc)

    def _close_without_request(self) -> None:
        if getattr(self, "cycle", None) is None:
            self.transport.close()


class _NotifyingServer(uvicorn.Server):
    """uvicorn's server, which says when it has started or failed to, and when it has ended."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_started = threading.Event()
        self.has_ended = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.has_started.set()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            with suppress(SystemExit):  # it couldn't start
                super().run(sockets)
        finally:
            self.has_started.set()
            self.has_ended.set()
