"""Where a command's output goes: its result to stdout; progress, notes and errors to stderr.

Every exception becomes a T5TuneError, whose message says what to do.
"""

import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from t5tune.cli.screen import Screen, StderrConsole, format_number
from t5tune.errors import DependencyError, SettingsError, T5TuneError, WriteError
from t5tune.progress import Report, silent


class Unexpected(T5TuneError):
    """An error that t5tune doesn't raise on purpose."""


@dataclasses.dataclass
class Output:
    """The output of a command. Each command shows its result through it.

    Args:
        stream: where results are printed.
        json: print the result as a JSON object, and an error too.
        quiet: print only errors and the result.
        debug: print the traceback of an error.
        shows_paths: False if another process shows where the output is.
    """

    stream: TextIO
    json: bool = False
    quiet: bool = False
    debug: bool = False
    shows_paths: bool = True

    def __post_init__(self) -> None:
        self.console = Console(file=self.stream, highlight=False, soft_wrap=True, emoji=False)
        self._screen = None if self.quiet else Screen()
        self.report: Report = self._screen or silent

    def show(self, result: Any, text: RenderableType | None = None) -> None:
        """Show a command's result, a dataclass or a dictionary: as JSON with --json, else as `text`.

        Without `text`, its first field, which is the path of the output, is printed to stdout, and the others as a
        table to stderr. Such a result is only shown if `shows_paths`.
        """
        if text is None and not self.shows_paths:
            return
        if self.json:
            self.print_json(result)
            return
        if text is None:
            self.close_screen()
            (_, path), *others = dataclasses.asdict(result).items()
            text = str(path)
            if not self.quiet and others:
                with suppress(OSError):
                    StderrConsole().print(_make_table(dict(others)))
        self.print(text)

    def print_json(self, value: Any) -> None:
        """Print a dataclass or a dictionary as JSON, on one line of stdout."""
        self.print(json.dumps(value, ensure_ascii=False, allow_nan=False, default=_to_json))

    def print(self, what: RenderableType, end: str = "\n") -> None:
        """Print to stdout.

        Raises:
            WriteError: stdout can't be written to.
        """
        self.close_screen()
        if not isinstance(what, str):
            with self.console.capture() as captured:
                self.console.print(what)
            what, end = captured.get(), ""
        try:
            print(what, end=end, file=self.stream, flush=True)
        except OSError as error:
            raise WriteError(f"standard output: can't be written: {error.strerror}") from error

    def fail(self, error: BaseException) -> int:
        """Show an error, and return its exit code: one line per problem on stderr, with --json also a JSON object."""
        self.close_screen()
        known = to_t5tune_error(error)
        if isinstance(known.__cause__, BrokenPipeError):  # the reader of the result is gone
            return known.exit_code
        if self.debug:
            traceback.print_exception(error)
        print_error(known)
        if self.json:
            with suppress(WriteError):
                self.print_json({"error": {"kind": known.kind, "message": known.message, "hint": known.hint}})
        return known.exit_code

    def close_screen(self) -> None:
        """Stop drawing progress bars."""
        if self._screen is not None:
            self._screen.close()


def print_error(error: T5TuneError) -> None:
    """Print one line per problem to stderr, the last one with the hint."""
    *problems, last = error.problems if isinstance(error, SettingsError) else [error.message]
    if error.hint:
        last += f"{' ' if last.endswith('?') else '; '}{error.hint}"
    console = StderrConsole()
    for line in (*problems, last):
        with suppress(OSError):  # if stderr is closed, the exit code still reports the failure
            console.print(Text.assemble(("error:", "bold red"), " ", line))


def to_t5tune_error(error: BaseException) -> T5TuneError:
    """Return the error itself if it is a T5TuneError, otherwise one that explains it."""
    match error:
        case T5TuneError():
            return error
        case KeyboardInterrupt():
            interrupted = T5TuneError("interrupted")
            # SIGTERM and SIGHUP arrive as a KeyboardInterrupt with their number
            interrupted.exit_code = 128 + int(error.args[0] if error.args else signal.SIGINT)
            return interrupted
        case ImportError() if (explained := _explain_import_error(error)) is not None:
            return explained
        case OSError(filename=str() | bytes() as path):
            return T5TuneError(f"{os.fsdecode(path)}: {error.strerror}")
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Unexpected(message, hint="run with --debug to see the traceback")


def _explain_import_error(error: ImportError) -> DependencyError | None:
    """Name the missing or broken library and say how to fix it; None if the module is one of t5tune."""
    # transformers wraps every failed import in a generic message; the cause has the library's name
    while isinstance(error.__cause__, ImportError):
        error = error.__cause__
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name = (error.name or frame.f_globals["__name__"]).partition(".")[0]
    if name == "t5tune":
        return None
    return DependencyError(
        f"{name} can't be imported: {' '.join(str(error).split())}",
        hint=f"pip install --force-reinstall {name}; t5tune doctor checks what else doesn't work here",
    )


@contextmanager
def reserve_stdout() -> Iterator[TextIO]:
    """Yield a stream to stdout: until the block ends, what libraries print to stdout goes to stderr.

    Raises:
        T5TuneError: stdout is closed.
    """
    if sys.stdout is None:
        raise T5TuneError("standard output is closed", hint="redirect it to a file or /dev/null")
    sys.stdout.flush()
    # file descriptors, not sys.stdout: C++ code prints too
    saved = os.dup(1)
    os.dup2(2, 1)
    # bytes of a path that aren't valid UTF-8 are shown as \\udcff, as JSON escapes them
    stream = open(saved, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        yield stream
    finally:
        with suppress(OSError):  # must not replace the error that ended the block
            stream.close()
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def _to_json(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else dataclasses.asdict(value)


def _make_table(values: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in values.items():
        if value not in (None, {}, []) and value is not False:
            label, shown = name.replace("_", " "), _format_value(value)
            if name.endswith("bytes"):
                label, shown = label.removesuffix("bytes").strip() or "size", decimal(value)
            table.add_row(Text(label, "dim"), Text(shown))
    return table


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format_number(value)
    if isinstance(value, dict):
        return "  ".join(f"{name} {_format_value(item)}" for name, item in value.items())
    return str(value)
