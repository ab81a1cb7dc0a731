"""The scores of targets and the labels of texts: both are queued like replies, and share their turns."""

import asyncio
from collections.abc import Sequence
from typing import Any

from t5tune.inference.label_sources import Source
from t5tune.inference.prompts import Prompt
from t5tune.serving.answers import Answer, make_usage
from t5tune.serving.computing import Batcher
from t5tune.serving.generation import DecodingOptions, Generation
from t5tune.serving.models import LabelModel, TextModel
from t5tune.serving.replies import Ends, Record, submit


async def score(
    model: TextModel, prompt: Prompt, targets: Sequence[list[int]], batcher: Batcher, record: Record
) -> dict[str, Any]:
    """Queue the targets, wait for their scores, and return the body of the answer.

    Raises:
        ApiError: the queue is full, or the scores can't be computed.
    """
    ends, options = Ends(), DecodingOptions(max_new_tokens=sum(map(len, targets)), is_scored=True)
    scoring = Generation(model.engine, prompt.ids, options, ends.notify, targets=targets)
    record.generations = [scoring]
    submit(batcher, [scoring])
    await ends.wait([scoring])
    scores = [
        {"index": index, "logprob": each.logprob, "token_logprobs": each.token_logprobs, "is_greedy": each.is_greedy}
        for index, each in enumerate(scoring.scored_targets)
    ]
    head = Answer(model.name, is_chat=False, fingerprint=model.fingerprint).make_head("score", "score")
    return {**head, "scores": scores, "usage": make_usage(prompt.num_tokens, 0)}


async def classify(model: LabelModel, sources: list[Source], batcher: Batcher, record: Record) -> dict[str, Any]:
    """Queue the inputs, wait for their labels, and return the body of the answer.

    Raises:
        ApiError: the queue is full, or the labels can't be computed.
    """
    ends, options = Ends(), DecodingOptions(max_new_tokens=1)
    record.generations = [
        Generation(model.engine, source.example.source_S.tolist(), options, ends.notify) for source in sources
    ]
    submit(batcher, record.generations)
    await ends.wait(record.generations)
    logits = [generation.logits for generation in record.generations]
    # in a separate thread: many words take a while
    data = await asyncio.to_thread(lambda: [*map(model.describe, range(len(logits)), sources, logits)])
    head = Answer(model.name, is_chat=False, fingerprint=model.fingerprint).make_head("classify", "list")
    return {**head, "data": data, "usage": make_usage(record.prompt_tokens, 0)}
