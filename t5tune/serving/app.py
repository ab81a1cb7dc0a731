"""The HTTP interface: OpenAI's endpoints, vLLM's for labels, health, metrics, and a page to try the models."""

import asyncio
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Match, Route
from starlette.types import Message, Receive, Scope, Send

from t5tune.constraints.trials import QUICK, Trials
from t5tune.errors import InvalidReplyError, SettingsError, T5TuneError, make_printable
from t5tune.inference.label_sources import Source
from t5tune.inference.prompts import Prompt
from t5tune.io.hosts import is_loopback
from t5tune.progress import Answered, Report
from t5tune.serving.computing import Batcher
from t5tune.serving.generation import DecodingOptions
from t5tune.serving.metrics import Metrics
from t5tune.serving.models import VERBS, LabelModel, ServedModel, TextModel
from t5tune.serving.protocol import (
    ApiError,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    GenerationRequest,
    ScoreRequest,
    parse_body,
)
from t5tune.serving.replies import Record, Replies
from t5tune.serving.scoring import classify, score

PAGE_FILE = Path(__file__).with_name("page.html")
MAX_BODY_BYTES = 4 << 20
SECONDS_FOR_BODY = 30.0
SECONDS_TO_RESTART = "5"
SECONDS_FOR_TRIALS = 1.0  # of constraints, while the server stops
CLIENT_GONE = 499  # nginx's status, only for metrics and the log
PROBES = {"/health", "/ready"}  # are answered before the models are loaded, and while the server stops
OPEN_PATHS = {"/", *PROBES}  # need no API key
JSON = "application/json"
# the page loads nothing from other sites, and no other page may frame it
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(eq=False)
class Service:
    """The ASGI application. All methods except `use_models` run in the event loop's thread."""

    batcher: Batcher
    metrics: Metrics
    max_replies: int  # to one request
    api_key: str | None  # that clients must send; None: no key needed
    is_local: bool  # whether the server listens only on this machine's loopback address
    report: Report
    models: Mapping[str, ServedModel] = field(default_factory=dict)  # none: they are being loaded
    reload: Callable[[], Any] = lambda: None  # returns a dataclass for the answer
    is_reloading: Callable[[], bool] = lambda: False
    is_leaving: bool = False  # whether a new server takes the connections of later requests
    num_cut_off: int = 0  # replies that were incomplete when the server had to stop

    def __post_init__(self) -> None:
        self._stopping = asyncio.Event()
        self._num_accepted = 0  # requests that are being answered
        self._all_answered = asyncio.Event()
        # One thread parses all bodies and encodes all prompts. The event loop can answer other requests meanwhile, and
        # competes with only one thread for Python's interpreter lock, however many requests arrive.
        self._reader = ThreadPoolExecutor(1, "prompts")
        # slow constraints, which compile for seconds without the interpreter lock, don't delay fast ones
        self._compiler = ThreadPoolExecutor(QUICK.max_running, "constraints")
        self._slow_compiler = ThreadPoolExecutor(1, "slow constraints")
        self.trials = Trials()
        self._reloader = ThreadPoolExecutor(1, "reload")
        self._routes = [
            Route("/", self._show_page),
            Route("/health", self._show_health),
            Route("/ready", self._show_ready),
            Route("/metrics", self._show_metrics),
            Route("/v1/models", self._list_models),
            Route("/v1/models/reload", self._reload, methods=["POST"]),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/v1/chat/completions", partial(self._complete, kind=ChatRequest), methods=["POST"]),
            Route("/v1/completions", partial(self._complete, kind=CompletionRequest), methods=["POST"]),
            Route("/v1/score", self._score, methods=["POST"]),
            *(Route(path, self._classify, methods=["POST"]) for path in ("/v1/classify", "/classify")),
            Route("/v1/responses", _refuse_responses, methods=["POST"]),
        ]
        handlers: dict[Any, Callable[..., Any]] = {
            HTTPException: _refuse_route,
            ApiError: _refuse,
            ClientDisconnect: _end_silently,
            Exception: _report_failure,
        }
        self._router = Starlette(routes=self._routes, exception_handlers=handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, route it, then count and report the answer."""
        started, record, request_id = time.monotonic(), Record(), uuid.uuid4().hex
        status, is_complete = CLIENT_GONE, False
        scope["t5tune"] = record

        async def send_and_note(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                closes = [(b"connection", b"close")] if self.is_leaving or self._stopping.is_set() else []
                message["headers"] = [*message["headers"], *closes, (b"x-request-id", request_id.encode())]
            elif not message.get("more_body"):
                is_complete = True
            await send(message)

        try:
            await self._answer_checked(scope, receive, send_and_note)
        except Exception as error:  # a bug: the client got status 500, or uvicorn closes its connection
            record.error = record.error or _describe_failure(error)
            if not is_complete:
                raise
        except asyncio.CancelledError:  # the shutdown timeout is over
            self.num_cut_off += sum(generation.ended is None for generation in record.generations)
            if status != CLIENT_GONE:
                raise
            cut_off = ApiError(503, "the server stopped before the reply was complete")
            await (await _refuse(Request(scope, receive), cut_off))(scope, receive, send_and_note)
        finally:
            self.batcher.cancel([generation for generation in record.generations if generation.ended is None])
            self._note_answer(scope, record, request_id, status if is_complete else CLIENT_GONE, started)
            record.generations.clear()  # breaks a reference cycle, which would keep the model after a reload

    def use_models(self, models: Mapping[str, ServedModel]) -> None:
        """Answer later requests with these models. May be called in any thread."""
        self.batcher.add_threads(max(model.engine.max_batches for model in models.values()))
        self.models = models

    async def _answer_checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            self._check(request)
        except ApiError as error:
            await (await _refuse(request, error))(scope, receive, send)
            return
        self._num_accepted += 1
        try:
            await self._router(scope, receive, send)
        finally:
            self._num_accepted -= 1
            if self._stopping.is_set() and self._num_accepted == 0:
                self._all_answered.set()

    async def finish(self) -> None:
        """Refuse new requests, and wait until all accepted requests are answered."""
        self._stopping.set()
        asyncio.get_running_loop().call_later(SECONDS_FOR_TRIALS, self.trials.close)
        if self._num_accepted:
            await self._all_answered.wait()

    def _check(self, request: Request) -> None:
        if request.scope["path"] not in PROBES and (not self.models or self._stopping.is_set()):
            raise self._refuse_for_now()
        if self.api_key is None:
            # DNS rebinding: a website may point its host name at this machine, and send requests from a browser here
            host = request.headers.get("host", "")
            if self.is_local and not is_loopback(_get_host_name(host)):
                problem = f"host: {host or 'missing'}: not a name of this machine; without an API key, the server"
                raise ApiError(403, f"{problem} answers only requests to localhost and 127.0.0.1", code="wrong_host")
        elif request.scope["path"] not in OPEN_PATHS:
            kind, _, key = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
                problem = "wrong API key" if key else "no API key; send it in the header Authorization: Bearer KEY"
                raise ApiError(401, problem, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _note_answer(self, scope: Scope, record: Record, request_id: str, status: int, started: float) -> None:
        # older releases of Starlette don't say which route answered
        paths = [route.path for route in self._routes if route.matches(scope)[0] is not Match.NONE]
        begun = [reply.started_at for reply in record.generations if reply.started_at is not None]
        first = [reply.first_token_at for reply in record.generations if reply.first_token_at is not None]
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
            repaired_tokens=sum(generation.num_repairs for generation in record.generations),
            invalid_replies=sum(isinstance(reply.ended, InvalidReplyError) for reply in record.generations),
            error=record.error,
        )
        self.metrics.count_answer(answered, paths[0] if paths else "other")
        self.report(answered)

    async def _show_page(self, request: Request) -> Response:
        return Response(PAGE_FILE.read_bytes(), media_type="text/html", headers=PAGE_HEADERS)

    async def _show_health(self, request: Request) -> Response:
        if failure := self.batcher.failure:
            raise ApiError(503, failure)
        return JSONResponse({"status": "ok"})

    async def _show_ready(self, request: Request) -> Response:
        if not self.models or self.is_leaving or self._stopping.is_set():
            raise self._refuse_for_now()
        await self._show_health(request)
        return JSONResponse({"status": "ready"})

    def _refuse_for_now(self) -> ApiError:
        state = "stopping" if self.models else "loading its models"
        return ApiError(503, f"the server is {state}", headers={"retry-after": SECONDS_TO_RESTART})

    async def _reload(self, request: Request) -> Response:
        if self.api_key is None:
            hint = "set T5TUNE_API_KEY, or send the signal SIGUSR1 to the server"
            raise ApiError(403, f"reload: a server without an API key reloads only on its own machine; {hint}")
        if self.is_reloading():
            problem = "reload: a reload is running, and may have read the files too early; try again when it has ended"
            raise ApiError(409, problem, headers={"retry-after": SECONDS_TO_RESTART})
        result = asyncio.get_running_loop().run_in_executor(self._reloader, self.reload)
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({result, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not result.done():
            raise self._refuse_for_now()
        if isinstance(error := result.exception(), T5TuneError):
            raise ApiError(500, f"not reloaded: {'; '.join(str(error).splitlines())}", code=error.kind)
        return JSONResponse(asdict(result.result()))

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type=self.metrics.content_type)

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model.to_body() for model in self.models.values()]})

    async def _show_model(self, request: Request) -> Response:
        return JSONResponse(self._find_model(request.path_params["name"]).to_body())

    def _find_model(self, name: str) -> ServedModel:
        models = self.models  # which a reload replaces
        if name not in models:
            known = ", ".join(models)
            raise ApiError(404, f"model: {name}: not served here; this server has {known}", "model", "model_not_found")
        return models[name]

    def _find_text_model(self, name: str) -> TextModel:
        model = self._find_model(name)
        if isinstance(model, LabelModel):
            raise ApiError(
                400, f"model: {name} {VERBS[model.reader.task.objective]}: use /v1/classify", "model", "unsupported"
            )
        assert isinstance(model, TextModel), "a model without labels"
        return model

    async def _complete(self, request: Request, kind: type[GenerationRequest]) -> Response:
        record: Record = request.scope["t5tune"]
        replies = await self._read_replies(await _read_body(request), kind, record)
        headers = {"x-t5tune-dropped-messages": str(record.dropped_messages)} if record.dropped_messages else {}
        replies.submit()  # before an answer begins, so that a full queue still decides its status
        if replies.request.stream:
            return StreamingResponse(replies.stream(), media_type="text/event-stream", headers=headers)
        return JSONResponse(await _unless_gone(request, replies.collect()), headers=headers)

    async def _read_replies(self, body: bytes, kind: type[GenerationRequest], record: Record) -> Replies:
        run = partial(asyncio.get_running_loop().run_in_executor, self._reader)
        request = await run(parse_body, body, kind)
        model = self._find_text_model(request.model)
        record.model = model.name
        self._check_number(request)
        options = await self._read_options(model, request)
        prompts: list[Prompt] = []
        unread = model.read_prompts(request)
        while prompt := await run(next, unread, None):  # one by one, so that prompts of other requests get their turn
            prompts.append(prompt)
        record.prompt_tokens = sum(prompt.num_tokens for prompt in prompts)
        record.dropped_messages = sum(prompt.dropped_turns for prompt in prompts)
        return Replies(request, model, prompts, options, self.batcher, record)

    async def _read_options(self, model: TextModel, request: GenerationRequest) -> DecodingOptions:
        if request.constraint_field is None:
            return model.read_options(request, None if request.wants_text else model.constraint)
        run = asyncio.get_running_loop().run_in_executor
        constraint = await run(self._compiler, model.read_constraint, request)
        try:
            is_quick = await self.trials.try_constraint(constraint)
        except SettingsError as error:
            if self._stopping.is_set():  # it may have had too little time
                raise self._refuse_for_now() from None
            raise ApiError(400, str(error), request.constraint_field, "invalid_constraint") from error
        except OSError as error:
            headers = {"retry-after": SECONDS_TO_RESTART}
            raise ApiError(503, f"{constraint.place}: can't be compiled now: {error}", headers=headers) from error
        return await run(self._compiler if is_quick else self._slow_compiler, model.read_options, request, constraint)

    async def _score(self, request: Request) -> Response:
        record: Record = request.scope["t5tune"]
        run = partial(asyncio.get_running_loop().run_in_executor, self._reader)
        asked = await run(parse_body, await _read_body(request), ScoreRequest)
        model = self._find_text_model(asked.model)
        record.model = model.name
        prompt = await run(next, model.read_prompts(asked.make_generation_request()))
        record.prompt_tokens, record.dropped_messages = prompt.num_tokens, prompt.dropped_turns
        targets = await run(model.read_targets, asked)
        return JSONResponse(await _unless_gone(request, score(model, prompt, targets, self.batcher, record)))

    async def _classify(self, request: Request) -> Response:
        record: Record = request.scope["t5tune"]
        run = partial(asyncio.get_running_loop().run_in_executor, self._reader)
        asked = await run(parse_body, await _read_body(request), ClassifyRequest)
        model = self._find_model(asked.model)
        if not isinstance(model, LabelModel):
            problem = f"model: {model.name} writes text: use /v1/chat/completions, or /v1/score to score labels"
            raise ApiError(400, problem, "model", "unsupported")
        record.model = model.name
        if (count := len(asked.input)) > self.max_replies:
            limit = f"this server labels at most {self.max_replies:,} in one request"
            raise ApiError(400, f"input: {count:,} texts: {limit}", "input")
        sources: list[Source] = []
        unread = model.read_sources(asked)
        while source := await run(next, unread, None):  # one by one, as prompts
            sources.append(source)
        record.prompt_tokens = sum(source.num_tokens for source in sources)
        return JSONResponse(await _unless_gone(request, classify(model, sources, self.batcher, record)))

    def _check_number(self, request: GenerationRequest) -> None:
        num_prompts = len(request.prompt) if isinstance(request, CompletionRequest) else 1
        if num_prompts * request.n > self.max_replies:
            limit = f"this server gives at most {self.max_replies:,} replies to one request"
            if num_prompts == 1:
                raise ApiError(400, f"n: {request.n}: {limit}", "n")
            each = "" if request.n == 1 else f", with n {request.n} for each"
            raise ApiError(400, f"prompt: {num_prompts:,} prompts{each}: {limit}", "prompt")


async def _read_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:  # also keeps other websites out: browsers send JSON across sites only with CORS, missing here
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
        raise ApiError(408, f"the body didn't arrive within {SECONDS_FOR_BODY:g} seconds") from None
    return bytes(body)


async def _unless_gone(request: Request, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Do the work, or raise ClientDisconnect as soon as the client is gone."""
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


def _get_host_name(header: str) -> str:
    """Get the name without the port from a Host header; "" if it is empty or malformed."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:  # brackets without an address
        return ""


async def _refuse(request: Request, error: ApiError) -> Response:
    request.scope["t5tune"].error = error.summary
    return JSONResponse(error.to_body(), error.status, error.headers)


async def _end_silently(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _refuse_route(request: Request, error: HTTPException) -> Response:
    path = request.scope["path"]
    if error.status_code == 404:
        known = (
            "/v1/chat/completions, /v1/completions, /v1/score, /v1/classify, /v1/models, /v1/models/reload, /health, "
            "/ready, /metrics, /"
        )
        return await _refuse(request, ApiError(404, f"{path}: no such path; this server has {known}"))
    allowed = (error.headers or {}).get("Allow", "")
    problem = f"{request.method} {path}: use {allowed.replace(', ', ' or ')}" if allowed else f"{path}: {error.detail}"
    return await _refuse(request, ApiError(error.status_code, problem, headers=error.headers))


async def _refuse_responses(request: Request) -> Response:
    problem = "/v1/responses: this server doesn't store conversations; use /v1/chat/completions"
    raise ApiError(501, problem, code="unsupported")


async def _report_failure(request: Request, error: Exception) -> Response:
    return await _refuse(request, ApiError(500, _describe_failure(error)))


def _describe_failure(error: Exception) -> str:
    return make_printable(f"{type(error).__name__}: {error}")
