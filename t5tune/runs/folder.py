"""The run folder: its files, the settings it was started with, and the checkpoint to resume from.

run = locate_run(settings)
base_metadata, run_identity, resume = start_or_resume_run(
    settings, run, examples, evaluations, base, pinned, None, world, report
)
resume                              # run/checkpoint-40, or None for a new run
read_result(run.folder).adapter     # of a finished run
"""

import fcntl
import hashlib
import html
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.fingerprint import describe_base, load_hash, read_file_stats, store_hash
from t5tune.compat.quiet import quiet_libraries
from t5tune.data.caches.examples import (
    Examples,
    find_caches,
    has_examples,
    open_examples,
    read_examples_manifest,
)
from t5tune.data.caches.mixing import choose_mixing
from t5tune.data.tokens.templates import Template, find_template
from t5tune.data.tokens.tokenizer import find_other_token, load_tokenizer
from t5tune.distributed.world import World, identify_launch
from t5tune.errors import CheckpointError, DataError, SettingsError, TrainingError
from t5tune.file_names import EVAL_CACHE_FOLDER, REPORT_FILE, RESULT_FILE, RUN_CACHE_FOLDER, SETTINGS_FILE
from t5tune.io.atomic import (
    explain_write_errors,
    find_unused_folder,
    find_used_folder,
    get_lock_path,
    write_file,
    write_json,
)
from t5tune.io.reasons import describe_error
from t5tune.io.untrusted import read_json_object
from t5tune.io.yaml_file import MAX_SETTINGS_BYTES, read_yaml
from t5tune.preparing.datasets import list_given_caches
from t5tune.progress import Note, Report
from t5tune.runs.checkpoints import find_newest, list_checkpoints, read_run_identity, remove_staged
from t5tune.runs.metrics_log import Metrics, read_metrics
from t5tune.runs.resume_guard import (
    CACHE_INPUTS,
    build_run_identity,
    check_allowed_names,
    check_run_identity,
    describe_other_ranks,
    has_other_evaluations,
)
from t5tune.settings import TrainSettings, dump_settings, load_settings
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_list import DatasetSettings
from t5tune.settings.field_types import exists
from t5tune.settings.groups.base import InferenceSettings
from t5tune.settings.groups.record_format import PREFERENCE_OBJECTIVES, Objective

BASE_HASH_FILE = "base.json"  # see checkpoints/fingerprint.py
PREPARED_FILE = "prepared.json"
LAUNCH_FILE = "launch.json"
FILE_SETTINGS = (*select_settings(TrainSettings, Affects.INPUT_FILES), "conversation_template", "deepspeed")
MAX_LOCK_ATTEMPTS = 100
CACHE_SETTINGS = {*select_settings(TrainSettings, Affects.CACHE)} - {*select_settings(TrainSettings, Affects.STEPS)}
"""What determines the examples in a token cache, without what train can also apply to them later, such as num_data."""


class RunModel(NamedTuple):
    """PEFT's model in evaluation mode, transformers' tokenizer, and the conversation template."""

    model: Any
    tokenizer: Any
    template: Template


@dataclass(frozen=True)
class TrainResult:
    """Result of train. Times in seconds, memory in bytes; `tokens` counts the source and target tokens trained on.

    Values cover the whole run, including before it was resumed, except `resumed_from`, `seconds` (wall-clock time,
    everything included) and `peak_memory_bytes`, which cover only the process that finished it. `tokens_per_second`
    excludes the time of evaluations and saves. `stopped_early` says when and why early stopping ended the run.
    `peak_reserved_bytes` is what torch had reserved on a GPU, of which `peak_memory_bytes` was in use; None on a CPU.
    `pushed` is the URL of the repository that the result was uploaded to. `datasets` has the examples and the metrics
    of each dataset, if there are several. A metric that isn't finite is None. `best_step` is the step of the best
    evaluation, by `metric_for_best_model` or else the loss, and `best_eval` has its metrics. `eval` has the metrics of
    the weights: of the best step if the settings choose a metric, otherwise of the last one. `lora` has LoRA's
    settings; None for full training.
    """

    run: Path
    adapter: Path
    steps: int
    epochs: float
    train_loss: float | None
    eval: dict[str, float | None]
    examples: int
    tokens: int
    tokens_per_second: float
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    world_size: int
    resumed_from: Path | None
    seconds: float
    stopped_early: str | None = None
    peak_reserved_bytes: int | None = None
    pushed: str | None = None
    datasets: dict[str, dict[str, float | None]] | None = None
    best_step: int | None = None
    best_eval: dict[str, float | None] | None = None
    seed: int | None = None
    split_seed: int | None = None
    lora: dict[str, Any] | None = None

    def metrics(self) -> Metrics:
        """Read the logged metrics: a dict for each logged step; `metrics.curve("loss")` has the points of a plot."""
        return read_metrics(self.run)

    def load(self, **settings: Any) -> RunModel:
        """Load the model with the adapter, for inference, and what belongs to it.

        Args:
            settings: such as `bf16=True`, `device="cuda"` or `q_lora=True`; see InferenceSettings.

        Raises:
            SettingsError, ModelError, CheckpointError: a setting, the base or the adapter can't be used.
        """
        with quiet_libraries():
            from transformers import AutoTokenizer

            from t5tune.inference.loading import load_for_inference

            loaded = load_for_inference(InferenceSettings(model_name_or_path=str(self.run), **settings))
            tokenizer = AutoTokenizer.from_pretrained(loaded.tokenizer_folder)
        template = find_template(None, loaded.template_files)
        assert template is not None  # train has written it
        return RunModel(loaded.model, tokenizer, template)

    def _repr_html_(self) -> str | None:
        """Show the run's report page in a notebook, in a frame, because it has a style of its own. None: no page."""
        path = self.run / REPORT_FILE
        if not path.is_file():
            return None
        page = html.escape(path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 40em; border: 0"></iframe>'


@dataclass(frozen=True)
class Run:
    """Paths of a run folder, and whether its run has finished.

    Args:
        cache, eval_cache: the folders of the token caches.
    """

    folder: Path
    settings_path: Path
    cache: Path
    eval_cache: Path | None
    finished: bool


def locate_run(settings: TrainSettings) -> Run:
    """Determine the paths of a run, which need not exist yet."""
    folder = settings.output_dir
    cache = find_given_examples(settings.data_path, settings.data)
    cache = cache or settings.preprocessed_path or folder / RUN_CACHE_FOLDER
    eval_cache = None
    if settings.eval_data_path:
        eval_cache = find_given_examples(settings.eval_data_path, settings.eval_data) or folder / EVAL_CACHE_FOLDER
    return Run(folder, folder / SETTINGS_FILE, cache, eval_cache, (folder / RESULT_FILE).is_file())


def find_given_examples(paths: list[str], datasets: Sequence[DatasetSettings] | None) -> Path | None:
    """Return the folder of the token cache or the mixture that the paths name; None if they name data.

    Raises:
        DataError: they name more than that.
    """
    given = Path(paths[0])
    if datasets is not None or not has_examples(given):
        return None
    if len(paths) > 1:
        problem = f"{given}: a token cache can't be combined with other data ({paths[1]})"
        raise DataError(problem, hint="give it alone, or give each dataset a weight: cache:1 more.jsonl:1")
    return given


@contextmanager
def lock_run_folder(folder: Path, report: Report) -> Iterator[None]:
    """Lock the folder against other processes for this block, since two runs would mix up their files.

    The lock is on a file next to the folder. The system releases it when this process ends, in whatever way. Parent
    folders that are created for that file are removed if they contain nothing else in the end, so another process that
    was about to use them creates them again.

    Raises:
        SettingsError: another run holds the lock.
    """
    folder = folder.resolve()
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
            problem = f"{path}: {error.strerror}: no lock, so a second run in {folder} isn't prevented"
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


def _open_locked(path: Path) -> int:
    """Lock a file, which is created with its parent folders if it doesn't exist.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file can't be created or locked.
    """
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
        # The previous holder removed the file between our open and our lock: what we locked is no longer at this path,
        # and another process could create and lock a new file there. So try again.
        os.close(descriptor)


def read_saved_settings(folder: Path) -> TrainSettings | None:
    """Read the settings that an earlier train saved in a run folder; None if there are none.

    Other commands save theirs in a file of the same name, but without a learning rate.

    Raises:
        SettingsError: the file can't be read as settings of train.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file() or "learning_rate" not in read_yaml(path, MAX_SETTINGS_BYTES):
        return None
    return load_settings(TrainSettings, str(path))[0]


def check_inputs_stay(settings: TrainSettings) -> None:
    """Refuse inputs in the folder that --fresh is going to rename: the new run wouldn't find them.

    preprocessed_path may be there: what is in it is made again.

    Raises:
        SettingsError: names each of them.
    """
    folder = settings.output_dir
    files = {name: _list_paths(getattr(settings, name)) for name in FILE_SETTINGS}
    files["metric"] = [function.rpartition(":")[0] for function in settings.metric or []]
    problems = [
        f"{name}: {path}: is in output_dir {folder}, which --fresh renames"
        for name, paths in files.items()
        for path in paths
        if _is_within(path, folder)
    ]
    if problems:
        raise SettingsError(*problems, hint="choose another output_dir")


def _list_paths(value: Any) -> list[str]:
    return [] if value is None else [str(path) for path in (value if isinstance(value, list) else [value])]


def _is_within(path: str, folder: Path) -> bool:
    """Whether what exists at a path, or where a pattern begins, is in the folder or found through it."""
    if not exists(path) and (begin := re.split(r"[*?\[]", path)[0]) != path:
        path = os.path.dirname(begin)
    places = (os.path.realpath(path), os.path.abspath(path))
    owners = (os.path.realpath(folder), os.path.abspath(folder))
    within = [Path(place).is_relative_to(owner) for place, owner in zip(places, owners, strict=True)]
    return exists(path) and any(within)


def follow_link(folder: Path) -> Path:
    """Return the folder that a symbolic link points to, whether it exists or not; another path unchanged."""
    return folder.resolve() if folder.is_symlink() else folder


def move_aside(folder: Path, report: Report) -> Path | None:
    """Rename the folder of a run to the first unused name of folder.1, folder.2, …, and return that name.

    A folder that isn't empty and isn't that of a run stays where it is, so that `train` refuses it.

    Raises:
        SettingsError: it can't be renamed, or a run in it is in progress.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    hint = "choose another output_dir"
    if Path.cwd().is_relative_to(folder.resolve()):  # relative paths would then mean what is in the renamed folder
        raise SettingsError(
            f"output_dir: {folder}: --fresh can't rename the current folder or one that it is in", hint=hint
        )
    if os.path.ismount(folder):
        raise SettingsError(f"output_dir: {folder}: is a mount point, which --fresh can't rename", hint=hint)
    if not _is_run(folder):
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


def _is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, also if its settings or its checkpoints can't be used any more."""
    try:
        return bool(list_checkpoints(folder)) or read_saved_settings(folder) is not None
    except SettingsError:
        return True


def list_all_caches(settings: TrainSettings) -> list[Path]:
    """List the token caches that all of the training data is in, also those of a mixture; none if some of it isn't.

    Raises:
        DataError: the paths name more than token caches and data, or mixture.json is broken.
    """
    if settings.data is not None:
        return list_given_caches(settings.data)
    given = find_given_examples(settings.data_path, None)
    return [] if given is None else find_caches(given)


def _divide_cache_settings(settings: TrainSettings) -> tuple[dict[str, Any], set[str]]:
    """Return the settings that are the same for all token caches, with their values, and the names of the others."""
    inputs = [read_examples_manifest(cache)["inputs"] for cache in list_all_caches(settings)]
    if not inputs:
        return {}, set()
    names = {*CACHE_SETTINGS, "objective"} & inputs[0].keys()
    same = {name: inputs[0][name] for name in names if all(each.get(name) == inputs[0][name] for each in inputs)}
    return same, names - same.keys()


def apply_cache_settings(settings: TrainSettings) -> TrainSettings:
    """Replace the settings that determine the examples with those of the token caches, if all data is in some.

    Of several caches, only with those that are the same for all. Caches of preference pairs are for all objectives that
    read them, so the given one is kept.
    """
    same, _ = _divide_cache_settings(settings)
    if "objective" in settings.model_fields_set:
        same.pop("objective", None)
    elif settings.data is not None:
        same["objective"] = same.get("objective", _find_objective_of_caches(settings))
    return settings.model_copy(update=same)


def _find_objective_of_caches(settings: TrainSettings) -> Objective:
    """Return the objective of datasets that are token caches of preference pairs; that of the settings if none is."""
    for dataset in settings.data or []:
        if has_examples(path := Path(dataset.path[0])):
            objective = read_examples_manifest(path)["inputs"].get("objective")
            if objective in PREFERENCE_OBJECTIVES:
                return cast(Objective, objective)
    return settings.objective


def dump_run_settings(settings: TrainSettings) -> str:
    """Write the settings of a run as YAML, without those in which its token caches differ.

    With one value for all caches they would be refused, since they are given in a file.
    """
    _, different = _divide_cache_settings(settings)
    if settings.reads_preferences:
        different.discard("objective")
    return dump_settings(settings, leave_out=different)


def save_settings(settings: TrainSettings, run: Run) -> None:
    """Save the settings for resuming, without those that apply to this call only, such as --fresh."""
    defaults = {
        name: TrainSettings.model_fields[name].default for name in select_settings(TrainSettings, Affects.THIS_CALL)
    }
    again = apply_cache_settings(settings).model_copy(update=defaults)
    write_file(run.settings_path, dump_run_settings(again).encode())


def record_launch(run: Run) -> None:
    """Record which launch has begun a run with --fresh, because a restart of that launch must not begin it again."""
    if (launch := identify_launch()) is not None:
        write_json(run.folder / LAUNCH_FILE, {"launch": launch})


def forget_launch(folder: Path) -> None:
    """Forget which launch has begun the run in a folder that another one replaces: it isn't to be taken for that one's.

    A call of torchrun may have the same id as an earlier one, and a job of SLURM may contain several.
    """
    (folder / LAUNCH_FILE).unlink(missing_ok=True)


def has_other_launch(folder: Path) -> bool:
    """Whether the run in a folder wasn't begun with --fresh by the launch that this process is part of.

    False if nothing identifies this launch.
    """
    launch, before = identify_launch(), None
    with suppress(FileNotFoundError):
        before = read_json_object(folder, LAUNCH_FILE).get("launch")
    return launch is not None and launch != before


def record_prepared(run: Run) -> None:
    """Record what the cache of a run contains, because other runs may replace one that is outside of the run folder."""
    write_json(run.folder / PREPARED_FILE, {"cache": str(run.cache), "sha256": _hash_manifest(run.cache)})


def _check_prepared(run: Run) -> None:
    """Check that the run's cache is the one that was prepared for it.

    Raises:
        DataError: another process has replaced it.
    """
    if not (run.folder / PREPARED_FILE).is_file():
        return
    prepared = json.loads((run.folder / PREPARED_FILE).read_bytes())
    if prepared["cache"] == str(run.cache) and prepared["sha256"] != _hash_manifest(run.cache):
        problem = f"preprocessed_path: {run.cache}: another process has replaced it since it was prepared for this run"
        raise DataError(problem, hint="give each run its own preprocessed_path, and run the same command again")


def has_trained_caches(run: Run) -> bool:
    """Whether the caches of a run with checkpoints are those that the newest one was trained on.

    Another run, or a start of this one with other data that was refused or failed, may have replaced them.
    """
    now = _hash_cache_inputs(run)
    for checkpoint in list_checkpoints(run.folder):
        with suppress(CheckpointError):  # its manifest is damaged
            then = read_run_identity(checkpoint).get(CACHE_INPUTS, {})  # earlier releases didn't record it
            return all(then.get(name, digest) == digest for name, digest in now.items())
    return True


def _hash_cache_inputs(run: Run) -> dict[str, str | None]:
    """Hash what the caches to train and to evaluate on were made from; None if there is no readable one."""
    caches = {"data": run.cache} if run.eval_cache is None else {"data": run.cache, "eval_data": run.eval_cache}
    hashes: dict[str, str | None] = dict.fromkeys(caches)
    for name, cache in caches.items():
        if has_examples(cache):
            with suppress(DataError):
                hashes[name] = _hash_json(read_examples_manifest(cache)["inputs"])
    return hashes


def _hash_manifest(cache: Path) -> str:
    return _hash_json(read_examples_manifest(cache))


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def open_data(settings: TrainSettings, run: Run) -> tuple[Examples, Examples | None]:
    """Open the examples to train on, and the held-out ones if there are any.

    Raises:
        SettingsError: the objective learns from preference pairs, and the examples are none, or the other way round;
            or eval_fraction or split_seed differs from prepare's.
    """
    _check_prepared(run)
    examples = open_examples(run.cache)
    if examples.has_preferences != settings.reads_preferences:
        what = "preference pairs" if examples.has_preferences else "no preference pairs"
        problem = f"objective: {settings.objective}: the examples in {run.cache} are {what}"
        raise SettingsError(problem, hint="dpo and orpo are for pairs, the other objectives for examples")
    if examples.are_several and (mixing := choose_mixing(settings)) is not None:
        examples = examples.mix(mixing)
    # of data that prepare has read for this run, it has taken num_data already
    if settings.num_data is not None and find_given_examples(settings.data_path, settings.data) is not None:
        examples = examples.limit_training(settings.num_data)
    if run.eval_cache is not None:
        held_out = open_examples(run.eval_cache)
        if held_out.has_preferences != examples.has_preferences:
            has, lacks = (run.eval_cache, run.cache) if held_out.has_preferences else (run.cache, run.eval_cache)
            problem = f"eval_data_path: {has} has preference pairs, and {lacks} has none"
            raise DataError(problem, hint="give the records in place of the cache")
        return examples.split_as_prepared()[0], held_out
    if settings.eval_fraction > 0:
        _check_split(settings, run.cache, examples)
        return examples.split(settings.eval_fraction, settings.split_seed)
    return examples.split_as_prepared()


def _check_split(settings: TrainSettings, cache: Path, examples: Examples) -> None:
    """Check that no example is trained on that prepare has held out: evaluate would score it as held out.

    Raises:
        SettingsError: eval_fraction or split_seed would hold out different examples.
    """
    for manifest in (dataset.cache.manifest for dataset in examples.datasets):
        fraction, seed = manifest["eval_fraction"], manifest["split_seed"]
        if fraction and (fraction, seed) != (settings.eval_fraction, settings.split_seed):
            now = f"{settings.eval_fraction:g} with split_seed {settings.split_seed}"
            raise SettingsError(
                f"eval_fraction: {now}, but prepare held out {fraction:g} of {cache} with split_seed {seed}",
                hint="leave out eval_fraction to hold out the same, or prepare the data again without it",
            )


def start_or_resume_run(
    settings: TrainSettings,
    run: Run,
    examples: Examples,
    evaluations: dict[str, Any],
    base: Path,
    pinned: TrainSettings,
    teacher_hash: str | None,
    world: World,
    report: Report,
) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
    """Prepare a new run, or an existing one for resuming.

    Args:
        evaluations: what they measure, as fields of the run identity.
        pinned: the settings with the commits of adapters and teachers that are on the Hub.
        teacher_hash: hash of the teacher's weights, if there is a teacher.

    Returns:
        The base's metadata, the run identity, and the checkpoint to resume from (None for a new run).

    Raises:
        CheckpointError: all checkpoints are damaged, or the newest has state that these ranks can't use.
        SettingsError: the run was started with a different configuration.
    """
    stats = read_file_stats(base)
    base_metadata = _collect_base_metadata(base, settings, load_hash(run.folder / BASE_HASH_FILE, stats))
    run_identity = build_run_identity(pinned, examples, base_metadata["sha256"], teacher_hash, world.size)
    run_identity |= evaluations
    check_allowed_names(settings.allow_change, run_identity)
    resume, damaged = find_newest(run.folder)
    for problem in damaged:
        report(Note(f"skipped a damaged checkpoint: {problem}", warning=True))
    if damaged and resume is None:
        raise CheckpointError(f"{run.folder}: all of its checkpoints are damaged", hint="use --fresh to start over")
    if resume:
        steps = settings.gradient_accumulation_steps
        for change in check_run_identity(resume, run_identity, settings.allow_change, steps):
            report(Note(f"change allowed by --allow-change: {change}", warning=True))
        _check_same_tokens(resume, examples, run_identity)
        report(Note(f"resuming from {resume}"))
        if has_other_evaluations(resume, run_identity):
            other = "the held-out examples or the metric for the best model have changed"
            report(Note(f"{other}, so earlier evaluations don't count any more", warning=True))
        if (other_ranks := describe_other_ranks(resume, run_identity)) is not None:
            report(Note(other_ranks))
    remove_staged(run.folder)
    save_settings(settings, run)
    store_hash(run.folder / BASE_HASH_FILE, stats, base_metadata["sha256"])
    return base_metadata, run_identity | {CACHE_INPUTS: _hash_cache_inputs(run)}, resume


def _check_same_tokens(checkpoint: Path, examples: Examples, run_identity: dict[str, Any]) -> None:
    """Check that each id means the same token to the examples as to the checkpoint, whose embedding rows are trained.

    Raises:
        CheckpointError: a token has another id, or only one of the two has it. --allow-change can't allow this.
    """
    if read_run_identity(checkpoint)["tokenizer"] == run_identity["tokenizer"]:
        return
    then, now = load_tokenizer(checkpoint), load_tokenizer(examples.tokenizer_folder)
    if found := find_other_token(then, now) or find_other_token(now, then):
        token, index = found
        raise CheckpointError(
            f"{checkpoint}: token {index}, {token!r}, isn't the same in its tokenizer and in that of the data, so "
            "trained embedding rows would belong to other tokens",
            hint="resume with the tokens of the run (the previous add_tokens), or start over with --fresh",
        )


def read_result(folder: Path | str) -> TrainResult:
    """Read the result of a finished run.

    Raises:
        TrainingError: the run hasn't finished.
    """
    path = Path(folder, RESULT_FILE)
    try:
        # earlier releases wrote NaN and infinity, which --json couldn't print
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        written = Path(values["run"])  # the folder may have been moved since
        for name in ("run", "adapter", "resumed_from"):
            if values[name] is not None:
                values[name] = path.parent / Path(values[name]).relative_to(written)
        return TrainResult(**values)
    except FileNotFoundError:
        hint = "train with the same settings to continue it"
        raise TrainingError(f"{folder}: not a finished run: it has no {path.name}", hint=hint) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: broken: {describe_error(error)}") from error


def save_pushed(result: TrainResult, url: str | None) -> TrainResult:
    """Write to the result of a finished run where it was uploaded to, and return it."""
    path = result.run / RESULT_FILE
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "pushed": url})
    return replace(result, pushed=url)


def _collect_base_metadata(base: Path, settings: TrainSettings, sha256: str | None) -> dict[str, Any]:
    """Collect what an adapter records about its base, by which merge verifies it and loads it as in training."""
    opened = open_base(base, settings.family)
    base_metadata: dict[str, Any] = dict(describe_base(opened, settings.model_name_or_path, sha256))
    if settings.family is not None:
        base_metadata["family"] = settings.family
    base_metadata["bf16"] = settings.bf16
    if settings.q_lora:
        compute = "bfloat16" if settings.bf16 else "float32"
        base_metadata |= {"onto": settings.quant_type, "double_quant": settings.double_quant, "compute": compute}
        base_metadata["quantize_wo"] = settings.quantize_wo
    return base_metadata
