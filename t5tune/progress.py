"""What long work tells its caller, as plain events. The command line draws them; a test collects them.

def prepare(settings, report=silent):
    for record in track(records, "read", report, unit="records"):
        ...
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Started:
    """A task begins. `total` is None where nobody knows it."""

    task: str
    total: int | None = None
    unit: str = "items"


@dataclass(frozen=True)
class Advanced:
    """`done` of the task's units are done, counted from its start."""

    task: str
    done: int


@dataclass(frozen=True)
class Finished:
    """The task is over."""

    task: str


@dataclass(frozen=True)
class Measured:
    """Figures of a step: loss, learning rate, tokens per second, …"""

    task: str
    step: int
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """A sentence for the user. `warning` marks what may be a mistake of theirs."""

    text: str
    warning: bool = False


Event = Started | Advanced | Finished | Measured | Note
Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """The report of a caller that wants none."""


def track(
    items: Iterable[Item], task: str, report: Report, total: int | None = None, unit: str = "items"
) -> Iterator[Item]:
    """Yield the items and report each one as done once its consumer asks for the next."""
    report(Started(task, total, unit))
    for done, item in enumerate(items, start=1):
        yield item
        report(Advanced(task, done))
    report(Finished(task))
