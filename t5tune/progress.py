"""Progress events that long-running functions report. The command line draws them; a test collects them.

def prepare(settings, report=silent):
    for record in track(records, "read", report, unit="records"):
        ...
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Started:
    """A task has started. `total` is None if it isn't known."""

    task: str
    total: int | None = None
    unit: str = "items"


@dataclass(frozen=True)
class Advanced:
    """`done` units of the task are done so far."""

    task: str
    done: int


@dataclass(frozen=True)
class Finished:
    """The task has ended, complete or not."""

    task: str


@dataclass(frozen=True)
class Measured:
    """Metrics of a step: loss, learning rate, tokens per second, …"""

    task: str
    step: int
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """The metrics of an evaluation during training.

    Args:
        is_best: whether it is the best yet, by the metric for the best model.
        datasets: the metrics of each dataset, if there are several.
    """

    task: str
    step: int
    values: dict[str, float]
    is_best: bool
    datasets: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """A message for the user. `warning` marks what may be a mistake on their side."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Answered:
    """The server has answered a request, or its client has gone.

    Args:
        id: of the request, which its answer has in the header x-request-id.
        client: address.
        status: HTTP's; 499 if the client was gone before the answer was complete.
        seconds: until the answer was complete.
        model: its name, if the request named one that is served.
        prompt_tokens, completion_tokens: of all prompts and replies of the request.
        queue_seconds, first_token_seconds: until the first reply began, and had a token.
        dropped_messages: the oldest messages, which the model hasn't seen.
        error: why the request was refused or failed.
    """

    id: str
    client: str
    method: str
    path: str
    status: int
    seconds: float
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    dropped_messages: int = 0
    error: str | None = None


Event = Started | Advanced | Finished | Measured | Evaluated | Note | Answered
Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore all events: the `Report` for callers that want none."""


def without_notes(report: Report) -> Report:
    """Return a report of warnings and all other events, for work that is done again with its notes."""
    return lambda event: None if isinstance(event, Note) and not event.warning else report(event)


def track(
    items: Iterable[Item], task: str, report: Report, total: int | None = None, unit: str = "items"
) -> Iterator[Item]:
    """Yield the items, reporting each one as done when the consumer asks for the next."""
    with count_done(task, report, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def count_done(
    task: str, report: Report, total: int | None = None, unit: str = "items"
) -> Iterator[Callable[[int], None]]:
    """Report a task's start and end; yield a function to call with each amount that is done."""
    done = 0

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        report(Advanced(task, done))

    report(Started(task, total, unit))
    try:
        yield advance
    finally:
        report(Finished(task))
