"""`t5tune train`: fine-tune a base on conversations, into a run folder with an adapter.

    result = train(TrainSettings(model_name_or_path="pocket", data_path="pocket", output_dir="run"))
    result.adapter

Runs in the current process: as the only one, or as one rank under torchrun, the deepspeed launcher or `--num-gpus`.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter import TEMPLATE_FILE
from t5tune.checkpoints.base import find_base
from t5tune.checkpoints.model_card import format_outcome_lines
from t5tune.checkpoints.training_data import TRAINING_DATA_FILE
from t5tune.commands.prepare import prepare
from t5tune.data.cache import Cache, is_cache
from t5tune.data.templates import Template, parse_template
from t5tune.data.tokenizer import Tokenizer, load_tokenizer
from t5tune.distributed.collectives import barrier, report_lost_ranks, run_on_rank_0, use_default_timeout
from t5tune.distributed.process_group import join_process_group
from t5tune.distributed.signals import StopRequest, handle_signals
from t5tune.distributed.world import World
from t5tune.errors import DataError, SettingsError
from t5tune.io.atomic import copy_atomically, explain_write_errors, write_file, write_json
from t5tune.io.yaml_file import read_yaml
from t5tune.model.device import check_bf16, explain_out_of_memory, get_peak_memory
from t5tune.progress import Note, Report, silent
from t5tune.settings import PrepareSettings, TrainSettings, packaged_templates
from t5tune.training.arguments import choose_best_metric, make_training_arguments
from t5tune.training.checkpoint import list_checkpoints
from t5tune.training.disk_space import check_disk_space, estimate_checkpoint_bytes
from t5tune.training.resume_guard import check_finished_run
from t5tune.training.run_folder import (
    RESULT_FILE,
    Run,
    TrainResult,
    apply_cache_settings,
    locate_run,
    lock_run_folder,
    move_aside,
    open_data,
    read_result,
    read_saved_settings,
    save_settings,
    start_or_resume_run,
)
from t5tune.training.validate import check_machine, check_settings

# prefixes of the files in a checkpoint that are needed to use the trained model; the others are needed only to resume
FINAL_MODEL_FILE_PREFIXES = (
    "adapter_", "non_lora_state", "tokenizer", "special_", "added_tokens", "spiece", "template", "README",
    TRAINING_DATA_FILE, "model.", "config.", "generation_config",
)  # fmt: skip


def train(settings: TrainSettings, report: Report = silent) -> TrainResult:
    """Train in this process, as the rank that the environment variables give.

    Raises:
        SettingsError, DataError, ModelError: the input is wrong.
        TrainingError: the loss is no longer finite, or a checkpoint can't be written.
        RankLost: another rank died or doesn't answer.
        Stopped: a signal asked to stop; the progress so far is saved in a checkpoint.
    """
    world = World.from_environment()
    report = report if world.rank == 0 else silent
    timeout = timedelta(seconds=settings.process_group_timeout)
    group = join_process_group(world, settings, report)
    with (
        handle_signals() as stop,
        use_default_timeout(timeout),
        group as device,
        report_lost_ranks(world),
        ExitStack() as locks,
    ):
        if settings.bf16:
            check_bf16(device)
        if not world.is_run_set_up:

            def set_up_interruptibly() -> None:
                with stop.interruptible():
                    set_up_run_folder(settings, locks, report)

            run_on_rank_0(world, set_up_interruptibly)
        run = locate_run(settings)
        if run.finished:
            return read_result(run.folder)
        with _explain_out_of_memory(settings):
            return _train(_Session(settings, run, world, device, stop, report))


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
        f"{smaller}{checkpointing}; t5tune plan --config {settings.output_dir / 'settings.yaml'} estimates what fits",
    )


def set_up_run_folder(settings: TrainSettings, locks: ExitStack, report: Report = silent) -> Run:
    """Validate the settings without loading the model, lock the run folder, save the settings and prepare the cache.

    Args:
        locks: closing it releases the run folder's lock.
    """
    check_settings(settings)
    check_machine(settings)
    settings = apply_cache_settings(settings)
    folder = settings.output_dir
    locks.enter_context(lock_run_folder(folder, report))
    if settings.fresh:
        move_aside(folder, report)
    run = locate_run(settings)
    saved_settings = read_saved_settings(run)
    if run.finished and saved_settings is not None:
        check_finished_run(folder, saved_settings, settings)
        report(Note(f"{folder}: this run has already finished; use --fresh to start over"))
        return run
    _check_no_json_cache(settings.preprocessed_path)
    _create_run_folder(folder, is_run=saved_settings is not None)
    if saved_settings is None:  # the saved settings mark the folder as a run
        save_settings(settings, run)
    _prepare_caches(settings, run, report)
    return run


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
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"output_dir: {folder}: can't be created: {error.strerror}", hint=hint) from error


def _prepare_caches(settings: TrainSettings, run: Run, report: Report) -> None:
    """Prepare the token caches for training and evaluation, unless the settings name existing ones."""
    in_use = bool(list_checkpoints(settings.output_dir)) and "data" not in settings.allow_change
    for data, cache in ((settings.data_path, run.cache), (settings.eval_data_path, run.eval_cache)):
        if data and cache and not is_cache(Path(data[0])):
            is_eval = cache == run.eval_cache
            source = run.cache if is_eval else _find_adapter_with_tokens(settings)
            with _rename_data_path("eval_data_path" if is_eval else "data_path"):
                prepare(_make_prepare_settings(settings, data, cache), report, in_use=in_use, tokenizer_source=source)
    if run.eval_cache is not None:
        _check_same_tokenizer(run.cache, run.eval_cache)


def _find_adapter_with_tokens(settings: TrainSettings) -> Path | None:
    """Return the initial adapter if its tokenizer is to be used, so that its embedding rows keep their tokens."""
    folder = settings.adapter
    has_tokenizer = folder is not None and (folder / "tokenizer_config.json").is_file()
    return folder if has_tokenizer and settings.add_tokens == ["auto"] else None


def _check_same_tokenizer(cache: Path, eval_cache: Path) -> None:
    """Check that both caches were made with the same tokenizer: otherwise the same id means different tokens.

    Raises:
        DataError: the vocabularies differ.
    """
    trained, evaluated = (load_tokenizer(folder / "tokenizer").get_vocab() for folder in (cache, eval_cache))
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


@contextmanager
def _rename_data_path(setting: str) -> Iterator[None]:
    """In prepare's errors, replace `data_path` with the setting that the user set, such as `eval_data_path`."""
    try:
        yield
    except DataError as error:
        raise DataError(error.message.replace("data_path", setting, 1), hint=error.hint) from error


def _make_prepare_settings(settings: TrainSettings, data: list[str], cache: Path) -> PrepareSettings:
    values = {name: getattr(settings, name) for name in PrepareSettings.model_fields}
    # train holds out examples itself, so that a change of eval_fraction or seed doesn't need another cache
    return PrepareSettings(**{**values, "data_path": data, "output_dir": cache, "eval_fraction": 0.0, "seed": 0})


@dataclass(frozen=True)
class _Session:
    """What one rank needs to take part in a run."""

    settings: TrainSettings
    run: Run
    world: World
    device: Any
    stop: StopRequest
    report: Report


@dataclass(frozen=True)
class _LoadedRun:
    """The data and the model of a run, ready to start training or to resume from the checkpoint `resume`.

    Args:
        built: a `BuiltModel`.
        run_identity: the configuration that the run depends on, for its checkpoints.
        deepspeed: the DeepSpeed config, if there is one.
    """

    cache: Cache
    held_out: Cache | None
    tokenizer: Tokenizer
    template: Template
    built: Any
    run_identity: dict[str, Any]
    deepspeed: dict[str, Any] | None
    resume: Path | None


def _load_data_and_model(session: _Session) -> _LoadedRun:
    from transformers import set_seed

    from t5tune.training.build_model import build_model

    settings, run, world, report = session.settings, session.run, session.world, session.report
    cache, held_out = open_data(settings, run)
    base = find_base(settings)
    base_metadata, run_identity, resume = run_on_rank_0(
        world, lambda: start_or_resume_run(settings, run, cache, base, world, report)
    )
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    template = parse_template(read_yaml(cache.folder / TEMPLATE_FILE), cache.folder / TEMPLATE_FILE)
    deepspeed = packaged_templates.read_deepspeed_config(settings.deepspeed) if settings.deepspeed else None
    set_seed(settings.seed)
    built = build_model(settings, base, base_metadata, cache, deepspeed, session.device, report)
    share = f"{built.trainable:,} of {built.total:,} ({built.trainable / built.total:.1%})"
    processes = f"{world.size} × {session.device.type}"
    report(Note(f"trainable parameters: {share}; {len(cache):,} examples; {processes}"))
    return _LoadedRun(cache, held_out, tokenizer, template, built, run_identity, deepspeed, resume)


def _make_trainer(session: _Session, loaded: _LoadedRun) -> Any:
    from t5tune.training.batches import PackedCollator, PaddedCollator
    from t5tune.training.non_finite import NonFiniteGuard
    from t5tune.training.trainer import GenerationScorer, T5Trainer

    settings, report, built = session.settings, session.report, loaded.built
    evaluates = loaded.held_out is not None
    args = make_training_arguments(settings, loaded.deepspeed, evaluates, session.world, session.device, report)
    start_id, pad_id = built.model.config.decoder_start_token_id, loaded.tokenizer.pad_token_id
    count, answer_suffix = settings.eval_generate, loaded.template.answer_suffix
    skips = settings.on_non_finite == "skip"
    return T5Trainer(
        model=built.model,
        args=args,
        train=loaded.cache,
        held_out=loaded.held_out,
        collator=PackedCollator(start_id) if built.is_packed else PaddedCollator(pad_id, start_id),
        write=built.write,
        weights_file=built.weights_file,
        subtracted=built.subtracted,
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        group_by_length=settings.group_by_length,
        tokens_per_batch=settings.tokens_per_batch,
        label_smoothing=settings.label_smoothing_factor,
        run_identity=loaded.run_identity,
        keep=settings.save_total_limit,
        scorer=GenerationScorer(loaded.tokenizer, answer_suffix, count) if count else None,
        patience=settings.early_stopping_patience,
        stop=session.stop,
        non_finite=NonFiniteGuard(session.run.folder, skips, settings.max_skipped_steps, report),
        report=report,
    )


def _check_space_for_checkpoints(session: _Session, loaded: _LoadedRun) -> None:
    with_deepspeed = loaded.deepspeed is not None
    size = estimate_checkpoint_bytes(loaded.built.trainable, with_deepspeed, loaded.cache.tokenizer_folder)
    limit = session.settings.save_total_limit or 1
    run_on_rank_0(session.world, lambda: check_disk_space(session.run.folder, size, limit, session.report))


def _build_trainer(session: _Session) -> tuple[_LoadedRun, Any, Any]:
    """Load the data and the model. Return them, the trainer, and the callback for sample predictions or None."""
    stop, world = session.stop, session.world
    # a single process may exit at once while it loads; a rank must not leave the others waiting in a collective
    with stop.interruptible() if world.size == 1 else nullcontext():
        loaded = _load_data_and_model(session)
        trainer = _make_trainer(session, loaded)
        samples = _make_sample_callback(session, loaded) if session.settings.report_samples else None
        if samples is not None:
            trainer.add_callback(samples)
        _check_space_for_checkpoints(session, loaded)
    return loaded, trainer, samples


def _train(session: _Session) -> TrainResult:
    from t5tune.training.resumable_trainer import RESUME_HINT

    started = time.monotonic()
    settings, run = session.settings, session.run
    loaded, trainer, samples = _build_trainer(session)
    trainer.train(resume_from_checkpoint=str(loaded.resume) if loaded.resume else None)
    training_seconds = trainer.measure_training_seconds()
    if trainer.is_stopped:
        checkpoint = run.folder / f"checkpoint-{trainer.state.global_step}"
        raise session.stop.make_error(f"; progress saved to {checkpoint}", hint=RESUME_HINT)
    if samples is not None:
        samples.finish(trainer.model, trainer.is_world_process_zero())
    tokens = trainer.count_tokens()
    best = trainer.state.best_global_step if choose_best_metric(settings) else None
    if best is not None:
        metric = f"{choose_best_metric(settings)} {trainer.state.best_metric:.4g}"
        session.report(Note(f"the adapter is from the best step, {best}: {metric}"))
    result = TrainResult(
        run=run.folder,
        adapter=run.folder,
        steps=trainer.state.global_step,
        epochs=round(trainer.state.epoch or 0.0, 4),
        train_loss=trainer.compute_mean_loss(),
        eval=_get_evaluation_metrics(trainer.state, best),
        examples=len(loaded.cache),
        tokens=tokens,
        tokens_per_second=round(tokens / max(training_seconds, 1e-9), 1),
        trainable_parameters=loaded.built.trainable,
        total_parameters=loaded.built.total,
        peak_memory_bytes=get_peak_memory(session.device),
        world_size=session.world.size,
        resumed_from=loaded.resume,
        seconds=round(time.monotonic() - started, 3),
    )
    last = best or result.steps
    run_on_rank_0(session.world, lambda: _finish_run(run, settings, loaded.cache, trainer.state, result, last))
    barrier()
    return result


def _get_evaluation_metrics(state: Any, step: int | None) -> dict[str, float]:
    """Return the evaluation metrics of a step (None: the last evaluation), without the prefix `eval_`."""
    for line in reversed(state.log_history):
        if "eval_loss" in line and step in (None, line["step"]):
            return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
    return {}


def _make_sample_callback(session: _Session, loaded: _LoadedRun) -> Any:
    """Make the callback that generates sample predictions for a few evenly spaced examples."""
    from t5tune.training.evaluation import select_evenly
    from t5tune.training.sample_predictions import SamplePredictions

    settings, examples = session.settings, loaded.held_out or loaded.cache
    chosen = [examples[index] for index in select_evenly(len(examples), settings.report_samples)]
    answer_suffix, batch_size = loaded.template.answer_suffix, settings.per_device_eval_batch_size
    return SamplePredictions(session.run.folder, chosen, loaded.tokenizer, answer_suffix, batch_size)


def _finish_run(run: Run, settings: TrainSettings, cache: Cache, state: Any, result: TrainResult, step: int) -> None:
    """Copy the adapter from the checkpoint of `step` to the run folder, write the report, and finally the result.

    The result file marks the run as finished, so it is written last.
    """
    from t5tune.reports.run_page import write_run_report

    checkpoint = run.folder / f"checkpoint-{step}"
    for file in sorted(checkpoint.iterdir()):
        if file.name.startswith(FINAL_MODEL_FILE_PREFIXES):
            copy_atomically(file, run.folder / file.name)
    history = run.folder / "trainer_state.json"
    with explain_write_errors(history):
        state.save_to_json(str(history))
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(result).items()}
    write_run_report(run.folder, settings, values, cache)
    if (card := run.folder / "README.md").is_file():  # copied from the checkpoint, when the final metrics weren't known
        about, code, how = card.read_text(encoding="utf-8").partition("\n```python\n")
        write_file(card, (about + format_outcome_lines(values) + code + how).encode())
    write_json(run.folder / RESULT_FILE, values)
