"""The HTTP interface: OpenAI's endpoints, health, metrics, and a page to try the models."""

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from t5tune.errors import T5TuneError, to_one_line
from t5tune.model.prompts import Prompt, ReplyText
from t5tune.progress import Answered, Report
from t5tune.serving.batching import Batcher, QueueFull
from t5tune.serving.generation import FinishReason, Generation
from t5tune.serving.metrics import Metrics
from t5tune.serving.models import ServedModel
from t5tune.serving.protocol import (
    LAST_EVENT,
    Answer,
    ApiError,
    Body,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Usage,
    encode_event,
    encode_json,
    parse_body,
)

PAGE_FILE = Path(__file__).with_name("page.html")
MAX_BODY_BYTES = 4 << 20
SECONDS_FOR_BODY = 30.0
SECONDS_TO_RETRY = "1"
CLIENT_GONE = 499  # nginx's status for it, which no one receives
# larger bodies are parsed and encoded in another thread, so that they don't hold up other requests
LARGE_BODY_BYTES = 16 << 10
LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
OPEN_PATHS = {"/", "/health"}  # no key is needed for these
JSON = "application/json"
# the page loads nothing from elsewhere, and no other page may frame it
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass
class Record:
    """What becomes known of a request while it is answered."""

    model: str | None = None
    prompt_tokens: int = 0
    dropped_messages: int = 0
    error: str | None = None
    generations: list[Generation] = field(default_factory=list)


class Service:
    """Answers requests with the models. All methods run in the event loop's thread, except where they say otherwise.

    Args:
        api_key: the key that clients must send; None: none.
        is_local: whether only this machine reaches the server.

    Attributes:
        is_stopping: set to refuse new requests.
        num_cut_off: replies that weren't complete when the server had to stop.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        batcher: Batcher,
        metrics: Metrics,
        api_key: str | None,
        is_local: bool,
        report: Report,
    ) -> None:
        self.is_stopping = False
        self.num_cut_off = 0
        self._models = models
        self._batcher = batcher
        self._metrics = metrics
        self._api_key = api_key
        self._is_local = is_local
        self._report = report
        routes = [
            Route("/", self._show_page),
            Route("/health", self._show_health),
            Route("/metrics", self._show_metrics),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/v1/chat/completions", self._complete_chat, methods=["POST"]),
            Route("/v1/completions", self._complete_text, methods=["POST"]),
        ]
        handlers: dict[Any, Callable[..., Any]] = {
            HTTPException: _refuse_route,
            ApiError: _refuse,
            ClientDisconnect: _note_disconnect,
            Exception: _explain_failure,
        }
        self._router = Starlette(routes=routes, exception_handlers=handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request as an ASGI application: check it, pass it to its route, count and report it."""
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        started, record, status = time.monotonic(), Record(), CLIENT_GONE
        request_id = uuid.uuid4().hex
        scope["t5tune"] = record
        is_complete = False

        async def send_and_note(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            elif not message.get("more_body"):
                is_complete = True
            await send(message)

        try:
            await self._answer_checked(scope, receive, send_and_note)
        except Exception as error:  # a fault of ours: the client has got status 500, or its connection is closed
            record.error = record.error or _describe_failure(error)
            if not is_complete:
                raise
        except asyncio.CancelledError:  # the server can't wait any longer
            self.num_cut_off += sum(generation.ended is None for generation in record.generations)
            raise
        finally:
            # those that no one waits for any more
            self._batcher.cancel([generation for generation in record.generations if generation.ended is None])
            self._note_answer(scope, record, request_id, status if is_complete else CLIENT_GONE, started)

    async def _answer_checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            self._check(request)
        except ApiError as error:
            await _refuse(request, error)(scope, receive, send)
            return
        await self._router(scope, receive, send)

    def _check(self, request: Request) -> None:
        """Check the address that a request was sent to, and its key.

        Raises:
            ApiError: the request is refused.
        """
        if self.is_stopping:
            raise ApiError(503, "the server is stopping", headers={"retry-after": "5", "connection": "close"})
        if self._api_key is None:
            # a page on the web may give a name of its own to this machine's address, and send requests from a browser
            host = urlsplit(f"//{request.headers.get('host', '')}").hostname
            if self._is_local and host not in LOCAL_NAMES:
                problem = f"host: {host}: not a name of this machine; without an API key, the server answers only"
                raise ApiError(403, f"{problem} requests to {', '.join(sorted(LOCAL_NAMES))}", code="wrong_host")
        elif request.url.path not in OPEN_PATHS:
            kind, _, key = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
                problem = "wrong API key" if key else "no API key; send it in the header Authorization: Bearer KEY"
                raise ApiError(401, problem, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _note_answer(self, scope: Scope, record: Record, request_id: str, status: int, started: float) -> None:
        route = scope.get("route")
        begun = [generation.started_at for generation in record.generations if generation.started_at is not None]
        first = [item.first_token_at for item in record.generations if item.first_token_at is not None]
        answered = Answered(
            id=request_id,
            client=scope["client"][0] if scope.get("client") else "",
            method=scope["method"],
            path=scope["path"],
            status=status,
            seconds=round(time.monotonic() - started, 6),
            model=record.model,
            prompt_tokens=record.prompt_tokens,
            completion_tokens=sum(len(generation.ids) for generation in record.generations),
            queue_seconds=round(min(begun) - started, 6) if begun else None,
            first_token_seconds=round(min(first) - started, 6) if first else None,
            dropped_messages=record.dropped_messages,
            error=record.error,
        )
        self._metrics.count_answer(answered, route.path if isinstance(route, Route) else "other")
        self._report(answered)

    async def _show_page(self, request: Request) -> Response:
        return Response(PAGE_FILE.read_bytes(), media_type="text/html", headers=PAGE_HEADERS)

    async def _show_health(self, request: Request) -> Response:
        if not self._batcher.is_alive:
            raise ApiError(503, "the thread that computes replies has ended; restart the server")
        return Response(encode_json({"status": "ok"}), media_type=JSON)

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), media_type=self._metrics.content_type)

    async def _list_models(self, request: Request) -> Response:
        models = [_describe_model(model) for model in self._models.values()]
        return Response(encode_json({"object": "list", "data": models}), media_type=JSON)

    async def _show_model(self, request: Request) -> Response:
        return Response(encode_json(_describe_model(self._find_model(request.path_params["name"]))), media_type=JSON)

    def _find_model(self, name: str) -> ServedModel:
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(404, f"model: {name}: not served here; this server has {known}", "model", "model_not_found")
        return self._models[name]

    async def _complete_chat(self, request: Request) -> Response:
        return await self._complete(request, ChatRequest)

    async def _complete_text(self, request: Request) -> Response:
        return await self._complete(request, CompletionRequest)

    async def _complete(self, request: Request, kind: type[Body]) -> Response:
        record: Record = request.scope["t5tune"]
        body = await _read_body(request)
        if len(body) < LARGE_BODY_BYTES:
            order = self._read_order(body, kind, record)
        else:
            order = await asyncio.to_thread(self._read_order, body, kind, record)
        replies = _Replies(order, self._batcher, record)
        headers = {"x-t5tune-dropped-messages": str(record.dropped_messages)} if record.dropped_messages else {}
        if order.request.stream:
            replies.submit()  # a full queue is an error of its own status
            events = replies.stream(is_chat=kind is ChatRequest)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        whole = await _unless_gone(request, replies.collect(is_chat=kind is ChatRequest))
        return Response(encode_json(whole), media_type=JSON, headers=headers)

    def _read_order(self, body: bytes, kind: type[Body], record: Record) -> "Order":
        """Read a request, in any thread."""
        request = parse_body(body, kind)
        model = self._find_model(request.model)
        record.model = model.name
        options = model.read_options(request)
        prompts = model.read_prompts(request)
        record.prompt_tokens = sum(prompt.num_tokens for prompt in prompts)
        record.dropped_messages = sum(prompt.dropped_turns for prompt in prompts)
        return Order(request, model, prompts, options)


@dataclass(frozen=True)
class Order:
    """A request that was read: what to generate with which model."""

    request: GenerationRequest
    model: ServedModel
    prompts: list[Prompt]
    options: Any


class _Replies:
    """The replies of one request, while they are generated."""

    def __init__(self, order: Order, batcher: Batcher, record: Record) -> None:
        self._order = order
        self._batcher = batcher
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._is_woken = False
        request = order.request
        self._generations = [
            Generation(
                engine=order.model.engine,
                source=prompt.ids,
                options=order.options
                if order.options.seed is None
                else replace(order.options, seed=order.options.seed + number),
                notify=self._notify,
                follows=request.stream or bool(request.stop),
            )
            for prompt in order.prompts
            for number in range(request.n)
        ]
        record.generations = self._generations

    def submit(self) -> None:
        """Queue the replies.

        Raises:
            ApiError: too many wait already.
        """
        try:
            self._batcher.submit(self._generations)
        except QueueFull as error:
            headers = {"retry-after": SECONDS_TO_RETRY}
            raise ApiError(429, f"too many requests: {error.message}", code="queue_full", headers=headers) from error

    async def collect(self, is_chat: bool) -> dict[str, Any]:
        """Generate the replies, and return the body of the whole answer."""
        self.submit()
        texts = [""] * len(self._generations)
        reasons = [""] * len(self._generations)
        async for index, piece, reason in self._follow():
            texts[index] += piece
            reasons[index] = reason or ""
        answer = Answer(self._order.model.name, is_chat)
        return answer.make_whole(list(zip(texts, reasons, strict=True)), self._count_usage())

    async def stream(self, is_chat: bool) -> AsyncIterator[bytes]:
        """Yield the events of the answer."""
        answer = Answer(self._order.model.name, is_chat)
        try:
            for index in range(len(self._generations)) if is_chat else ():
                yield encode_event(answer.make_part(index, "", is_first=True))
            async for index, piece, reason in self._follow():
                if piece or reason is None:
                    yield encode_event(answer.make_part(index, piece))
                if reason is not None:
                    yield encode_event(answer.make_part(index, "", reason))
        except ApiError as error:
            self._record.error = error.message
            yield encode_event(error.to_body())
            return
        if self._order.request.stream_options.include_usage:
            yield encode_event(answer.make_usage(self._count_usage()))
        yield LAST_EVENT

    async def _follow(self) -> AsyncIterator[tuple[int, str, FinishReason | None]]:
        """Yield each new piece of text, (index of the reply, text, finish reason with its last piece).

        Raises:
            ApiError: a reply couldn't be computed.
        """
        prompts, stops = self._order.model.prompts, self._order.request.stop
        pieces: list[list[str]] = [[] for _ in self._generations]
        texts = [ReplyText(prompts, show.append, stops) for show in pieces]
        unfinished = dict(enumerate(self._generations))
        while unfinished:
            await self._news.wait()
            self._news.clear()
            for index, generation in list(unfinished.items()):
                reason = self._update(generation, texts[index])
                if reason is not None:
                    del unfinished[index]
                if pieces[index] or reason is not None:
                    yield index, "".join(pieces[index]), reason
                    pieces[index].clear()

    def _update(self, generation: Generation, text: ReplyText) -> FinishReason | None:
        ended = generation.ended  # before its ids, which are complete then
        if isinstance(ended, T5TuneError):
            raise ApiError(500, str(ended), code=type(ended).__name__)
        if ended is None:
            if not generation.follows or not text.update(generation.ids[:]):
                return None
            self._batcher.cancel([generation])  # at one of the texts before which the reply ends
            return "stop"
        whole = text.finish(generation.ids)
        is_cut = bool(self._order.request.stop) and whole != self._order.model.prompts.decode(generation.ids)
        return "stop" if is_cut else ended

    def _count_usage(self) -> Usage:
        prompt_tokens = sum(prompt.num_tokens for prompt in self._order.prompts)
        return Usage(prompt_tokens, sum(len(generation.ids) for generation in self._generations))

    def _notify(self) -> None:
        """Wake up the request, from any thread: once for all news since it was awake."""
        if not self._is_woken:
            self._is_woken = True
            with suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_woken = False
        self._news.set()


async def _read_body(request: Request) -> bytes:
    """Read the body of a request.

    Raises:
        ApiError: it isn't JSON by its header, too large, or doesn't arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:  # also: a browser sends JSON to another site only if that allows it, which this one doesn't
        raise ApiError(415, f"content-type: {kind or 'missing'}: expected the header Content-Type: {JSON}")
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS_FOR_BODY):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        problem = f"the body didn't arrive within {SECONDS_FOR_BODY:g} seconds"
        raise ApiError(408, problem, headers={"connection": "close"}) from None
    return bytes(body)


async def _unless_gone(request: Request, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Do the work, unless the client goes away.

    Raises:
        ClientDisconnect: it has.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for unfinished in (task, gone):
            unfinished.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _describe_model(model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "t5tune"}


def _refuse(request: Request, error: ApiError) -> Response:
    request.scope["t5tune"].error = error.message
    return Response(encode_json(error.to_body()), error.status, error.headers, JSON)


def _note_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


def _refuse_route(request: Request, error: HTTPException) -> Response:
    """Answer a request to a path that doesn't exist, or with a method that it doesn't have."""
    path = request.url.path
    if error.status_code == 404:
        known = "/v1/chat/completions, /v1/completions, /v1/models, /health, /metrics and /"
        return _refuse(request, ApiError(404, f"{path}: no such path; this server has {known}"))
    problem = f"{request.method} {path}: {error.detail}".rstrip()
    return _refuse(request, ApiError(error.status_code, problem, headers=error.headers))


def _explain_failure(request: Request, error: Exception) -> Response:
    return _refuse(request, ApiError(500, _describe_failure(error)))


def _describe_failure(error: Exception) -> str:
    return to_one_line(f"{type(error).__name__}: {error}")
