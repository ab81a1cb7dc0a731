"""`t5tune train`: a base and conversations -> a run folder with an adapter.

    result = train(TrainSettings(model_name_or_path="pocket", data_path="pocket", output_dir="run"))
    result.adapter

It runs in whatever processes there are: alone, or as one rank under torchrun, deepspeed or `--num-gpus`.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter import TEMPLATE
from t5tune.checkpoints.base import find_base
from t5tune.checkpoints.model_card import outcome_lines
from t5tune.checkpoints.training_data import TRAINING_DATA
from t5tune.commands.prepare import prepare
from t5tune.data.cache import Cache, is_cache
from t5tune.data.templates import template_from
from t5tune.data.tokenizer import load_tokenizer
from t5tune.distributed.collectives import barrier, by_rank_0, default_timeout, loss_of_ranks
from t5tune.distributed.process_group import process_group
from t5tune.distributed.signals import StopRequest, listening
from t5tune.distributed.world import World
from t5tune.errors import DataError, SettingsError
from t5tune.io.atomic import copy_file, write_file, write_json, writing
from t5tune.io.yaml_file import read_yaml
from t5tune.model.device import check_bf16, memory_is_named, peak_memory
from t5tune.progress import Note, Report, silent
from t5tune.settings import PrepareSettings, TrainSettings, packaged_templates
from t5tune.training.arguments import best_by, training_arguments
from t5tune.training.checkpoint import checkpoints
from t5tune.training.disk_space import bytes_of_checkpoint, check_space
from t5tune.training.resume_guard import check_finished
from t5tune.training.run_folder import (
    RESULT,
    Run,
    Trained,
    begin,
    existing_run,
    move_aside,
    only_run,
    open_data,
    read_result,
    save_settings,
    settings_of,
    with_those_of_cache,
)
from t5tune.training.validate import check, check_machine

# what a checkpoint holds for use, beside what resuming needs
RESULTS = (
    "adapter_", "non_lora_state", "tokenizer", "special_", "added_tokens", "spiece", "template", "README",
    TRAINING_DATA, "model.", "config.", "generation_config",
)  # fmt: skip


def train(settings: TrainSettings, report: Report = silent) -> Trained:
    """Train in this process, as the rank that the environment says.

    Raises:
        SettingsError, DataError, ModelError: the input is wrong.
        TrainingError: the loss is no longer finite, or a checkpoint can't be written.
        RankLost: another rank died or doesn't answer.
        Stopped: a signal asked to stop; the work so far is sealed.
    """
    world = World.from_environment()
    report = report if world.rank == 0 else silent
    timeout = timedelta(seconds=settings.process_group_timeout)
    group = process_group(world, settings, report)
    with listening() as stop, default_timeout(timeout), group as device, loss_of_ranks(world), ExitStack() as held:
        if settings.bf16:
            check_bf16(device)
        if not world.run_is_open:

            def open_it() -> None:
                with stop.at_once():
                    open_run(settings, held, report)

            by_rank_0(world, open_it)
        run = existing_run(settings)
        if run.finished:
            return read_result(run.folder)
        with _memory_is_named(settings):
            return _train(settings, run, world, device, stop, report)


def _memory_is_named(settings: TrainSettings) -> AbstractContextManager[None]:
    batch = (
        f"tokens_per_batch {settings.tokens_per_batch}"
        if settings.tokens_per_batch
        else f"per_device_train_batch_size {settings.per_device_train_batch_size}"
    )
    smaller = "a smaller one with more gradient_accumulation_steps gives the same steps"
    checkpointing = "" if settings.gradient_checkpointing else ", --gradient-checkpointing"
    return memory_is_named(
        f"training with {batch} and model_max_length {settings.model_max_length}",
        f"{smaller}{checkpointing}; t5tune plan --config {settings.output_dir / 'settings.yaml'} reckons what fits",
    )


def open_run(settings: TrainSettings, held: ExitStack, report: Report = silent) -> Run:
    """Check what can be checked without loading the model, make the cache, and save the settings.

    Args:
        held: keeps the run folder for this process until it is closed.
    """
    check(settings)
    check_machine(settings)
    settings = with_those_of_cache(settings)
    folder = settings.output_dir
    held.enter_context(only_run(folder, report))
    if settings.fresh:
        move_aside(folder, report)
    run = existing_run(settings)
    begun = settings_of(run)
    if run.finished and begun is not None:
        check_finished(folder, begun, settings)
        report(Note(f"{folder}: this run is finished; --fresh trains anew"))
        return run
    if settings.preprocessed_path is not None and settings.preprocessed_path.is_file():
        raise SettingsError(
            f"preprocessed_path: {settings.preprocessed_path}: a file; the token cache is a folder",
            hint="name a new folder: FastChat's JSON cache can't be read, many of its labels are not the answers",
        )
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"output_dir: {folder}: a file stands there")
    if folder.is_dir() and any(folder.iterdir()) and begun is None:
        raise SettingsError(
            f"output_dir: {folder}: holds something that is no run of t5tune", hint="name another folder"
        )
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"output_dir: {folder}: can't be made: {error.strerror}", hint="name another folder"
        ) from error
    if begun is None:  # by its settings a run is known
        save_settings(settings, run)
    in_use = bool(checkpoints(folder)) and "data" not in settings.allow_change
    for data, cache in ((settings.data_path, run.cache), (settings.eval_data_path, run.eval_cache)):
        if data and cache and not is_cache(Path(data[0])):
            is_eval = cache == run.eval_cache
            like = run.cache if is_eval else _start_of_tokens(settings)
            with _named("eval_data_path" if is_eval else "data_path"):
                prepare(_prepare_settings(settings, data, cache), report, in_use=in_use, like=like)
    if run.eval_cache is not None:
        _check_tokens(run.cache, run.eval_cache)
    return run


def _start_of_tokens(settings: TrainSettings) -> Path | None:
    """The adapter to start from, where its rows are to stand for the tokens that they were trained for."""
    folder = settings.adapter
    brings = folder is not None and (folder / "tokenizer_config.json").is_file()
    return folder if brings and settings.add_tokens == ["auto"] else None


def _check_tokens(cache: Path, eval_cache: Path) -> None:
    """The ids of one tokenizer are other words in another."""
    trained, evaluated = (load_tokenizer(folder / "tokenizer").vocabulary() for folder in (cache, eval_cache))
    if trained != evaluated:
        others = sorted(trained.keys() ^ evaluated.keys()) or sorted(trained)
        raise DataError(
            f"eval_data_path: {eval_cache}: its tokenizer isn't that of {cache}: one lacks, or has elsewhere, "
            f"{others[0]!r}",
            hint="give the conversations themselves, or prepare both with the same --add-tokens",
        )


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """prepare knows its conversations as data_path."""
    try:
        yield
    except DataError as error:
        raise DataError(error.message.replace("data_path", setting, 1), hint=error.hint) from error


def _prepare_settings(settings: TrainSettings, data: list[str], cache: Path) -> PrepareSettings:
    values = {name: getattr(settings, name) for name in PrepareSettings.model_fields}
    # train itself holds out, so another seed needs no other cache
    return PrepareSettings(**{**values, "data_path": data, "output_dir": cache, "eval_fraction": 0.0, "seed": 0})


@dataclass(frozen=True)
class _Ready:
    """A run that can begin its first step, or go on from `resume`."""

    trainer: Any
    samples: Any
    cache: Cache
    trainable: int
    total: int
    resume: Path | None


def _ready(settings: TrainSettings, run: Run, world: World, device: Any, stop: StopRequest, report: Report) -> _Ready:
    from transformers import set_seed

    from t5tune.training.batches import PackedCollator, PaddedCollator
    from t5tune.training.build_model import build
    from t5tune.training.non_finite import NonFiniteSteps
    from t5tune.training.trainer import Answers, T5Trainer

    # one process alone may go while it still loads
    with stop.at_once() if world.size == 1 else nullcontext():
        cache, held_out = open_data(settings, run)
        base = find_base(settings)
        facts, made_of, resume = by_rank_0(world, lambda: begin(settings, run, cache, base, world, report))
        tokenizer = load_tokenizer(cache.tokenizer_folder)
        layout = template_from(read_yaml(cache.folder / TEMPLATE), cache.folder / TEMPLATE)
        deepspeed = packaged_templates.read_deepspeed(settings.deepspeed) if settings.deepspeed else None
        set_seed(settings.seed)
        built = build(settings, base, facts, cache, deepspeed, device, report)
        report(
            Note(
                f"{built.trainable:,} of {built.total:,} parameters train; {len(cache):,} examples; "
                f"{world.size} × {device.type}"
            )
        )
        start_id = built.model.config.decoder_start_token_id
        trainer = T5Trainer(
            model=built.model,
            args=training_arguments(settings, deepspeed, held_out is not None, world, device, report),
            train=cache,
            held_out=held_out,
            collator=PackedCollator(start_id) if built.packs else PaddedCollator(tokenizer.pad_token_id, start_id),
            write=built.write,
            weights_file=built.weights_file,
            taken_out=built.taken_out,
            loraplus_lr_ratio=settings.loraplus_lr_ratio,
            group_by_length=settings.group_by_length,
            tokens_per_batch=settings.tokens_per_batch,
            label_smoothing=settings.label_smoothing_factor,
            made_of=made_of,
            keep=settings.save_total_limit,
            answers=Answers(tokenizer, layout.answer_end, settings.eval_generate) if settings.eval_generate else None,
            patience=settings.early_stopping_patience,
            stop=stop,
            non_finite=NonFiniteSteps(run.folder, settings.on_non_finite == "skip", settings.max_skipped_steps, report),
            report=report,
        )
        samples = _samples(settings, run, held_out or cache, tokenizer, layout) if settings.report_samples else None
        if samples is not None:
            trainer.add_callback(samples)
        size = bytes_of_checkpoint(built.trainable, deepspeed is not None, cache.tokenizer_folder)
        by_rank_0(world, lambda: check_space(run.folder, size, settings.save_total_limit or 1, report))
    return _Ready(trainer, samples, cache, built.trainable, built.total, resume)


def _train(settings: TrainSettings, run: Run, world: World, device: Any, stop: StopRequest, report: Report) -> Trained:
    from t5tune.training.resumable_trainer import AGAIN

    started = time.monotonic()
    ready = _ready(settings, run, world, device, stop, report)
    trainer, samples, resume = ready.trainer, ready.samples, ready.resume
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds_training = trainer.seconds_training()
    if trainer.is_stopped:
        sealed = run.folder / f"checkpoint-{trainer.state.global_step}"
        raise stop.stopped(f"; all work stands in {sealed}", hint=AGAIN)
    if samples is not None:
        samples.finish(trainer.model, trainer.is_world_process_zero())
    tokens = trainer.total_tokens()
    best = trainer.state.best_global_step if best_by(settings) else None
    if best is not None:
        report(Note(f"the adapter is that of step {best}: {best_by(settings)} {trainer.state.best_metric:.4g}"))
    result = Trained(
        run=run.folder,
        adapter=run.folder,
        steps=trainer.state.global_step,
        epochs=round(trainer.state.epoch or 0.0, 4),
        train_loss=trainer.mean_loss(),
        eval=_evaluation(trainer.state, best),
        examples=len(ready.cache),
        tokens=tokens,
        tokens_per_second=round(tokens / max(seconds_training, 1e-9), 1),
        trainable_parameters=ready.trainable,
        total_parameters=ready.total,
        peak_memory_bytes=peak_memory(device),
        world_size=world.size,
        resumed_from=resume,
        seconds=round(time.monotonic() - started, 3),
    )
    by_rank_0(world, lambda: _finish(run, settings, ready.cache, trainer.state, result, best or result.steps))
    barrier()
    return result


def _evaluation(state: Any, step: int | None) -> dict[str, float]:
    """The held-out figures of a step (None: the last ones)."""
    for line in reversed(state.log_history):
        if "eval_loss" in line and step in (None, line["step"]):
            return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
    return {}


def _samples(settings: TrainSettings, run: Run, examples: Cache, tokenizer: Any, layout: Any) -> Any:
    """The callback that replies to a few evenly spread examples."""
    from t5tune.training.evaluation import spread
    from t5tune.training.sample_replies import SampleReplies

    chosen = [examples[index] for index in spread(len(examples), settings.report_samples)]
    return SampleReplies(run.folder, chosen, tokenizer, layout.answer_end, settings.per_device_eval_batch_size)


def _finish(run: Run, settings: TrainSettings, cache: Cache, state: Any, result: Trained, step: int) -> None:
    """Put the adapter of a step's checkpoint at the top of the run folder, the report of the run beside it, then
    the result that says it is over.
    """
    from t5tune.reports.run_page import write_report

    last = run.folder / f"checkpoint-{step}"
    for file in sorted(last.iterdir()):
        if file.name.startswith(RESULTS):
            copy_file(file, run.folder / file.name)
    history = run.folder / "trainer_state.json"
    with writing(history):
        state.save_to_json(str(history))
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(result).items()}
    write_report(run.folder, settings, values, cache)
    if (card := run.folder / "README.md").is_file():  # of the step's adapter, before its figures were known
        about, code, how = card.read_text(encoding="utf-8").partition("\n```python\n")
        write_file(card, (about + outcome_lines(values) + code + how).encode())
    write_json(run.folder / RESULT, values)
