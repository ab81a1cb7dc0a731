"""`t5tune train`: fine-tune a base on conversations, into a run folder with an adapter.

    result = train(TrainSettings(model_name_or_path="pocket", data_path="pocket", output_dir="run"))
    result.adapter

Runs in the current process: alone, or as one rank under torchrun, the deepspeed launcher or `--num-gpus`.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
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
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.compat.python_patches import pause_garbage_collection, restore_environment
from t5tune.data.caches.mixing import Mixing
from t5tune.data.caches.prepared import find_tokenizer_folder
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.distributed.signals import StopRequest, handle_signals
from t5tune.distributed.world import RESUME_HINT, World, has_restarted
from t5tune.errors import DataError, SettingsError
from t5tune.file_names import SETTINGS_FILE, TOKENIZER_CONFIG_FILE
from t5tune.io.atomic import copy_atomically
from t5tune.model.device import check_bf16, explain_out_of_memory, use_gpu_kernels
from t5tune.preparing.dataset import check_cache_tokenizer
from t5tune.preparing.datasets import prepare_datasets
from t5tune.preparing.plan import Origin, PreparePlan
from t5tune.preparing.record_checks import name_rejected_file
from t5tune.progress import Note, Report, silent
from t5tune.runs.checks import check_machine, check_plan, check_starts_no_processes, choose_trackers, list_notes
from t5tune.runs.commits import find_commits, pin_commits, read_commits_to_resume
from t5tune.runs.data import hash_prepared, is_replaced
from t5tune.runs.folder import RunFolder, check_inputs_stay
from t5tune.runs.plan import RunPlan
from t5tune.runs.result import TrainResult, read_result, save_pushed
from t5tune.settings import TrainSettings
from t5tune.settings.groups.data import SplitSettings, TrainingDataSettings


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
    """Make rank 0's callbacks of the Trainer that continue after training: they finish when the result is written.

    Each has `begin`, called before the Trainer is made, `add_to` it, `finish` with the result, and `abandon` without a
    result.
    """
    callbacks: list[Any] = []
    if settings.hub_strategy == "every_save":
        from t5tune.training.callbacks.push_checkpoints import PushCheckpoints

        callbacks.append(PushCheckpoints(settings, settings.output_dir, report))
    if trackers := choose_trackers(settings.report_to):
        from t5tune.training.callbacks.trackers import TrackRun

        callbacks.append(TrackRun(make_run_plan(settings), trackers, report))
    return callbacks


def _train(
    settings: TrainSettings, world: World, report: Report, stop: StopRequest, callbacks: list[Any]
) -> TrainResult:
    with ExitStack() as stack:
        stack.enter_context(restore_environment())
        stack.callback(gc.unfreeze)  # a script goes on
        _remove_accelerate_variables(report)
        with pause_garbage_collection():  # imports torch, which takes seconds; a signal may arrive meanwhile
            from t5tune.distributed.collectives import any_rank, report_lost_ranks, run_on_rank_0
            from t5tune.distributed.process_group import join_process_group
            from t5tune.distributed.watch import watch_ranks
            from t5tune.runs.same_ranks import check_same_settings

        chosen = "cpu" if settings.use_cpu else None
        device = stack.enter_context(join_process_group(world, settings, chosen, report, stop))
        watch = stack.enter_context(watch_ranks(world, settings.process_group_timeout, RESUME_HINT))
        stack.enter_context(report_lost_ranks(world, RESUME_HINT))
        check_same_settings(settings, settings.deepspeed, world)
        if settings.bf16:
            check_bf16(device)
        if any_rank(has_restarted()) and settings.fresh:
            has_other = run_on_rank_0(world, RunFolder(settings.output_dir).has_other_launch)
            settings = resume_after_restart(settings, not has_other, report)
        if not world.is_run_set_up:

            def set_up_interruptibly() -> None:
                with stop.interruptible():
                    set_up_run_folder(settings, stack, report)

            run_on_rank_0(world, set_up_interruptibly)
        folder = RunFolder(settings.output_dir)
        if folder.is_finished:
            return read_result(folder.path)
        commits = run_on_rank_0(world, folder.read_commits)
        plan = pin_commits(make_run_plan(settings), commits)
        with pause_garbage_collection():
            from transformers.trainer_utils import enable_full_determinism

            from t5tune.compat.torch_patches import restore_determinism
            from t5tune.training.arguments import choose_tf32
            from t5tune.training.run import run_training
            from t5tune.training.session import Session

        stack.enter_context(restore_determinism())
        if plan.steps.training_args.get("full_determinism"):
            # the Trainer does this too, but only after the first product on the GPU, which sets up cuBLAS for good
            enable_full_determinism(plan.data.seed)
        stack.enter_context(use_gpu_kernels(device, choose_tf32(settings.tf32, device, report)))
        with _explain_out_of_memory(plan):
            return run_training(Session(plan, folder, world, device, stop, watch, report, callbacks))


def _remove_accelerate_variables(report: Report) -> None:
    """Remove accelerate's variables for precision and so on: the run would differ from its settings."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        value = os.environ.pop(name)
        report(Note(f"{name}={value} in the environment is ignored: t5tune uses its own settings"))


def _check_call(settings: TrainSettings, world: World) -> None:
    if settings.sweep is not None:
        raise SettingsError("sweep: train() makes one run", hint="call sweep(TrainSettings(…)) instead")
    if settings.dry_run:
        raise SettingsError("dry_run: train() has no dry run", hint="call plan(PlanSettings(…)) instead")
    check_starts_no_processes(settings, "train", world)


def _explain_out_of_memory(plan: RunPlan) -> AbstractContextManager[None]:
    steps = plan.steps
    batch = (
        f"tokens_per_batch {steps.tokens_per_batch}"
        if steps.tokens_per_batch
        else f"per_device_train_batch_size {steps.per_device_train_batch_size}"
    )
    smaller = "a smaller batch with more gradient_accumulation_steps keeps the effective batch size"
    checkpointing = "" if plan.model.layers.gradient_checkpointing else "; --gradient-checkpointing needs less memory"
    return explain_out_of_memory(
        f"training with {batch} and model_max_length {plan.data.model_max_length}",
        f"{smaller}{checkpointing}; t5tune plan --config {plan.folder / SETTINGS_FILE} estimates what fits",
    )


def resume_after_restart(settings: TrainSettings, has_begun: bool, report: Report) -> TrainSettings:
    """Ignore --fresh where a launcher repeats the command, if it has begun the run in the folder."""
    if not has_begun:
        return settings
    problem = "fresh: ignored, since torchrun or SLURM has restarted this command: it resumes the run in output_dir"
    report(Note(f"{problem} ({settings.output_dir})", warning=True))
    return settings.model_copy(update={"fresh": False})


def set_up_run_folder(settings: TrainSettings, locks: ExitStack, report: Report = silent) -> RunFolder:
    """Check the settings without loading the model, lock the run folder, and prepare its data.

    Args:
        locks: closing it releases the run folder's lock.
    """
    plan = make_run_plan(settings)
    folder = RunFolder(plan.folder)
    recorded = read_commits_to_resume(folder, plan)
    check_plan(pin_commits(plan, recorded))
    commits = recorded | find_commits(pin_commits(plan, recorded), report)
    check_machine(pin_commits(plan, commits), report)
    if plan.output.fresh:
        check_inputs_stay(plan)
    open_repository(plan.hub, plan.folder, report)
    locks.enter_context(folder.lock(report))
    with folder.begin(plan, report) as state, _keep_records(settings, plan.data, report):
        if state.is_finished:
            report(Note(f"{folder.path}: this run has already finished; use --fresh to start over"))
            return folder
        for note in list_notes(plan) if state.is_new else []:
            report(Note(note))
        folder.record(commits=commits)
        _prepare_data(pin_commits(plan, commits), folder, state.checkpoint, report)
    return folder


@contextmanager
def _keep_records(given: TrainSettings, kept: TrainingDataSettings, report: Report) -> Iterator[None]:
    """Copy records that were given in memory into the run folder; remove the copies if the block fails."""
    paths = [
        (Path(path), Path(copy))
        for name in ("data_path", "eval_data_path")
        for path, copy in zip(getattr(given, name) or [], getattr(kept, name) or [], strict=True)
        if path != copy and not Path(copy).is_file()
    ]
    try:
        for path, copy in paths:
            copy.parent.mkdir(exist_ok=True)
            copy_atomically(path, copy)
        yield
    except BaseException as error:
        for _, copy in paths:
            with suppress(OSError):  # the error that led here must be reported
                copy.unlink()
        if isinstance(error, DataError) and paths:
            names = " and ".join(copy.name for _, copy in paths)
            line = f"line N of {names} is the Nth record"  # a file that the message may name is gone
            raise DataError(error.message, hint=f"{error.hint}; {line}" if error.hint else line) from error
        raise
    for _, copy in paths:
        report(Note(f"the records are also in {copy}, for repeating this run from the command line"))


def _prepare_data(plan: RunPlan, folder: RunFolder, checkpoint: Path | None, report: Report) -> None:
    """Prepare the data to train and to evaluate on; for given token caches, only their paths are stored.

    Once there is a checkpoint, the data to train on stays as it is: other data is refused.
    """
    # rejected records are listed outside the folder, which is removed if the first start fails
    common = Origin(rejected_file=name_rejected_file(folder.path), run=folder.path)
    if is_replaced(plan.data_folder, folder.read_record().get("prepared")):
        checkpoint = None  # the data there is another run's: this run's is prepared again
    if given := [each.cache for each in plan.datasets if each.cache is not None]:
        base = find_base(plan.model.base, report=report)
        for cache in given:
            check_cache_tokenizer(cache, base)
    split = None if plan.eval_datasets or not plan.data.eval_fraction else plan.data
    origin = replace(common, checkpoint=checkpoint, tokenizer_source=_find_adapter_with_tokens(plan), run_split=split)
    prepare_datasets(_make_prepare_plan(plan, origin), report)
    folder.record(prepared=hash_prepared(plan.data_folder))
    if plan.eval_datasets:
        for cache in [each.cache for each in plan.eval_datasets if each.cache is not None]:
            _check_same_tokenizer(plan.data_folder, cache)
        origin = replace(common, tokenizer_source=plan.data_folder, setting="eval_data_path", is_evaluation=True)
        prepare_datasets(_make_prepare_plan(plan, origin), report)


def _find_adapter_with_tokens(plan: RunPlan) -> Path | None:
    """Return the initial adapter if its tokenizer is to be used, so that its embedding rows keep their tokens."""
    given = plan.model.initial_adapter
    folder = None if given is None else find_adapter(given, plan.model.base.cache_dir)
    has_tokenizer = folder is not None and (folder / TOKENIZER_CONFIG_FILE).is_file()
    return folder if has_tokenizer and plan.data.add_tokens == ["auto"] else None


def _check_same_tokenizer(cache: Path, eval_cache: Path) -> None:
    """Check that both caches were made with the same tokenizer: otherwise the same id means different tokens."""
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
        f"eval_data_path: {eval_cache}: its tokenizer differs from the training data's: {difference}",
        hint="pass the conversation files instead of a cache, or prepare both with the same --add-tokens",
    )


def _make_prepare_plan(plan: RunPlan, origin: Origin) -> PreparePlan:
    data, is_eval = plan.data, origin.is_evaluation
    datasets = plan.eval_datasets if is_eval else plan.datasets
    # train holds out examples itself, so that a change of eval_fraction or of a seed needs no new cache. But for raw
    # text, a seed determines how many tokens are masked: for evaluations it is split_seed, which compared runs share.
    is_masked = "raw text" in (data.kind, *(each.kind for each in datasets if each.cache is None))
    seed = data.split_seed if is_eval else data.seed
    return PreparePlan(
        datasets=datasets,
        base=plan.model.base,
        output_dir=plan.eval_data_folder if is_eval else plan.data_folder,
        split=SplitSettings(eval_fraction=0.0, split_seed=0, seed=seed if is_masked else 0),
        add_tokens=data.add_tokens,
        mixing=Mixing() if is_eval else plan.mixing,
        origin=origin,
    )
