"""A run that ends after a few steps, for `t5tune plan`: `python -m t5tune.commands.train.timed_run FOLDER`.

It trains with the settings in the folder, and writes when its parts ended to the folder's TIMES_FILE. It runs in its
own process, alone or as one of several ranks, so that it can't change or end the plan's process.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from t5tune.errors import Stopped, T5TuneError
from t5tune.file_names import SETTINGS_FILE
from t5tune.io.atomic import write_json
from t5tune.io.processes import die_with_parent
from t5tune.io.reasons import describe_error
from t5tune.progress import Advanced, Evaluated, Event, Started
from t5tune.settings import TrainSettings, load_settings

TIMES_FILE = "times.json"
MAX_STEPS, MIN_STEPS = 31, 5
SECONDS_OF_STEPS = 12.0  # no further step after MIN_STEPS and this time
MAX_SECONDS = 120.0  # of the whole process


@dataclass
class Times:
    """When parts of the run ended, in seconds since the epoch, as `time.time` counts.

    Args:
        loaded: when training began, before the first evaluation.
        evaluated: when that evaluation ended; None: nothing is held out.
        error: why the run failed.
    """

    loaded: float = 0.0
    evaluated: float | None = None
    steps: list[float] = field(default_factory=list)
    end: float = 0.0
    error: str | None = None

    def record(self, event: Event) -> None:
        """Record an event of `train`, and stop this process's run after enough steps."""
        match event:
            case Started("train"):
                self.loaded = time.time()
            case Evaluated(step=0):
                self.evaluated = time.time()
            case Advanced("train", done) if done > 0 and self.end == 0.0:
                self.steps.append(time.time())
                took = self.steps[-1] - self.steps[0]
                if len(self.steps) >= MAX_STEPS or (len(self.steps) >= MIN_STEPS and took > SECONDS_OF_STEPS):
                    self.end = self.steps[-1]
                    os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> None:
    """Train, and write the times of rank 0."""
    die_with_parent()
    limit = threading.Timer(MAX_SECONDS, os._exit, [1])  # loading can't be interrupted otherwise
    limit.daemon = True
    limit.start()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's library is imported
    from t5tune.commands.train import train

    times = Times()
    try:
        train(load_settings(TrainSettings, str(folder / SETTINGS_FILE), {})[0], times.record)
    except Stopped:
        pass
    except Exception as error:  # the plan shows it
        times.error = error.message if isinstance(error, T5TuneError) else describe_error(error)
    times.end = time.time()
    if os.environ.get("RANK", "0") == "0":
        write_json(folder / TIMES_FILE, asdict(times))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
