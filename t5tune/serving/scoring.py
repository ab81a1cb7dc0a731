"""The scores of a request's targets: they are queued and computed like replies, and share their turns.

scores = Scores(model, prompt, targets, batcher, record)
scores.submit()
body = await scores.collect()
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from t5tune.errors import T5TuneError
from t5tune.inference.prompts import Prompt
from t5tune.serving.answers import Answer, make_usage
from t5tune.serving.computing import Batcher
from t5tune.serving.generation import DecodingOptions, Generation, ScoredTarget
from t5tune.serving.models import ServedModel
from t5tune.serving.replies import Record, explain, submit


@dataclass(eq=False)
class Scores:
    """The scores of one request's targets while they are computed."""

    model: ServedModel
    prompt: Prompt
    targets: Sequence[list[int]]
    batcher: Batcher
    record: Record
    _is_done: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()

        def notify() -> None:
            with suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(self._is_done.set)

        options = DecodingOptions(max_new_tokens=sum(map(len, self.targets)), is_scored=True)
        self._scoring = Generation(self.model.engine, self.prompt.ids, options, notify, targets=self.targets)
        self.record.generations = [self._scoring]

    def submit(self) -> None:
        """Queue the targets. Raises ApiError if the queue is full, or the GPU has failed."""
        submit(self.batcher, [self._scoring])

    async def collect(self) -> dict[str, Any]:
        """Wait for the scores, and return the body of the answer."""
        await self._is_done.wait()
        if isinstance(self._scoring.ended, T5TuneError):
            raise explain(self._scoring.ended)
        scores = [_describe(index, target) for index, target in enumerate(self._scoring.scored_targets)]
        head = Answer(self.model.name, is_chat=False, fingerprint=self.model.fingerprint).make_head("score", "score")
        return {**head, "scores": scores, "usage": make_usage(self.prompt.num_tokens, 0)}


def _describe(index: int, target: ScoredTarget) -> dict[str, Any]:
    logprob = sum(target.token_logprobs)
    values = {"logprob": logprob, "token_logprobs": target.token_logprobs, "is_greedy": target.is_greedy}
    return {"index": index, **values}
