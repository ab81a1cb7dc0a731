"""What a user sees: progress and notes on stderr, the result on stdout, an error in a line."""

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

from t5tune.errors import SettingsError, T5TuneError, one_line
from t5tune.progress import Advanced, Event, Finished, Measured, Note, Started

SECONDS_BETWEEN_LINES = 15.0


class Screen:
    """A report that draws: bars on a terminal, plain lines in a log."""

    def __init__(self) -> None:
        self.console = _stderr()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, Started] = {}
        self._last_line: dict[str, float] = {}
        self._has_lines: set[str] = set()
        self._behind: dict[str, str] = {}  # of these tasks: what no line has said yet

    def __call__(self, event: Event) -> None:
        try:
            self._show(event)
        except OSError:  # nobody can read it any more: the work goes on
            self.console.quiet = True

    def _show(self, event: Event) -> None:
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
                text = ("warning: " if event.warning else "") + one_line(event.text)
                self.console.print(text, style=style, markup=False)

    def close(self) -> None:
        """Take the bars off the terminal."""
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()
            self._progress = None

    def _start(self, event: Started) -> None:
        self._started[event.task] = event
        self._last_line[event.task] = time.monotonic()
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
                _Values(),
                console=self.console,
            )
            self._progress.start()
        self._tasks[event.task] = self._progress.add_task(event.task, total=event.total, unit=event.unit, values=[])

    def _advance(self, event: Advanced) -> None:
        if self._progress is not None and event.task in self._tasks:
            self._progress.update(self._tasks[event.task], completed=event.done)
        elif event.task in self._started:
            self._line(event.task, f"{event.task}: {event.done}{self._of_total(event.task)}")

    def _finish(self, event: Finished) -> None:
        if self._progress is not None and event.task in self._tasks:
            task = self._tasks.pop(event.task)
            done = self._progress.tasks[[t.id for t in self._progress.tasks].index(task)].completed
            self._progress.update(task, total=done)
            if not self._tasks:
                self.close()
        elif event.task in self._behind:
            self.console.print(self._behind.pop(event.task), markup=False)

    def _measure(self, event: Measured) -> None:
        figures = [f"{name} {format_number(value)}" for name, value in event.values.items()]
        if self._progress is not None and event.task in self._tasks:
            self._progress.update(self._tasks[event.task], values=figures)
        else:
            self.console.print(f"{event.task}: step {event.step}  {'  '.join(figures)}", markup=False)

    def _of_total(self, task: str) -> str:
        started = self._started[task]
        return f" of {started.total} {started.unit}" if started.total else f" {started.unit}"

    def _line(self, task: str, text: str) -> None:
        now = time.monotonic()
        if now - self._last_line[task] >= SECONDS_BETWEEN_LINES:
            self._last_line[task] = now
            self._behind.pop(task, None)
            self._has_lines.add(task)
            self.console.print(text, markup=False)
        elif task in self._has_lines:
            self._behind[task] = text


class _Values(ProgressColumn):
    """What was measured last. On a narrow terminal it and the bar give way, not the count and the time left."""

    def render(self, task: Task) -> "_Figures":
        return _Figures(task.fields["values"])


@dataclasses.dataclass
class _Figures:
    """As many of the figures as there is room for, the first ones, each whole."""

    figures: list[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        fitting = (self.figures[:count] for count in range(len(self.figures), 0, -1))
        lines = ("  ".join(figures) for figures in fitting)
        yield Text(next((line for line in lines if len(line) <= options.max_width), ""), "cyan", no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, len("  ".join(self.figures)))


class UnwritableStdout(OSError):
    """The result can't be told."""


class _Stdout(io.TextIOWrapper):
    """Says what it is where it can't be written to."""

    def write(self, text: str) -> int:
        with _named_stdout():
            return super().write(text)

    def flush(self) -> None:
        with _named_stdout():
            super().flush()


@contextmanager
def _named_stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UnwritableStdout(error.errno, error.strerror) from error


@contextmanager
def result_stream() -> Iterator[TextIO]:
    """Keep stdout for the result: until the block ends, whatever libraries print there goes to stderr.

    Raises:
        T5TuneError: it is closed.
        OSError: it can't be written to.
    """
    if sys.stdout is None:
        raise T5TuneError("standard output is closed", hint="send it to a file or /dev/null")
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    # what is no Unicode in a path is shown as \\udcff, which is how JSON writes it
    raw = open(saved, "wb", closefd=False)  # noqa: SIM115 (closed with the stream)
    stream = _Stdout(raw, encoding="utf-8", errors="backslashreplace")
    try:
        yield stream
        stream.flush()
    finally:
        with suppress(OSError):  # what could be written is
            stream.close()
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def format_number(value: float) -> str:
    """Four significant digits, without needless zeros: 0.0001, 12.35, 81920."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e3 else f"{value:,.0f}"


def as_json(result: Any) -> str:
    """A command's result as one JSON object on one line."""
    return json.dumps(_plain(dataclasses.asdict(result)), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def show_result(result: Any, stream: TextIO, quiet: bool) -> None:
    """The path that was made on `stream`, and what there is to know of it as a table on stderr."""
    values = _plain(dataclasses.asdict(result))
    first, *others = values.items()
    if not quiet and others:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in others:
            if value not in (None, {}, []) and value is not False:
                label, shown = name.replace("_", " "), _show(value)
                if name.endswith("bytes"):
                    label, shown = label.removesuffix("bytes").strip() or "size", decimal(value)
                table.add_row(Text(label, "dim"), Text(shown))
        with suppress(OSError):
            _stderr().print(table)
    print(first[1], file=stream, flush=True)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format_number(value)
    if isinstance(value, dict):
        return "  ".join(f"{name} {_show(item)}" for name, item in value.items())
    return str(value)


def show_error(error: BaseException, json_stream: TextIO | None, debug: bool) -> None:
    """One line per problem on stderr; with --json the error as an object on stdout too."""
    if debug:
        traceback.print_exception(error)
    known = isinstance(error, T5TuneError)
    kind = error.kind if isinstance(error, T5TuneError) else type(error).__name__
    message = error.message if isinstance(error, T5TuneError) else one_line(f"{kind}: {' '.join(str(error).split())}")
    hint = error.hint if isinstance(error, T5TuneError) else "--debug shows where it came from"
    problems = list(error.problems) if isinstance(error, SettingsError) else [message]
    console = _stderr()
    for index, problem in enumerate(problems):
        last = index == len(problems) - 1
        tail = f"{' ' if problem.endswith('?') else '; '}{hint}" if hint and last else ""
        with suppress(OSError):  # the exit code tells it
            console.print(Text.assemble(("error:", "bold red"), " ", problem + tail))
    if json_stream is not None:
        body = {"kind": kind if known else "Unexpected", "message": message, "hint": hint}
        print(json.dumps({"error": body}, ensure_ascii=False), file=json_stream, flush=True)


class _Stderr(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read it has gone; Rich would end the process, and with it the work."""
        self.quiet = True


def _stderr() -> Console:
    """Shows text as it is: no markup, emoji codes or colours are read into what a user typed."""
    return _Stderr(stderr=True, highlight=False, soft_wrap=True, emoji=False)
