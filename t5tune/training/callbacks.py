"""The Trainer's callbacks: report progress, and decide when to log, save, evaluate and stop."""

import math
from typing import Any, Protocol

from transformers import TrainerCallback

from t5tune.checkpoints.model_card import is_timing
from t5tune.progress import Advanced, Evaluated, Finished, Measured, Report, Started
from t5tune.reports.metrics_log import MetricsLog

TRAIN_TASK = "train"
REPORTED_METRICS = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad norm", "tokens_per_second": "tokens/s"}


class ReportProgress(TrainerCallback):  # type: ignore[misc]
    """Reports progress events, and writes heartbeats to metrics.jsonl while nothing else is logged."""

    def __init__(self, report: Report, metrics_log: MetricsLog | None) -> None:
        self.report = report
        self.metrics_log = metrics_log

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
        values = {REPORTED_METRICS[name]: float(value) for name, value in logs.items() if name in REPORTED_METRICS}
        if values:
            self.report(Measured(TRAIN_TASK, state.global_step, values))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        finite = [line for line in state.log_history if math.isfinite(line.get("eval_loss", math.nan))]
        others = [line for line in finite if line["step"] != state.global_step]
        is_best = math.isfinite(metrics["eval_loss"]) and all(is_better(metrics, other, args) for other in others)
        values = {
            name.removeprefix("eval_"): value
            for name, value in metrics.items()
            if name.startswith("eval_") and not is_timing(name)
        }
        self.report(Evaluated(TRAIN_TASK, state.global_step, values, is_best))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(Finished(TRAIN_TASK))


def is_better(metrics: dict[str, float], other: dict[str, float], args: Any) -> bool:
    """Compare two evaluations by the metric for the best model (default: the loss); if equal, by their losses."""
    name = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
    if name not in other:  # it was evaluated before this metric was chosen
        return True
    sign = 1 if args.greater_is_better else -1
    return (sign * metrics[name], -metrics["eval_loss"]) > (sign * other[name], -other["eval_loss"])


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
