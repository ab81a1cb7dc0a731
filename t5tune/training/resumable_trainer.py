"""A Trainer that never loses work: sealed checkpoints, and an end behind a whole step when a signal asks for it."""

import math
import shutil
import uuid
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from t5tune.distributed.collectives import any_rank, from_rank_0, gather
from t5tune.distributed.signals import StopRequest
from t5tune.errors import CheckpointError, TrainingError, WriteError
from t5tune.progress import Advanced, Event, Note, Report
from t5tune.training.checkpoint import (
    STAGED,
    checkpoints,
    publish,
    read_evaluation,
    rotate,
    size_of,
    write_evaluation,
)
from t5tune.training.non_finite import NonFiniteSteps
from t5tune.training.torch_save_errors import noted_saves

AGAIN = "the same command goes on from there"


class SealingTrainer(Trainer):  # type: ignore[misc]
    """What a subclass sets before it trains:

    run_folder: where checkpoints stand.
    made_of: what the run is made of (see training/resume_guard.py).
    keep: number of checkpoints to keep beside the best; None: all.
    stop: what was asked of this process.
    non_finite: what is done about a loss or gradient that is no finite number.
    report: where notes go.

    Its save_model notes in `failures` what it can't write.
    """

    run_folder: Path
    made_of: dict[str, Any]
    keep: int | None
    stop: StopRequest
    non_finite: NonFiniteSteps
    report: Report
    is_stopped = False
    staging: Path | None = None
    failures: list[Exception]
    last_saved: int | None = None
    _rotates = True
    _found_before: dict[str, Any] | None = None
    _step_loss: Any = None
    _skipped = 0
    _left_out = 0
    _plain_norm: float | None = None
    _steps_per_epoch = 1

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.add_callback(_LastStep())
        self.add_callback(_EndWhenAsked(self))

    def is_asked_to_stop(self) -> bool:
        """Whether a rank got a signal. All ranks ask at the same places, and go by the same answer."""
        self.is_stopped = self.is_stopped or any_rank(self.stop.name is not None, self.args.device)
        return self.is_stopped

    def begin(self, steps_per_epoch: int) -> None:
        """Make up for what the process before this one left undone: a stop, or the evaluation of its last step.

        Trainer comes here once everything is loaded, also where no step is left.
        """
        self._steps_per_epoch = steps_per_epoch
        self.last_saved = self.state.global_step or None  # it resumed from the checkpoint of that step
        self._skipped = self._skipped_by_deepspeed()
        self._watch_plain_optimizer()
        self.on_resumed()
        if self.is_asked_to_stop():
            self._save_checkpoint(self.model, None)
        elif self._evaluation_is_due():
            self._evaluate_resumed()
        self.control.should_save = False
        if self.is_stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Train an epoch, or what is left of it."""
        self._epoch = options["epoch"]
        if not self.control.should_training_stop:
            super()._run_epoch(*arguments, **options)

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """Trainer's, but a checkpoint is saved before the evaluation of its step, which may fail or take long.

        Checkpoints are rotated after the evaluation, which says whether this is the best of them.
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
            self._conclude_evaluation()

    def _conclude_evaluation(self) -> None:
        """Add what the evaluation found to the checkpoint of its step, which was saved before it, and rotate."""
        if self.args.process_index != 0:
            return
        step = self.state.global_step
        line = self._evaluation_of(step)
        if line is not None:
            try:
                write_evaluation(self.run_folder / f"checkpoint-{step}", line)
            except (WriteError, OSError) as error:
                self.report(Note(f"{_words(error)}; a resumed run evaluates this step again", warning=True))
        rotate(self.run_folder, self.keep, self.state.best_global_step)

    def _evaluation_of(self, step: int) -> dict[str, Any] | None:
        history = reversed(self.state.log_history)
        return next((line for line in history if line["step"] == step and "eval_loss" in line), None)

    def _evaluate_resumed(self) -> None:
        """Evaluate the checkpoint that the run resumed from, unless that was done, and choose the best by it."""
        step = self.state.global_step
        is_first = self.args.process_index == 0
        self._found_before = from_rank_0(read_evaluation(self.run_folder / f"checkpoint-{step}") if is_first else None)
        self._determine_best_metric(self._evaluate(None, None), None)
        if not self.is_stopped:
            self._conclude_evaluation()

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Trainer's, or what was found before this process resumed the run."""
        line, self._found_before = self._found_before, None
        if line is not None:
            self.state.log_history.append(line)
            return line
        metrics: dict[str, float] = super().evaluate(*arguments, **options)
        return metrics

    def _evaluation_is_due(self) -> bool:
        """Whether the run ended between a step and the evaluation that follows it."""
        step, strategy = self.state.global_step, self.args.eval_strategy
        if step == 0 or strategy == "no":
            return False
        if self._evaluation_of(step) is not None:
            return False
        interval = self.state.eval_steps if strategy == "steps" else self._steps_per_epoch
        return bool(step >= self.state.max_steps or step % interval == 0)

    def _evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate; no figures where a signal ended it. What is due is then evaluated after resuming."""
        try:
            metrics: dict[str, float] = super()._evaluate(*arguments, **options)
            return metrics
        except _EvaluationEnded:
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def end_evaluation_when_asked(self, event: Event) -> None:
        """A report for what evaluates, which comes here on every rank after each batch."""
        if isinstance(event, Note):
            self.report(event)
        if isinstance(event, Advanced) and self.is_asked_to_stop():
            raise _EvaluationEnded

    def watched(self, loss: Any) -> Any:
        """A micro-step's loss, remembered until the step's end, with 0 in place of what is no finite number."""
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        return torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Trainer asks before the update; under DeepSpeed it has been made, or left out where the norm is no number."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is None:  # DeepSpeed's stage 0 measures it only where it clips
            norm = self._plain_norm
        loss, self._step_loss = self._step_loss, None
        if self.is_deepspeed_enabled:
            skipped = self._skipped_by_deepspeed()
            is_left_out, self._skipped = skipped > self._skipped, skipped
        elif is_left_out := not math.isfinite(norm):
            model.zero_grad(set_to_none=True)  # an optimizer leaves alone what has no gradient
        if is_left_out:
            self._meet_non_finite(float(loss), math.inf if self.is_deepspeed_enabled else float(norm))
        return norm

    def _skipped_by_deepspeed(self) -> int:
        return int(self.model_wrapped.skipped_steps) + self._left_out if self.is_deepspeed_enabled else 0

    def _watch_plain_optimizer(self) -> None:
        """DeepSpeed's stage 0 in fp32 steps torch's own optimizer, whatever the gradients are."""
        if not self.is_deepspeed_enabled or hasattr(self.model_wrapped.optimizer, "overflow"):
            return

        def leave_out(optimizer: Any, *_: Any) -> None:
            parameters = [value for group in optimizer.param_groups for value in group["params"]]
            norm = torch.nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None])
            self._plain_norm = float(norm)
            if not math.isfinite(norm):
                self._left_out += 1
                for value in parameters:
                    value.grad = None

        self.model_wrapped.optimizer.register_step_pre_hook(leave_out)

    def _meet_non_finite(self, loss: float, norm: float) -> None:
        step = self.state.global_step + 1
        losses = gather(loss)
        worst = next((value for value in losses if not math.isfinite(value)), loss)
        examples = self.examples_of_step(self._epoch, (step - 1) % self._steps_per_epoch)
        self.non_finite.meet(step, worst, norm, examples, self.args.process_index == 0)

    @abstractmethod
    def on_resumed(self) -> None:
        """Called before the first step of this process, whose state is that of a checkpoint or new."""

    @abstractmethod
    def examples_of_step(self, epoch: int, step: int) -> list[int]:
        """The numbers in the cache of the examples of an epoch's step (from 0), over all ranks."""

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self.staging or super()._get_output_dir(trial=trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Stage, wait for every rank's success, then seal and rename (see training/checkpoint.py)."""
        step = self.state.global_step
        if self.last_saved == step:
            return
        staging = self.run_folder / f"{STAGED}{from_rank_0(uuid.uuid4().hex[:8])}"
        try:
            self._agree_on(self._staged(staging, model, trial), step)
            self._agree_on(self._published(staging, step) if self.args.process_index == 0 else None, step)
        finally:
            if self.args.process_index == 0:
                shutil.rmtree(staging, ignore_errors=True)
        self.last_saved = step

    def _staged(self, staging: Path, model: Any, trial: Any) -> Exception | None:
        """Let Trainer and DeepSpeed write what they resume from; what went wrong with a file, or None.

        Raises:
            TrainingError: it broke off, and others may be waiting in a collective that this rank won't come to.
        """
        step = self.state.global_step
        self.staging = staging
        try:
            with noted_saves() as self.failures:
                staging.mkdir(exist_ok=True)
                super()._save_checkpoint(model, trial)
        except OSError as error:
            raise self._unwritten(step, _words(error)) from error
        finally:
            self.staging = None
        return self.failures[0] if self.failures else None

    def _published(self, staging: Path, step: int) -> Exception | None:
        staged, best = staging / f"checkpoint-{step}", self.state.best_global_step
        try:
            publish(staged, self.run_folder, step, self.args.world_size, self.made_of)
            if self._rotates:
                rotate(self.run_folder, self.keep, best)
        except (OSError, CheckpointError, WriteError) as error:
            return error
        return None

    def _agree_on(self, failure: Exception | None, step: int) -> None:
        """Wait for all ranks; where one has failed, all do.

        Raises:
            TrainingError: naming the rank, the reason and the room that there is.
        """
        reasons = gather(None if failure is None else _words(failure))
        failed = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
        if failed is None:
            return
        where = f"rank {failed}: " if self.args.world_size > 1 else ""
        raise self._unwritten(step, f"{where}{reasons[failed]}") from failure

    def _unwritten(self, step: int, reason: str) -> TrainingError:
        kept = checkpoints(self.run_folder)
        needed = f"; a checkpoint takes {size_of(kept[0]):,} bytes" if kept else ""
        room = f"{shutil.disk_usage(self.run_folder).free:,} bytes are free{needed}"
        return TrainingError(
            f"{self.run_folder / f'checkpoint-{step}'} could not be written: {reason} ({room})",
            hint=f"the last checkpoint, {kept[0]}, is whole; {AGAIN}" if kept else AGAIN,
        )


def _words(error: Exception) -> str:
    return " ".join(str(error).split())


class _EvaluationEnded(Exception):
    """A signal came while evaluating."""


class Begin(TrainerCallback):  # type: ignore[misc]
    """Calls `begin`. It is to be the last of the callbacks, so that the others know of the training by then."""

    def __init__(self, trainer: SealingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        self.trainer.begin(-(-len(train_dataloader) // args.gradient_accumulation_steps))


class _EndWhenAsked(TrainerCallback):  # type: ignore[misc]
    """Behind each step: where a rank got a signal, save and stop, and leave the evaluation for later."""

    def __init__(self, trainer: SealingTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.trainer.is_asked_to_stop():
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        # Trainer comes here from the middle of an epoch too
        if self.trainer.is_stopped:
            control.should_log = control.should_save = control.should_evaluate = False
        return control


class _LastStep(TrainerCallback):  # type: ignore[misc]
    """The last step is logged, evaluated and saved, and none is evaluated twice."""

    evaluated: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_save = True  # the line is in the checkpoint then
            control.should_evaluate = args.eval_strategy != "no"
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluated = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_evaluate &= self.evaluated != state.global_step
        control.should_log |= control.should_training_stop  # patience ends a run between two lines of metrics
        return control
