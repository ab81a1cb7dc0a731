"""A run that ends after a few steps, for `t5tune plan`: `python -m t5tune.commands.train.timed_run FOLDER …`.

It trains with the settings in the folder, and adds TIMES_FILE. It runs in its own process, alone or as one of several
ranks, so that it can't change or end the plan's process.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from t5tune.compat.quiet import quiet_libraries
from t5tune.errors import Stopped
from t5tune.file_names import SETTINGS_FILE
from t5tune.io.atomic import write_json
from t5tune.io.processes import die_with_parent
from t5tune.io.reasons import describe_error
from t5tune.planning.run_time import TIMES_FILE, Times
from t5tune.progress import Advanced, Evaluated, Event, Started
from t5tune.settings import TrainSettings, load_settings

MAX_STEPS, MIN_STEPS = 12, 5  # and one more, since the run stops after the next step
SECONDS_OF_STEPS = 2.0  # no further step after MIN_STEPS and this time


def record(event: Event, times: Times) -> None:
    """Record an event of `train`, and ask this process to stop after enough steps."""
    match event:
        case Started("train"):
            times.loaded = time.time()
        case Evaluated(step=0):
            times.evaluated = time.time()
        case Advanced("train", done) if done > len(times.steps):
            times.steps.append(time.time())
            is_long = times.steps[-1] - times.steps[0] > SECONDS_OF_STEPS
            if times.end == 0.0 and (done == MAX_STEPS or (done >= MIN_STEPS and is_long)):
                times.end = times.steps[-1]  # a second signal would end the process at once
                os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path, times: Times, max_seconds: float) -> None:
    """Train, and write the times of rank 0; end this process after `max_seconds`."""
    die_with_parent()
    limit = threading.Timer(max_seconds, os._exit, [1])  # loading can't be interrupted otherwise
    limit.daemon = True
    limit.start()
    from huggingface_hub import constants

    from t5tune.commands.train import train

    constants.HF_HUB_OFFLINE = True  # the variable may have been read already, in the process that forked
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    try:
        settings, _ = load_settings(TrainSettings, str(folder / SETTINGS_FILE), {})
        with quiet_libraries():
            train(settings, lambda event: record(event, times))
    except Stopped:
        pass
    except Exception as error:  # the plan shows it
        times.error = describe_error(error)
    times.end = time.time()
    if os.environ.get("RANK", "0") == "0":
        write_json(folder / TIMES_FILE, asdict(times))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Times(float(sys.argv[2])), float(sys.argv[3]))
