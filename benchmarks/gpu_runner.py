"""Run measurements in turn, each in a separate process with a time limit, and keep every result.

    outcomes = run_all(measurements, Limits(on_gpu=True, end=time.monotonic() + 540), folder, save)

The processes are forks of this process, so each library is imported only once. This process must not use the GPU: CUDA
doesn't work in a fork of a process that used it.
"""

import faulthandler
import json
import math
import multiprocessing
import operator
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

LIMIT_FACTOR = 4  # a measurement is ended after this many times the seconds that it is expected to take
CPU_LIMIT_FACTOR = 30
NEEDS_GPU = "needs a GPU"
RELATIONS: dict[str, Callable[[Any, Any], Any]] = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}
LOG_LINES = 100  # lines of a failed measurement's output that are kept


class Skipped(Exception):
    """Raised by a measurement that isn't possible here; its text is the reason."""


@dataclass(frozen=True)
class Comparison:
    """A value that was found, and what it must be."""

    what: str
    found: Any
    relation: Literal["<=", ">=", "=="]
    bound: Any

    @property
    def is_met(self) -> bool:
        """Whether the value is as it must be. NaN never is."""
        return bool(RELATIONS[self.relation](self.found, self.bound))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_met": self.is_met}


def make_check(comparisons: list[Comparison], **others: Any) -> dict[str, Any]:
    """Make the result of a check: its comparisons, and other values."""
    return {"comparisons": [comparison.to_dict() for comparison in comparisons], **others}


@dataclass(frozen=True)
class Measurement:
    """Something to measure or to check.

    Args:
        name: such as `train flan-t5-xl 512 packed`.
        seconds: how long it is expected to take on a large GPU. With less time left, it is skipped.
        measure: returns the result, for JSON. It receives a folder that all measurements share.
        needs_gpu: whether it says nothing on a CPU.
    """

    name: str
    seconds: float
    measure: Callable[[Path], dict[str, Any]]
    needs_gpu: bool = False


@dataclass(frozen=True)
class Limits:
    """What measurements can use.

    Args:
        end: when the time is over, in seconds of `time.monotonic`.
        method: how multiprocessing starts the processes.
    """

    on_gpu: bool
    end: float
    method: str = "fork"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a measurement.

    Args:
        seconds: how long it took.
        result: the measured values.
        reason: why it was skipped, or failed.
        log: the end of the output of a failed measurement.
    """

    name: str
    state: Literal["measured", "skipped", "failed", "needs a GPU"]
    seconds: float = 0.0
    result: dict[str, Any] | None = None
    reason: str | None = None
    log: list[str] | None = None


def run_all(
    measurements: list[Measurement], limits: Limits, folder: Path, save: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Run measurements in this order, until the time is over.

    Args:
        folder: for temporary files.
        save: receives all outcomes so far, after each measurement.
    """
    outcomes = list[Outcome]()
    for measurement in measurements:
        outcome = _run_within(limits, measurement, folder)
        outcomes.append(outcome)
        save(outcomes)
        reason = f": {outcome.reason}" if outcome.reason else ""
        print(f"{outcome.name}: {outcome.state} ({outcome.seconds:.0f} s){reason}", file=sys.stderr, flush=True)
    return outcomes


def _run_within(limits: Limits, measurement: Measurement, folder: Path) -> Outcome:
    if measurement.needs_gpu and not limits.on_gpu:
        return Outcome(measurement.name, NEEDS_GPU)
    left = limits.end - time.monotonic()
    if left < measurement.seconds:
        reason = f"no time left: takes about {measurement.seconds:g} s, and {max(0, left):.0f} s are left"
        return Outcome(measurement.name, "skipped", reason=reason)
    factor = LIMIT_FACTOR if limits.on_gpu else CPU_LIMIT_FACTOR
    return run_in_process(measurement, min(left, factor * measurement.seconds), folder, limits.method)


def run_in_process(measurement: Measurement, limit: float, folder: Path, method: str = "fork") -> Outcome:
    """Run a measurement in a new process, which is ended after `limit` seconds."""
    started, log = time.monotonic(), folder / "log.txt"
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=_measure_and_write, args=(measurement, folder, result, log))
    process.start()
    try:
        process.join(limit)
        is_late = process.is_alive()
    finally:  # also if this process is asked to stop
        with suppress(ProcessLookupError):  # the processes that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    seconds = round(time.monotonic() - started, 1)
    if result.is_file():
        return Outcome(measurement.name, seconds=seconds, **json.loads(result.read_text(encoding="utf-8")))
    reason = f"no result within {limit:.0f} s" if is_late else _explain_exit(process.exitcode)
    return Outcome(measurement.name, "failed", seconds, reason=reason, log=_read_end(log))


def _explain_exit(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _measure_and_write(measurement: Measurement, folder: Path, result: Path, log: Path) -> None:
    """Run a measurement in this process, and write its state and result, or the reason for a missing result."""
    os.setsid()  # so that its own processes can be ended with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _write_output_to(log)
    values: dict[str, Any]
    try:
        values = {"state": "measured", "result": measurement.measure(folder)}
    except Skipped as error:
        values = {"state": "skipped", "reason": str(error)}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        sys.stderr.flush()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        values = {"state": "failed", "reason": reason[:500], "log": _read_end(log)}
    write_json(result, values)
    os._exit(0)  # at once, whatever the libraries' threads and processes still do


def _write_output_to(log: Path) -> None:
    """Redirect the output of this process and its children to a file."""
    with open(log, "wb") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    # a test runner may have replaced these
    sys.stdout, sys.stderr = (open(number, "w", 1, "utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    faulthandler.enable(sys.stderr)  # print where a crash happens


def _read_end(log: Path) -> list[str]:
    if not log.is_file():
        return []
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]


def write_json(path: Path, values: Any) -> None:
    """Write JSON to a file that is complete whenever it exists."""
    write_text(path, json.dumps(_replace_non_finite(values), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete whenever it exists."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def to_dict(outcome: Outcome) -> dict[str, Any]:
    """Convert an outcome for JSON, without missing values."""
    return {name: value for name, value in asdict(outcome).items() if value is not None}


def read_outcomes(path: Path) -> list[Outcome]:
    """Read the outcomes that a command has written."""
    return [Outcome(**values) for values in json.loads(path.read_text(encoding="utf-8"))["measurements"]]


def _replace_non_finite(values: Any) -> Any:
    """Replace numbers that JSON doesn't have by their names."""
    if isinstance(values, dict):
        return {name: _replace_non_finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_replace_non_finite(value) for value in values]
    return str(values) if isinstance(values, float) and not math.isfinite(values) else values
