"""Progress and notes on stderr: bars on a terminal, lines in a log."""

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from t5tune.errors import to_one_line
from t5tune.progress import Advanced, Event, Finished, Measured, Note, Started

SECONDS_BETWEEN_LINES = 15.0


class StderrConsole(Console):
    """Prints text unchanged: nothing that a user typed is read as markup, emoji codes or colors."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False, soft_wrap=True, emoji=False)

    def on_broken_pipe(self) -> None:
        """Go quiet if the reader has closed the pipe; Rich's own handler would exit the process."""
        self.quiet = True


class Screen:
    """A `Report` that draws events."""

    def __init__(self) -> None:
        self.console: Console = StderrConsole()
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._lines: dict[str, _Lines] = {}

    def __call__(self, event: Event) -> None:
        try:
            self._draw(event)
        except OSError:  # stderr was closed; that is no reason to stop the work
            self.console.quiet = True

    def _draw(self, event: Event) -> None:
        match event:
            case Started(task) if self.console.is_terminal:
                if self._progress is None:
                    self._progress = _make_progress(self.console)
                    self._progress.start()
                self._bars[task] = self._progress.add_task(task, total=event.total, unit=event.unit, values=[])
            case Started(task):
                self._lines[task] = _Lines(event)
            case Advanced(task, done):
                if not self._update_bar(task, completed=done) and task in self._lines:
                    self._print_line(self._lines[task].advance(done))
            case Measured(task, step):
                metrics = [f"{name} {format_number(value)}" for name, value in event.values.items()]
                if not self._update_bar(task, values=metrics):
                    self._print_line(f"{task}: step {step}  {'  '.join(metrics)}")
            case Finished(task):
                if self._progress is not None and task in self._bars:
                    self._update_bar(task, total=self._progress.tasks[self._bars[task]].completed)
                    del self._bars[task]
                    if not self._bars:
                        self.close()
                elif task in self._lines:
                    self._print_line(self._lines.pop(task).unprinted)
            case Note(text, is_warning):
                text = ("warning: " if is_warning else "") + to_one_line(text)
                self.console.print(text, style="yellow" if is_warning else "dim", markup=False)

    def _update_bar(self, task: str, **changes: Any) -> bool:
        """Change the bar of a task. Return False if it has none."""
        if self._progress is None or task not in self._bars:
            return False
        self._progress.update(self._bars[task], **changes)
        return True

    def _print_line(self, line: str | None) -> None:
        if line is not None:
            self.console.print(line, markup=False)

    def close(self) -> None:
        """Stop drawing progress bars."""
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()
            self._progress = None
            self._bars.clear()


@dataclass
class _Lines:
    """The lines of a task in a log: one every SECONDS_BETWEEN_LINES, and a last one, unless it has only that one.

    Args:
        unprinted: the newest line, if it isn't printed yet.
    """

    started: Started
    printed_at: float = field(default_factory=time.monotonic)
    has_lines: bool = False
    unprinted: str | None = None

    def advance(self, done: int) -> str | None:
        """Return the line to print now, if any."""
        total = f" of {self.started.total}" if self.started.total else ""
        line = f"{self.started.task}: {done}{total} {self.started.unit}"
        now = time.monotonic()
        if now - self.printed_at < SECONDS_BETWEEN_LINES:
            self.unprinted = line if self.has_lines else None
            return None
        self.printed_at, self.has_lines, self.unprinted = now, True, None
        return line


def _make_progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("[dim]{task.fields[unit]}"),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("[dim]left"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _MetricsColumn(),
        console=console,
    )


class _MetricsColumn(ProgressColumn):
    """The latest metrics. On a narrow terminal this column and the bar shrink; the count and the time left don't."""

    def render(self, task: Task) -> "_Metrics":
        return _Metrics(task.fields["values"])


@dataclass
class _Metrics:
    """As many of the first metrics as fit in the width, none of them cut."""

    metrics: list[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        candidates = (self.metrics[:count] for count in range(len(self.metrics), 0, -1))
        lines = ("  ".join(metrics) for metrics in candidates)
        yield Text(next((line for line in lines if len(line) <= options.max_width), ""), "cyan", no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        # a minimum of 0, so that Rich shrinks this column before the others
        return Measurement(0, len("  ".join(self.metrics)))


def format_number(value: float) -> str:
    """Four significant digits without trailing zeros; thousands separated by commas: 0.0001, 12.35, 81,920."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e3 else f"{value:,.0f}"
