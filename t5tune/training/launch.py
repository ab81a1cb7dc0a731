"""Who this process is among others, and how `--num-gpus` and `--num-processes` start them."""

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from t5tune import errors
from t5tune.errors import T5TuneError, TrainingError

ERRORS = "_T5TUNE_ERRORS"


@dataclass(frozen=True)
class World:
    """This process's place: what torchrun, deepspeed and this module's `launch` put into the environment.

    Args:
        launched: a launcher started this process.
        run_is_open: `launch` did, and the process that called it has opened the run folder.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    launched: bool = False
    run_is_open: bool = False

    @staticmethod
    def from_environment() -> "World":
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return World()
        return World(
            int(os.environ["RANK"]),
            int(os.environ.get("LOCAL_RANK", "0")),
            int(os.environ["WORLD_SIZE"]),
            launched=True,
            run_is_open=ERRORS in os.environ,
        )


def launch(settings_path: Path, count: int, arguments: list[str]) -> None:
    """Run `t5tune train --config settings_path` in `count` processes on this machine, and wait for them.

    torch's elastic agent starts and watches them. Its words and its traceback are kept back: the first
    failing worker's own error is raised here.

    Raises:
        T5TuneError: what a worker raised, or that one died, with its exit code.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with tempfile.TemporaryDirectory(prefix="t5tune-errors-") as folder:
        os.environ[ERRORS] = folder
        try:
            command = ["-m", "t5tune", "train", "--config", str(settings_path), *arguments]
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            raise _first_error(Path(folder), error) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise TrainingError(f"stopped by {error.sigval.name}") from None
        finally:
            del os.environ[ERRORS]


def write_error(error: T5TuneError) -> None:
    """In a worker: leave the error where `launch` looks for it."""
    path = Path(os.environ[ERRORS], f"rank-{World.from_environment().rank}.json")
    path.write_text(json.dumps({"kind": error.kind, "message": error.message, "hint": error.hint}), encoding="utf-8")


def die_with_parent() -> None:
    """Ask Linux to end this worker when the launching process ends, however that may happen."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _first_error(folder: Path, failure: Exception) -> T5TuneError:
    """The error that was written first; where none was, how the first failing worker ended."""
    written = sorted(folder.glob("rank-*.json"), key=lambda path: path.stat().st_mtime_ns)
    if written:
        values = json.loads(written[0].read_text(encoding="utf-8"))
        kind = getattr(errors, values["kind"])
        return kind(values["message"], hint=values["hint"])  # type: ignore[no-any-return]
    rank, first = min(failure.failures.items(), key=lambda item: item[1].timestamp)  # type: ignore[attr-defined]
    ended = (
        f"was killed by {signal.Signals(-first.exitcode).name}"
        if first.exitcode < 0
        else f"exited with {first.exitcode}"
    )
    error = TrainingError(f"rank {rank} {ended}", hint="its own output stands above; --debug shows more")
    error.exit_code = first.exitcode if first.exitcode > 0 else 1
    return error
