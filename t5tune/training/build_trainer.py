"""Load and build the model of a run, and make its trainer from its parts."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from t5tune.data.caches.examples import Examples, describe_shares
from t5tune.errors import SettingsError, suggest_name
from t5tune.evaluation.batches import EvaluationStopped
from t5tune.evaluation.scoring import GenerationScorer
from t5tune.formatting import format_count
from t5tune.model.attention.t5 import trains_position_bias
from t5tune.model.batches import make_collator
from t5tune.model.device import manage_memory_for_loading
from t5tune.model.kernels.flex_check import AttentionShape, read_attention_shape
from t5tune.progress import Note
from t5tune.runs.checkpoints import read_run_identity
from t5tune.runs.deepspeed_values import find_mismatches
from t5tune.runs.plan import DistillationPlan, ObjectivePlan, PreferencePlan
from t5tune.runs.publisher import CheckpointPublisher
from t5tune.runs.resume_guard import (
    PACKED_ATTENTION,
    STEPS_PER_EPOCH,
    check_steps_per_epoch,
    has_other_evaluations,
    has_other_held_out,
    needs_resharding,
)
from t5tune.settings import packaged_templates
from t5tune.training.arguments import make_training_arguments
from t5tune.training.attention_choice import LOOP, ChosenAttention, choose_packed_attention
from t5tune.training.build_model import BuiltModel, build_model, will_train_position_bias
from t5tune.training.callbacks.sample_predictions import SamplePredictions
from t5tune.training.non_finite import NonFiniteGuard
from t5tune.training.objectives import (
    DirectPreferenceObjective,
    EvaluationOptions,
    OddsRatioObjective,
    Pairs,
    RunObjective,
    TargetObjective,
)
from t5tune.training.reference import PairMeter, complete_references, open_initial_model, open_reference_adapter
from t5tune.training.session import LoadedData, Session
from t5tune.training.steps import count_all_steps, make_sampler
from t5tune.training.teacher import DistillationObjective, Teacher, load_teacher
from t5tune.training.trainer import T5Trainer, TrainerParts


def build_trainer(session: Session, loaded: LoadedData) -> tuple[BuiltModel, T5Trainer, SamplePredictions | None]:
    """Load and build the model, and make its trainer, with the callback for sample predictions if there is one."""
    plan = session.plan
    choose_attention = _make_attention_choice(session, loaded)
    references = None
    if plan.reference_adapter is not None:
        references = _measure_reference_adapter(session, loaded, plan.reference_adapter, choose_attention)
    set_seed(plan.data.seed)
    is_partitioned = loaded.deepspeed is not None and packaged_templates.get_zero_stage(loaded.deepspeed) == 3
    with manage_memory_for_loading(session.device, is_partitioned):
        built = build_model(
            plan.model,
            loaded.base,
            loaded.base_metadata,
            loaded.examples,
            loaded.files,
            plan.given.model_dump(),
            loaded.deepspeed,
            session.device,
            session.report,
        )
    _report_sizes(session, loaded, built)
    for callback in session.callbacks:
        callback.begin()
    trainer = _make_trainer(session, loaded, built, references, choose_attention)
    samples = _make_sample_callback(session, loaded, trainer.parts) if plan.output.report_samples else None
    if samples is not None:
        trainer.add_callback(samples)
    for callback in session.callbacks:
        callback.add_to(trainer)
    return built, trainer, samples


def _report_sizes(session: Session, loaded: LoadedData, built: BuiltModel) -> None:
    share = f"{built.trainable:,} of {built.total:,} ({built.trainable / built.total:.1%})"
    processes = f"{session.world.size} × {session.device.type}"
    session.report(Note(f"trainable parameters: {share}; {format_count(len(loaded.examples), 'example')}; {processes}"))
    for note in describe_shares(loaded.examples):
        session.report(note)


def _make_trainer(
    session: Session,
    loaded: LoadedData,
    built: BuiltModel,
    references: dict[str, Pairs] | None,
    choose_attention: "_AttentionChoice",
) -> T5Trainer:
    plan, report, folder = session.plan, session.report, session.folder.path
    evaluation, steps = plan.evaluation, plan.steps
    start_id, pad_id = built.model.architecture.start_token_id, loaded.tokenizer.pad_token_id
    teacher = _load_teacher(session, loaded, built)
    run_identity, attention = loaded.run_identity, LOOP
    if built.is_packed:
        shapes = [read_attention_shape(built.model, plan.model.layers.has_attention_dropout)]
        if teacher is not None:
            shapes.append(read_attention_shape(teacher.model, has_dropout=False, is_trained=False))
        attention = choose_attention(tuple(shapes), trains_position_bias(built.model))
        if attention.implementation == "flex" or session.device.type == "cuda":
            run_identity = run_identity | {PACKED_ATTENTION: attention.implementation}
    collator = make_collator(
        start_id, pad_id, built.is_packed, attention.implementation == "flex", attention.num_stages
    )
    if plan.data.objective == "dpo" and references is None:
        options = EvaluationOptions(
            collator, evaluation.per_device_eval_batch_size, report, lambda: session.stop.is_set
        )
        references = _complete_references(
            session, loaded, lambda: open_initial_model(built, options, plan.uses_autocast)
        )
    objective = _make_objective(plan.objective, teacher, references or {})
    losses = objective.list_losses(loaded.held_out) if loaded.held_out is not None else []
    sampler = make_sampler(steps, plan.data.seed, loaded.examples, built.is_packed, session.world.size)
    run_identity = run_identity | {STEPS_PER_EPOCH: sampler.steps_per_epoch}
    if loaded.resume is not None:
        check_steps_per_epoch(loaded.resume, run_identity)
    args = make_training_arguments(plan, loaded.deepspeed, losses, session.world, session.device)
    _check_deepspeed_values(session, count_all_steps(sampler, args))
    count, skips = evaluation.eval_generate, steps.on_non_finite == "skip"
    scorer = _make_scorer(session, loaded, count) if count else None
    parts = TrainerParts(
        examples=loaded.examples,
        held_out=loaded.held_out,
        sampler=sampler,
        collator=collator,
        weights=built.weights,
        publisher=CheckpointPublisher(folder, run_identity, plan.output.save_total_limit, report),
        reshards=loaded.resume is not None and needs_resharding(read_run_identity(loaded.resume), run_identity),
        forgets_evaluations=loaded.resume is not None and has_other_evaluations(loaded.resume, run_identity),
        has_new_held_out=loaded.resume is not None and has_other_held_out(loaded.resume, run_identity),
        non_finite=NonFiniteGuard(folder, skips, steps.max_skipped_steps, report),
        stop=session.stop,
        watch=session.watch,
        scorer=scorer,
        objective=objective,
        reference=(references or {}).get("training"),
        loraplus_lr_ratio=None if plan.model.adapter is None else plan.model.adapter.loraplus_lr_ratio,
        metric_names=_list_metrics(evaluation.metric_for_best_model, objective, scorer, loaded.held_out),
        patience=evaluation.early_stopping_patience,
        threshold=evaluation.early_stopping_threshold or 0.0,
        eval_batch_size=evaluation.per_device_eval_batch_size,
        report=report,
    )
    return T5Trainer(built.model, args, parts)


def _check_deepspeed_values(session: Session, num_steps: int) -> None:
    """Compare the DeepSpeed config with the settings once more: the number of steps may not have been known before.

    Raises:
        SettingsError: they differ.
    """
    if (deepspeed := session.plan.processes.deepspeed) is None:
        return
    configuration = packaged_templates.read_deepspeed_file(deepspeed)
    if problems := find_mismatches(session.plan, configuration, session.world.size, num_steps):
        raise SettingsError(*problems)


def _measure_reference_adapter(
    session: Session, loaded: LoadedData, adapter: Path, choose_attention: "_AttentionChoice"
) -> dict[str, Pairs]:
    plan = session.plan

    def choose(model: Any) -> ChosenAttention:
        shape = read_attention_shape(model, plan.model.layers.has_attention_dropout)
        return choose_attention((shape,), will_train_position_bias(model, plan.model.adapter))

    return _complete_references(
        session,
        loaded,
        lambda: open_reference_adapter(
            adapter,
            plan.model,
            loaded.base,
            loaded.examples,
            loaded.deepspeed,
            session.device,
            plan.evaluation.per_device_eval_batch_size,
            session.report,
            lambda: session.stop.is_set,
            choose,
        ),
    )


def _complete_references(
    session: Session, loaded: LoadedData, open_meter: Callable[[], AbstractContextManager[PairMeter]]
) -> dict[str, Pairs]:
    """Return the reference's log-probabilities of the pairs to train on, and of the held-out ones.

    Raises:
        Stopped: a signal arrived while they were measured; those that are known are saved.
    """
    sets = {"training": loaded.examples, **({"held-out": loaded.held_out} if loaded.held_out is not None else {})}
    try:
        folder, run_identity = session.folder.path, loaded.run_identity
        return complete_references(folder, run_identity, sets, session.world, open_meter, session.report)
    except EvaluationStopped:
        raise session.stop.make_error("before training began", hint="run the same command to continue") from None


def _make_objective(plan: ObjectivePlan, teacher: Teacher | None, references: dict[str, Pairs]) -> RunObjective:
    match plan:
        case PreferencePlan("orpo", options):
            return OddsRatioObjective(options)
        case PreferencePlan(options=options):
            return DirectPreferenceObjective(options, references.get("held-out"))
        case DistillationPlan() if teacher is not None:
            return DistillationObjective(plan, teacher)
        case _:
            return TargetObjective(plan.label_smoothing_factor)


def _load_teacher(session: Session, loaded: LoadedData, built: BuiltModel) -> Teacher | None:
    settings, files = session.plan.teacher, loaded.teacher
    if settings is None or files is None:
        return None
    return load_teacher(
        settings,
        session.plan.model,
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


def _make_attention_choice(session: Session, loaded: LoadedData) -> _AttentionChoice:
    """Make the function that chooses; for the same models, such as DPO's reference and its policy, only once."""
    plan, resume = session.plan.model, loaded.resume
    previous = None if resume is None else read_run_identity(resume).get(PACKED_ATTENTION)
    dtype = torch.bfloat16 if plan.precision.bf16 else torch.float32

    @cache
    def choose(shapes: tuple[AttentionShape | None, ...], trains_bias: bool) -> ChosenAttention:
        return choose_packed_attention(
            plan.layers.packed_attention, shapes, session.device, dtype, trains_bias, previous, session.report
        )

    return choose


def _make_scorer(session: Session, loaded: LoadedData, count: int) -> GenerationScorer:
    plan = session.plan
    names, functions = plan.evaluation.metrics, plan.evaluation.metric or []
    return GenerationScorer(loaded.tokenizer, count, names, functions, session.world, plan.uses_autocast)


def _list_metrics(
    best: str | None, objective: RunObjective, scorer: GenerationScorer | None, held_out: Examples | None
) -> list[str]:
    """List the metrics of evaluations, after trying whether they can be computed. Call on every rank.

    Raises:
        SettingsError: one can't, or metric_for_best_model isn't among them.
    """
    if held_out is None:
        return []
    names = objective.list_metrics(held_out) + (scorer.list_metrics(held_out) if scorer is not None else [])
    if best is not None and best not in names:
        advice = suggest_name(best, names) or f"; choose from {', '.join(names)}"
        raise SettingsError(f"metric_for_best_model: {best}: not among the metrics of this run's evaluations{advice}")
    return names


def _make_sample_callback(session: Session, loaded: LoadedData, parts: TrainerParts) -> SamplePredictions:
    """Make the callback that generates sample predictions, for held-out examples if there are any."""
    plan = session.plan
    return SamplePredictions(
        session.folder.path,
        loaded.held_out or loaded.examples,
        plan.output.report_samples,
        loaded.tokenizer,
        parts.collator,
        plan.evaluation.per_device_eval_batch_size,
        plan.uses_autocast,
    )
