"""Trainer with atomic, verified checkpoints that stops cleanly after the current step on a signal."""

import math
import shutil
import uuid
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from t5tune.distributed.collectives import all_gather, any_rank, broadcast_from_rank_0
from t5tune.distributed.signals import StopRequest
from t5tune.errors import CheckpointError, TrainingError, WriteError
from t5tune.progress import Advanced, Event, Note, Report
from t5tune.training.checkpoint import (
    STAGING_PREFIX,
    count_bytes,
    list_checkpoints,
    publish,
    read_evaluation,
    rotate,
    write_evaluation,
)
from t5tune.training.non_finite import NonFiniteGuard
from t5tune.training.torch_save_errors import collect_save_errors

RESUME_HINT = "the same command resumes from it"


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """Saves complete checkpoints or none, resumes exactly, and handles signals and non-finite steps.

    A subclass sets these attributes before it trains:

    run_folder: the folder of the checkpoints.
    run_identity: the configuration that the run depends on (see training/resume_guard.py).
    keep: number of checkpoints to keep in addition to the best one; None: all.
    stop: request to stop, set by a signal.
    non_finite: handles steps with a non-finite loss or gradient.
    report: receives notes for the user.

    Its `save_model` appends errors to `failures` instead of raising them.
    """

    run_folder: Path
    run_identity: dict[str, Any]
    keep: int | None
    stop: StopRequest
    non_finite: NonFiniteGuard
    report: Report
    is_stopped = False
    staging: Path | None = None
    failures: list[Exception]
    last_saved: int | None = None
    _rotates = True
    _evaluation_to_reuse: dict[str, Any] | None = None
    _step_loss: Any = None
    _num_skipped = 0
    _num_skipped_by_hook = 0
    _plain_optimizer_norm: float | None = None
    _steps_per_epoch = 1

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.add_callback(_LastStepCallback())
        self.add_callback(_StopOnRequest(self))

    def is_stop_requested(self) -> bool:
        """Whether any rank has received a signal. A collective, so that all ranks stop after the same step."""
        self.is_stopped = self.is_stopped or any_rank(self.stop.is_set, self.args.device)
        return self.is_stopped

    def catch_up(self, steps_per_epoch: int) -> None:
        """Handle a signal that arrived while loading, or do the evaluation that the previous process didn't get to.

        The Trainer calls this once everything is loaded, even if no step is left.
        """
        self._steps_per_epoch = steps_per_epoch
        self.last_saved = self.state.global_step or None  # the checkpoint of that step already exists
        self._num_skipped = self._count_skipped_by_deepspeed()
        self._guard_plain_optimizer()
        self.on_resumed()
        if self.is_stop_requested():
            self._save_checkpoint(self.model, None)
        elif self._is_evaluation_due():
            self._evaluate_resumed()
        self.control.should_save = False
        if self.is_stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Train an epoch or the rest of it, unless training is over before its first step."""
        self._epoch = options["epoch"]
        if not self.control.should_training_stop:
            super()._run_epoch(*arguments, **options)

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """Log, save and evaluate, in this order: the Trainer evaluates before it saves.

        The step is safe on disk before its evaluation, which may fail or take long. Checkpoints are rotated after the
        evaluation, because only then it is known which one is the best.
        """
        evaluates = self.control.should_evaluate
        if evaluates and self.control.should_save:
            self.control.should_evaluate = False
            self._rotates = False
            try:
                super()._maybe_log_save_evaluate(*arguments, **options)
            finally:
                self._rotates = True
            self.control.should_evaluate = True
        was_saved = self.last_saved == self.state.global_step
        super()._maybe_log_save_evaluate(*arguments, **options)
        if evaluates and was_saved and not self.is_stopped:
            self._save_evaluation()

    def _save_evaluation(self) -> None:
        """Add the evaluation to its step's checkpoint, which was saved before it, and rotate the checkpoints."""
        if self.args.process_index != 0:
            return
        step = self.state.global_step
        line = self._find_evaluation(step)
        if line is not None:
            try:
                write_evaluation(self.run_folder / f"checkpoint-{step}", line)
            except (WriteError, OSError) as error:
                self.report(Note(f"{_describe_error(error)}; a resumed run will repeat this evaluation", warning=True))
        rotate(self.run_folder, self.keep, self.state.best_global_step)

    def _find_evaluation(self, step: int) -> dict[str, Any] | None:
        history = reversed(self.state.log_history)
        return next((line for line in history if line["step"] == step and "eval_loss" in line), None)

    def _evaluate_resumed(self) -> None:
        """Evaluate the checkpoint that the run resumed from, or reuse its evaluation, and update the best metric."""
        step = self.state.global_step
        is_first = self.args.process_index == 0
        self._evaluation_to_reuse = broadcast_from_rank_0(
            read_evaluation(self.run_folder / f"checkpoint-{step}") if is_first else None
        )
        self._determine_best_metric(self._evaluate(None, None), None)
        if not self.is_stopped:
            self._save_evaluation()

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate, or return the evaluation that an earlier process has saved in the checkpoint."""
        line, self._evaluation_to_reuse = self._evaluation_to_reuse, None
        if line is not None:
            self.state.log_history.append(line)
            return line
        metrics: dict[str, float] = super().evaluate(*arguments, **options)
        return metrics

    def _is_evaluation_due(self) -> bool:
        """Whether the previous process ended after a step, but before the evaluation that is due after that step."""
        step, strategy = self.state.global_step, self.args.eval_strategy
        if step == 0 or strategy == "no":
            return False
        if self._find_evaluation(step) is not None:
            return False
        interval = self.state.eval_steps if strategy == "steps" else self._steps_per_epoch
        return bool(step >= self.state.max_steps or step % interval == 0)

    def _evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate; return no metrics if a signal interrupts it. A resumed run will then repeat the evaluation."""
        try:
            metrics: dict[str, float] = super()._evaluate(*arguments, **options)
            return metrics
        except _EvaluationInterrupted:
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def stop_evaluation_on_request(self, event: Event) -> None:
        """Receive an evaluation's progress events, and interrupt the evaluation on a signal.

        Every rank reports each batch, so all ranks check for a signal at the same points.
        """
        if isinstance(event, Note):
            self.report(event)
        if isinstance(event, Advanced) and self.is_stop_requested():
            raise _EvaluationInterrupted

    def record_step_loss(self, loss: Any) -> Any:
        """Add a micro-batch's loss to the step's, and return it with a non-finite value replaced with 0.

        The Trainer would otherwise add NaN to its running mean, which would never recover.
        """
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        return torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Get the gradient norm, and handle the step if it isn't finite.

        The Trainer calls this before the update. Under DeepSpeed the update has already been made, or skipped if the
        norm isn't finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is None:  # DeepSpeed's stage 0 computes it only for clipping
            norm = self._plain_optimizer_norm
        loss, self._step_loss = self._step_loss, None
        if self.is_deepspeed_enabled:
            skipped = self._count_skipped_by_deepspeed()
            is_skipped, self._num_skipped = skipped > self._num_skipped, skipped
        elif is_skipped := not math.isfinite(norm):
            model.zero_grad(set_to_none=True)  # optimizers skip parameters without a gradient
        if is_skipped:
            self._handle_non_finite(float(loss), math.inf if self.is_deepspeed_enabled else float(norm))
        return norm

    def _count_skipped_by_deepspeed(self) -> int:
        return int(self.model_wrapped.skipped_steps) + self._num_skipped_by_hook if self.is_deepspeed_enabled else 0

    def _guard_plain_optimizer(self) -> None:
        """Make torch's own optimizer skip non-finite steps: DeepSpeed's stage 0 in fp32 doesn't check gradients."""
        if not self.is_deepspeed_enabled or hasattr(self.model_wrapped.optimizer, "overflow"):
            return

        def skip_if_non_finite(optimizer: Any, *_: Any) -> None:
            parameters = [value for group in optimizer.param_groups for value in group["params"]]
            norm = torch.nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None])
            self._plain_optimizer_norm = float(norm)
            if not math.isfinite(norm):
                self._num_skipped_by_hook += 1
                for value in parameters:
                    value.grad = None

        self.model_wrapped.optimizer.register_step_pre_hook(skip_if_non_finite)

    def _handle_non_finite(self, loss: float, norm: float) -> None:
        step = self.state.global_step + 1
        losses = all_gather(loss)  # all ranks get here, since the norm is the same on every rank
        worst = next((value for value in losses if not math.isfinite(value)), loss)
        examples = self.list_examples_of_step(self._epoch, (step - 1) % self._steps_per_epoch)
        self.non_finite.handle(step, worst, norm, examples, self.args.process_index == 0)

    @abstractmethod
    def on_resumed(self) -> None:
        """Called before the first step of this process, with a new state or that of a checkpoint."""

    @abstractmethod
    def list_examples_of_step(self, epoch: int, step: int) -> list[int]:
        """List the indices in the cache of the examples in an epoch's step (from 0), over all ranks."""

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self.staging or super()._get_output_dir(trial=trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write to a staging folder, wait for every rank's success, then publish it (see training/checkpoint.py)."""
        step = self.state.global_step
        if self.last_saved == step:
            return
        staging = self.run_folder / f"{STAGING_PREFIX}{broadcast_from_rank_0(uuid.uuid4().hex[:8])}"
        try:
            self._raise_if_any_rank_failed(self._write_staged(staging, model, trial), step)
            self._raise_if_any_rank_failed(
                self._publish_staged(staging, step) if self.args.process_index == 0 else None, step
            )
        finally:
            if self.args.process_index == 0:
                shutil.rmtree(staging, ignore_errors=True)
        self.last_saved = step

    def _write_staged(self, staging: Path, model: Any, trial: Any) -> Exception | None:
        """Let the Trainer and DeepSpeed write their files. Return the first error in writing a file, or None.

        Raises:
            TrainingError: saving was aborted; other ranks may be waiting in a collective that this rank won't reach.
        """
        step = self.state.global_step
        self.staging = staging
        try:
            with collect_save_errors() as self.failures:
                staging.mkdir(exist_ok=True)
                super()._save_checkpoint(model, trial)
        except OSError as error:
            raise self._make_save_error(step, _describe_error(error)) from error
        finally:
            self.staging = None
        return self.failures[0] if self.failures else None

    def _publish_staged(self, staging: Path, step: int) -> Exception | None:
        staged, best = staging / f"checkpoint-{step}", self.state.best_global_step
        try:
            publish(staged, self.run_folder, step, self.args.world_size, self.run_identity)
            if self._rotates:
                rotate(self.run_folder, self.keep, best)
        except (OSError, CheckpointError, WriteError) as error:
            return error
        return None

    def _raise_if_any_rank_failed(self, failure: Exception | None, step: int) -> None:
        """Exchange errors with all ranks. If one rank has failed, all ranks raise.

        Raises:
            TrainingError: names the rank, the reason and the free disk space.
        """
        reasons = all_gather(None if failure is None else _describe_error(failure))
        failed = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
        if failed is None:
            return
        where = f"rank {failed}: " if self.args.world_size > 1 else ""
        raise self._make_save_error(step, f"{where}{reasons[failed]}") from failure

    def _make_save_error(self, step: int, reason: str) -> TrainingError:
        kept = list_checkpoints(self.run_folder)
        needed = f"; a checkpoint takes {count_bytes(kept[0]):,} bytes" if kept else ""
        space = f"{shutil.disk_usage(self.run_folder).free:,} bytes are free{needed}"
        return TrainingError(
            f"{self.run_folder / f'checkpoint-{step}'} couldn't be written: {reason} ({space})",
            hint=f"the last checkpoint, {kept[0]}, is complete; {RESUME_HINT}"
            if kept
            else "there is no earlier checkpoint; the same command starts from the beginning",
        )


def _describe_error(error: Exception) -> str:
    """Join an error's message to one line."""
    return " ".join(str(error).split())


class _EvaluationInterrupted(Exception):
    """Raised when a signal arrives during an evaluation."""


class CatchUpCallback(TrainerCallback):  # type: ignore[misc]
    """Calls `catch_up`. Must be the last callback: it may evaluate and save, for which the others must have begun."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        self.trainer.catch_up(-(-len(train_dataloader) // args.gradient_accumulation_steps))


class _StopOnRequest(TrainerCallback):  # type: ignore[misc]
    """After each step: if a rank has received a signal, save and stop, without evaluating first."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.trainer.is_stop_requested():
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        # the Trainer also calls this when training stops in the middle of an epoch
        if self.trainer.is_stopped:
            control.should_log = control.should_save = control.should_evaluate = False
        return control


class _LastStepCallback(TrainerCallback):  # type: ignore[misc]
    """Logs, saves and evaluates the last step, and keeps a step from being evaluated twice."""

    evaluated: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step >= state.max_steps:
            # the Trainer logs before it saves, so the checkpoint's history includes this line of metrics
            control.should_log = control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluated = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_evaluate &= self.evaluated != state.global_step
        control.should_log |= control.should_training_stop  # early stopping may come between two logging steps
        return control
