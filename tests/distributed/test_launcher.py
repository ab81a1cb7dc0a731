"""Errors of workers: the launching process reads the error that the worker raised."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from t5tune.distributed import launcher
from t5tune.distributed.launcher import _find_first_error, _read_error, _ReceivedSignals, write_error
from t5tune.errors import RankLost, SettingsError, T5TuneError

pytestmark = pytest.mark.slow


def run_ranks(code: str, count: int, received: _ReceivedSignals, saves_checkpoints: bool) -> T5TuneError | None:
    def start(environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", code], env=environment)

    return launcher._run(start, count, received, saves_checkpoints)


def test_the_launching_process_reads_each_problem_of_a_workers_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_T5TUNE_ERRORS", str(tmp_path))
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for raised in (
        SettingsError("seed: 1 \u2260 2", "lora_r: 4", hint="--fresh"),
        SettingsError("lora_r: 8 before, 4 now", heading="run can't be resumed:", choices=["use 8", "add --fresh"]),
        RankLost("rank 0 is gone"),
        T5TuneError("x"),
    ):
        write_error(raised)
        (path,) = tmp_path.iterdir()
        read = _read_error(path)
        assert (path.name, type(read), str(read), read.hint) == ("rank-1.json", type(raised), str(raised), raised.hint)
        if isinstance(raised, SettingsError):
            shown = (raised.problems, raised.heading, raised.choices)
            assert (read.problems, read.heading, read.choices) == shown
    write_error(ValueError("a\nb"))
    assert _read_error(tmp_path / "rank-1.json").message == "ValueError: a b"


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of Python 3.12 and later, at preexec_fn
def test_the_launcher_names_the_hanging_rank_if_nccl_aborts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SECONDS_TO_REPORT", 0.5)
    hang_or_abort = "import os, signal; signal.pause() if os.environ['RANK'] == '1' else os.abort()"
    error = run_ranks(hang_or_abort, 3, _ReceivedSignals(), saves_checkpoints=False)
    assert isinstance(error, RankLost)
    assert error.hint == "run the same command again"
    assert (
        error.message == "rank 0 was killed by SIGABRT, which NCCL sends if another rank hangs; still running: rank 1"
    )
    error = run_ranks("import os; os.abort()", 2, _ReceivedSignals(), saves_checkpoints=True)
    assert isinstance(error, RankLost)
    assert error.message == "rank 0 was killed by SIGABRT"


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_stops_on_request_may_take_longer(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that only the launching process has asked ends as after SIGTERM."""
    monkeypatch.setattr(launcher, "SECONDS_TO_REPORT", 0.2)
    done = tmp_path / "done"
    stop = f"""
import os, signal, sys, time
signal.sigwait([signal.{launcher.FORWARDED_SIGNAL.name}])
if os.environ["RANK"] == "0":
    time.sleep(1)
    open({str(done)!r}, "w").close()
sys.exit(143)
"""
    received = _ReceivedSignals(number)
    error = run_ranks(stop, 2, received, saves_checkpoints=True)
    assert error.exit_code == 143
    assert done.exists()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_rank_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SECONDS_TO_STOP", 1.0)
    ignoring, ended = tmp_path / "ignoring", tmp_path / "ended"
    stop_or_hang = f"""
import os, pathlib, signal, sys, time
number, ignoring = signal.{launcher.FORWARDED_SIGNAL.name}, pathlib.Path({str(ignoring)!r})
if os.environ["RANK"] == "0":
    signal.sigwait([number])
    while not ignoring.exists():
        time.sleep(0.01)
    sys.exit(143)
for each in (number, signal.SIGTERM, signal.SIGINT):
    signal.signal(each, signal.SIG_IGN)
ignoring.write_text(str(os.getpid()))
time.sleep(20)
pathlib.Path({str(ended)!r}).touch()
"""
    error = run_ranks(stop_or_hang, 2, _ReceivedSignals(signal.SIGINT), saves_checkpoints=True)
    assert error.exit_code == 143
    assert not ended.exists()
    assert not psutil.pid_exists(int(ignoring.read_text()))


def test_only_train_says_that_a_checkpoint_is_kept(tmp_path: Path) -> None:
    received = _ReceivedSignals(signal.SIGTERM, is_second=True)
    for saves_checkpoints, hint in ((True, "the last complete checkpoint is kept"), (False, None)):
        error = _find_first_error(tmp_path, [None], received, saves_checkpoints)
        assert (error.message, error.hint) == ("second SIGTERM: exited immediately", hint)
