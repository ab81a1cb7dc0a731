"""Stop training on a signal: finish the current step, save a checkpoint and exit with code 143.

    with handle_signals() as stop:
        import torch                 # a signal is recorded
        with stop.interruptible():   # a recorded signal raises here: there is nothing to save yet
            model = load()           # a signal interrupts this
        train(model)                 # signals are recorded again, and checked after each step
        if any_rank(stop.is_set):
            ...                      # every rank gets here after the same step

Schedulers send SIGTERM or SIGUSR1 some time before they kill a job. Closing a terminal sends SIGHUP. Ctrl-C sends
SIGINT, with exit code 130. A second signal exits immediately. In a notebook or a script, whose process isn't ours to
end, it raises KeyboardInterrupt instead.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NoReturn

from t5tune.compat.python_patches import hide_unraisable
from t5tune.errors import Stopped
from t5tune.io.processes import die_with_parent
from t5tune.progress import Note, Report, silent

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
IGNORABLE_SIGNALS = (signal.SIGINT, signal.SIGHUP)
# `launch` forwards stop requests as this signal, so that a worker that also received the original counts one request
FORWARDED_SIGNAL = signal.SIGUSR2
# signals less than this apart are one request: a launcher and a scheduler may each deliver a copy
SECONDS_BETWEEN_SIGNALS = 1.0
# exit after this time if the work can't be interrupted: download threads, for example, finish their file
SECONDS_TO_UNWIND = 20.0
# how long the main thread has to exit at a second signal before a watching thread does it
SECONDS_TO_REACT = 0.5
KEPT_CHECKPOINT = "the last complete checkpoint is kept"
ERASE_LINE_AND_SHOW_CURSOR = "\r\x1b[K\x1b[?25h"


class Interrupted(BaseException):
    """Raised by a signal wherever it arrives. Not an Exception, because libraries catch those and continue."""


class InterruptedAgain(KeyboardInterrupt):
    """Raised by a second signal in a process that isn't ours to end."""

    def _render_traceback_(self) -> list[str]:
        """Make IPython show the exception as one line."""
        return [f"KeyboardInterrupt: {self}"]


class StopRequest:
    """A request to stop this process.

    Args:
        report: receives a note when Ctrl-C is pressed.
        exits: whether to end the process at a second signal, or if the work can't be interrupted.
        saves_checkpoints: whether the command saves checkpoints, as `train` does.
    """

    def __init__(self, report: Report = silent, exits: bool = True, saves_checkpoints: bool = False) -> None:
        self._report = report
        self._exits = exits
        self._kept = f"; {KEPT_CHECKPOINT}" if saves_checkpoints else ""
        self.signal_name: str | None = None  # of the first signal
        self._came_at = 0.0
        self._interruptible_when: str | None = None
        self._exit_timer: threading.Timer | None = None
        self._is_exiting = threading.Event()

    @property
    def is_set(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal_name is not None

    def receive(self, number: int, _frame: Any = None) -> None:
        """Handle a signal: record it, raise within `interruptible`, and end the work at a second signal."""
        if self.is_set:
            if number != FORWARDED_SIGNAL and time.monotonic() - self._came_at > SECONDS_BETWEEN_SIGNALS:
                if not self._exits:
                    raise InterruptedAgain(f"stopped at once{self._kept}")
                self._exit_now(f"second signal: exiting now{self._kept}")
            return
        self.signal_name = signal.Signals(number).name
        self._came_at = time.monotonic()
        if self._interruptible_when is not None:
            self._interrupt()
        if number == signal.SIGINT:
            # in a thread: the signal may have interrupted a report, which isn't reentrant
            again = "press Ctrl-C again to quit immediately" if self._exits else "interrupt again to stop at once"
            note = Note(f"finishing this step and saving; {again}")
            threading.Thread(target=self._report, args=(note,), daemon=True).start()

    def exit_at_second_signal(self, pipe: int) -> None:
        """Read the numbers of signals from a pipe until a 0, and exit at a second signal if the main thread doesn't.

        Python runs signal handlers in the main thread, but not while it waits in C++ for a GPU or a rank.
        """
        first_came_at: float | None = None
        with open(pipe, "rb", buffering=0) as numbers:
            while number := numbers.read(1)[0]:
                if signal.getsignal(number) != self.receive:  # `launch` handles signals itself
                    continue
                now = time.monotonic()
                first_came_at = first_came_at or now
                is_second = number != FORWARDED_SIGNAL and now - first_came_at > SECONDS_BETWEEN_SIGNALS
                if is_second and not self._is_exiting.wait(SECONDS_TO_REACT):
                    self._exit_now(f"second signal: exiting now{self._kept}")

    @contextmanager
    def interruptible(self, when: str = "before training began") -> Iterator[None]:
        """Let a signal interrupt the block, for work with nothing to save, such as the work before the first step.

        Args:
            when: completes the message `stopped by SIGTERM …`.

        Raises:
            Stopped: a signal arrived, before or during the block.
        """
        try:
            with hide_unraisable(Interrupted):
                self._interruptible_when = when
                if self.is_set:
                    self._interrupt()
                yield
                if self.is_set:  # Interrupted was raised where Python ignores exceptions, such as in __del__
                    self._interrupt()
        except (Interrupted, Exception) as error:
            if not self.is_set:
                raise
            raise self.make_error(when) from error
        finally:
            self._interruptible_when = None

    def _interrupt(self) -> NoReturn:
        if self._exits and self._exit_timer is None:
            reason = "exiting, since the work in progress can't be interrupted"
            line = f"{self._describe()} {self._interruptible_when}; {reason}"
            self._exit_timer = threading.Timer(SECONDS_TO_UNWIND, self._exit_now, [line])
            self._exit_timer.daemon = True
            self._exit_timer.start()
        raise Interrupted

    def _exit_now(self, line: str) -> NoReturn:
        self._is_exiting.set()
        write_stderr(line)
        os._exit(get_exit_code(self.signal_name))

    def close(self) -> None:
        """Cancel the forced exit, because the block ended in time."""
        if self._exit_timer is not None:
            self._exit_timer.cancel()

    def make_error(self, what: str, hint: str | None = None) -> Stopped:
        """Make the error to raise once the process has stopped; `what` follows the signal's name."""
        error = Stopped(f"{self._describe()} {what}", hint=hint)
        error.exit_code = get_exit_code(self.signal_name)
        return error

    def _describe(self) -> str:
        if self.signal_name in (signal.SIGINT.name, FORWARDED_SIGNAL.name):  # the user knows the signal
            return "stopped"
        return f"stopped by {self.signal_name or 'a signal to another rank'}"


def write_stderr(line: str) -> None:
    """Write a line to stderr, also from a signal handler or while a thread draws a progress bar."""
    # in a signal handler, `print` could re-enter a buffered writer
    with suppress(OSError):  # Ctrl-C also ends a `tee` that reads the output
        # a terminal shows a progress bar in this line, and no cursor
        os.write(2, f"{ERASE_LINE_AND_SHOW_CURSOR if os.isatty(2) else ''}{line}\n".encode())


def choose_signals() -> list[signal.Signals]:
    """Choose the signals to handle, without those that a shell (SIGINT, for a background job) or nohup ignores."""
    ignored = [number for number in IGNORABLE_SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    return [number for number in STOP_SIGNALS if number not in ignored]


def get_exit_code(name: str | None) -> int:
    """Return the exit code of a process that the named signal stopped."""
    return 128 + signal.SIGINT if name == signal.SIGINT.name else Stopped.exit_code


_current: StopRequest | None = None  # of the outermost `handle_signals` block


@contextmanager
def handle_signals(
    report: Report = silent, exits: bool = True, saves_checkpoints: bool = False
) -> Iterator[StopRequest]:
    """Handle the signals in this block. A nested block yields the outermost block's request.

    Python runs signal handlers only in the main thread: in other threads, the request is never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest(report, exits, saves_checkpoints)
        return
    global _current
    if _current is not None:
        yield _current
        return
    stop = _current = StopRequest(report, exits, saves_checkpoints)
    before = {number: signal.signal(number, stop.receive) for number in (*choose_signals(), FORWARDED_SIGNAL)}
    # `launch` starts workers with these signals blocked, so that an earlier signal is delivered here
    signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
    try:
        with _watch_signals(stop) if exits else nullcontext():
            yield stop
    finally:
        _current = None
        stop.close()
        for number, handler in before.items():
            if signal.getsignal(number) == stop.receive:  # after a signal, `launch` has set them to be ignored
                signal.signal(number, handler)


@contextmanager
def pipe_signals() -> Iterator[tuple[int, int]]:
    """Open a pipe, and yield its two ends. Python's C code writes each handled signal's number to it at once.

    Python's handlers wait for the main thread, which may be in C++, or asleep if the kernel gives the signal to a
    different thread. The caller must close the reading end.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader, writer
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


@contextmanager
def _watch_signals(stop: StopRequest) -> Iterator[None]:
    with pipe_signals() as (reader, writer):
        threading.Thread(target=stop.exit_at_second_signal, args=(reader,), daemon=True).start()
        try:
            yield
        finally:
            os.write(writer, b"\0")


def ignore_signals(_worker: int) -> None:
    """Ignore the signals in a data loader's worker: the rank handles signals to the process group."""
    for number in (*STOP_SIGNALS, FORWARDED_SIGNAL):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, so that temporary files are deleted."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    # under nohup SIGHUP stays ignored
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
