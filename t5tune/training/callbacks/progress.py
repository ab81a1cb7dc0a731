"""The Trainer's callback that reports the progress of a run."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from t5tune.checkpoints.model_card import is_timing
from t5tune.metrics import split_by_dataset
from t5tune.progress import Advanced, Evaluated, Finished, Measured, Report, Started
from t5tune.runs.metrics_log import MetricsLog
from t5tune.training.flow import find_best

TRAIN_TASK = "train"
REPORTED_METRICS = {
    "loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "kl": "KL", "grad_norm": "grad norm",
    "learning_rate": "lr", "tokens_per_second": "tokens/s",
}  # fmt: skip


class ReportProgress(TrainerCallback):  # type: ignore[misc]
    """Reports progress events, and writes heartbeats to metrics.jsonl while nothing else is logged."""

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
