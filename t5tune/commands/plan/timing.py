"""Time the beginning of a planned run, with `train` itself on the plan's sample of the data."""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch

from t5tune.commands.plan.example_lengths import ExampleLengths
from t5tune.commands.train import set_up_run_folder
from t5tune.distributed.launcher import launch
from t5tune.errors import T5TuneError
from t5tune.file_names import RUN_CACHE_FOLDER
from t5tune.io.processes import can_fork, start_module
from t5tune.io.untrusted import read_json_object
from t5tune.planning.run_memory import Machine
from t5tune.planning.run_time import TIMES_FILE, RunTime, Times, count_occasions, estimate_run_time
from t5tune.settings import PlanSettings, TrainSettings, write_settings

TIMED_RUN = "t5tune.commands.train.timed_run"
MAX_SECONDS = 120.0  # of each process
SECONDS_OF_IMPORTS = time.time() - psutil.Process().create_time()  # the run would need them, too


def estimate_time(
    settings: PlanSettings,
    data: ExampleLengths,
    machine: Machine,
    steps: int,
    steps_per_epoch: int,
    folder: Path,
    in_fork: bool,
) -> RunTime:
    """Time the beginning of the run, and estimate the time of all of it.

    Args:
        folder: has the prepared sample of the data; the timed run is in it, too.
        in_fork: see `start_module`.

    Raises:
        T5TuneError: why it can't be timed.
    """
    if not settings.time_run:
        raise T5TuneError("no steps were run; t5tune plan runs some, unless time_run is off")
    if settings.gpu_memory is not None or (machine.on_gpu and machine.count > torch.cuda.device_count()):
        raise T5TuneError("the plan is for a different machine")
    if data.share is None:
        has_data = settings.data is not None or settings.data_path is not None
        unread = "the model isn't on this machine" if has_data else "no data is given"
        raise T5TuneError("the number of examples isn't known" if data.is_real else unread)
    times = _time_beginning(_make_train_settings(settings, folder), folder, in_fork)
    if times.error is not None or len(times.steps) < 3:
        raise T5TuneError(times.error or "the run has fewer than three steps")
    strategy = settings.eval_strategy or ("steps" if settings.eval_steps else "epoch")
    is_split = settings.eval_fraction > 0 and not settings.list_evaluation_datasets()
    return estimate_run_time(
        times,
        steps,
        0 if strategy == "no" else count_occasions(strategy, settings.eval_steps, steps, steps_per_epoch),
        count_occasions(settings.save_strategy, settings.save_steps, steps, steps_per_epoch),
        data.seconds / data.share,
        data.share if is_split else 1.0,
    )


def _make_train_settings(settings: PlanSettings, folder: Path) -> TrainSettings:
    """Make the settings of a run like the planned run, but on the sample, and with nothing outside of the folder."""
    names = settings.model_fields_set & TrainSettings.model_fields.keys() - {"data", "num_data", "preprocessed_path"}
    changes: dict[str, Any] = {"data_path": [str(folder / RUN_CACHE_FOLDER)], "output_dir": folder / "run"}
    if settings.eval_strategy != "no":
        changes["training_args"] = {**settings.training_args, "eval_on_start": True}
    return TrainSettings(**{name: getattr(settings, name) for name in names} | changes | {"report_to": ["none"]})


def _time_beginning(settings: TrainSettings, folder: Path, in_fork: bool) -> Times:
    write_settings(folder, settings, only_given=True)
    started = time.time() - (SECONDS_OF_IMPORTS if in_fork and can_fork() else 0.0)
    arguments = [str(folder), str(started), str(MAX_SECONDS)]
    with ExitStack() as stack:
        if settings.process_count == 1:
            process = start_module(TIMED_RUN, arguments, os.environ, None, in_fork)
            stack.callback(process.kill)
            process.wait()
        else:
            set_up_run_folder(settings, stack)
            launch(arguments, settings.process_count, module=TIMED_RUN, in_fork=in_fork)
    try:
        return Times(**read_json_object(folder, TIMES_FILE))
    except FileNotFoundError:
        raise T5TuneError(f"the first steps took more than {MAX_SECONDS:.0f} seconds, or more memory") from None
