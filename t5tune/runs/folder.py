"""The folder of a run: its settings, its data and its checkpoints.

    folder = RunFolder(run_plan.folder)
    with folder.lock(report), folder.begin(run_plan, report) as state:
        state.checkpoint                # run/checkpoint-40, or None for a new run
        folder.record(commits=commits)  # in run.json

`run.json` has facts that aren't settings, but that a resumed run needs.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from t5tune.distributed.world import identify_launch
from t5tune.errors import CheckpointError, SettingsError
from t5tune.file_names import RESULT_FILE, RUN_FILE, SETTINGS_FILE
from t5tune.io.atomic import (
    copy_atomically,
    explain_write_errors,
    find_unused_folder,
    find_used_folder,
    get_lock_path,
    write_file,
    write_json,
)
from t5tune.io.untrusted import read_json_object
from t5tune.io.yaml_file import MAX_SETTINGS_BYTES, read_yaml
from t5tune.progress import Note, Report
from t5tune.runs.checkpoints import has_complete_checkpoints, list_checkpoints
from t5tune.runs.plan import EXAMPLE_SETTINGS, RunPlan
from t5tune.runs.resume_guard import check_finished_run
from t5tune.settings import dump_settings, load_settings
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.field_types import Settings, exists

RUN_FORMAT = 1
RECORDS_FOLDER = "records"
MAX_LOCK_ATTEMPTS = 100
AnySettings = TypeVar("AnySettings", bound=Settings)


@dataclass(frozen=True)
class RunState:
    """How far the run in a folder is.

    Args:
        is_new: this call began it.
        checkpoint: the newest checkpoint, which may be damaged; None: no step was saved.
        is_finished: it has a result.
    """

    is_new: bool
    checkpoint: Path | None
    is_finished: bool


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which need not exist yet. Only rank 0 writes to it."""

    path: Path

    @property
    def settings(self) -> Path:
        """The file with the settings that the run was started with."""
        return self.path / SETTINGS_FILE

    @property
    def records(self) -> Path:
        """The folder with the records that were given in memory."""
        return self.path / RECORDS_FOLDER

    @property
    def is_finished(self) -> bool:
        """Whether the run has a result, which is written last."""
        return (self.path / RESULT_FILE).is_file()

    @contextmanager
    def lock(self, report: Report) -> Iterator[None]:
        """Lock the folder against other processes for this block, since two runs would mix up their files.

        The lock is on a file next to the folder. The system releases it when this process ends, however it ends. Parent
        folders that are created for that file are removed if they contain nothing else in the end, so another process
        that was about to use them creates them again.

        Raises:
            SettingsError: another run holds the lock.
        """
        folder = self.path.resolve()
        path = get_lock_path(folder)
        descriptor = None
        created = [parent for parent in path.parents if not parent.exists()]
        try:
            descriptor = _open_locked(path)
        except BlockingIOError:
            raise SettingsError(
                f"output_dir: {folder}: another run is using this folder",
                hint="wait until it ends, or choose another folder",
            ) from None
        except OSError as error:
            if path.parent.is_dir():  # otherwise creating the run folder fails later, with a better message
                problem = f"{path}: {error.strerror}: no lock, so nothing prevents a second run in {folder}"
                report(Note(problem, warning=True))
        try:
            yield
        finally:
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)
            with suppress(OSError):
                for parent in created:
                    parent.rmdir()

    @contextmanager
    def begin(self, plan: RunPlan, report: Report) -> Iterator[RunState]:
        """Begin a run with this plan, or resume the run in the folder, which is locked.

        With `fresh`, the folder of an earlier run is renamed before. If the block fails, the files of a new run are
        removed, except for prepared data, and an earlier run gets its name back.

        Raises:
            SettingsError: the folder can't be used, or the run in it has finished with different settings.
        """
        aside = None
        if plan.output.fresh:
            # torchrun may reuse an id, and a job of SLURM may have several launches: the earlier run must not pass for
            # the run of this launch
            self.record(launch=None)
            aside = self._move_aside(report)
        try:
            if aside is not None:
                self._copy_records_back(plan, aside)
            with self._begin_here(plan) as state:
                yield state
        except BaseException:
            if aside is not None:
                self._move_back(aside, report)
            raise

    @contextmanager
    def _begin_here(self, plan: RunPlan) -> Iterator[RunState]:
        saved = self._read_settings_of_run(type(plan.given))
        if self.is_finished and saved is not None:
            check_finished_run(self.path, saved, plan.given)
            yield RunState(False, None, is_finished=True)
            return
        is_new_folder = not self.path.is_dir()
        self._create(is_run=saved is not None)
        if saved is None:  # the saved settings mark the folder as a run
            self.save_settings(plan)
            self.record(launch=identify_launch() if plan.output.fresh else None)
        try:
            yield RunState(saved is None, next(iter(list_checkpoints(self.path)), None), is_finished=False)
        except BaseException:
            if saved is None:
                self._remove_failed_start(is_new_folder)
            raise

    def read_settings(self, model: type[AnySettings]) -> AnySettings | None:
        """Read the settings that an earlier `train` saved; None: no such settings.

        Raises:
            SettingsError: the file can't be read as settings of train.
        """
        return load_settings(model, str(self.settings))[0] if self._has_settings() else None

    def _has_settings(self) -> bool:
        """Whether the folder has settings of train: other commands save theirs in a file of the same name, but without
        a learning rate.
        """
        return self.settings.is_file() and "learning_rate" in read_yaml(self.settings, MAX_SETTINGS_BYTES)

    def _read_settings_of_run(self, model: type[AnySettings]) -> AnySettings | None:
        hint = (
            f"to resume, write it again: the same command with --dry-run >{self.settings}; to start over, use --fresh, "
            "which keeps the checkpoints under a new name"
        )
        has_checkpoints = has_complete_checkpoints(self.path)
        try:
            saved = self.read_settings(model)
        except SettingsError as error:
            if not has_checkpoints:
                raise
            raise SettingsError(*error.problems, hint=hint) from error
        if saved is None and has_checkpoints:
            raise SettingsError(f"{self.settings}: missing or broken: not the settings of a run", hint=hint)
        return saved

    def save_settings(self, plan: RunPlan) -> None:
        """Save the settings for resuming, without those that apply to this call only, such as --fresh."""
        write_file(self.settings, dump_run_settings(plan).encode())

    def read_record(self) -> dict[str, Any]:
        """Read run.json; empty if it is missing or damaged: its values can be found again."""
        try:
            record = read_json_object(self.path, RUN_FILE)
        except (FileNotFoundError, CheckpointError):
            return {}
        return record if record.pop("format", None) == RUN_FORMAT else {}

    def read_commits(self) -> dict[str, str]:
        """Read which commits the run uses of models on the Hub: name as given -> `owner/name@commit`."""
        commits = self.read_record().get("commits")
        return {name: str(commit) for name, commit in commits.items()} if isinstance(commits, dict) else {}

    def record(self, **values: Any) -> None:
        """Write values to run.json, next to the values that are there; None removes a value."""
        before = self.read_record()
        now = {name: value for name, value in (before | values).items() if value}
        if now != before:
            write_json(self.path / RUN_FILE, {"format": RUN_FORMAT, **now})

    def has_other_launch(self) -> bool:
        """Whether the run wasn't begun with --fresh by the launch that this process is part of.

        False if nothing identifies this launch.
        """
        launch = identify_launch()
        return launch is not None and launch != self.read_record().get("launch")

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, which marks the run as finished: all other files are there."""
        write_json(self.path / RESULT_FILE, result)

    def _create(self, is_run: bool) -> None:
        folder, hint = self.path, "choose another output_dir"
        if folder.exists() and not folder.is_dir():
            raise SettingsError(f"output_dir: {folder}: is a file", hint=hint)
        if folder.is_dir() and {path.name for path in folder.iterdir()} - {RECORDS_FOLDER} and not is_run:
            raise SettingsError(f"output_dir: {folder}: isn't empty and isn't a t5tune run", hint=hint)
        try:
            with explain_write_errors(folder):
                _follow_link(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"output_dir: {folder}: can't be created: {error.strerror}", hint=hint) from error

    def _remove_failed_start(self, is_new_folder: bool) -> None:
        """Remove the files of a run whose data couldn't be prepared, unless it has prepared data already."""
        with suppress(OSError):  # the error that led here must be reported
            begun = {self.settings, self.path / RUN_FILE, self.records}
            if begun.issuperset(self.path.iterdir()):
                shutil.rmtree(self.records, ignore_errors=True)
                for path in begun:
                    path.unlink(missing_ok=True)
                if is_new_folder:
                    self.path.rmdir()

    def _copy_records_back(self, plan: RunPlan, aside: Path) -> None:
        """Copy records in memory from the earlier run's new folder, if the plan names their files."""
        records = os.path.realpath(self.records)
        for text in [*plan.data.data_path, *(plan.data.eval_data_path or [])]:
            path = Path(text)
            if os.path.realpath(path.parent) == records and (old := aside / RECORDS_FOLDER / path.name).is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                copy_atomically(old, path)

    def _move_aside(self, report: Report) -> Path | None:
        """Rename the folder of a run to the first unused name of folder.1, folder.2, …, and return that name.

        A folder with files that aren't a run's stays where it is, so that `train` refuses it.
        """
        folder = _follow_link(self.path)  # the link itself isn't renamed: the new run belongs on the same disk
        if not folder.is_dir() or not any(folder.iterdir()):
            return None
        hint = "choose another output_dir"
        if Path.cwd().is_relative_to(folder.resolve()):  # relative paths would then lead into the renamed folder
            raise SettingsError(
                f"output_dir: {folder}: --fresh can't rename the current folder or a folder above it", hint=hint
            )
        if os.path.ismount(folder):
            raise SettingsError(f"output_dir: {folder}: is a mount point, which --fresh can't rename", hint=hint)
        if not self._is_run():
            return None
        if (used := find_used_folder(folder)) is not None:
            problem = f"output_dir: {folder}: --fresh can't rename it while another run is using {used}"
            raise SettingsError(problem, hint=f"wait until it ends, or {hint}")
        aside = find_unused_folder(folder)
        try:
            with explain_write_errors(aside):
                folder.rename(aside)
        except OSError as error:
            problem = f"output_dir: {folder}: --fresh can't rename it to {aside}: {error.strerror}"
            raise SettingsError(problem, hint=hint) from error
        report(Note(f"{folder}: moved to {aside}"))
        return aside

    def _move_back(self, aside: Path, report: Report) -> None:
        """Move an old run back, in place of the files of the start that failed."""
        folder = _follow_link(self.path)
        with suppress(OSError):  # the error that led here must be reported
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            report(Note(f"{aside}: moved back to {folder}"))

    def _is_run(self) -> bool:
        """Whether there is a run in the folder, also if its settings or its checkpoints can no longer be used."""
        try:
            return bool(list_checkpoints(self.path)) or self._has_settings()
        except SettingsError:
            return True


def _open_locked(path: Path) -> int:
    """Lock a file, which is created if needed; raise BlockingIOError if another process holds the lock."""
    attempts = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            # a run that ended just now may have removed the folders; that can't happen many times in a row
            attempts += 1
            if attempts == MAX_LOCK_ATTEMPTS:
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        # The previous holder removed the file between our open and our lock: our locked file is no longer at this path,
        # and another process could create and lock a new file there. So try again.
        os.close(descriptor)


def dump_run_settings(plan: RunPlan) -> str:
    """Write the settings of a run as YAML, without those that apply to this call only, such as --fresh."""
    model = type(plan.given)
    defaults = {name: model.model_fields[name].default for name in select_settings(model, Affects.THIS_CALL)}
    first, *others = [each.made_from for each in plan.datasets]
    # no value of these suits all token caches, so each would be refused
    different = {name for name in EXAMPLE_SETTINGS if any(each.get(name) != first.get(name) for each in others)}
    is_of_caches = all(each.cache for each in plan.datasets)
    if plan.data.kind == "pairs":
        different.discard("objective")
    return dump_settings(plan.given.model_copy(update=defaults), leave_out=different if is_of_caches else ())


def check_inputs_stay(plan: RunPlan) -> None:
    """Refuse inputs in the folder that --fresh is going to rename: the new run wouldn't find them.

    preprocessed_path may be there: its data is prepared again. Records that were given in memory are copied back.
    """
    folder = plan.folder
    values = plan.list_affecting(Affects.INPUT_FILES)
    values |= {"conversation_template": plan.data.conversation_template, "deepspeed": plan.processes.deepspeed}
    values["metric"] = [function.rpartition(":")[0] for function in plan.evaluation.metric or []]
    kept = RunFolder(folder).records
    problems = [
        f"{name}: {path}: is in output_dir {folder}, which --fresh renames"
        for name, value in values.items()
        for path in _list_paths(value)
        if _is_within(path, folder) and not _is_within(path, kept)
    ]
    if problems:
        raise SettingsError(*problems, hint="choose another output_dir")


def _list_paths(value: Any) -> list[str]:
    return [] if value is None else [str(path) for path in (value if isinstance(value, list) else [value])]


def _is_within(path: str, folder: Path) -> bool:
    """Whether the file at a path, or the beginning of a pattern, is in the folder or found through it."""
    if not exists(path) and (begin := re.split(r"[*?\[]", path)[0]) != path:
        path = os.path.dirname(begin)
    places = (os.path.realpath(path), os.path.abspath(path))
    owners = (os.path.realpath(folder), os.path.abspath(folder))
    within = [Path(place).is_relative_to(owner) for place, owner in zip(places, owners, strict=True)]
    return exists(path) and any(within)


def _follow_link(folder: Path) -> Path:
    """Return the folder that a symbolic link points to, whether it exists or not; other paths unchanged."""
    return folder.resolve() if folder.is_symlink() else folder
