"""One rank's part in a run: load the data and the model, train, and finish the run folder.

result = run_training(Session(settings, run, world, device, stop, watch, report))
"""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from t5tune.checkpoints.base import find_base
from t5tune.checkpoints.model_card import format_outcome_lines
from t5tune.checkpoints.model_folder import is_trained_file
from t5tune.checkpoints.tokenizer_files import read_supporting_files
from t5tune.data.caches.examples import Examples, Mixture, describe_shares
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer
from t5tune.distributed.collectives import barrier, run_on_rank_0
from t5tune.distributed.signals import StopRequest
from t5tune.distributed.watch import RankWatch
from t5tune.distributed.world import World
from t5tune.errors import CheckpointError, SettingsError, TrainingError, suggest_name
from t5tune.evaluation.batches import EvaluationStopped
from t5tune.evaluation.scoring import GenerationScorer
from t5tune.file_names import MODEL_CARD_FILE, RESULT_FILE, TEMPLATE_FILE, TRAINER_STATE_FILE
from t5tune.formatting import format_count, format_held_out_metric, format_number, format_size
from t5tune.io.atomic import copy_atomically, explain_write_errors, write_file, write_json
from t5tune.metrics import split_by_dataset
from t5tune.model.attention.t5 import trains_position_bias
from t5tune.model.batches import make_collator
from t5tune.model.device import get_peak_memory, get_reserved_memory, manage_memory_for_loading
from t5tune.model.kernels.flex_check import AttentionShape, read_attention_shape
from t5tune.progress import Note, Report
from t5tune.reports.run_page import write_run_report
from t5tune.runs.checkpoints import read_run_identity, verify
from t5tune.runs.commits import load_commits, pin_commits
from t5tune.runs.deepspeed_values import find_mismatches
from t5tune.runs.folder import Run, TrainResult, open_data, start_or_resume_run
from t5tune.runs.metrics_log import drop_non_finite
from t5tune.runs.publisher import CheckpointPublisher
from t5tune.runs.resume_guard import (
    PACKED_ATTENTION,
    STEPS_PER_EPOCH,
    check_steps_per_epoch,
    describe_evaluations,
    has_other_evaluations,
    has_other_held_out,
    needs_resharding,
)
from t5tune.runs.same_ranks import check_same_inputs
from t5tune.runs.teacher_files import TeacherFiles, find_teacher, hash_teacher
from t5tune.settings import TrainSettings, packaged_templates
from t5tune.settings.groups.lora import LoraSettings
from t5tune.training.arguments import choose_best_metric, make_training_arguments
from t5tune.training.attention_choice import LOOP, ChosenAttention, choose_packed_attention
from t5tune.training.build_model import BuiltModel, build_model, will_train_position_bias
from t5tune.training.flow import find_best
from t5tune.training.non_finite import NonFiniteGuard
from t5tune.training.objectives import (
    DirectPreferenceObjective,
    OddsRatioObjective,
    Pairs,
    RunObjective,
    TargetObjective,
)
from t5tune.training.reference import PairMeter, complete_references, open_initial_model, open_reference_adapter
from t5tune.training.sample_predictions import SamplePredictions
from t5tune.training.steps import StepSampler, count_steps, make_sampler
from t5tune.training.teacher import DistillationObjective, Teacher, load_teacher
from t5tune.training.trainer import T5Trainer, TrainerParts

BYTES_PER_PARAMETER = 4 + 8  # of a checkpoint: the weights in fp32, and Adam's two moments
EXTRA_BYTES_WITH_DEEPSPEED = 4 + 4  # per parameter: DeepSpeed's fp32 masters, and a second copy of the weights
OVERHEAD_BYTES = 1 << 20  # random states, the Trainer's state, the manifest


@dataclass(frozen=True)
class Session:
    """What one rank needs to take part in a run."""

    settings: TrainSettings
    run: Run
    world: World
    device: torch.device
    stop: StopRequest
    watch: RankWatch
    report: Report
    callbacks: Sequence[Any] = ()
    started: float = field(default_factory=time.monotonic)


def run_training(session: Session) -> TrainResult:
    """Train from the start or the newest checkpoint, and finish the run. Every rank calls this.

    Raises:
        Stopped: a signal asked to stop; the progress so far is saved in a checkpoint.
    """
    settings, run, world, report = session.settings, session.run, session.world, session.report
    # a single process may exit at once while it loads; a rank must not leave the others waiting in a collective
    with session.stop.interruptible() if world.size == 1 else nullcontext():
        loaded = _load_data(session)
        built, trainer, samples = _load_model(session, loaded)
        saves = _count_saves(trainer.args, trainer.parts.sampler)
        run_on_rank_0(world, lambda: _check_disk_space(session, loaded, built.trainable, saves))
    trainer.train(resume_from_checkpoint=str(loaded.resume) if loaded.resume else None)
    training_seconds = trainer.totals.measure_seconds()
    if trainer.flow.is_stopped:
        step = trainer.state.global_step
        saved = f"after step {step:,} of {trainer.state.max_steps:,}; saved in {run.folder / f'checkpoint-{step}'}"
        raise session.stop.make_error(saved, hint="run the same command to continue")
    if samples is not None:
        samples.finish(trainer.model, trainer.is_world_process_zero())
    best = _report_choice(settings, trainer, report)
    result = _make_result(session, loaded, built, trainer, training_seconds, best)
    last = best or result.steps
    run_on_rank_0(world, lambda: _finish_run(run, settings, loaded, trainer.state, result, last))
    barrier()
    return result


def _report_choice(settings: TrainSettings, trainer: T5Trainer, report: Report) -> int | None:
    """Report why training ended early, and the best step. Return that step; None if the last one is kept."""
    if trainer.flow.early_stop is not None:
        report(Note(f"stopped early {trainer.flow.early_stop}"))
    if (metric := choose_best_metric(settings)) is None or (best := trainer.state.best_global_step) is None:
        return None
    value = trainer.flow.get_best_value()
    shown = "" if value is None else f": {format_held_out_metric(metric)} {format_number(value)}"
    report(Note(f"the adapter is from the best step, {best}{shown}"))
    return int(best)


@dataclass(frozen=True)
class _LoadedData:
    """What a run is made from, and the checkpoint `resume` that it continues from, if there is one.

    Args:
        files: the tokenizer and the template, for the checkpoints: name -> content.
        pinned: the settings with the commits of adapters and teachers that are on the Hub.
        teacher: the files of the teacher, if there is one.
        base_metadata: what identifies the base.
        run_identity: the configuration that the run depends on, for its checkpoints.
        deepspeed: the DeepSpeed config, if there is one.
    """

    examples: Examples
    held_out: Examples | None
    files: dict[str, bytes]
    tokenizer: Tokenizer
    base: Path
    pinned: TrainSettings
    teacher: TeacherFiles | None
    base_metadata: dict[str, Any]
    run_identity: dict[str, Any]
    deepspeed: dict[str, Any] | None
    resume: Path | None

    def list_evaluated_datasets(self) -> list[str]:
        """List the names of the datasets that are evaluated, if there are several."""
        return [] if self.held_out is None else [name for name, _ in self.held_out.list_datasets()]


def _load_data(session: Session) -> _LoadedData:
    settings, run, world = session.settings, session.run, session.world
    examples, held_out = open_data(settings, run)
    # now, because prepare may replace a cache outside of the run folder while the run goes on
    files = read_supporting_files(examples.tokenizer_folder, examples.folder / TEMPLATE_FILE)
    tokenizer = load_tokenizer(examples.tokenizer_folder)
    pinned = pin_commits(settings, run_on_rank_0(world, lambda: load_commits(run.folder)))
    base = find_base(pinned, report=session.report)
    pinned = pinned.model_copy(update={"revision": settings.revision})  # the adapter's config names it as given
    teacher = find_teacher(pinned, session.report) if settings.teacher_model_name_or_path is not None else None

    def start_or_resume() -> tuple[dict[str, Any], dict[str, Any], Path | None]:
        teacher_hash = None if teacher is None else hash_teacher(teacher, run.folder)
        evaluations = describe_evaluations(held_out, choose_best_metric(settings))
        return start_or_resume_run(
            settings, run, examples, evaluations, base, pinned, teacher_hash, world, session.report
        )

    check_same_inputs(settings, base, examples, held_out, world)
    base_metadata, run_identity, resume = run_on_rank_0(world, start_or_resume)
    deepspeed = packaged_templates.read_deepspeed_config(settings.deepspeed) if settings.deepspeed else None
    return _LoadedData(
        examples, held_out, files, tokenizer, base, pinned, teacher, base_metadata, run_identity, deepspeed, resume
    )


def _report_sizes(session: Session, loaded: _LoadedData, built: BuiltModel) -> None:
    share = f"{built.trainable:,} of {built.total:,} ({built.trainable / built.total:.1%})"
    processes = f"{session.world.size} × {session.device.type}"
    session.report(Note(f"trainable parameters: {share}; {format_count(len(loaded.examples), 'example')}; {processes}"))
    if isinstance(loaded.examples, Mixture):
        for note in describe_shares(loaded.examples):
            session.report(note)


def _load_model(session: Session, loaded: _LoadedData) -> tuple[BuiltModel, T5Trainer, SamplePredictions | None]:
    """Load and build the model, and make its trainer, with the callback for sample predictions if there is one."""
    settings = session.settings
    choose_attention = _make_attention_choice(session, loaded)
    references = None
    if settings.reference_adapter is not None:
        references = _measure_reference_adapter(session, loaded, choose_attention)
    set_seed(settings.seed)
    is_partitioned = loaded.deepspeed is not None and packaged_templates.get_zero_stage(loaded.deepspeed) == 3
    with manage_memory_for_loading(session.device, is_partitioned):
        built = build_model(
            loaded.pinned,
            loaded.base,
            loaded.base_metadata,
            loaded.examples,
            loaded.files,
            loaded.deepspeed,
            session.device,
            session.report,
        )
    _report_sizes(session, loaded, built)
    for callback in session.callbacks:
        callback.begin()
    trainer = _make_trainer(session, loaded, built, references, choose_attention)
    samples = _make_sample_callback(session, loaded, trainer.parts) if settings.report_samples else None
    if samples is not None:
        trainer.add_callback(samples)
    for callback in session.callbacks:
        callback.add_to(trainer)
    return built, trainer, samples


def _make_trainer(
    session: Session,
    loaded: _LoadedData,
    built: BuiltModel,
    references: dict[str, Pairs] | None,
    choose_attention: "_AttentionChoice",
) -> T5Trainer:
    settings, report, folder = session.settings, session.report, session.run.folder
    start_id, pad_id = built.model.architecture.start_token_id, loaded.tokenizer.pad_token_id
    teacher = _load_teacher(session, loaded, loaded.teacher, built) if loaded.teacher is not None else None
    run_identity, attention = loaded.run_identity, LOOP
    if built.is_packed:
        shapes = [read_attention_shape(built.model, settings.has_attention_dropout)]
        if teacher is not None:
            shapes.append(read_attention_shape(teacher.model, has_dropout=False, is_trained=False))
        attention = choose_attention(tuple(shapes), trains_position_bias(built.model))
        if attention.implementation == "flex" or session.device.type == "cuda":
            run_identity = run_identity | {PACKED_ATTENTION: attention.implementation}
    collator = make_collator(
        start_id, pad_id, built.is_packed, attention.implementation == "flex", attention.num_stages
    )
    if settings.objective == "dpo" and references is None:
        references = _complete_references(
            session,
            loaded,
            lambda: open_initial_model(built, collator, settings, report, lambda: session.stop.is_set),
        )
    objective = _make_objective(session, teacher, references or {})
    losses = objective.list_losses(loaded.held_out) if loaded.held_out is not None else []
    then = {} if loaded.resume is None else read_run_identity(loaded.resume)
    sampler = make_sampler(settings, loaded.examples, built.is_packed, session.world.size)
    run_identity = run_identity | {STEPS_PER_EPOCH: count_steps(len(sampler), sampler.step_size, 1)}
    if loaded.resume is not None:
        check_steps_per_epoch(loaded.resume, run_identity)
    args = make_training_arguments(settings, loaded.deepspeed, losses, session.world, session.device)
    _check_deepspeed_values(session, loaded, _count_all_steps(args, sampler))
    count, skips = settings.eval_generate, settings.on_non_finite == "skip"
    scorer = _make_scorer(session, loaded, count) if count else None
    parts = TrainerParts(
        examples=loaded.examples,
        held_out=loaded.held_out,
        sampler=sampler,
        collator=collator,
        weights=built.weights,
        publisher=CheckpointPublisher(folder, run_identity, settings.save_total_limit, report),
        reshards=loaded.resume is not None and needs_resharding(read_run_identity(loaded.resume), run_identity),
        resumed_rates=(then.get("learning_rate"), then.get("weight_decay")),
        forgets_evaluations=loaded.resume is not None and has_other_evaluations(loaded.resume, run_identity),
        has_new_held_out=loaded.resume is not None and has_other_held_out(loaded.resume, run_identity),
        non_finite=NonFiniteGuard(folder, skips, settings.max_skipped_steps, report),
        stop=session.stop,
        watch=session.watch,
        scorer=scorer,
        objective=objective,
        reference=(references or {}).get("training"),
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        metric_names=_list_metrics(settings, objective, scorer, loaded.held_out),
        patience=settings.early_stopping_patience,
        threshold=settings.early_stopping_threshold or 0.0,
        eval_batch_size=settings.per_device_eval_batch_size,
        report=report,
    )
    return T5Trainer(built.model, args, parts)


def _check_deepspeed_values(session: Session, loaded: _LoadedData, num_steps: int) -> None:
    """Compare the DeepSpeed config with the settings once more: the number of steps may not have been known before.

    Raises:
        SettingsError: they differ.
    """
    if loaded.deepspeed is None:
        return
    if problems := find_mismatches(session.settings, loaded.deepspeed, session.world.size, num_steps):
        raise SettingsError(*problems)


def _measure_reference_adapter(
    session: Session, loaded: _LoadedData, choose_attention: "_AttentionChoice"
) -> dict[str, Pairs]:
    settings = session.settings

    def choose(model: Any) -> ChosenAttention:
        shape = read_attention_shape(model, settings.has_attention_dropout)
        return choose_attention((shape,), will_train_position_bias(model, settings))

    return _complete_references(
        session,
        loaded,
        lambda: open_reference_adapter(
            loaded.pinned,
            loaded.base,
            loaded.examples,
            loaded.deepspeed,
            session.device,
            session.report,
            lambda: session.stop.is_set,
            choose,
        ),
    )


def _complete_references(
    session: Session, loaded: _LoadedData, open_meter: Callable[[], AbstractContextManager[PairMeter]]
) -> dict[str, Pairs]:
    """Return the reference's log-probabilities of the pairs to train on, and of the held-out ones.

    Raises:
        Stopped: a signal arrived while they were measured; those that are known are saved.
    """
    sets = {"training": loaded.examples, **({"held-out": loaded.held_out} if loaded.held_out is not None else {})}
    try:
        folder, run_identity = session.run.folder, loaded.run_identity
        return complete_references(folder, run_identity, sets, session.world, open_meter, session.report)
    except EvaluationStopped:
        raise session.stop.make_error("before training began", hint="run the same command to continue") from None


def _make_objective(session: Session, teacher: Teacher | None, references: dict[str, Pairs]) -> RunObjective:
    settings = session.settings
    if settings.objective == "orpo":
        return OddsRatioObjective(settings)
    if settings.objective == "dpo":
        return DirectPreferenceObjective(settings, references.get("held-out"))
    if teacher is not None:
        return DistillationObjective(settings, teacher)
    return TargetObjective(settings.label_smoothing_factor)


def _load_teacher(session: Session, loaded: _LoadedData, files: TeacherFiles, built: BuiltModel) -> Teacher:
    return load_teacher(
        session.settings,
        files,
        loaded.tokenizer,
        session.device,
        loaded.deepspeed,
        built.model.architecture.start_token_id,
        built.is_packed,
        loaded.examples.get_template(0),
        session.report,
    )


_AttentionChoice = Callable[[tuple[AttentionShape | None, ...], bool], ChosenAttention]
"""Chooses how attention over packed rows is computed, from the models' shapes and whether the bias is trained."""


def _make_attention_choice(session: Session, loaded: _LoadedData) -> _AttentionChoice:
    """Make the function that chooses; for the same models, such as DPO's reference and its policy, only once."""
    settings, resume = session.settings, loaded.resume
    previous = None if resume is None else read_run_identity(resume).get(PACKED_ATTENTION)
    dtype = torch.bfloat16 if settings.bf16 else torch.float32

    @cache
    def choose(shapes: tuple[AttentionShape | None, ...], trains_bias: bool) -> ChosenAttention:
        return choose_packed_attention(
            settings.packed_attention, shapes, session.device, dtype, trains_bias, previous, session.report
        )

    return choose


def _make_scorer(session: Session, loaded: _LoadedData, count: int) -> GenerationScorer:
    names, functions = session.settings.metrics, session.settings.metric or []
    return GenerationScorer(loaded.tokenizer, count, names, functions, session.world, session.settings.uses_autocast)


def _list_metrics(
    settings: TrainSettings, objective: RunObjective, scorer: GenerationScorer | None, held_out: Examples | None
) -> list[str]:
    """List the metrics of evaluations, after trying whether they can be computed. Call on every rank.

    Raises:
        SettingsError: one can't, or metric_for_best_model isn't among them.
    """
    if held_out is None:
        return []
    names = objective.list_metrics(held_out) + (scorer.list_metrics(held_out) if scorer is not None else [])
    if (best := settings.metric_for_best_model) is not None and best not in names:
        advice = suggest_name(best, names) or f"; choose from {', '.join(names)}"
        raise SettingsError(f"metric_for_best_model: {best}: not among the metrics of this run's evaluations{advice}")
    return names


def _count_saves(args: Any, sampler: StepSampler) -> int:
    """Count the checkpoints that a run saves."""
    if args.save_strategy == "no":  # the last step saves one all the same
        return 1
    steps_per_epoch = count_steps(len(sampler), sampler.step_size, 1)
    steps_per_save = steps_per_epoch if args.save_strategy == "epoch" else args.save_steps
    return -(-_count_all_steps(args, sampler) // steps_per_save)


def _count_all_steps(args: Any, sampler: StepSampler) -> int:
    """Count the steps of a run."""
    if args.max_steps > 0:
        return int(args.max_steps)
    return count_steps(len(sampler), sampler.step_size, args.num_train_epochs)


def _check_disk_space(session: Session, loaded: _LoadedData, trainable: int, saves: int) -> None:
    """Compare the free disk space with what the checkpoints of the run need; say how much, if all are kept.

    Raises:
        TrainingError: there is no room for two checkpoints; a new one is written before the old one is deleted.
    """
    folder, limit = session.run.folder, session.settings.save_total_limit
    count = min(saves, limit or saves)
    per_parameter = BYTES_PER_PARAMETER + (EXTRA_BYTES_WITH_DEEPSPEED if loaded.deepspeed is not None else 0)
    size = trainable * per_parameter + sum(map(len, loaded.files.values())) + OVERHEAD_BYTES
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise TrainingError(
            f"{folder}: {free:,} bytes are free, but two checkpoints need about {2 * size:,}",
            hint="free some disk space, or choose another output_dir",
        )
    if free < (needed := (count + 1) * size):
        problem = (
            f"{folder}: {free:,} bytes are free, but {format_count(count, 'checkpoint')} will need about {needed:,}"
        )
        session.report(Note(f"{problem}; set save_total_limit to keep fewer", warning=True))
    elif limit is None and count > 2:
        kept = f"all {count} checkpoints will be kept, about {format_size(count * size)}"
        session.report(Note(f"{kept}; --save-total-limit 2 keeps only the newest two, {format_size(2 * size)}"))


def _make_result(
    session: Session, loaded: _LoadedData, built: BuiltModel, trainer: T5Trainer, seconds: float, best: int | None
) -> TrainResult:
    """Make the result of a run that trained for so many seconds. Every rank calls this; it sums over them."""
    settings, tokens, evaluations = session.settings, trainer.totals.count_tokens(), trainer.flow.list_evaluations()
    metrics, by_dataset = _get_evaluation_metrics(loaded, evaluations, best)
    index = find_best([*evaluations.values()], trainer.args)
    best_step = None if index is None else [*evaluations][index]
    return TrainResult(
        run=session.run.folder,
        adapter=session.run.folder,
        steps=trainer.state.global_step,
        epochs=round(trainer.state.epoch or 0.0, 4),
        train_loss=trainer.compute_mean_loss(),
        eval=metrics,
        examples=len(loaded.examples),
        tokens=tokens,
        tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
        trainable_parameters=built.trainable,
        total_parameters=built.total,
        peak_memory_bytes=get_peak_memory(session.device),
        world_size=session.world.size,
        resumed_from=loaded.resume,
        seconds=round(time.monotonic() - session.started, 3),
        stopped_early=trainer.flow.early_stop,
        peak_reserved_bytes=get_reserved_memory(session.device).get("peak_reserved_bytes"),
        datasets=_describe_datasets(loaded.examples, by_dataset),
        best_step=best_step,
        best_eval=None if best_step is None else _get_evaluation_metrics(loaded, evaluations, best_step)[0],
        seed=settings.seed,
        split_seed=settings.split_seed,
        lora=_describe_lora(settings),
    )


def _describe_lora(settings: TrainSettings) -> dict[str, Any] | None:
    if settings.train_mode == "full":
        return None
    return {name: getattr(settings, name) for name in LoraSettings.model_fields if name != "train_mode"}


def _get_evaluation_metrics(
    loaded: _LoadedData, evaluations: dict[int, dict[str, Any]], step: int | None
) -> tuple[dict[str, float | None], dict[str, dict[str, float | None]]]:
    """Return the metrics of a step's evaluation (None: the last one): of all examples, and of each dataset.

    Those that aren't finite are None.
    """
    line = evaluations.get(step or max(evaluations, default=0), {})
    metrics = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
    overall, by_dataset = split_by_dataset(metrics, loaded.list_evaluated_datasets())
    return drop_non_finite(overall), {name: drop_non_finite(values) for name, values in by_dataset.items()}


def _describe_datasets(
    examples: Examples, metrics: dict[str, dict[str, float | None]]
) -> dict[str, dict[str, float | None]] | None:
    """Describe what was trained on of each dataset, and its metrics if it was evaluated, if there are several."""
    if not isinstance(examples, Mixture) and not metrics:
        return None
    found: dict[str, dict[str, float | None]] = {}
    if isinstance(examples, Mixture):
        for dataset, rates in zip(examples.datasets, examples.describe_rates(), strict=True):
            found[dataset.name] = {"examples": len(dataset.cache), **rates}
    for name, values in metrics.items():
        found[name] = found.get(name, {}) | values
    return found


def _make_sample_callback(session: Session, loaded: _LoadedData, parts: TrainerParts) -> SamplePredictions:
    """Make the callback that generates sample predictions, for held-out examples if there are any."""
    settings = session.settings
    return SamplePredictions(
        session.run.folder,
        loaded.held_out or loaded.examples,
        settings.report_samples,
        loaded.tokenizer,
        parts.collator,
        settings.per_device_eval_batch_size,
        settings.uses_autocast,
    )


def _finish_run(
    run: Run, settings: TrainSettings, loaded: _LoadedData, state: Any, result: TrainResult, step: int
) -> None:
    """Copy the adapter from the checkpoint of `step` to the run folder, write the report, and finally the result.

    The result file marks the run as finished, so it is written last.

    Raises:
        CheckpointError: the checkpoint is an earlier one, and was damaged or deleted since.
    """
    checkpoint = run.folder / f"checkpoint-{step}"
    if step != state.global_step and (damage := verify(checkpoint)):
        raise CheckpointError(
            f"{checkpoint}: the best checkpoint, whose weights would be the result, is damaged: {damage}",
            hint=f"restore it and repeat the command, or use another one, such as {run.folder}/"
            f"checkpoint-{state.global_step}, as an adapter or a model",
        )
    for file in sorted(checkpoint.iterdir()):
        if is_trained_file(file.name):
            copy_atomically(file, run.folder / file.name)
    history = run.folder / TRAINER_STATE_FILE
    with explain_write_errors(history):
        state.save_to_json(str(history))
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(result).items()}
    write_run_report(run.folder, settings, values, loaded.examples, has_held_out=bool(loaded.held_out))
    # the card was copied from the checkpoint, when the final metrics weren't known
    if (card := run.folder / MODEL_CARD_FILE).is_file():
        about, code, how = card.read_text(encoding="utf-8").partition("\n```python\n")
        write_file(card, (about + format_outcome_lines(values) + code + how).encode())
    write_json(run.folder / RESULT_FILE, values)
