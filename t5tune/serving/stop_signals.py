"""Read from a pipe the signals that ask a server to stop, or to reload its models."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from t5tune.distributed.signals import pipe_signals

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RELOAD_SIGNAL = signal.SIGUSR1
ENDED = 0  # no signal: the server has ended


class Requests:
    """Numbers of the received signals. `pipe`: its read end and its write end."""

    def __init__(self, pipe: tuple[int, int]) -> None:
        self._reader, self._writer = pipe

    def end_after(self, work: Callable[[], None]) -> None:
        """Do some work in a background thread; when it is done, `wait` returns ENDED."""
        writer = os.dup(self._writer)  # the thread may outlive this object

        def end() -> None:
            with suppress(BrokenPipeError), open(writer, "wb", buffering=0) as pipe:
                try:
                    work()
                finally:
                    pipe.write(bytes([ENDED]))

        threading.Thread(target=end, daemon=True).start()

    def wait(self) -> int:
        """Wait for the next signal, and return its number; ENDED if the server has ended."""
        return os.read(self._reader, 1)[0]


@contextmanager
def read_signals() -> Iterator[Requests]:
    """Read signals from a pipe: an exception raised by a handler could arrive while an earlier one is handled.

    The block handles RELOAD_SIGNAL, which would end the process, and `handle` handles further signals.
    """
    with pipe_signals() as pipe:
        try:
            with handle(RELOAD_SIGNAL):
                yield Requests(pipe)
        finally:
            os.close(pipe[0])


@contextmanager
def handle(*numbers: signal.Signals) -> Iterator[None]:
    """Handle signals in a block, except those that are ignored."""
    # a shell script's background jobs ignore SIGINT, and nohup ignores SIGHUP
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
