"""The end of a run: which step is kept, and the files that mark it as finished."""

import time
from pathlib import Path
from typing import Any

from t5tune.checkpoints.model_card import format_outcome_lines
from t5tune.checkpoints.model_folder import is_trained_file
from t5tune.data.caches.examples import Examples
from t5tune.errors import CheckpointError
from t5tune.file_names import MODEL_CARD_FILE, RESULT_FILE, TRAINER_STATE_FILE
from t5tune.formatting import format_held_out_metric, format_number
from t5tune.io.atomic import copy_atomically, explain_write_errors, write_file, write_json
from t5tune.metrics import split_by_dataset
from t5tune.model.device import get_peak_memory, get_reserved_memory
from t5tune.progress import Note, Report
from t5tune.reports.run_page import write_run_report
from t5tune.runs.checkpoints import verify
from t5tune.runs.folder import Run, TrainResult
from t5tune.runs.metrics_log import drop_non_finite
from t5tune.settings import TrainSettings
from t5tune.settings.groups.lora import LoraSettings
from t5tune.training.arguments import choose_best_metric
from t5tune.training.build_model import BuiltModel
from t5tune.training.flow import find_best
from t5tune.training.session import LoadedData, Session
from t5tune.training.trainer import T5Trainer


def report_choice(settings: TrainSettings, trainer: T5Trainer, report: Report) -> int | None:
    """Report why training ended early, and the best step. Return that step; None if the last one is kept."""
    if trainer.flow.early_stop is not None:
        report(Note(f"stopped early {trainer.flow.early_stop}"))
    if (metric := choose_best_metric(settings)) is None or (best := trainer.state.best_global_step) is None:
        return None
    value = trainer.flow.get_best_value()
    shown = "" if value is None else f": {format_held_out_metric(metric)} {format_number(value)}"
    report(Note(f"the adapter is from the best step, {best}{shown}"))
    return int(best)


def make_result(
    session: Session, loaded: LoadedData, built: BuiltModel, trainer: T5Trainer, seconds: float, best: int | None
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
    loaded: LoadedData, evaluations: dict[int, dict[str, Any]], step: int | None
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
    if not examples.are_several and not metrics:
        return None
    found: dict[str, dict[str, float | None]] = {}
    if examples.are_several:
        for dataset, rates in zip(examples.datasets, examples.describe_rates(), strict=True):
            found[dataset.name] = {"examples": len(dataset.cache), **rates}
    for name, values in metrics.items():
        found[name] = found.get(name, {}) | values
    return found


def finish_run(
    run: Run, settings: TrainSettings, loaded: LoadedData, state: Any, result: TrainResult, step: int
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
