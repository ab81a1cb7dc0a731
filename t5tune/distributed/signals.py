"""A signal asks training to stop: it ends behind a whole step, with a sealed checkpoint and exit code 143.

    with listening() as stop:
        import torch           # a signal is noted
        with stop.at_once():   # raised here, if one came: there is nothing to seal yet
            model = load()     # it cuts this off
        train(model)           # it is noted again, for the end of a step
        if any_rank(stop.name is not None, device):
            ...                # every rank comes here behind the same step

Schedulers send SIGTERM or SIGUSR1 a while before they kill, a terminal that is closed sends SIGHUP, and the keyboard's
Ctrl-C is SIGINT, which ends with 130. A second signal stops at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from t5tune.errors import Stopped
from t5tune.io.processes import die_with_parent

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
# how `launch` hands a request on, so that a worker that got the signal itself doesn't count it twice
HANDED_ON = signal.SIGUSR2
SECONDS_APART = 1.0  # signals closer than this are one request: launchers and schedulers send it along several ways
SECONDS_TO_LEAVE = 20.0  # a download's threads finish their files first, however large


class CutOff(BaseException):
    """What a signal raises where it arrives. No Exception: libraries catch those, and go on."""


class StopRequest:
    """What was asked of this process.

    Args:
        name: of the first signal, or who handed it on; None: none has come.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._came_at = 0.0
        self._cuts_off = False
        self._patience: threading.Timer | None = None

    def receive(self, number: int, _frame: Any = None) -> None:
        """The signals' handler.

        Raises:
            CutOff: within `at_once`.
        """
        if self.name is not None:
            if number != HANDED_ON and time.monotonic() - self._came_at > SECONDS_APART:
                _say(b"a second signal: stopped at once; the last whole checkpoint stands\n")
                self._leave()
            return
        self.name = "its launcher" if number == HANDED_ON else signal.Signals(number).name
        self._came_at = time.monotonic()
        if self._cuts_off:
            self._cut_off()
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            _say(b"stopping as soon as all work is sealed; Ctrl-C once more stops at once\n")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Where nothing has been trained yet, a signal ends the work in the middle.

        Raises:
            Stopped: one has come, now or before.
        """
        tell_dropped = sys.unraisablehook
        sys.unraisablehook = lambda dropped: None if dropped.exc_type is CutOff else tell_dropped(dropped)
        try:
            self._cuts_off = True
            if self.name is not None:
                self._cut_off()
            yield
            if self.name is not None:  # it was raised in a place where Python drops what is raised
                self._cut_off()
        except (CutOff, Exception) as error:
            if self.name is None:
                raise
            raise self.stopped(" before training began") from error
        finally:
            self._cuts_off = False
            sys.unraisablehook = tell_dropped

    def _cut_off(self) -> NoReturn:
        if self._patience is None:
            self._patience = threading.Timer(SECONDS_TO_LEAVE, self._leave_unfinished)
            self._patience.daemon = True
            self._patience.start()
        raise CutOff

    def _leave_unfinished(self) -> NoReturn:
        _say(f"stopped by {self.name} before training began; what was under way didn't end by itself\n".encode())
        self._leave()

    def _leave(self) -> NoReturn:
        os._exit(exit_code(self.name))

    def close(self) -> None:
        """Nothing more comes."""
        if self._patience is not None:
            self._patience.cancel()

    def stopped(self, what: str, hint: str | None = None) -> Stopped:
        """The error of having done so."""
        error = Stopped(f"stopped by {self.name or 'a signal to another rank'}{what}", hint=hint)
        error.exit_code = exit_code(self.name)
        return error


def _say(line: bytes) -> None:
    with suppress(OSError):  # Ctrl-C ends the `tee` behind the run too
        os.write(2, line)


def signals() -> list[signal.Signals]:
    """Those to take here. Ctrl-C isn't for what a script put into the background, nor SIGHUP for what nohup started."""
    ignored = [number for number in MAY_BE_IGNORED if signal.getsignal(number) is signal.SIG_IGN]
    return [number for number in SIGNALS if number not in ignored]


def exit_code(name: str | None) -> int:
    """That of the end which a signal asked for."""
    return 128 + signal.SIGINT if name == signal.SIGINT.name else Stopped.exit_code


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Take the signals for a while. Within another `listening` the request is the same.

    Outside of the main thread, where none arrive, it stays empty.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    listens = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(listens, StopRequest):
        yield listens
        return
    stop = StopRequest()
    before = {number: signal.signal(number, stop.receive) for number in (*signals(), HANDED_ON)}
    # `launch` starts workers with these blocked, so that one that comes before this line waits for it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
    try:
        yield stop
    finally:
        stop.close()
        for number, handler in before.items():
            if signal.getsignal(number) == stop.receive:  # `launch` leaves them ignored, where one has come
                signal.signal(number, handler)


def outlast_signals(_worker: int) -> None:
    """In a process that reads data: a signal to the whole group is the rank's to answer, not this process's."""
    for number in (*SIGNALS, HANDED_ON):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
