"""Load and build the model of a run, and make its trainer from its parts."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from transformers import set_seed

from t5tune.data.caches.examples import Examples, describe_shares, find_missing_labels
from t5tune.errors import SettingsError, suggest_name
from t5tune.evaluation.batches import EvaluationStopped
from t5tune.evaluation.scoring import GenerationScorer, find_held_out_labels
from t5tune.formatting import format_count
from t5tune.metrics import has_label_metrics
from t5tune.model.attention.t5 import trains_position_bias
from t5tune.model.device import manage_memory_for_loading
from t5tune.model.kernels.flex_check import AttentionShape, read_attention_shape
from t5tune.progress import Note
from t5tune.runs.checkpoints import read_run_identity
from t5tune.runs.deepspeed_values import find_mismatches
from t5tune.runs.plan import DistillationPlan, LabelPlan, ObjectivePlan, PreferencePlan
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
from t5tune.training.callbacks.sample_predictions import LabelSamples, SamplePredictions
from t5tune.training.non_finite import NonFiniteGuard
from t5tune.training.objectives import (
    DirectPreferenceObjective,
    EvaluationOptions,
    LabelObjective,
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
    plan, device, report = session.plan, session.device, session.report
    choose_attention = _make_attention_choice(session, loaded)
    references = None
    if plan.reference_adapter is not None:

        def choose(model: Any) -> ChosenAttention:
            shape = read_attention_shape(model, plan.model.layers.has_attention_dropout)
            return choose_attention((shape,), will_train_position_bias(model, plan.model.adapter))

        references = _complete_references(session, loaded, lambda: open_reference_adapter(session, loaded, choose))
    set_seed(plan.data.seed)
    with manage_memory_for_loading(device, packaged_templates.get_zero_stage(loaded.deepspeed) == 3):
        built = build_model(plan.model, loaded, plan.given.model_dump(), device, report)
    share = f"{built.trainable:,} of {built.total:,} ({built.trainable / built.total:.1%})"
    count, processes = format_count(len(loaded.examples), "example"), f"{session.world.size} × {device.type}"
    report(Note(f"trainable parameters: {share}; {count}; {processes}"))
    missing = find_missing_labels(loaded.tokenizer, loaded.examples, loaded.held_out) if loaded.held_out else []
    for note in [*describe_shares(loaded.examples), *missing]:
        report(note)
    for callback in session.callbacks:
        callback.begin()
    trainer = _make_trainer(session, loaded, built, references, choose_attention)
    samples = None
    if plan.output.report_samples:
        objective = trainer.parts.objective
        make = (
            partial(LabelSamples, scale=objective.scale) if isinstance(objective, LabelObjective) else SamplePredictions
        )
        samples = make(
            session.folder.path,
            loaded.held_out or loaded.examples,
            plan.output.report_samples,
            loaded.tokenizer,
            trainer.parts.collator,
            plan.evaluation.per_device_eval_batch_size,
            plan.uses_autocast,
        )
        trainer.add_callback(samples)
    for callback in session.callbacks:
        callback.add_to(trainer)
    return built, trainer, samples


def _make_trainer(
    session: Session,
    loaded: LoadedData,
    built: BuiltModel,
    references: dict[str, Pairs] | None,
    choose_attention: "_AttentionChoice",
) -> T5Trainer:
    plan, report, folder = session.plan, session.report, session.folder.path
    evaluation, steps, resume = plan.evaluation, plan.steps, loaded.resume
    teacher = load_teacher(session, loaded, built.model.architecture.start_token_id, built.is_packed)
    run_identity, attention = loaded.run_identity, LOOP
    if built.is_packed:
        shapes = [read_attention_shape(built.model, plan.model.layers.has_attention_dropout)]
        if teacher is not None:
            shapes.append(read_attention_shape(teacher.model, has_dropout=False, is_trained=False))
        attention = choose_attention(tuple(shapes), trains_position_bias(built.model))
        if attention.implementation == "flex" or session.device.type == "cuda":
            run_identity = run_identity | {PACKED_ATTENTION: attention.implementation}
    collator = attention.make_collator(built.model, loaded.tokenizer.pad_token_id, built.is_packed)
    if plan.data.objective == "dpo" and references is None:
        options = EvaluationOptions(
            collator, evaluation.per_device_eval_batch_size, report, lambda: session.stop.is_set
        )
        references = _complete_references(
            session, loaded, lambda: open_initial_model(built, options, plan.uses_autocast)
        )
    references = references or {}
    objective = _make_objective(plan.objective, loaded, teacher, references)
    losses = objective.list_losses(loaded.held_out) if loaded.held_out is not None else []
    sampler = make_sampler(steps, plan.data.seed, loaded.examples, built.is_packed, session.world.size)
    run_identity = run_identity | {STEPS_PER_EPOCH: sampler.steps_per_epoch}
    if resume is not None:
        check_steps_per_epoch(resume, run_identity)
    args = make_training_arguments(plan, loaded.deepspeed, losses, session.world, session.device)
    _check_deepspeed_values(session, count_all_steps(sampler, args))
    scorer = _make_scorer(session, loaded)
    parts = TrainerParts(
        examples=loaded.examples,
        held_out=loaded.held_out,
        sampler=sampler,
        collator=collator,
        weights=built.weights,
        publisher=CheckpointPublisher(folder, run_identity, plan.output.save_total_limit, report),
        reshards=resume is not None and needs_resharding(read_run_identity(resume), run_identity),
        forgets_evaluations=resume is not None and has_other_evaluations(resume, run_identity),
        has_new_held_out=resume is not None and has_other_held_out(resume, run_identity),
        non_finite=NonFiniteGuard(folder, steps.on_non_finite == "skip", steps.max_skipped_steps, report),
        stop=session.stop,
        watch=session.watch,
        scorer=scorer,
        objective=objective,
        reference=references.get("training"),
        loraplus_lr_ratio=None if plan.model.adapter is None else plan.model.adapter.loraplus_lr_ratio,
        metric_names=_list_metrics(evaluation.metric_for_best_model, objective, scorer, loaded.held_out),
        evaluation=evaluation,
        report=report,
    )
    return T5Trainer(built.model, args, parts)


def _check_deepspeed_values(session: Session, num_steps: int) -> None:
    """Compare the DeepSpeed config with the settings again: the number of steps may be new."""
    if (deepspeed := session.plan.processes.deepspeed) is None:
        return
    configuration = packaged_templates.read_deepspeed_file(deepspeed)
    if problems := find_mismatches(session.plan, configuration, session.world.size, num_steps):
        raise SettingsError(*problems)


def _complete_references(
    session: Session, loaded: LoadedData, open_meter: Callable[[], AbstractContextManager[PairMeter]]
) -> dict[str, Pairs]:
    """Return the reference's log-probabilities of the training pairs and the held-out pairs."""
    sets = {"training": loaded.examples, **({"held-out": loaded.held_out} if loaded.held_out is not None else {})}
    try:
        folder, run_identity = session.folder.path, loaded.run_identity
        return complete_references(folder, run_identity, sets, session.world, open_meter, session.report)
    except EvaluationStopped:
        raise session.stop.make_error("before training began", hint="run the same command to continue") from None


def _make_objective(
    plan: ObjectivePlan, loaded: LoadedData, teacher: Teacher | None, references: dict[str, Pairs]
) -> RunObjective:
    match plan:
        case PreferencePlan("orpo", options):
            return OddsRatioObjective(options)
        case PreferencePlan(options=options):
            return DirectPreferenceObjective(options, references.get("held-out"))
        case DistillationPlan() if teacher is not None:
            return DistillationObjective(plan, teacher)
        case LabelPlan():
            task = loaded.examples.label_task
            assert task is not None, "the examples have labels"
            scale, _ = loaded.examples.compute_label_scale() if task.objective == "regress" else (1.0, 0.0)
            return LabelObjective(task, scale)
        case _:
            return TargetObjective(plan.label_smoothing_factor)


_AttentionChoice = Callable[[tuple[AttentionShape | None, ...], bool], ChosenAttention]
"""Chooses how attention over packed rows is computed, from the models' shapes and whether the bias is trained."""


def _make_attention_choice(session: Session, loaded: LoadedData) -> _AttentionChoice:
    plan, resume = session.plan.model, loaded.resume
    previous = None if resume is None else read_run_identity(resume).get(PACKED_ATTENTION)
    dtype = torch.bfloat16 if plan.precision.bf16 else torch.float32

    @cache  # DPO's reference and its policy have the same shapes, and checking a kernel takes minutes
    def choose(shapes: tuple[AttentionShape | None, ...], trains_bias: bool) -> ChosenAttention:
        return choose_packed_attention(
            plan.layers.packed_attention, shapes, session.device, dtype, trains_bias, previous, session.report
        )

    return choose


def _make_scorer(session: Session, loaded: LoadedData) -> GenerationScorer | None:
    plan, evaluation = session.plan, session.plan.evaluation
    if not (count := evaluation.eval_generate) or loaded.held_out is None:
        return None
    names, functions = evaluation.metrics, evaluation.metric or []
    labels_are_named = has_label_metrics([*(names or []), evaluation.metric_for_best_model or ""])
    labels = find_held_out_labels(loaded.tokenizer, loaded.held_out, labels_are_named)
    return GenerationScorer(loaded.tokenizer, count, names, functions, labels, session.world, plan.uses_autocast)


def _list_metrics(
    best: str | None, objective: RunObjective, scorer: GenerationScorer | None, held_out: Examples | None
) -> list[str]:
    """List the metrics of evaluations, after trying to compute them. Call on every rank."""
    if held_out is None:
        return []
    names = objective.list_metrics(held_out) + (scorer.list_metrics(held_out) if scorer is not None else [])
    if best is not None and best not in names:
        advice = suggest_name(best, names) or f"; choose from {', '.join(names)}"
        raise SettingsError(f"metric_for_best_model: {best}: not among the metrics of this run's evaluations{advice}")
    return names
