"""Totals of a run over all of its processes: tokens, training time and loss, continued when it resumes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from t5tune.data.tokens.encoding import Example
from t5tune.distributed.collectives import all_gather
from t5tune.training.steps import is_dummy

NUM_TOKENS = "num_tokens"
"""Key in a micro-batch: its source and target tokens, without dummy examples."""

NUM_ITEMS = "num_items"
"""Key in a micro-batch: the number of its items, unless they are target tokens, which the Trainer counts."""

TOTALS_KEY = "T5TuneTotals"
"""Key in the stateful_callbacks of a checkpoint's Trainer state: tokens, sum of the steps' losses, training seconds."""


@dataclass(frozen=True)
class CountingCollator:
    """Adds the numbers of tokens and items to a micro-batch while it is on the CPU: reading a GPU would wait for it.

    Args:
        count_items: counts the items of examples that aren't dummies; None for target tokens.
    """

    collate: Callable[[Sequence[Example]], dict[str, Any]]
    count_items: Callable[[Sequence[Example]], int | None]

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        real = [each for each in examples if not is_dummy(each)]
        counts = {NUM_TOKENS: sum(each.num_tokens for each in real)}
        if (count := self.count_items(real)) is not None:
            counts[NUM_ITEMS] = count
        return {**self.collate(examples), **counts}


class RunTotals:
    """Counts the tokens trained on, and measures the time since the first step without evaluations and saves."""

    def __init__(self) -> None:
        self.before = {"tokens": 0, "loss": 0.0, "seconds": 0.0}  # of the run, when this process resumed it
        self._tokens = 0  # of this rank, in this process
        self._first_step_at: float | None = None
        self._seconds_excluded = 0.0
        self._last_logged = (0, 0.0)  # tokens and seconds

    def resume(self, state: Any) -> None:
        """Continue from the totals in the Trainer's state, if it has them. Call on every rank."""
        self.before = {**self.before, **state.stateful_callbacks.get(TOTALS_KEY, {})}
        self._last_logged = (self.count_tokens(), self.measure_seconds())

    def count(self, tokens: int) -> None:
        """Add the tokens of this rank's micro-batch, which is about to be trained on."""
        if self._first_step_at is None:
            self._first_step_at = time.monotonic()
        self._tokens += tokens

    @contextmanager
    def exclude_time(self) -> Iterator[None]:
        """Exclude the time of this block from the training time."""
        started = time.monotonic()
        try:
            yield
        finally:
            if self._first_step_at is not None:  # a resumed run may evaluate before its first step
                self._seconds_excluded += time.monotonic() - started

    def count_tokens(self) -> int:
        """Count the tokens that the run has trained on, over all ranks. Call on every rank."""
        return int(self.before["tokens"]) + sum(all_gather(self._tokens))

    def measure_seconds(self) -> float:
        """Measure the run's training time in seconds."""
        before = float(self.before["seconds"])
        if self._first_step_at is None:
            return before
        return before + (time.monotonic() - self._first_step_at - self._seconds_excluded)

    def measure_speed(self) -> float:
        """Measure the tokens per second since the last call. Call on every rank."""
        tokens, seconds = self.count_tokens(), self.measure_seconds()
        speed = (tokens - self._last_logged[0]) / max(seconds - self._last_logged[1], 1e-9)
        self._last_logged = (tokens, seconds)
        return round(speed, 1)
