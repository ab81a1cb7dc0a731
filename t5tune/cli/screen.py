"""Progress and notes on stderr: bars on a terminal, lines in a log."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from t5tune.errors import make_printable
from t5tune.formatting import format_metrics, format_number, format_size
from t5tune.progress import Advanced, Evaluated, Event, Finished, Measured, Note, Started

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_DRAWINGS = 0.1
SECONDS_WORTH_SHOWING = 1.0  # a bar that took less is erased when it is done
SECONDS_OF_SPEED = 600.0  # the time left is estimated from the speed in these; steps may take minutes
WORD, METRIC = r"\S+", r"\S+(?: \S+)*"  # metrics are separated by two spaces


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
        # downloads and uploads report from threads; a signal may report while its thread holds the lock
        self._lock = threading.RLock()

    def __call__(self, event: Event) -> None:
        try:
            with self._lock:
                self._draw(event)
        except OSError:  # stderr was closed; that is no reason to stop the work
            self.console.quiet = True

    def _draw(self, event: Event) -> None:
        match event:
            case Started(task) if self.console.is_terminal:
                if self._progress is None:
                    self._progress = _make_progress(self.console)
                    self._progress.start()
                    threading.Thread(target=self._keep_drawing, args=[self._progress], daemon=True).start()
                self._bars[task] = self._progress.add_task(task, total=event.total, unit=event.unit, values=[])
            case Started(task):
                self._lines[task] = _Lines(event, _make_progress(self.console))
            case Advanced(task, done):
                if not self._update_bar(task, completed=done) and task in self._lines:
                    self._print_line(self._lines[task].advance(done))
            case Measured(task, step):
                metrics = [f"{name} {format_number(value)}" for name, value in event.values.items()]
                if not self._update_bar(task, values=metrics):
                    self._print_line(f"{task}: step {step}  {'  '.join(metrics)}")
            case Evaluated(task, step):
                where = f"step {step:,}" if task in self._bars else f"{task}: step {step}"
                print_message(self.console, Text(f"{where}  {_format_evaluation(event)}"), METRIC)
            case Finished(task):
                if task in self._bars:
                    self._end_bar(task)
                elif task in self._lines:
                    self._print_line(self._lines.pop(task).unprinted)
            case Note(text, is_warning):
                text = ("warning: " if is_warning else "") + make_printable(text)
                print_message(self.console, Text(text, "yellow" if is_warning else "dim"))

    def _keep_drawing(self, progress: Progress) -> None:
        while self.redraw(progress):
            time.sleep(SECONDS_BETWEEN_DRAWINGS)

    def redraw(self, progress: Progress) -> bool:
        """Draw the bars with the elapsed time. Return False if they are no longer shown.

        Rich's thread would draw while a different thread prints; if a bar ended meanwhile, the line above the bars
        would be erased (Rich's issue 1530).
        """
        with self._lock:
            if self._progress is not progress:
                return False
            try:
                progress.refresh()
            except OSError:
                self.console.quiet = True
            return True

    def _update_bar(self, task: str, **changes: Any) -> bool:
        """Change a task's bar. Return False if there is no bar."""
        if self._progress is None or task not in self._bars:
            return False
        self._progress.update(self._bars[task], **changes)
        return True

    def _end_bar(self, name: str) -> None:
        """End the bar of a task. It is erased if it is part of a longer task, or was done in almost no time."""
        assert self._progress is not None
        bar = self._bars.pop(name)
        self._progress.stop_task(bar)
        (task,) = (each for each in self._progress.tasks if each.id == bar)
        is_done = task.total is None or task.finished
        if self._bars or (is_done and (task.elapsed or 0.0) < SECONDS_WORTH_SHOWING):
            self._progress.remove_task(bar)
        if not self._bars:
            self.close()

    def _print_line(self, line: str | None) -> None:
        if line is not None:
            print_message(self.console, Text(line))

    def close(self) -> None:
        with self._lock:
            if self._progress is not None:
                for bar in self._bars.values():
                    self._progress.stop_task(bar)
                with suppress(OSError):
                    self._progress.stop()
                self._progress = None
                self._bars.clear()


def print_message(console: Console, message: Text, unbroken: str = WORD) -> None:
    """Print a message on one line; on a terminal, break a longer one between matches of the pattern `unbroken`."""
    console.print(_wrap(message, console.width, unbroken) if console.is_terminal else message, soft_wrap=True)


def _wrap(message: Text, width: int, unbroken: str) -> Text:
    # Rich's own wrapping would also break a path that is longer than the width
    text, start, breaks = message.plain, 0, []
    for word in re.finditer(unbroken, text):
        if text[start : word.start()].strip() and cell_len(text[start : word.end()]) > width:
            start = word.start()
            breaks.append(start)
    lines = message.divide(breaks)
    for line in lines:
        line.rstrip()
    return Text("\n").join(lines)


@dataclass
class _Lines:
    """A task's lines in a log, every SECONDS_BETWEEN_LINES; if there were any, the end prints the `unprinted` line.

    `bar` is never drawn: it estimates the time left, as on a terminal.
    """

    started: Started
    bar: Progress
    printed_at: float = field(default_factory=time.monotonic)
    has_lines: bool = False
    unprinted: str | None = None

    def __post_init__(self) -> None:
        self.bar.add_task(self.started.task, total=self.started.total)

    def advance(self, done: int) -> str | None:
        total = f" of {self.started.total}" if self.started.total else ""
        self.bar.update(self.bar.task_ids[0], completed=done)
        left = self.bar.tasks[0].time_remaining
        rest = f", {_format_seconds(left)} left" if left else ""
        line = f"{self.started.task}: {done}{total} {self.started.unit}{rest}"
        now = time.monotonic()
        if now - self.printed_at < SECONDS_BETWEEN_LINES:
            self.unprinted = line if self.has_lines else None
            return None
        self.printed_at, self.has_lines, self.unprinted = now, True, None
        return line


class _Bars(Progress):
    def get_renderables(self) -> Iterator["_Narrower"]:
        yield _Narrower(self.make_tasks_table(self.tasks))


@dataclass
class _Narrower:
    """Leaves room for the `^C` that a terminal adds: if that breaks the line, the bar can no longer be erased."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.table, options.update_width(options.max_width - len("^C")))


def _make_progress(console: Console) -> Progress:
    return _Bars(
        _Spinner(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        _CountColumn(Column(no_wrap=True)),
        _TimeColumn(Column(no_wrap=True)),
        _MetricsColumn(),
        console=console,
        auto_refresh=False,
        speed_estimate_period=SECONDS_OF_SPEED,
    )


class _Spinner(SpinnerColumn):
    """Turns until the task ends."""

    def render(self, task: Task) -> RenderableType:
        return super().render(task) if task.stop_time is None else Text(" ")


class _CountColumn(ProgressColumn):
    """69/2,694 steps; 255 records if the total is unknown."""

    def render(self, task: Task) -> Text:
        is_bytes = task.fields["unit"] == "bytes"
        counts = [int(count) for count in (task.completed, task.total) if count is not None]
        count = "/".join(format_size(count) if is_bytes else f"{count:,}" for count in counts)
        return Text.assemble((count, "green"), "" if is_bytes else f" {task.fields['unit']}")


class _TimeColumn(ProgressColumn):
    """[0:10 elapsed, 6:49 left], without the rest if it is unknown or nothing."""

    def render(self, task: Task) -> Text:
        times = [f"{_format_seconds(task.elapsed or 0)} elapsed"]
        if task.stop_time is None and task.time_remaining:
            times.append(f"{_format_seconds(task.time_remaining)} left")
        return Text(f"[{', '.join(times)}]")


def _format_seconds(seconds: float) -> str:
    """Format a duration: 0:07, 12:34, 26:03:59."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _MetricsColumn(ProgressColumn):
    """The latest metrics. On a narrow terminal this column and the bar shrink; the count and the time left don't."""

    def render(self, task: Task) -> "_Metrics":
        return _Metrics(task.fields["values"])


@dataclass
class _Metrics:
    """The first metrics that fit in the width, without cutting any."""

    metrics: list[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        candidates = (self.metrics[:count] for count in range(len(self.metrics), 0, -1))
        lines = ("  ".join(metrics) for metrics in candidates)
        yield Text(next((line for line in lines if len(line) <= options.max_width), ""), "cyan", no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        # a minimum of 0 makes Rich shrink this column first
        return Measurement(0, len("  ".join(self.metrics)))


def _format_evaluation(event: Evaluated) -> str:
    return "  ".join([*format_metrics(event.values, event.datasets), *(["(best)"] if event.is_best else [])])
