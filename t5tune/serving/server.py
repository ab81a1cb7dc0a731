"""uvicorn's server in a background thread, so that this process keeps its signal handlers.

server = HttpServer(service, bind("127.0.0.1", 8000), batcher)
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
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from t5tune.errors import SettingsError, T5TuneError
from t5tune.serving.app import MAX_BODY_BYTES, Service
from t5tune.serving.computing import Batcher

BACKLOG = 2048
SECONDS_FOR_HEADERS = 30.0  # of a request, counted from the connection or from the last answer
SECONDS_AFTER_EARLY_ANSWER = 2.0  # for a client that still sends the body to notice the answer
SECONDS_TO_HAND_OVER = 2.0  # for the next request of connections to a server that leaves its port
SECONDS_BETWEEN_LOOKS = 0.05
MILLISECONDS_TO_READ = 60_000  # a client that reads nothing for this long is disconnected


def bind(host: str, port: int, reuse_port: bool = False) -> socket.socket:
    """Reserve an address, without accepting connections yet; with `reuse_port`, several servers of a user can."""
    if reuse_port and not hasattr(socket, "SO_REUSEPORT"):
        raise SettingsError("reuse_port: this operating system can't share a port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        problem = f"host: {host}: no such address: {error.strerror}"
        raise SettingsError(problem, hint="use an address of this machine, such as 127.0.0.1 or 0.0.0.0") from None
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if sys.platform == "linux":  # connections inherit it
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, MILLISECONDS_TO_READ)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        setting = f"port: {port}" if error.errno in (errno.EADDRINUSE, errno.EACCES) else f"host: {host}"
        hint = "choose another port or host; --port 0 takes any free port"
        if reuse_port and error.errno == errno.EADDRINUSE:
            hint = "both servers need --reuse-port and the same user"
        raise SettingsError(f"{setting}: {error.strerror}", hint=hint) from None
    return found


def format_url(listener: socket.socket, host: str) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


class HttpServer(uvicorn.Server):
    """Accepts requests from its creation on.

    Args:
        shares_port: whether a second server takes new connections as soon as this server stops.
    """

    def __init__(self, service: Service, listener: socket.socket, batcher: Batcher, shares_port: bool = False) -> None:
        config = uvicorn.Config(
            _EarlyAnswers(service),
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            lifespan="off",
            http=_Connection,
            ws="none",
            backlog=BACKLOG,
            timeout_keep_alive=int(SECONDS_FOR_HEADERS),
        )
        super().__init__(config)
        self._service = service
        self._batcher = batcher
        self._shares_port = shares_port
        self._seconds_to_stop = 0.0
        self._has_started = threading.Event()
        self._has_ended = threading.Event()
        threading.Thread(target=self.run, args=([listener],), name="http", daemon=True).start()
        self._has_started.wait()
        if not self.started:
            raise T5TuneError("the server couldn't start")

    def wait(self) -> None:
        """Wait until the server has ended, or a signal raises KeyboardInterrupt."""
        # not Thread.join: in Python 3.11, a signal in it marks the thread as ended (python/cpython#90882)
        self._has_ended.wait()

    def stop(self, timeout: float) -> int:
        """Refuse new requests with status 503, finish accepted requests within `timeout` seconds, and end.

        Returns:
            How many replies were cut off.
        """
        self._seconds_to_stop = timeout
        self.should_exit = True
        self.wait()
        self._batcher.close(0)
        self._service.trials.close()
        return self._service.num_cut_off

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, to refuse their requests, until all accepted requests are answered."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._seconds_to_stop
        for listener in sockets or [] if self._shares_port else []:
            await self._hand_over(listener, min(until, loop.time() + SECONDS_TO_HAND_OVER))
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._service.finish()
        self.config.timeout_graceful_shutdown = max(0, until - loop.time())  # type: ignore[assignment]
        await super().shutdown(sockets)

    async def _hand_over(self, listener: socket.socket, until: float) -> None:
        """Close the listener, and answer the next request of each open connection, which then closes.

        The kernel would reset the connections in the queue of a closed listener, so they are accepted first.
        """
        loop = asyncio.get_running_loop()
        waiting: list[socket.socket] = []
        with suppress(BlockingIOError):
            while True:
                waiting.append(listener.accept()[0])
        for server in self.servers:
            server.close()
        self._service.is_leaving = True
        for connection in waiting:
            await loop.connect_accepted_socket(lambda: _Connection(self.config, self.server_state, {}), connection)
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)  # connections that were accepted just before are set up
        while self.server_state.connections and loop.time() < until:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        for idle_or_busy in list(self.server_state.connections):
            idle_or_busy.shutdown()  # closes an idle connection now, and a busy one after its answer

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self._has_started.set()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            with suppress(SystemExit):  # uvicorn couldn't start
                super().run(sockets)
        finally:
            self._has_started.set()
            self._has_ended.set()


class _Connection(H11Protocol):
    """uvicorn's connection, which is closed if its first or next request doesn't arrive in time.

    Unlike httptools, h11 limits the size of headers, and reads the body of a request that offers to upgrade to HTTP/2,
    as Java's client does.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_deadline()

    def handle_events(self) -> None:
        super().handle_events()
        self._set_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()  # the timer would keep this object and its buffers in memory
        super().connection_lost(exc)

    def _set_deadline(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._clear_deadline()  # a request is being answered
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(SECONDS_FOR_HEADERS, self.transport.close)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _EarlyAnswers:
    """Closes the connection of a request that is answered before its body was read.

    Otherwise uvicorn would read the rest of the body for as long as the client sends it. This reads on only for a
    moment: if a connection is closed while its client sends, the client may not see the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_unread = any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in scope["headers"]
        )
        closes = is_answered = False

        async def receive_and_note() -> Message:
            nonlocal has_unread
            message = await receive()
            has_unread = has_unread and message["type"] == "http.request" and message["more_body"]
            return message

        async def send_and_note(message: Message) -> None:
            nonlocal closes, is_answered
            if message["type"] == "http.response.start":
                closes = has_unread
                if closes:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif closes and not message.get("more_body"):
                is_answered = True
                message = {**message, "more_body": True}
            await send(message)

        await self._app(scope, receive_and_note, send_and_note)
        if not is_answered:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(SECONDS_AFTER_EARLY_ANSWER):
                room = MAX_BODY_BYTES
                while has_unread and room > 0:
                    room -= len((await receive_and_note()).get("body", b""))
        await send({"type": "http.response.body"})  # uvicorn closes the connection
