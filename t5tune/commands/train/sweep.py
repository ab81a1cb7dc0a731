"""`t5tune train --sweep`: train with each combination of settings, and compare the runs.

    result = sweep(TrainSettings(sweep={"lora_r": [4, 8], "seed": [1, 2, 3]}, output_dir="ranks", …))
    result.comparison.rows[0].settings                # {"lora_r": 8}

Each run is an ordinary run in a separate process, in a folder that is named after its settings. The folders are the
only state: when the command is run again, finished runs are skipped, and interrupted runs are resumed.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from t5tune.commands.compare import Comparison, compare
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.distributed.launcher import POLL_SECONDS
from t5tune.distributed.signals import FORWARDED_SIGNAL, StopRequest, get_exit_code, handle_signals
from t5tune.distributed.world import World
from t5tune.errors import SettingsError, Stopped, T5TuneError
from t5tune.formatting import format_count
from t5tune.io.processes import count_cores, die_with_parent, make_module_command
from t5tune.io.yaml_file import MAX_SETTINGS_BYTES, read_yaml
from t5tune.metrics import is_better_low
from t5tune.progress import Note, Report, silent
from t5tune.runs.checks import check_plan
from t5tune.runs.folder import RunFolder
from t5tune.runs.metrics_log import read_metrics
from t5tune.runs.plan import EXAMPLE_SETTINGS
from t5tune.runs.resume_guard import check_finished_run
from t5tune.settings import CompareSettings, TrainSettings, load_settings, write_settings
from t5tune.settings.groups.record_format import KINDS
from t5tune.settings.loading import VARIABLE_PREFIX
from t5tune.settings.sweep import expand_sweep, name_run

DATA_FOLDER = "data"
MIN_FINISHED = 5  # before a run is stopped by the median, as in Optuna's MedianPruner
# settings of the whole sweep, which a run doesn't get
OF_SWEEP = ("sweep", "jobs", "max_runs", "median_stopping")
NOT_IN_SWEEPS = {
    "fresh": "choose a new output_dir, or delete the folders of the runs to repeat",
    "push_to_hub": "upload the best run afterward: t5tune push RUN owner/name",
}
MODEL_SETTINGS = {"model_name_or_path", "revision", "family", "adapter"}  # they determine the tokens


@dataclass(frozen=True)
class SweepResult:
    """The folder of a sweep, its runs by what became of them, and their comparison, if any run was evaluated.

    Args:
        stopped: runs that were worse than the median.
        failed: name of a run -> its error.
    """

    folder: Path
    finished: list[str]
    stopped: list[str]
    failed: dict[str, str]
    comparison: Comparison | None


@dataclass
class _Running:
    """A process that trains a run.

    Args:
        output: the file with its output.
        is_asked: whether the process was asked to stop.
        is_pruned: the request was made because the run is worse than the median.
    """

    name: str
    process: subprocess.Popen[bytes]
    output: Path
    is_asked: bool = False
    is_pruned: bool = False


def sweep(settings: TrainSettings, report: Report = silent, shows_runs: bool = False) -> SweepResult:
    """Train the runs of a sweep that haven't finished, and compare all.

    Args:
        shows_runs: whether a run shows its progress on the terminal, if one is trained at a time.

    Raises:
        SettingsError: the sweep is wrong, or the settings of a run are; nothing was trained.
        Stopped: a signal asked to stop; runs that were begun have saved a checkpoint.
    """
    runs = make_runs(settings)
    variables = _divide_devices(settings)
    report(Note(f"sweep: {format_count(len(runs), 'run')} in {settings.output_dir}"))
    shows_runs = shows_runs and settings.jobs == 1  # then the run reports Ctrl-C
    signal_report = silent if shows_runs else report
    with handle_signals(signal_report, saves_checkpoints=True) as stop, tempfile.TemporaryDirectory() as scratch:
        state = _Sweep(settings, runs, variables, Path(scratch), shows_runs, report)
        state.train_all(stop)
    finished = [name for name in runs if RunFolder(runs[name].output_dir).is_finished]
    folders = [runs[name].output_dir for name in [*finished, *state.stopped]]
    return SweepResult(settings.output_dir, finished, state.stopped, state.failed, _compare(folders, report))


def _compare(folders: list[Path], report: Report) -> Comparison | None:
    """Compare the runs, unless they can't be compared, such as runs of different objectives."""
    try:
        return compare(CompareSettings(runs=folders), report) if folders else None
    except T5TuneError as error:
        report(Note(f"the runs can't be compared: {error}", warning=True))
        return None


def make_runs(settings: TrainSettings) -> dict[str, TrainSettings]:
    """Make the settings of each run: its name -> settings.

    Raises:
        SettingsError: with a line for each problem, which names the run.
    """
    if World.from_environment().launched:
        raise SettingsError("sweep: it starts its own processes", hint="run t5tune train without torchrun or srun")
    for name, advice in NOT_IN_SWEEPS.items():
        if getattr(settings, name):
            raise SettingsError(f"{name}: can't be combined with sweep", hint=advice)
    base = settings.replace(**{name: TrainSettings.model_fields[name].default for name in OF_SWEEP})
    runs: dict[str, TrainSettings] = {}
    problems: dict[str, str] = {}  # the first run that has it
    hint: str | None = None
    for name, changes in expand_sweep(_read_sweep(settings.sweep), settings.seed, settings.max_runs).items():
        places = {"output_dir": settings.output_dir / name, "preprocessed_path": _find_data(settings, changes)}
        try:
            runs[name] = base.replace(**changes, **places)
            check_plan(plan := make_run_plan(runs[name]), imports_metrics=False)
            if (folder := RunFolder(plan.folder)).is_finished:  # otherwise its process compares them
                check_finished_run(folder.path, load_settings(TrainSettings, str(folder.settings))[0], plan.given)
        except SettingsError as error:
            hint = NOT_IN_SWEEPS["fresh"] if error.choices else error.hint or hint
            problems |= {problem: name for problem in error.problems if problem not in problems}
    if problems:
        raise SettingsError(*(f"sweep: {name}: {problem}" for problem, name in problems.items()), hint=hint)
    if settings.median_stopping and not all(_evaluates(run) for run in runs.values()):
        raise SettingsError("median_stopping: without evaluations", hint="set eval_fraction or eval_data_path")
    return runs


def _read_sweep(given: Path | dict[str, Any] | None) -> dict[str, Any]:
    if not isinstance(given, Path):
        return given or {}
    try:
        return read_yaml(given, MAX_SETTINGS_BYTES)
    except SettingsError as error:
        raise SettingsError(*(f"sweep: {problem}" for problem in error.problems), hint=error.hint) from None


def _find_data(settings: TrainSettings, changes: Mapping[str, object]) -> Path:
    """Return the folder of a run's data, which runs share if their settings make the same token cache."""
    names = EXAMPLE_SETTINGS | MODEL_SETTINGS
    if KINDS[str(changes.get("objective", settings.objective))] == "raw text":  # the seed chooses the tokens to mask
        names |= {"seed"}
    varied = {name: value for name, value in changes.items() if name in names}
    folder = settings.preprocessed_path or settings.output_dir / DATA_FOLDER
    return folder.with_name(f"{folder.name},{name_run(varied)}") if varied else folder


def _evaluates(run: TrainSettings) -> bool:
    return run.eval_fraction > 0 or run.eval_data_path is not None or run.eval_data is not None


def _divide_devices(settings: TrainSettings) -> list[dict[str, str]]:
    """Return the environment variables of each job, which divide the GPUs or the CPU cores among the jobs.

    Raises:
        SettingsError: there are fewer GPUs than the jobs need.
    """
    if settings.jobs == 1:
        return [{}]
    import torch

    count, each = torch.cuda.device_count(), settings.num_gpus or 1
    if settings.use_cpu or settings.num_processes or count == 0:
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, count_cores() // settings.jobs))
        return [{"OMP_NUM_THREADS": threads}] * settings.jobs
    if settings.jobs * each > count:
        problem = f"jobs: {settings.jobs} runs on {format_count(each, 'GPU')} each, but this machine has {count}"
        raise SettingsError(problem, hint=f"set jobs: {count // each or 1}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    gpus = visible.split(",")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[job * each : (job + 1) * each])} for job in range(settings.jobs)]


@dataclass
class _Sweep:
    """Trains the runs, and collects which of them were stopped or failed."""

    settings: TrainSettings
    runs: dict[str, TrainSettings]
    variables: list[dict[str, str]]
    scratch: Path
    shows_runs: bool
    report: Report
    stopped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def train_all(self, stop: StopRequest) -> None:
        waiting = deque(name for name in self.runs if not self._is_finished(name))
        running: dict[int, _Running] = {}
        try:
            while running or (waiting and not stop.is_set):
                for job in range(self.settings.jobs):
                    if job not in running and not stop.is_set and (name := self._choose(waiting, running)) is not None:
                        running[job] = self._start(name, job)
                time.sleep(POLL_SECONDS)
                for job, run in list(running.items()):
                    if run.process.poll() is not None:
                        self._end(running.pop(job))
                    elif not run.is_asked and (stop.is_set or self._is_worse_than_median(run.name)):
                        run.is_asked, run.is_pruned = True, not stop.is_set
                        run.process.send_signal(FORWARDED_SIGNAL)
        finally:
            for run in running.values():
                run.process.kill()
                run.process.wait()
        if stop.is_set:
            done = sum(map(self._is_finished, self.runs))
            what = f"sweep: stopped by {stop.signal_name}; {done} of {len(self.runs)} runs have finished"
            error = Stopped(what, hint="run the same command to continue")
            error.exit_code = get_exit_code(stop.signal_name)
            raise error

    def _is_finished(self, name: str) -> bool:
        return RunFolder(self.runs[name].output_dir).is_finished

    def _choose(self, waiting: deque[str], running: Mapping[int, _Running]) -> str | None:
        """Take the next run to train; None if no run is left, or if all wait for a run that prepares their data."""
        preparing = {self.runs[run.name].preprocessed_path for run in running.values()}
        for name in list(waiting):
            data = self.runs[name].preprocessed_path
            if data in preparing and data is not None and not data.exists():
                continue
            waiting.remove(name)
            if not self._is_worse_than_median(name):  # True if it was stopped by the median in an earlier call
                return name
            self.stopped.append(name)
        return None

    def _start(self, name: str, job: int) -> _Running:
        self.report(Note(f"run {[*self.runs].index(name) + 1} of {len(self.runs)}: {name}"))
        folder = self.scratch / str(job)
        folder.mkdir(exist_ok=True)
        config = write_settings(folder, self.runs[name], only_given=True, leave_out=OF_SWEEP)
        words = ["train", "--config", str(config), "--json", *([] if self.shows_runs else ["--quiet"])]
        # the settings include these variables
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(VARIABLE_PREFIX)}
        output = folder / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                make_module_command("t5tune", *words),
                env=inherited | self.variables[job],
                stdout=file,
                stderr=None if self.shows_runs else file,
                preexec_fn=die_with_parent,
            )
        return _Running(name, process, output)

    def _end(self, run: _Running) -> None:
        if run.is_pruned:
            self.stopped.append(run.name)
            self.report(Note(f"{run.name}: stopped: worse than the median of the finished runs"))
        elif run.process.returncode and not run.is_asked:
            self.failed[run.name] = _find_error(run.output, run.process.returncode)
            self.report(Note(f"{run.name}: {self.failed[run.name]}", warning=True))

    def _is_worse_than_median(self, name: str) -> bool:
        """Whether the best metric of a run is worse than the median of the finished runs' best by the same step.

        This is the rule of Vizier (Golovin et al. 2017) and of Optuna's MedianPruner.
        """
        if not self.settings.median_stopping or not (points := self._read_curve(name)):
            return False
        finished = [self._read_curve(other) for other in self.runs if self._is_finished(other)]
        choose = min if is_better_low(self._metric) else max
        bests = [choose(values) for curve in finished if (values := [v for step, v in curve if step <= points[-1][0]])]
        best, middle = choose(value for _, value in points), median(bests) if bests else 0.0
        return len(bests) >= MIN_FINISHED and best != middle and choose(best, middle) == middle

    @property
    def _metric(self) -> str:
        return self.settings.metric_for_best_model or "loss"

    def _read_curve(self, name: str) -> list[tuple[int, float]]:
        folder = self.runs[name].output_dir
        return list(zip(*read_metrics(folder).curve(f"eval_{self._metric}"), strict=True)) if folder.is_dir() else []


def _find_error(output: Path, code: int) -> str:
    """Return the error that a run printed as JSON, or else how it ended."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; the machine may have run out of memory"
    for line in reversed(output.read_text(encoding="utf-8", errors="replace").splitlines()):
        with suppress(ValueError, KeyError, TypeError):
            return str(json.loads(line)["error"]["message"])
    return f"exited with {code}"
