"""After each step: log, save, then evaluate, and perhaps stop.

transformers' Trainer evaluates before it saves. Here a step is on disk before its evaluation, which may fail or take
long. So this callback decides when to evaluate: after the Trainer has logged and saved, before it gets the batches of
the next step, or at the end of the epoch. In `on_step_begin` it would be too late to stop before that step.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerCallback, set_seed
from transformers.optimization import GreedyLR

from t5tune.distributed.collectives import any_rank, get_rank_and_size
from t5tune.errors import SettingsError
from t5tune.evaluation.batches import EvaluationStopped
from t5tune.formatting import format_count, format_held_out_metric, format_number
from t5tune.runs.metrics_log import NEW_HELD_OUT, RESUMED


class TrainingFlow(TrainerCallback):  # type: ignore[misc]
    """Decides after each step whether to log, save, evaluate and stop.

    Args:
        trainer: the T5Trainer, whose `get_batch_samples` and epochs end with `finish_step`.

    Attributes:
        will_evaluate: whether to evaluate the current step once it is saved.
        is_stopped: whether a signal ended training.
        early_stop: when and why early stopping ended training; None: it didn't.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.parts = trainer.parts
        self.will_evaluate = False
        self.is_stopped = False
        self.early_stop: str | None = None
        self.steps_per_epoch = trainer.parts.sampler.steps_per_epoch
        self.threshold = trainer.parts.evaluation.early_stopping_threshold or 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # the Trainer fails to do this when it resumes on several ranks: accelerate then wraps the sampler in more
        # layers than the Trainer looks through
        self.parts.sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.parts.non_finite.require_check()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_last = state.global_step >= state.max_steps
        ends_epoch = state.global_step % self.steps_per_epoch == 0
        # the Trainer logs before it saves, so the checkpoint's history includes this line of metrics
        control.should_log |= is_last or (ends_epoch and args.logging_strategy == "epoch")
        control.should_save |= is_last or (ends_epoch and args.save_strategy == "epoch")
        control.should_evaluate = False
        if self._is_stop_requested():  # save and stop, without evaluating first
            control.should_log = control.should_save = control.should_training_stop = True
        else:
            self.will_evaluate = self._is_evaluation_due()

    def catch_up(self) -> None:
        """Handle a signal that arrived while loading, or do the evaluation that the previous process didn't reach.

        Called after loading, even if no step is left.
        """
        args, state, parts = self.trainer.args, self.trainer.state, self.parts
        step = state.global_step
        evaluates_at_start = args.eval_on_start and step == 0 and parts.held_out is not None
        args.eval_on_start = False  # the Trainer would do so when it resumes, too
        parts.publisher.last_step = step or None  # the checkpoint of that step already exists
        if parts.forgets_evaluations:
            state.log_history = [line for line in state.log_history if "eval_loss" not in line]
            state.best_metric = state.best_global_step = None
        if state.is_world_process_zero:
            for mark, counts in ((RESUMED, step > 0), (NEW_HELD_OUT, parts.has_new_held_out)):
                if counts:
                    self.trainer.metrics_log.write(step, {mark: True})
        if step > 0:
            _seed_new_rank(parts.publisher.run_folder / f"checkpoint-{step}", args.seed, step)
        if self._is_stop_requested():
            self.trainer.save_checkpoint()
        elif evaluates_at_start:
            self._measure()
        elif self._is_evaluation_due():
            found = None if parts.forgets_evaluations else parts.publisher.read_evaluation(step)
            is_complete = found is not None and all(f"eval_{name}" in found for name in parts.metric_names)
            self._evaluate(found if is_complete else None)
        else:  # the previous process may have been killed after the evaluation that ended training
            self._stop_early()
        if self.is_stopped or step >= state.max_steps:
            self.trainer.control.should_training_stop = True

    def finish_step(self) -> None:
        """Evaluate the step that the Trainer has just logged and saved, if it is due. Call on every rank."""
        if self.will_evaluate:
            self.will_evaluate = False
            self._evaluate()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Finish the last step. The Trainer also calls this when training stops within an epoch, or before a step."""
        self.finish_step()
        control.should_save = control.should_evaluate = False  # `on_step_end` asks for them
        # early stopping may come between two logging steps
        control.should_log = control.should_training_stop and not self.is_stopped

    def list_evaluations(self) -> dict[int, dict[str, Any]]:
        """Return the evaluations of the run so far, in order: step -> its entry in the Trainer's log history."""
        return {line["step"]: line for line in self.trainer.state.log_history if "eval_loss" in line}

    def get_best_value(self) -> float | None:
        """Return the best checkpoint's metric for the best model; None: no checkpoint is the best."""
        best = self.list_evaluations().get(self.trainer.state.best_global_step)
        return None if best is None else get_best_metric(best, self.trainer.args)

    def _is_stop_requested(self) -> bool:
        """Whether any rank has received a signal. A collective, so that all ranks stop after the same step."""
        self.is_stopped = self.is_stopped or any_rank(self.parts.stop.is_set)
        return self.is_stopped

    def _is_evaluation_due(self) -> bool:
        args, state = self.trainer.args, self.trainer.state
        step, strategy = state.global_step, args.eval_strategy
        if step == 0 or strategy == "no" or step in self.list_evaluations():
            return False
        if step >= state.max_steps:  # the last step is evaluated whatever the delay is
            return True
        in_steps = strategy == "steps"
        if args.eval_delay > (step if in_steps else step / self.steps_per_epoch):
            return False
        interval = state.eval_steps if in_steps else self.steps_per_epoch
        return bool(step % interval == 0)

    def _evaluate(self, known: dict[str, Any] | None = None) -> None:
        """Evaluate the step, or take the known evaluation of an earlier process.

        Save the step if it is the best or the last, or add the evaluation to its checkpoint. Checkpoints are rotated
        only afterwards, when the best is known.
        """
        trainer, state, publisher = self.trainer, self.trainer.state, self.parts.publisher
        step, was_saved = state.global_step, publisher.last_step == state.global_step
        if known is not None:
            state.log_history.append(known)
        if (metrics := known or self._measure()) is None:
            return
        if isinstance(trainer.lr_scheduler, (ReduceLROnPlateau, GreedyLR)):
            trainer.lr_scheduler.step(metrics[name_best_metric(trainer.args)])
        best = self.list_evaluations().get(state.best_global_step)
        is_best = trainer.args.metric_for_best_model is not None and is_better(metrics, best, trainer.args)
        if is_best:
            state.best_metric, state.best_global_step = get_best_metric(metrics, trainer.args), step
        is_over = self._stop_early()
        if was_saved:
            publisher.save_evaluation(step, state.best_global_step, self.list_evaluations()[step])
        elif is_best or is_over:
            trainer.save_checkpoint()

    def _measure(self) -> dict[str, Any] | None:
        """Measure the metrics. If a signal interrupts it, save the step and return None; a resumed run repeats it.

        If a metric can't be computed, all ranks raise a SettingsError after saving the step.
        """
        trainer = self.trainer
        with trainer.totals.exclude_time():
            try:
                metrics: dict[str, Any] = trainer.evaluate()
                return metrics
            except EvaluationStopped:
                failure = None
            except SettingsError as error:
                failure = error
        trainer.save_checkpoint()  # the Trainer won't save before the next step
        if failure is None:
            self.is_stopped = trainer.control.should_training_stop = True
            return None
        folder = self.parts.publisher.run_folder / f"checkpoint-{trainer.state.global_step}"
        hint = f"{failure.hint}; " if failure.hint else ""
        saved = f"the step is saved in {folder}; the same command resumes from it"
        raise SettingsError(*failure.problems, hint=hint + saved) from failure

    def _stop_early(self) -> bool:
        """Stop training if the metric has stopped improving. Return True if it has."""
        since, state = self._list_steps_without_gain(), self.trainer.state
        patience = self.parts.evaluation.early_stopping_patience
        is_over = patience is not None and len(since) >= patience
        if is_over and state.global_step < state.max_steps:
            self.early_stop = self._describe_early_stop(since)
        self.trainer.control.should_training_stop |= is_over
        return is_over

    def _list_steps_without_gain(self) -> list[int]:
        """List the steps of the evaluations since the last gain. Evaluations without the metric don't count."""
        args, evaluations = self.trainer.args, self.list_evaluations()
        lines = {step: line for step, line in evaluations.items() if name_best_metric(args) in line}
        gains = find_gains(lines.values(), args, self.threshold)
        last_gain = max((number for number, gain in enumerate(gains, 1) if gain), default=0)
        return list(lines)[last_gain:]

    def _describe_early_stop(self, since: list[int]) -> str:
        threshold, state = self.threshold, self.trainer.state
        by = f" by more than {threshold:g}" if threshold else ""
        name = format_held_out_metric(name_best_metric(self.trainer.args).removeprefix("eval_"))
        evaluations = format_count(len(since), "evaluation")
        step, value, why = state.best_global_step, self.get_best_value(), ""
        if step in since:
            why = ", within the threshold" if threshold else ", equal but with a lower loss"
        best = "none, no value was finite" if value is None else f"step {step} ({format_number(value)}{why})"
        return f"at step {state.global_step}: {name} no better{by} for {evaluations}; best: {best}"


class CatchUp(TrainerCallback):  # type: ignore[misc]
    """Lets the flow catch up. Must come after the callbacks that must have begun when it evaluates or saves."""

    def __init__(self, flow: TrainingFlow) -> None:
        self.flow = flow

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.flow.catch_up()


def _seed_new_rank(checkpoint: Path, seed: int, step: int) -> None:
    """Derive this rank's random state from seed, step and rank, if the checkpoint lacks it.

    The Trainer loads a saved state right before the first step.
    """
    rank, num_ranks = get_rank_and_size()
    if not (checkpoint / (f"rng_state_{rank}.pth" if num_ranks > 1 else "rng_state.pth")).is_file():
        set_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def name_best_metric(args: Any) -> str:
    """Name the metric for the best model (default: the loss) as the Trainer's log history does: eval_loss."""
    return f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"


def get_best_metric(line: dict[str, float], args: Any) -> float | None:
    """Return an evaluation's metric for the best model; None: it or the loss isn't finite, or it wasn't measured."""
    return line.get(name_best_metric(args)) if math.isfinite(line["eval_loss"]) else None


def is_better(line: dict[str, float], other: dict[str, float] | None, args: Any) -> bool:
    """Compare two evaluations by the metric for the best model; if equal, by their losses."""
    value, other_value = (None if each is None else get_best_metric(each, args) for each in (line, other))
    if value is None or other is None or other_value is None:
        return value is not None
    sign = 1 if args.greater_is_better else -1
    return (sign * value, -line["eval_loss"]) > (sign * other_value, -other["eval_loss"])


def find_best(evaluations: Sequence[dict[str, float]], args: Any) -> int | None:
    """Find the index of the best evaluation; None: no evaluation has the metric for the best model."""
    best: int | None = None
    for number, line in enumerate(evaluations):
        if is_better(line, None if best is None else evaluations[best], args):
            best = number
    return best


def find_gains(evaluations: Iterable[dict[str, float]], args: Any, threshold: float) -> list[bool]:
    """List for each evaluation whether it improved on the best earlier one by more than the threshold.

    Only the metric for the best model counts, as in Hugging Face's early stopping: an equal value with a lower loss
    makes the better checkpoint, but isn't a gain.
    """
    sign = 1 if args.greater_is_better else -1
    gains, best = [], -math.inf
    for value in (get_best_metric(line, args) for line in evaluations):
        gains.append(value is not None and sign * value - best > threshold)
        best = best if value is None else max(best, sign * value)
    return gains
