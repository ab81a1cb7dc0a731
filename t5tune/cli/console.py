"""Terminal output: progress and notes on stderr, the result on stdout, each error on one line."""

import dataclasses
import io
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions
from rich.filesize import decimal
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
from rich.table import Column, Table
from rich.text import Text

from t5tune.errors import SettingsError, T5TuneError, to_one_line
from t5tune.progress import Advanced, Event, Finished, Measured, Note, Started

SECONDS_BETWEEN_LINES = 15.0


class Screen:
    """A `Report` that draws events: progress bars on a terminal, plain lines in a log."""

    def __init__(self) -> None:
        self.console = _make_stderr_console()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, Started] = {}
        # these three are for logs, which get a line every SECONDS_BETWEEN_LINES
        self._last_line_time: dict[str, float] = {}
        self._has_lines: set[str] = set()  # tasks with at least one line
        self._unprinted: dict[str, str] = {}  # task -> its newest line, if that isn't printed yet

    def __call__(self, event: Event) -> None:
        try:
            self._draw(event)
        except OSError:  # stderr was closed; that is no reason to stop the work
            self.console.quiet = True

    def _draw(self, event: Event) -> None:
        match event:
            case Started():
                self._start(event)
            case Advanced():
                self._advance(event)
            case Finished():
                self._finish(event)
            case Measured():
                self._measure(event)
            case Note():
                style = "yellow" if event.warning else "dim"
                text = ("warning: " if event.warning else "") + to_one_line(event.text)
                self.console.print(text, style=style, markup=False)

    def close(self) -> None:
        """Stop drawing progress bars."""
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()
            self._progress = None

    def _start(self, event: Started) -> None:
        self._started[event.task] = event
        self._last_line_time[event.task] = time.monotonic()
        self._has_lines.discard(event.task)
        if not self.console.is_terminal:
            return
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("[dim]{task.fields[unit]}"),
                TimeElapsedColumn(table_column=Column(no_wrap=True)),
                TextColumn("[dim]left"),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                _MetricsColumn(),
                console=self.console,
            )
            self._progress.start()
        self._tasks[event.task] = self._progress.add_task(event.task, total=event.total, unit=event.unit, values=[])

    def _advance(self, event: Advanced) -> None:
        if self._progress is not None and event.task in self._tasks:
            self._progress.update(self._tasks[event.task], completed=event.done)
        elif event.task in self._started:
            self._print_line(event.task, f"{event.task}: {event.done}{self._format_total(event.task)}")

    def _finish(self, event: Finished) -> None:
        if self._progress is not None and event.task in self._tasks:
            task = self._tasks.pop(event.task)
            done = self._progress.tasks[[t.id for t in self._progress.tasks].index(task)].completed
            self._progress.update(task, total=done)
            if not self._tasks:
                self.close()
        elif event.task in self._unprinted:
            self.console.print(self._unprinted.pop(event.task), markup=False)

    def _measure(self, event: Measured) -> None:
        metrics = [f"{name} {format_number(value)}" for name, value in event.values.items()]
        if self._progress is not None and event.task in self._tasks:
            self._progress.update(self._tasks[event.task], values=metrics)
        else:
            self.console.print(f"{event.task}: step {event.step}  {'  '.join(metrics)}", markup=False)

    def _format_total(self, task: str) -> str:
        started = self._started[task]
        return f" of {started.total} {started.unit}" if started.total else f" {started.unit}"

    def _print_line(self, task: str, text: str) -> None:
        """Print the line if enough time has passed, else keep it as the task's possible last line."""
        now = time.monotonic()
        if now - self._last_line_time[task] >= SECONDS_BETWEEN_LINES:
            self._last_line_time[task] = now
            self._unprinted.pop(task, None)
            self._has_lines.add(task)
            self.console.print(text, markup=False)
        elif task in self._has_lines:  # a task too short for any line needs no last line either
            self._unprinted[task] = text


class _MetricsColumn(ProgressColumn):
    """The latest metrics. On a narrow terminal this column and the bar shrink; the count and the time left don't."""

    def render(self, task: Task) -> "_MetricsText":
        return _MetricsText(task.fields["values"])


@dataclasses.dataclass
class _MetricsText:
    """As many of the first metrics as fit in the width, none of them cut."""

    metrics: list[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        candidates = (self.metrics[:count] for count in range(len(self.metrics), 0, -1))
        lines = ("  ".join(metrics) for metrics in candidates)
        yield Text(next((line for line in lines if len(line) <= options.max_width), ""), "cyan", no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        # a minimum of 0, so that Rich shrinks this column before the others
        return Measurement(0, len("  ".join(self.metrics)))


class UnwritableStdout(OSError):
    """The result can't be written to stdout."""


class _Stdout(io.TextIOWrapper):
    """A stdout whose write errors are `UnwritableStdout`, to tell them from those of other files."""

    def write(self, text: str) -> int:
        with _convert_write_errors():
            return super().write(text)

    def flush(self) -> None:
        with _convert_write_errors():
            super().flush()


@contextmanager
def _convert_write_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UnwritableStdout(error.errno, error.strerror) from error


@contextmanager
def open_result_stream() -> Iterator[TextIO]:
    """Reserve stdout for the result: until the block ends, what libraries print to stdout goes to stderr.

    Raises:
        T5TuneError: stdout is closed.
        OSError: stdout can't be written to.
    """
    if sys.stdout is None:
        raise T5TuneError("standard output is closed", hint="redirect it to a file or /dev/null")
    sys.stdout.flush()
    # file descriptors, not sys.stdout: C++ code prints too
    saved = os.dup(1)
    os.dup2(2, 1)
    # bytes of a path that aren't valid UTF-8 are shown as \\udcff, as JSON escapes them
    raw = open(saved, "wb", closefd=False)  # noqa: SIM115 (closed with the stream)
    stream = _Stdout(raw, encoding="utf-8", errors="backslashreplace")
    try:
        yield stream
        stream.flush()
    finally:
        with suppress(OSError):  # must not replace the error that ended the block
            stream.close()
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def format_number(value: float) -> str:
    """Four significant digits without trailing zeros; thousands separated by commas: 0.0001, 12.35, 81,920."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e3 else f"{value:,.0f}"


def format_json(result: Any) -> str:
    """Format a command's result as one JSON object on one line."""
    return json.dumps(_to_plain(dataclasses.asdict(result)), ensure_ascii=False, allow_nan=False)


def _to_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def show_result(result: Any, stream: TextIO, quiet: bool) -> None:
    """Print the first field of the result, the path of the output, to `stream`, and the others as a table to stderr."""
    values = _to_plain(dataclasses.asdict(result))
    first, *others = values.items()
    if not quiet and others:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in others:
            if value not in (None, {}, []) and value is not False:
                label, shown = name.replace("_", " "), _format_value(value)
                if name.endswith("bytes"):
                    label, shown = label.removesuffix("bytes").strip() or "size", decimal(value)
                table.add_row(Text(label, "dim"), Text(shown))
        with suppress(OSError):
            _make_stderr_console().print(table)
    print(first[1], file=stream, flush=True)


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format_number(value)
    if isinstance(value, dict):
        return "  ".join(f"{name} {_format_value(item)}" for name, item in value.items())
    return str(value)


def show_error(error: BaseException, json_stream: TextIO | None, debug: bool) -> None:
    """Print one line per problem to stderr, and to `json_stream`, if given, the error as one JSON object."""
    if debug:
        traceback.print_exception(error)
    known = isinstance(error, T5TuneError)
    kind = error.kind if isinstance(error, T5TuneError) else type(error).__name__
    message = (
        error.message if isinstance(error, T5TuneError) else to_one_line(f"{kind}: {' '.join(str(error).split())}")
    )
    hint = error.hint if isinstance(error, T5TuneError) else "run with --debug to see the traceback"
    problems = list(error.problems) if isinstance(error, SettingsError) else [message]
    console = _make_stderr_console()
    for index, problem in enumerate(problems):
        last = index == len(problems) - 1
        tail = f"{' ' if problem.endswith('?') else '; '}{hint}" if hint and last else ""
        with suppress(OSError):  # if stderr is closed, the exit code still reports the failure
            console.print(Text.assemble(("error:", "bold red"), " ", problem + tail))
    if json_stream is not None:
        body = {"kind": kind if known else "Unexpected", "message": message, "hint": hint}
        print(json.dumps({"error": body}, ensure_ascii=False), file=json_stream, flush=True)


class _Stderr(Console):
    def on_broken_pipe(self) -> None:
        """Go quiet if the reader has closed the pipe; Rich's own handler would exit the process."""
        self.quiet = True


def _make_stderr_console() -> Console:
    """Make a console that prints text unchanged: nothing that a user typed is read as markup, emoji codes or colors."""
    return _Stderr(stderr=True, highlight=False, soft_wrap=True, emoji=False)
