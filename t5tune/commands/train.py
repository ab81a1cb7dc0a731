"""`t5tune train`: fine-tune a base on conversations, into a run folder with an adapter.

    result = train(TrainSettings(model_name_or_path="pocket", data_path="pocket", output_dir="run"))
    result.adapter

Runs in the current process: as the only one, or as one rank under torchrun, the deepspeed launcher or `--num-gpus`.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter_folder import find_adapter
from t5tune.checkpoints.base import find_base
from t5tune.checkpoints.hub_upload import (
    choose_repository,
    explain_uploading_later,
    open_repository,
    upload_result,
)
from t5tune.commands.prepare import prepare
from t5tune.compat.python_patches import restore_environment
from t5tune.data.caches.cache import read_manifest
from t5tune.data.caches.examples import find_tokenizer_folder, is_prepared, list_caches
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.distributed.signals import StopRequest, handle_signals
from t5tune.distributed.world import RESUME_HINT, World, has_restarted
from t5tune.errors import DataError, SettingsError
from t5tune.file_names import SETTINGS_FILE, TOKENIZER_CONFIG_FILE
from t5tune.io.atomic import copy_atomically, explain_write_errors
from t5tune.model.device import check_bf16, explain_out_of_memory, use_gpu_kernels
from t5tune.preparing.dataset import Origin, take_vocabulary
from t5tune.preparing.datasets import find_given_cache
from t5tune.preparing.record_checks import name_rejected_file
from t5tune.progress import Note, Report, silent
from t5tune.runs.checkpoints import find_newest, has_complete_checkpoints, list_checkpoints
from t5tune.runs.checks import (
    check_machine,
    check_settings,
    check_starts_no_processes,
    choose_trackers,
    list_notes,
)
from t5tune.runs.commits import COMMITS_FILE, find_commits, pin_commits, read_commits_to_resume, save_commits
from t5tune.runs.folder import (
    LAUNCH_FILE,
    Run,
    TrainResult,
    apply_cache_settings,
    check_inputs_stay,
    find_given_examples,
    follow_link,
    forget_launch,
    has_other_launch,
    has_trained_caches,
    locate_run,
    lock_run_folder,
    move_aside,
    read_result,
    read_saved_settings,
    record_launch,
    record_prepared,
    save_pushed,
    save_settings,
)
from t5tune.runs.resume_guard import check_finished_run, check_settings_of_run
from t5tune.settings import DatasetSettings, PrepareSettings, TrainSettings
from t5tune.settings.dataset_list import PATHS_OF_DATASETS, list_unsuitable, name_datasets
from t5tune.settings.records_in_memory import find_kept_path


def train(settings: TrainSettings, report: Report = silent) -> TrainResult:
    """Train in this process, as the rank that the environment variables give.

    Raises:
        SettingsError, DataError, ModelError: the input is wrong.
        TrainingError: the loss is no longer finite, or a checkpoint can't be written.
        RankLost: another rank died or doesn't answer.
        Stopped: a signal asked to stop; the progress so far is saved in a checkpoint.
    """
    world = World.from_environment()
    _check_call(settings, world)
    report = report if world.rank == 0 else silent
    callbacks = _make_callbacks(settings, report) if world.rank == 0 else []
    # the process of a notebook or a script isn't ours to end; the command line handles signals before it calls this
    with handle_signals(report, exits=world.launched, saves_checkpoints=True) as stop:
        try:
            result = _train(settings, world, report, stop, callbacks)
            return send_result(settings, result, report, stop, callbacks) if world.rank == 0 else result
        except BaseException:
            for callback in callbacks:
                callback.abandon()
            raise


def send_result(
    settings: TrainSettings, result: TrainResult, report: Report, stop: StopRequest, callbacks: Sequence[Any] = ()
) -> TrainResult:
    """Send the result of a finished run to trackers and to the Hub, as the settings ask. Return it with its URL.

    Raises:
        Stopped: a signal arrived meanwhile. The run folder is complete.
    """
    if not (settings.push_to_hub or callbacks):
        return result
    name, where = choose_repository(settings, settings.output_dir), f"the run is complete in {result.run}"
    if settings.push_to_hub:
        where = explain_uploading_later(result.run, name, settings.hub_private_repo)
    with stop.interruptible(f"while sending the result; {where}"):
        for callback in callbacks:
            callback.finish(result)
        url = upload_result(settings, result.run, report)
    return result if url is None else save_pushed(result, url)


def _make_callbacks(settings: TrainSettings, report: Report) -> list[Any]:
    """Make rank 0's callbacks of the Trainer that go on after training: they finish when the result is written.

    Each has `begin`, called before the Trainer is made, `add_to` it, `finish` with the result, and `abandon` if there
    is none.
    """
    callbacks: list[Any] = []
    if settings.hub_strategy == "every_save":
        from t5tune.training.callbacks.push_checkpoints import PushCheckpoints

        callbacks.append(PushCheckpoints(settings, report))
    if trackers := choose_trackers(settings.report_to):
        from t5tune.training.callbacks.trackers import TrackRun

        callbacks.append(TrackRun(settings, trackers, report))
    return callbacks


def _train(
    settings: TrainSettings, world: World, report: Report, stop: StopRequest, callbacks: list[Any]
) -> TrainResult:
    with ExitStack() as stack:
        stack.enter_context(restore_environment())
        _remove_accelerate_variables(report)
        # imports torch, which takes seconds, in which a signal may arrive
        from t5tune.distributed.collectives import any_rank, report_lost_ranks, run_on_rank_0
        from t5tune.distributed.process_group import join_process_group
        from t5tune.distributed.watch import watch_ranks
        from t5tune.runs.same_ranks import check_same_settings

        device = stack.enter_context(join_process_group(world, settings, report, stop))
        watch = stack.enter_context(watch_ranks(world, settings.process_group_timeout, RESUME_HINT))
        stack.enter_context(report_lost_ranks(world, RESUME_HINT))
        check_same_settings(settings, world)
        if settings.bf16:
            check_bf16(device)
        if any_rank(has_restarted()) and settings.fresh:
            has_other = run_on_rank_0(world, lambda: has_other_launch(settings.output_dir))
            settings = resume_after_restart(settings, not has_other, report)
        if not world.is_run_set_up:

            def set_up_interruptibly() -> None:
                with stop.interruptible():
                    set_up_run_folder(settings, stack, report)

            run_on_rank_0(world, set_up_interruptibly)
        settings = name_kept_records(settings)
        run = locate_run(settings)
        if run.finished:
            return read_result(run.folder)
        settings = apply_cache_settings(settings)
        from transformers.trainer_utils import enable_full_determinism

        from t5tune.compat.torch_patches import restore_determinism
        from t5tune.training.arguments import choose_tf32
        from t5tune.training.run import run_training
        from t5tune.training.session import Session

        stack.enter_context(restore_determinism())
        if settings.training_args.get("full_determinism"):
            # the Trainer does this too, but only after products on the GPU, at which cuBLAS is set up for good
            enable_full_determinism(settings.seed)
        stack.enter_context(use_gpu_kernels(device, choose_tf32(settings, device, report)))
        with _explain_out_of_memory(settings):
            return run_training(Session(settings, run, world, device, stop, watch, report, callbacks))


def _remove_accelerate_variables(report: Report) -> None:
    """Remove the variables in which accelerate takes precision and more: the run would differ from its settings."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        value = os.environ.pop(name)
        report(Note(f"{name}={value} in the environment is ignored: t5tune uses its own settings"))


def _check_call(settings: TrainSettings, world: World) -> None:
    """Refuse what the command line does before it calls `train`."""
    if settings.dry_run:
        raise SettingsError("dry_run: a call of train trains", hint="call plan(PlanSettings(…)) instead")
    check_starts_no_processes(settings, world)


def _explain_out_of_memory(settings: TrainSettings) -> AbstractContextManager[None]:
    batch = (
        f"tokens_per_batch {settings.tokens_per_batch}"
        if settings.tokens_per_batch
        else f"per_device_train_batch_size {settings.per_device_train_batch_size}"
    )
    smaller = "a smaller batch with more gradient_accumulation_steps keeps the effective batch size"
    checkpointing = "" if settings.gradient_checkpointing else "; --gradient-checkpointing needs less memory"
    return explain_out_of_memory(
        f"training with {batch} and model_max_length {settings.model_max_length}",
        f"{smaller}{checkpointing}; t5tune plan --config {settings.output_dir / SETTINGS_FILE} estimates what fits",
    )


def resume_after_restart(settings: TrainSettings, has_begun: bool, report: Report) -> TrainSettings:
    """Ignore --fresh where a launcher repeats the command, if it has begun the run in the folder."""
    if not has_begun:
        return settings
    problem = "fresh: ignored, since torchrun or SLURM has restarted this command: it resumes the run in output_dir"
    report(Note(f"{problem} ({settings.output_dir})", warning=True))
    return settings.model_copy(update={"fresh": False})


def set_up_run_folder(settings: TrainSettings, locks: ExitStack, report: Report = silent) -> Run:
    """Validate the settings without loading the model, lock the run folder, save the settings and prepare the cache.

    Args:
        locks: closing it releases the run folder's lock.
    """
    recorded = read_commits_to_resume(settings)
    check_settings(pin_commits(settings, recorded))
    commits = recorded | find_commits(pin_commits(settings, recorded), report)
    check_machine(pin_commits(settings, commits), report)
    if settings.fresh:
        check_inputs_stay(settings)
    open_repository(settings, settings.output_dir, report)
    stored, settings = settings, name_kept_records(apply_cache_settings(settings))
    locks.enter_context(lock_run_folder(settings.output_dir, report))
    folder = follow_link(settings.output_dir)  # not the link is renamed: the new run belongs on the same disk
    if settings.fresh:
        forget_launch(folder)
    if settings.fresh and (aside := move_aside(folder, report)) is not None:
        try:
            return _keep_records(stored, settings, commits, report)
        except BaseException:
            _move_back(aside, folder, report)
            raise
    return _keep_records(stored, settings, commits, report)


def name_kept_records(settings: TrainSettings) -> TrainSettings:
    """Name records that were given in memory by the files that `train` keeps them in, next to the run folder."""
    kept: dict[str, list[Any]] = {}
    for name in ("data_path", "eval_data_path"):
        paths = getattr(settings, name) or []
        if any(found := [find_kept_path(path, settings.output_dir) for path in paths]):
            kept[name] = [str(new or path) for path, new in zip(paths, found, strict=True)]
    for data, name in PATHS_OF_DATASETS.items():
        if name in kept and (datasets := getattr(settings, data)) is not None:
            renamed = dict(zip(getattr(settings, name), kept[name], strict=True))
            kept[data] = [each.model_copy(update={"path": [renamed[path] for path in each.path]}) for each in datasets]
    return settings.model_copy(update=kept)


def _keep_records(stored: TrainSettings, settings: TrainSettings, commits: dict[str, str], report: Report) -> Run:
    """Copy records that were given in memory to where they are kept, and set up the run folder, which is locked."""
    paths = [
        (Path(path), Path(kept))
        for name in ("data_path", "eval_data_path")
        for path, kept in zip(getattr(stored, name) or [], getattr(settings, name) or [], strict=True)
        if path != kept and not Path(kept).is_file()
    ]
    try:
        for path, kept in paths:
            _copy_records(path, kept)
        run = _set_up_locked(settings, commits, report)
    except BaseException as error:
        for _, kept in paths:
            with suppress(OSError):  # the error that led here must be reported
                kept.unlink()
        if isinstance(error, DataError) and any(kept.name in str(error) for _, kept in paths):
            line = "line N is the N-th of the records"  # the file that the message names is gone
            raise DataError(error.message, hint=f"{error.hint}; {line}" if error.hint else line) from error
        raise
    for _, kept in paths:
        report(Note(f"the records are also in {kept}, for repeating this run from the command line"))
    return run


def _copy_records(path: Path, kept: Path) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        copy_atomically(path, kept)
    except OSError as error:
        problem = f"output_dir: the records can't be kept next to it, in {kept}: {error.strerror}"
        raise SettingsError(problem, hint="choose another output_dir") from error


def _set_up_locked(settings: TrainSettings, commits: dict[str, str], report: Report) -> Run:
    """Save the settings in the run folder, which is locked, and prepare the cache."""
    folder = settings.output_dir
    run = locate_run(settings)
    saved_settings = _read_settings_of_run(run)
    if run.finished and saved_settings is not None:
        check_finished_run(folder, saved_settings, settings)
        report(Note(f"{folder}: this run has already finished; use --fresh to start over"))
        return run
    _check_no_json_cache(settings.preprocessed_path)
    is_new_folder = not folder.is_dir()
    _create_run_folder(folder, is_run=saved_settings is not None)
    if saved_settings is None:  # the saved settings mark the folder as a run
        for note in list_notes(settings):
            report(Note(note))
        save_settings(settings, run)
        if settings.fresh:
            record_launch(run)
    try:
        save_commits(folder, commits)
        _prepare_caches(pin_commits(settings, commits), run, report)
    except BaseException:
        if saved_settings is None:
            _remove_failed_start(run, is_new_folder)
        raise
    return run


def _read_settings_of_run(run: Run) -> TrainSettings | None:
    """Read the settings that a run was started with; None if there is no run in the folder.

    Raises:
        SettingsError: there are checkpoints of a run, but its settings can't be read.
    """
    hint = (
        f"to resume, write it again: the same command with --dry-run >{run.settings_path}; to start over, use --fresh, "
        "which keeps the checkpoints under another name"
    )
    try:
        saved = read_saved_settings(run.folder)
    except SettingsError as error:
        if not has_complete_checkpoints(run.folder):
            raise
        raise SettingsError(*error.problems, hint=hint) from error
    if saved is None and has_complete_checkpoints(run.folder):
        raise SettingsError(f"{run.settings_path}: missing or broken: not the settings of a run", hint=hint)
    return saved


def _move_back(aside: Path, folder: Path, report: Report) -> None:
    """Move an old run back, in place of what a start that failed has left in the folder."""
    with suppress(OSError):  # the error that led here must be reported
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        report(Note(f"{aside}: moved back to {folder}"))


def _remove_failed_start(run: Run, is_new_folder: bool) -> None:
    """Remove the settings and the folder of a run whose data couldn't be prepared, unless one of its caches exists."""
    with suppress(OSError):  # the error that led here must be reported
        begun = {run.settings_path, run.folder / LAUNCH_FILE, run.folder / COMMITS_FILE}
        if begun.issuperset(run.folder.iterdir()):
            for path in begun:
                path.unlink(missing_ok=True)
            if is_new_folder:
                run.folder.rmdir()


def _check_no_json_cache(path: Path | None) -> None:
    if path is not None and path.is_file():
        raise SettingsError(
            f"preprocessed_path: {path}: is a file; a token cache is a folder",
            hint="choose a new folder: FastChat's JSON cache isn't read, because many of its labels aren't the targets",
        )


def _create_run_folder(folder: Path, is_run: bool) -> None:
    """Create the folder of a run, unless it exists: then it must be empty or contain a run.

    Raises:
        SettingsError: it is something else, or can't be created.
    """
    hint = "choose another output_dir"
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"output_dir: {folder}: is a file", hint=hint)
    if folder.is_dir() and any(folder.iterdir()) and not is_run:
        raise SettingsError(f"output_dir: {folder}: isn't empty and isn't a t5tune run", hint=hint)
    try:
        with explain_write_errors(folder):
            follow_link(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"output_dir: {folder}: can't be created: {error.strerror}", hint=hint) from error


def _prepare_caches(settings: TrainSettings, run: Run, report: Report) -> None:
    """Prepare the token caches for training and evaluation, unless the settings name existing ones."""
    checkpoints = list_checkpoints(settings.output_dir)
    in_use = bool(checkpoints) and "data" not in settings.allow_change and has_trained_caches(run)
    newest, _ = find_newest(settings.output_dir) if checkpoints and not in_use else (None, [])
    vocabulary = None
    if newest is not None:
        world = World.from_environment()
        num_ranks = world.size if world.launched else settings.process_count
        check_settings_of_run(newest, settings, settings.allow_change, num_ranks)
        if settings.add_tokens == ["auto"]:
            # a run keeps its tokens, since their embedding rows are trained already
            vocabulary = take_vocabulary(newest, find_base(settings, report=report))
    common = Origin(
        in_use,
        keeps_template=bool(checkpoints),
        checkpoint=newest,
        vocabulary=vocabulary,
        rejected_file=name_rejected_file(run.folder),  # not in the folder, which is removed if the first start fails
        run=run.folder,
    )
    for data, cache in ((settings.data_path, run.cache), (settings.eval_data_path, run.eval_cache)):
        if data and cache and cache != Path(data[0]):
            is_eval = cache == run.eval_cache
            source = run.cache if is_eval else _find_adapter_with_tokens(settings)
            setting = "eval_data_path" if is_eval else "data_path"
            origin = replace(common, tokenizer_source=source, setting=setting, is_evaluation=is_eval)
            prepare(_make_prepare_settings(settings, cache, setting), report, origin)
    if run.cache == settings.preprocessed_path and run.cache.parent != run.folder:
        record_prepared(run)
    if run.eval_cache is not None:
        _check_same_tokenizer(run.cache, run.eval_cache)


def _find_adapter_with_tokens(settings: TrainSettings) -> Path | None:
    """Return the initial adapter if its tokenizer is to be used, so that its embedding rows keep their tokens."""
    folder = settings.adapter and find_adapter(settings.adapter, settings.cache_dir)
    has_tokenizer = folder is not None and (folder / TOKENIZER_CONFIG_FILE).is_file()
    return folder if has_tokenizer and settings.add_tokens == ["auto"] else None


def _check_same_tokenizer(cache: Path, eval_cache: Path) -> None:
    """Check that both caches were made with the same tokenizer: otherwise the same id means different tokens.

    Raises:
        DataError: the vocabularies differ.
    """
    trained, evaluated = (load_tokenizer(find_tokenizer_folder(folder)).get_vocab() for folder in (cache, eval_cache))
    if trained == evaluated:
        return
    if only_one_has := trained.keys() ^ evaluated.keys():
        token = min(only_one_has)
        difference = f"{token!r} is only in {cache if token in trained else eval_cache}"
    else:
        token = min(token for token in trained if trained[token] != evaluated[token])
        difference = f"{token!r} has id {trained[token]} in {cache}, {evaluated[token]} in {eval_cache}"
    raise DataError(
        f"eval_data_path: {eval_cache}: its tokenizer isn't that of {cache}: {difference}",
        hint="pass the conversation files instead of a cache, or prepare both with the same --add-tokens",
    )


def _make_prepare_settings(settings: TrainSettings, cache: Path, setting: str) -> PrepareSettings:
    names = PrepareSettings.model_fields.keys() & TrainSettings.model_fields.keys()  # train prepares no part
    values = {name: getattr(settings, name) for name in names}
    if setting == "eval_data_path":
        paths, datasets = settings.eval_data_path, _inherit_reading(settings)
        nothing_mixed = dict.fromkeys(("mixing", "mixing_temperature", "mixing_cap"))
        values |= {"data_path": paths, "data": datasets, "data_split": settings.eval_data_split, **nothing_mixed}
        values["num_data"] = None  # it is how many are trained on
        if datasets is not None:
            values["data_subset"] = None  # each dataset has its own
    # train holds out examples itself, so that a change of eval_fraction or of a seed needs no new cache; but of raw
    # text, a seed determines how many tokens are masked: for evaluations, the seed that runs to be compared share
    is_masked = settings.is_raw_text or any(each.is_raw_text for each in values["data"] or [])
    seed = settings.split_seed if setting == "eval_data_path" else settings.seed
    values |= {"output_dir": cache, "eval_fraction": 0.0, "split_seed": 0, "seed": seed if is_masked else 0}
    return PrepareSettings(**values)


def _inherit_reading(settings: TrainSettings) -> list[DatasetSettings] | None:
    """Return the datasets to evaluate on, each read like the dataset of the same name that is trained on."""
    if settings.eval_data is None:
        return None
    trained = _list_reading(settings)
    # as for eval_data_path, the subset of the training data is that of the other splits, too
    common = {} if settings.data_subset is None else {"data_subset": settings.data_subset}
    datasets = []
    for name, dataset in zip(name_datasets(settings.eval_data), settings.eval_data, strict=True):
        values: dict[str, Any] = {}
        if find_given_cache(dataset) is None:
            values = trained.get(name, common)
        given = dataset.list_given()
        left_out = {"num_data", "data_split", *list_unsuitable(given, values.get("data_format") or "auto")}
        values = {key: value for key, value in values.items() if key not in left_out}
        datasets.append(DatasetSettings(**{**values, **given, "path": dataset.path, "name": name}))
    return datasets


def _list_reading(settings: TrainSettings) -> dict[str, dict[str, Any]]:
    """List how each of several datasets to train on is read: what is given for it, or how its cache was made."""
    datasets = dict(zip(name_datasets(settings.data or []), settings.data or [], strict=True))
    caches = {name: cache for name, dataset in datasets.items() if (cache := find_given_cache(dataset)) is not None}
    mixture = find_given_examples(settings.data_path, settings.data)
    if mixture is not None and is_prepared(mixture):
        caches = list_caches(mixture)
    given = {name: dataset.list_given() for name, dataset in datasets.items()}
    return given | {name: _read_reading(cache, settings) for name, cache in caches.items()}


def _read_reading(cache: Path, settings: TrainSettings) -> dict[str, Any]:
    """Read by which settings the records of a token cache were read."""
    inputs = read_manifest(cache)["inputs"]
    reading = {name: inputs[name] for name in DatasetSettings.model_fields if name in inputs}
    if settings.reads_preferences:  # all objectives that learn from pairs read the same
        reading.pop("objective", None)
    return {**reading, "conversation_template": None}  # that of the cache, which `prepare` finds by the name
