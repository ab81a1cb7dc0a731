"""Signals in a process that isn't ours to end, such as a notebook's; the command line's are in tests/reliability."""

import os
import queue
import signal
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from t5tune import train
from t5tune.distributed import signals
from t5tune.distributed.signals import handle_signals
from t5tune.errors import Stopped
from t5tune.progress import Advanced, Event, Note
from tests.support.train_runs import make_settings


class Exited(BaseException):
    """Raised in place of ending the process."""


@pytest.fixture(autouse=True)
def _exits(monkeypatch: pytest.MonkeyPatch) -> None:
    def exit_process(code: int) -> NoReturn:
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", exit_process)
    monkeypatch.setattr(signals, "SECONDS_BETWEEN_SIGNALS", 0.0)


def interrupt(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_a_second_interrupt_ends_a_call_from_python(inputs: list[Path], tmp_path: Path) -> None:
    settings = make_settings(*inputs, tmp_path / "run", save_steps=2)
    notes: queue.Queue[str] = queue.Queue()
    handler = signal.getsignal(signal.SIGINT)

    def interrupt_twice(event: Event) -> None:
        if isinstance(event, Note):
            notes.put(event.text)
        if event == Advanced("train", 3):
            interrupt(2)

    with pytest.raises(KeyboardInterrupt) as caught:
        train(settings, interrupt_twice)
    message = "KeyboardInterrupt: stopped at once; the last complete checkpoint is kept"
    assert caught.value._render_traceback_() == [message]  # type: ignore[attr-defined]
    while "interrupt again to stop at once" not in notes.get(timeout=100):
        pass
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert train(settings).resumed_from == tmp_path / "run" / "checkpoint-2"


def test_no_timer_ends_a_notebook_process() -> None:
    running: list[threading.Thread] = []

    def interrupt_stubborn_work() -> None:
        try:
            interrupt()
        finally:
            running.extend(threading.enumerate())

    with pytest.raises(Stopped), handle_signals(exits=False) as stop, stop.interruptible():
        interrupt_stubborn_work()
    assert running
    assert not [thread for thread in running if isinstance(thread, threading.Timer)]


def test_the_outermost_block_decides_if_a_second_signal_exits() -> None:
    with pytest.raises(Exited), handle_signals(), handle_signals(exits=False):
        interrupt(2)
