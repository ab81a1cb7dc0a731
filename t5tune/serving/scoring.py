"""The scores of a request's targets: they are queued and computed like replies, and share their turns."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from t5tune.errors import T5TuneError
from t5tune.inference.prompts import Prompt
from t5tune.serving.answers import Answer, make_usage
from t5tune.serving.computing import Batcher
from t5tune.serving.generation import DecodingOptions, Generation
from t5tune.serving.models import ServedModel
from t5tune.serving.replies import Record, explain, submit


async def score(
    model: ServedModel, prompt: Prompt, targets: Sequence[list[int]], batcher: Batcher, record: Record
) -> dict[str, Any]:
    """Queue the targets, wait for their scores, and return the body of the answer.

    Raises:
        ApiError: the queue is full, or the scores can't be computed.
    """
    loop, is_done = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        with suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(is_done.set)

    options = DecodingOptions(max_new_tokens=sum(map(len, targets)), is_scored=True)
    scoring = Generation(model.engine, prompt.ids, options, notify, targets=targets)
    record.generations = [scoring]
    submit(batcher, [scoring])
    await is_done.wait()
    if isinstance(scoring.ended, T5TuneError):
        raise explain(scoring.ended)
    scores = [
        {"index": index, "logprob": each.logprob, "token_logprobs": each.token_logprobs, "is_greedy": each.is_greedy}
        for index, each in enumerate(scoring.scored_targets)
    ]
    head = Answer(model.name, is_chat=False, fingerprint=model.fingerprint).make_head("score", "score")
    return {**head, "scores": scores, "usage": make_usage(prompt.num_tokens, 0)}
