"""The server's metrics in Prometheus's format, for `GET /metrics`."""

from collections.abc import Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from t5tune.progress import Answered
from t5tune.serving.batching import Schedule
from t5tune.serving.generation import Generation

OK = 200
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
RATES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)  # tokens per second
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts requests, tokens and batches, and measures times."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "t5tune", "registry": self._registry}
        by_model: dict[str, Any] = {**options, "labelnames": ["model"]}
        times: dict[str, Any] = {**by_model, "buckets": SECONDS}
        self._requests = Counter("requests", "Answered requests.", ["path", "status"], **options)
        self._seconds = Histogram("request_seconds", "Time until an answer was complete.", **times)
        self._queue_seconds = Histogram("queue_seconds", "Time until the first reply of a request began.", **times)
        self._first_token_seconds = Histogram("first_token_seconds", "Time until a request's first token.", **times)
        self._prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **by_model)
        self._completion_tokens = Counter("completion_tokens", "Tokens of replies.", **by_model)
        self._dropped = Counter("dropped_messages", "Oldest messages that were left out of prompts.", **by_model)
        self._repaired = Counter("repaired_tokens", "Tokens replaced because a constraint refused them.", **by_model)
        self._invalid = Counter("invalid_replies", "Replies that violated their JSON schema: errors.", **by_model)
        self._rates = Histogram(
            "tokens_per_second",
            "Tokens of a request's replies per second since the first began.",
            buckets=RATES,
            **by_model,
        )
        self._batches = Histogram("batch_replies", "Replies in a batch at its start.", buckets=BATCH_SIZES, **options)
        self._waiting = Gauge("replies_waiting", "Replies in the queue.", **options)
        self._running = Gauge("replies_running", "Replies that are being generated.", **options)

    def watch(self, schedule: Schedule) -> None:
        self._waiting.set_function(lambda: schedule.num_waiting)
        self._running.set_function(lambda: schedule.num_running)

    def count_batch(self, batch: Sequence[Generation]) -> None:
        self._batches.observe(len(batch))

    def count_answer(self, answered: Answered, path: str) -> None:
        """Count a request. `path`: a route or `other`, never the client's text, which would make endless series."""
        self._requests.labels(path, str(answered.status)).inc()
        if (model := answered.model) is None:
            return
        self._prompt_tokens.labels(model).inc(answered.prompt_tokens)
        self._completion_tokens.labels(model).inc(answered.completion_tokens)
        self._dropped.labels(model).inc(answered.dropped_messages)
        self._repaired.labels(model).inc(answered.repaired_tokens)
        self._invalid.labels(model).inc(answered.invalid_replies)
        if answered.status == OK:  # refused requests take no time and would lower the average
            self._seconds.labels(model).observe(answered.seconds)
        if answered.queue_seconds is not None:
            self._queue_seconds.labels(model).observe(answered.queue_seconds)
            if answered.completion_tokens and (seconds := answered.seconds - answered.queue_seconds) > 0:
                self._rates.labels(model).observe(answered.completion_tokens / seconds)
        if answered.first_token_seconds is not None:
            self._first_token_seconds.labels(model).observe(answered.first_token_seconds)

    def render(self) -> bytes:
        return generate_latest(self._registry)
