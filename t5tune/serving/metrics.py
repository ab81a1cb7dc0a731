"""The server's metrics in Prometheus's format, for `GET /metrics`."""

from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from t5tune.progress import Answered
from t5tune.serving.computing import Batcher
from t5tune.serving.generation import Generation

OK = 200
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts requests, tokens and batches, and measures times."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("t5tune_requests", "Answered requests.", ["path", "status"], registry=registry)
        self._seconds = self._make_histogram("request_seconds", "Time until an answer was complete.")
        self._queue_seconds = self._make_histogram("queue_seconds", "Time until the first reply of a request began.")
        self._first_token_seconds = self._make_histogram("first_token_seconds", "Time until a request's first token.")
        self._prompt_tokens = self._make_counter("prompt_tokens", "Tokens of prompts.")
        self._completion_tokens = self._make_counter("completion_tokens", "Tokens of replies.")
        self._dropped = self._make_counter("dropped_messages", "Oldest messages that were left out of prompts.")
        self._batches = Histogram(
            "t5tune_batch_replies", "Replies that began in a batch.", buckets=BATCH_SIZES, registry=registry
        )
        self._waiting = Gauge("t5tune_replies_waiting", "Replies in the queue.", registry=registry)
        self._running = Gauge("t5tune_replies_running", "Replies that are being generated.", registry=registry)

    def _make_histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"t5tune_{name}", text, ["model"], buckets=SECONDS, registry=self._registry)

    def _make_counter(self, name: str, text: str) -> Counter:
        return Counter(f"t5tune_{name}", text, ["model"], registry=self._registry)

    def watch(self, batcher: Batcher) -> None:
        self._waiting.set_function(lambda: batcher.num_waiting)
        self._running.set_function(lambda: batcher.num_running)

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
        if answered.status == OK:  # refused requests take no time and would lower the average
            self._seconds.labels(model).observe(answered.seconds)
        if answered.queue_seconds is not None:
            self._queue_seconds.labels(model).observe(answered.queue_seconds)
        if answered.first_token_seconds is not None:
            self._first_token_seconds.labels(model).observe(answered.first_token_seconds)

    def render(self) -> bytes:
        return generate_latest(self._registry)
