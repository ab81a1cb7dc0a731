"""Progress events that long-running functions report. The command line draws them; a test collects them.

def prepare(settings, report=silent):
    for record in track(records, "read", report, unit="records"):
        ...
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Started:
    """A task started; a `total` of None is unknown."""

    task: str
    total: int | None = None
    unit: str = "items"


@dataclass(frozen=True)
class Advanced:
    """`done` units of the task are complete so far."""

    task: str
    done: int


@dataclass(frozen=True)
class Finished:
    """The task ended, complete or not."""

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
        is_best: whether it is the best so far, by the metric for the best model.
        datasets: the metrics of each dataset, if there are several.
    """

    task: str
    step: int
    values: dict[str, float]
    is_best: bool
    datasets: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """A message for the user. `warning` marks a possible mistake by the user."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Answered:
    """The server answered a request, or its client disconnected.

    Args:
        id: the header x-request-id of the answer.
        client: address.
        status: of HTTP; 499 if the client disconnected before the answer was complete.
        seconds: until the answer was complete.
        model: the name of the served model, if the request named one.
        prompt_tokens, completion_tokens: of all prompts and replies of the request.
        queue_seconds, first_token_seconds: until the first reply began, and until its first token.
        dropped_messages: number of the oldest messages that the model didn't get.
        repaired_tokens: number of tokens that CTranslate2 replaced because the constraint refused them.
        invalid_replies: number of replies that were complete, but violated their JSON schema.
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
    repaired_tokens: int = 0
    invalid_replies: int = 0
    error: str | None = None


Event = Started | Advanced | Finished | Measured | Evaluated | Note | Answered
Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore all events."""


def without_notes(report: Report) -> Report:
    """Return a report that drops notes except warnings, for work that is repeated later, with its notes."""
    return lambda event: None if isinstance(event, Note) and not event.warning else report(event)


def without_folder(report: Report, folder: Path) -> Report:
    """Return a report that removes the part of each note that names a folder, which is temporary."""
    named = re.compile(rf"[;:] [^;:]*{re.escape(str(folder))}[^;]*")
    return lambda event: report(replace(event, text=named.sub("", event.text)) if isinstance(event, Note) else event)


def track(
    items: Iterable[Item], task: str, report: Report, total: int | None = None, unit: str = "items"
) -> Iterator[Item]:
    """Yield the items, reporting an item as done when the consumer asks for the next."""
    with count_done(task, report, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def count_done(
    task: str, report: Report, total: int | None = None, unit: str = "items"
) -> Iterator[Callable[[int], None]]:
    """Report a task's start and end; yield a function to call with each completed amount."""
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
