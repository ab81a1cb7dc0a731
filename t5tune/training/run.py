"""One rank's part in a run: load the data and the model, train, and finish the run folder.

result = run_training(Session(run_plan, folder, world, device, stop, watch, report))
"""

import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from t5tune.checkpoints.model_card import format_outcome_lines
from t5tune.checkpoints.model_folder import is_trained_file
from t5tune.data.caches.examples import Examples
from t5tune.distributed.collectives import barrier, run_on_rank_0
from t5tune.errors import CheckpointError, TrainingError
from t5tune.file_names import MODEL_CARD_FILE, TRAINER_STATE_FILE
from t5tune.formatting import format_count, format_held_out_metric, format_number, format_size
from t5tune.io.atomic import copy_atomically, explain_write_errors, write_file
from t5tune.metrics import split_by_dataset
from t5tune.model.device import get_peak_memory, get_reserved_memory
from t5tune.progress import Note, Report
from t5tune.reports.run_page import write_run_report
from t5tune.runs.checkpoints import verify
from t5tune.runs.folder import RunFolder
from t5tune.runs.metrics_log import EVAL_LABELS, drop_non_finite, read_metrics
from t5tune.runs.plan import RunPlan
from t5tune.runs.result import TrainResult
from t5tune.settings.groups.lora import LoraSettings
from t5tune.training.build_model import BuiltModel
from t5tune.training.build_trainer import build_trainer
from t5tune.training.flow import find_best
from t5tune.training.session import LoadedData, Session, load_data
from t5tune.training.steps import count_all_steps
from t5tune.training.trainer import T5Trainer

BYTES_PER_PARAMETER = 4 + 8  # of a checkpoint: the weights in fp32, and Adam's two moments
EXTRA_BYTES_WITH_DEEPSPEED = 4 + 4  # per parameter: DeepSpeed's fp32 masters, and a second copy of the weights
OVERHEAD_BYTES = 1 << 20  # random states, the Trainer's state, the manifest


def run_training(session: Session) -> TrainResult:
    """Train from the start or the newest checkpoint, and finish the run. Every rank calls this.

    Raises:
        Stopped: a signal asked to stop; the progress so far is saved in a checkpoint.
    """
    plan, folder, world, report = session.plan, session.folder, session.world, session.report
    # a single process may exit at once while it loads, but with several ranks the rest would wait in a collective
    with session.stop.interruptible() if world.size == 1 else nullcontext():
        loaded = load_data(session)
        built, trainer, samples = build_trainer(session, loaded)
        run_on_rank_0(world, lambda: _check_disk_space(session, loaded, built.trainable, trainer))
    trainer.train(resume_from_checkpoint=str(loaded.resume) if loaded.resume else None)
    training_seconds = trainer.totals.measure_seconds()  # without the sample predictions
    if trainer.flow.is_stopped:
        step = trainer.state.global_step
        saved = f"after step {step:,} of {trainer.state.max_steps:,}; saved in {folder.path / f'checkpoint-{step}'}"
        raise session.stop.make_error(saved, hint="run the same command to continue")
    if samples is not None:
        samples.finish(trainer.model, trainer.is_world_process_zero())
    best = _report_choice(plan, trainer, report)
    result = _make_result(session, loaded, built, trainer, training_seconds, best)
    run_on_rank_0(world, lambda: _finish_run(folder, plan, loaded, trainer.state, result, best or result.steps))
    barrier()
    return result


def _check_disk_space(session: Session, loaded: LoadedData, trainable: int, trainer: T5Trainer) -> None:
    # at least two checkpoints must fit: the new checkpoint is written before the old checkpoint is deleted
    folder, limit = session.folder.path, session.plan.output.save_total_limit
    args, sampler, saves = trainer.args, trainer.parts.sampler, 1  # the last step is always saved
    if args.save_strategy != "no":
        steps_per_save = sampler.steps_per_epoch if args.save_strategy == "epoch" else args.save_steps
        saves = -(-count_all_steps(sampler, args) // steps_per_save)
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


def _report_choice(plan: RunPlan, trainer: T5Trainer, report: Report) -> int | None:
    """Report why training ended early, and the best step. Return the best step; None: the last step is used."""
    if trainer.flow.early_stop is not None:
        report(Note(f"stopped early {trainer.flow.early_stop}"))
    if (metric := plan.best_metric) is None or (best := trainer.state.best_global_step) is None:
        return None
    value = trainer.flow.get_best_value()
    shown = "" if value is None else f": {format_held_out_metric(metric)} {format_number(value)}"
    report(Note(f"the weights are from the best step, {best}{shown}"))
    return int(best)


def _make_result(
    session: Session, loaded: LoadedData, built: BuiltModel, trainer: T5Trainer, seconds: float, best: int | None
) -> TrainResult:
    """Make the result. Every rank calls this, because it sums over the ranks; `seconds` is the training time."""
    plan, tokens, evaluations = session.plan, trainer.totals.count_tokens(), trainer.flow.list_evaluations()
    evaluated = best or max(evaluations, default=0)
    metrics, by_dataset = _get_evaluation_metrics(loaded, evaluations, evaluated)
    index = find_best([*evaluations.values()], trainer.args)
    best_step = None if index is None else [*evaluations][index]
    metrics_log = run_on_rank_0(session.world, lambda: read_metrics(session.folder.path))
    lora = None
    if (adapter := plan.model.adapter) is not None:
        lora = {name: getattr(adapter, name) for name in LoraSettings.model_fields if name != "train_mode"}
    return TrainResult(
        run=session.folder.path,
        adapter=session.folder.path,
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
        seed=plan.data.seed,
        split_seed=plan.data.split_seed,
        lora=lora,
        labels=next((line.get(EVAL_LABELS) for line in metrics_log if line["step"] == evaluated), None),
    )


def _get_evaluation_metrics(
    loaded: LoadedData, evaluations: dict[int, dict[str, Any]], step: int
) -> tuple[dict[str, float | None], dict[str, dict[str, float | None]]]:
    """Return the metrics of a step's evaluation, of all examples and of each dataset."""
    line = evaluations.get(step, {})
    metrics = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
    datasets = [] if loaded.held_out is None else [name for name, _ in loaded.held_out.list_datasets()]
    overall, by_dataset = split_by_dataset(metrics, datasets)
    return drop_non_finite(overall), {name: drop_non_finite(values) for name, values in by_dataset.items()}


def _describe_datasets(
    examples: Examples, metrics: dict[str, dict[str, float | None]]
) -> dict[str, dict[str, float | None]] | None:
    """Describe the examples and the metrics of each dataset, if there are several datasets."""
    if not examples.are_several and not metrics:
        return None
    found: dict[str, dict[str, float | None]] = {}
    if examples.are_several:
        for dataset, rates in zip(examples.datasets, examples.describe_rates(), strict=True):
            found[dataset.name] = {"examples": len(dataset.cache), **rates}
    for name, values in metrics.items():
        found[name] = found.get(name, {}) | values
    return found


def _finish_run(
    folder: RunFolder, plan: RunPlan, loaded: LoadedData, state: Any, result: TrainResult, step: int
) -> None:
    """Copy the adapter from the checkpoint of `step` to the run folder, and write the report.

    The result file marks the run as finished, so it is written last.
    """
    run = folder.path
    checkpoint = run / f"checkpoint-{step}"
    if step != state.global_step and (damage := verify(checkpoint)):
        raise CheckpointError(
            f"{checkpoint}: the best checkpoint, whose weights would be the result, is damaged: {damage}",
            hint="restore it and repeat the command, or use another checkpoint as an adapter or a model, such as "
            f"{run}/checkpoint-{state.global_step}",
        )
    for file in sorted(checkpoint.iterdir()):
        if is_trained_file(file.name):
            copy_atomically(file, run / file.name)
    history = run / TRAINER_STATE_FILE
    with explain_write_errors(history):
        state.save_to_json(str(history))
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(result).items()}
    write_run_report(run, plan, values, loaded.examples, has_held_out=bool(loaded.held_out))
    # the card was copied from the checkpoint, when the final metrics weren't known
    if (card := run / MODEL_CARD_FILE).is_file():
        about, code, how = card.read_text(encoding="utf-8").partition("\n```python\n")
        write_file(card, (about + format_outcome_lines(values) + code + how).encode())
    folder.finish(values)
