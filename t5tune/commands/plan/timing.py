"""Time the first steps of a planned run, with `train` itself on the plan's sample of the data."""

import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from t5tune.commands.plan.example_lengths import ExampleLengths
from t5tune.commands.train import set_up_run_folder
from t5tune.commands.train.timed_run import MAX_SECONDS, TIMES_FILE, Times
from t5tune.distributed.launcher import launch
from t5tune.errors import T5TuneError
from t5tune.file_names import RUN_CACHE_FOLDER
from t5tune.io.processes import make_module_command
from t5tune.io.untrusted import read_json_object
from t5tune.planning.run_time import Beginning, RunTime, count_occasions, estimate_run_time
from t5tune.progress import Report, count_done
from t5tune.settings import PlanSettings, TrainSettings, write_settings

TIMED_RUN = "t5tune.commands.train.timed_run"


def estimate_time(
    settings: PlanSettings, data: ExampleLengths, steps: tuple[int, int], folder: Path, report: Report
) -> RunTime:
    """Time the beginning of the run, and estimate the time of all of it.

    Args:
        steps: of the run, and of an epoch.
        folder: has the prepared sample of the data; the timed run is in it, too.

    Raises:
        T5TuneError: why it can't be timed.
    """
    with count_done("timing steps", report):
        beginning = _time_beginning(_make_train_settings(settings, folder), folder)
    share = data.share or 1.0
    is_split = settings.eval_fraction > 0 and not settings.list_evaluation_datasets()
    strategy = settings.eval_strategy or ("steps" if settings.eval_steps else "epoch")
    return estimate_run_time(
        beginning,
        steps[0],
        count_occasions(strategy, settings.eval_steps, *steps) if strategy != "no" else 0,
        count_occasions(settings.save_strategy, settings.save_steps, *steps),
        data.seconds / share,
        share if is_split else 1.0,
    )


def _make_train_settings(settings: PlanSettings, folder: Path) -> TrainSettings:
    """Make the settings of a run like the planned run, but on the sample, and with nothing outside of the folder."""
    names = settings.model_fields_set & TrainSettings.model_fields.keys() - {"data", "num_data", "preprocessed_path"}
    changes: dict[str, Any] = {
        "data_path": [str(folder / RUN_CACHE_FOLDER)],
        "output_dir": folder / "run",
        "report_to": ["none"],
    }
    if settings.eval_strategy != "no":
        changes["training_args"] = {**settings.training_args, "eval_on_start": True}
    return TrainSettings(**{name: getattr(settings, name) for name in names} | changes)


def _time_beginning(settings: TrainSettings, folder: Path) -> Beginning:
    """Run the first steps in their own processes."""
    write_settings(folder, settings, only_given=True)
    started = time.time()
    if settings.process_count == 1:
        subprocess.run(
            make_module_command(TIMED_RUN, str(folder)), stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    else:
        with ExitStack() as stack:
            set_up_run_folder(settings, stack)
            launch([str(folder)], settings.process_count, module=TIMED_RUN)
    try:
        times = Times(**read_json_object(folder, TIMES_FILE))
    except FileNotFoundError:
        raise T5TuneError(f"the first steps took more than {MAX_SECONDS:.0f} seconds, or more memory") from None
    if times.error is not None:
        raise T5TuneError(times.error)
    if len(times.steps) < 3:
        raise T5TuneError("the run has fewer than three steps")
    evaluation = None if times.evaluated is None else times.evaluated - times.loaded
    return Beginning(
        times.steps[0] - started - (evaluation or 0.0),
        [later - earlier for earlier, later in zip(times.steps, times.steps[1:], strict=False)],
        evaluation,
        times.end - times.steps[-1],
    )
