"""The replies to one request: they are queued, followed while they are generated, and turned into answers."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from t5tune.errors import SettingsError, T5TuneError
from t5tune.inference.prompts import Prompt, ReplyText
from t5tune.serving.answers import LAST_EVENT, Answer, Part, encode_event, make_usage
from t5tune.serving.batching import QueueFull
from t5tune.serving.computing import Batcher, DeviceLost
from t5tune.serving.generation import DecodingOptions, FinishReason, Generation
from t5tune.serving.logprobs import TokenLog
from t5tune.serving.models import TextModel
from t5tune.serving.protocol import ApiError, ChatRequest, GenerationRequest

SECONDS_TO_RETRY = "1"


@dataclass
class Record:
    """Facts about a request for the log and the metrics, collected while it is answered."""

    model: str | None = None
    prompt_tokens: int = 0
    dropped_messages: int = 0
    error: str | None = None
    generations: list[Generation] = field(default_factory=list)


@dataclass(eq=False)
class Replies:
    """The replies to one request while they are generated."""

    request: GenerationRequest
    model: TextModel
    prompts: list[Prompt]
    options: DecodingOptions
    batcher: Batcher
    record: Record

    def __post_init__(self) -> None:
        request, is_chat = self.request, isinstance(self.request, ChatRequest)
        self._answer = Answer(self.model.name, is_chat, request.stream_options.include_usage, self.model.fingerprint)
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._is_woken = False
        self._generations = [
            Generation(
                engine=self.model.engine,
                source=prompt.ids,
                options=replace(self.options, seed=_choose_seed(self.options.seed, number)),
                notify=self._notify,
                follows=request.stream or bool(request.stop),
            )
            for prompt in self.prompts
            for number in range(request.n)
        ]
        self._num_ids = [0] * len(self._generations)  # tokens of each reply, up to a stop text
        self._logs = [TokenLog(self.model.compiler.spellings, is_chat) for _ in self._generations]
        self.record.generations = self._generations

    def submit(self) -> None:
        """Queue the replies. Raises ApiError if the queue is full, or the GPU has failed."""
        submit(self.batcher, self._generations)

    async def collect(self) -> dict[str, Any]:
        """Wait for all replies, and return the body of the whole answer."""
        texts = [""] * len(self._generations)
        reasons = [""] * len(self._generations)
        async for index, piece, reason in self._follow():
            texts[index] += piece
            reasons[index] = reason or ""
        scores = map(self._describe_scores, range(len(texts)))
        return self._answer.make_whole([*map(Part, texts, reasons, scores)], self._count_usage())

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the events of the answer."""
        answer = self._answer
        try:
            for index in range(len(self._generations)) if answer.is_chat else ():
                yield encode_event(answer.make_part(index, Part(""), is_first=True))
            async for index, piece, reason in self._follow():
                if piece or reason is None:
                    yield encode_event(answer.make_part(index, Part(piece, logprobs=self._describe_scores(index))))
                if reason is not None:
                    yield encode_event(answer.make_part(index, Part("", reason)))
        except ApiError as error:
            self.record.error = error.summary
            yield encode_event(error.to_body())
            return
        if answer.has_usage:
            yield encode_event(answer.make_last(self._count_usage()))
        yield LAST_EVENT

    async def _follow(self) -> AsyncIterator[tuple[int, str, FinishReason | None]]:
        """Yield (index of the reply, new text, finish reason with its last text)."""
        gaps = [prompt.has_gaps for prompt in self.prompts for _ in range(self.request.n)]
        pieces: list[list[str]] = [[] for _ in self._generations]
        texts = [
            ReplyText(self.model.prompts, show.append, self.request.stop, fills_gaps)
            for show, fills_gaps in zip(pieces, gaps, strict=True)
        ]
        unfinished = dict(enumerate(self._generations))
        while unfinished:
            await self._news.wait()
            self._news.clear()
            for index, generation in list(unfinished.items()):
                reason = self._update(index, generation, texts[index])
                if reason is not None:
                    del unfinished[index]
                if pieces[index] or reason is not None:
                    yield index, "".join(pieces[index]), reason
                    pieces[index].clear()

    def _update(self, index: int, generation: Generation, text: ReplyText) -> FinishReason | None:
        """Show new text of a reply. Return its finish reason; None while it is being generated."""
        ended = generation.ended  # read before the ids: once it is set, the ids are complete
        if isinstance(ended, T5TuneError):
            raise explain(ended)
        if ended is None and not generation.follows:
            return None
        ids = generation.ids[:]
        self._num_ids[index] = len(ids)
        if generation.follows and (count := text.update(ids)) is not None:
            self._num_ids[index] = count
            generation.end("stop")
            return "stop"
        if ended is not None:
            text.finish(ids)
        return ended

    def _describe_scores(self, index: int) -> dict[str, Any] | None:
        """Describe the scores of a reply's tokens since the last call; None if the request doesn't ask for them."""
        if self.options.num_top is None:
            return None
        reply, end = self._generations[index], self._num_ids[index]
        return self._logs[index].describe(reply.ids[:end], reply.scores[:end])

    def _count_usage(self) -> dict[str, int]:
        return make_usage(self.record.prompt_tokens, sum(self._num_ids))

    def _notify(self) -> None:
        """Wake up the event loop from any thread, at most once until it runs."""
        if not self._is_woken:
            self._is_woken = True
            with suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_woken = False
        self._news.set()


class Ends:
    """Waits for the ends of generations, which are notified in other threads."""

    def __init__(self) -> None:
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()

    def notify(self) -> None:
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._news.set)

    async def wait(self, generations: Sequence[Generation]) -> None:
        """Wait until all have ended. Raises ApiError if one ended with an error."""
        while any(generation.ended is None for generation in generations):
            await self._news.wait()
            self._news.clear()
        for generation in generations:
            if isinstance(generation.ended, T5TuneError):
                raise explain(generation.ended)


def submit(batcher: Batcher, generations: Sequence[Generation]) -> None:
    """Queue the generations of a request. Raises ApiError if the queue is full, or the GPU has failed."""
    try:
        batcher.submit(generations)
    except QueueFull as error:
        headers = {"retry-after": SECONDS_TO_RETRY}
        raise ApiError(429, f"too many requests: {error.message}", code="queue_full", headers=headers) from error
    except DeviceLost as error:
        raise explain(error) from error


def explain(error: T5TuneError) -> ApiError:
    status = 503 if isinstance(error, DeviceLost) else 400 if isinstance(error, SettingsError) else 500
    return ApiError(status, str(error), code=type(error).__name__)


def _choose_seed(seed: int | None, number: int) -> int:
    return random.getrandbits(63) if seed is None else seed + number  # several replies to a prompt must differ
