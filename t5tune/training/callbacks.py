"""The Trainer's callbacks: report progress, and decide when to log, save, evaluate and stop."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from transformers import TrainerCallback

from t5tune.checkpoints.model_card import is_timing
from t5tune.metrics import split_by_dataset
from t5tune.progress import Advanced, Evaluated, Finished, Measured, Report, Started
from t5tune.runs.metrics_log import MetricsLog

TRAIN_TASK = "train"
REPORTED_METRICS = {
    "loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "kl": "KL", "grad_norm": "grad norm",
    "learning_rate": "lr", "tokens_per_second": "tokens/s",
}  # fmt: skip


class ReportProgress(TrainerCallback):  # type: ignore[misc]
    """Reports progress events, and writes heartbeats to metrics.jsonl while nothing else is logged.

    Args:
        datasets: the names of the datasets that are evaluated, if there are several.
    """

    def __init__(self, report: Report, metrics_log: MetricsLog | None, datasets: Sequence[str] = ()) -> None:
        self.report = report
        self.metrics_log = metrics_log
        self.datasets = datasets

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(Started(TRAIN_TASK, state.max_steps, "steps"))
        self.report(Advanced(TRAIN_TASK, state.global_step))

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.metrics_log is not None:
            self.metrics_log.write_heartbeat(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(Advanced(TRAIN_TASK, state.global_step))
        self.on_substep_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        values = {title: float(logs[name]) for name, title in REPORTED_METRICS.items() if name in logs}
        if values:
            self.report(Measured(TRAIN_TASK, state.global_step, values))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        evaluations = [line for line in state.log_history if "eval_loss" in line]
        is_best = find_best(evaluations, args) == len(evaluations) - 1
        values = {
            name.removeprefix("eval_"): value
            for name, value in metrics.items()
            if name.startswith("eval_") and not is_timing(name)
        }
        overall, by_dataset = split_by_dataset(values, self.datasets)
        self.report(Evaluated(TRAIN_TASK, state.global_step, overall, is_best, by_dataset))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(Finished(TRAIN_TASK))


def name_best_metric(args: Any) -> str:
    """Name the metric for the best model (default: the loss) as the Trainer's log history does: eval_loss."""
    return f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"


def get_best_metric(line: dict[str, float], args: Any) -> float | None:
    """Return an evaluation's metric for the best model.

    It is None if it or the loss isn't finite, or if it was chosen only after this evaluation.
    """
    return line.get(name_best_metric(args)) if math.isfinite(line["eval_loss"]) else None


def is_better(line: dict[str, float], other: dict[str, float] | None, args: Any) -> bool:
    """Compare two evaluations by the metric for the best model; if equal, by their losses."""
    value, other_value = (None if each is None else get_best_metric(each, args) for each in (line, other))
    if value is None or other is None or other_value is None:
        return value is not None
    sign = 1 if args.greater_is_better else -1
    return (sign * value, -line["eval_loss"]) > (sign * other_value, -other["eval_loss"])


def find_best(evaluations: Sequence[dict[str, float]], args: Any) -> int | None:
    """Find the index of the best evaluation; None if none has the metric for the best model."""
    best: int | None = None
    for number, line in enumerate(evaluations):
        if is_better(line, None if best is None else evaluations[best], args):
            best = number
    return best


def find_gains(evaluations: Iterable[dict[str, float]], args: Any, threshold: float) -> list[bool]:
    """Say of each evaluation whether it improves on the best one before it by more than the threshold.

    Only the metric for the best model counts, as in Hugging Face's early stopping: an equal value with a lower loss is
    no gain, though it makes the better checkpoint.
    """
    sign = 1 if args.greater_is_better else -1
    gains, best = [], -math.inf
    for value in (get_best_metric(line, args) for line in evaluations):
        gains.append(value is not None and sign * value - best > threshold)
        best = best if value is None else max(best, sign * value)
    return gains


class _Trainer(Protocol):
    """What the callbacks use of T5Trainer."""

    parts: Any
    is_stopped: bool

    def catch_up(self, steps_per_epoch: int) -> None: ...

    def is_stop_requested(self) -> bool: ...


class TrainingFlow(TrainerCallback):  # type: ignore[misc]
    """Decides after each step and epoch whether to log, save, evaluate and stop."""

    def __init__(self, trainer: _Trainer) -> None:
        self.trainer = trainer
        self._evaluated_step: int | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # the Trainer fails to do this when it resumes on several ranks: accelerate then wraps the sampler in more
        # layers than the Trainer looks through
        self.trainer.parts.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step >= state.max_steps:
            # the Trainer logs before it saves, so the checkpoint's history includes this line of metrics
            control.should_log = control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"
        if self.trainer.is_stop_requested():  # save and stop, without evaluating first
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._evaluated_step = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Keep a step from being evaluated twice. The Trainer also calls this when training stops within an epoch."""
        control.should_evaluate &= self._evaluated_step != state.global_step
        control.should_log |= control.should_training_stop  # early stopping may come between two logging steps
        if self.trainer.is_stopped:
            control.should_log = control.should_save = control.should_evaluate = False
        return control


class CatchUp(TrainerCallback):  # type: ignore[misc]
    """Calls `catch_up`. Must be the last callback: it may evaluate and save, for which the others must have begun."""

    def __init__(self, trainer: _Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        self.trainer.catch_up(-(-len(train_dataloader) // args.gradient_accumulation_steps))
