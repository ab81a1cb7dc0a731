"""A Trainer that never loses work: sealed checkpoints, and an end behind a whole step when a signal asks for it."""

import shutil
import uuid
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from t5tune.errors import CheckpointError, TrainingError
from t5tune.progress import Advanced, Event
from t5tune.training.checkpoint import STAGED, publish
from t5tune.training.ranks import from_rank_0, gather
from t5tune.training.stopping import StopRequest, agreed, outlast_signals


class SealingTrainer(Trainer):  # type: ignore[misc]
    """What a subclass sets before it trains:

    run_folder: where checkpoints stand.
    made_of: what the run is made of (see training/identity.py).
    keep: number of checkpoints to keep beside the best; None: all.
    stop: what was asked of this process.
    """

    run_folder: Path
    made_of: dict[str, Any]
    keep: int | None
    stop: StopRequest
    is_stopped = False
    staging: Path | None = None
    last_saved: int | None = None
    _has_begun = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.add_callback(_LastStep())
        self.add_callback(_EndWhenAsked(self))

    def is_asked_to_stop(self) -> bool:
        """Whether a rank got a signal. All ranks ask at the same places, and go by the same answer."""
        self.is_stopped = self.is_stopped or agreed(self.stop, self.args.device)
        return self.is_stopped

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if loader.num_workers:
            loader.worker_init_fn = outlast_signals  # nothing that reads data draws numbers, so none needs a seed
        return loader

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Train an epoch, or what is left of it: a checkpoint may be the last step's, or lack an evaluation."""
        if not self._has_begun:
            self._has_begun = True
            if self.is_asked_to_stop():
                self._save_checkpoint(self.model, None)
            elif self._evaluation_is_due(options["num_update_steps_per_epoch"]):
                self._determine_best_metric(self._evaluate(None, None), None)
            self.control.should_save = False
            if self.is_stopped or self.state.global_step >= self.state.max_steps:
                self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*arguments, **options)

    def _evaluation_is_due(self, steps_per_epoch: int) -> bool:
        """Whether the run ended between a step and the evaluation that follows it."""
        step, strategy = self.state.global_step, self.args.eval_strategy
        if step == 0 or strategy == "no":
            return False
        if any(line["step"] == step and "eval_loss" in line for line in self.state.log_history):
            return False
        interval = self.state.eval_steps if strategy == "steps" else steps_per_epoch
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
        if isinstance(event, Advanced) and self.is_asked_to_stop():
            raise _EvaluationEnded

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
        """Let Trainer and DeepSpeed write what they resume from; what went wrong, or None."""
        self.staging = staging
        try:
            staging.mkdir(exist_ok=True)
            super()._save_checkpoint(model, trial)
        except Exception as error:
            return error
        finally:
            self.staging = None
        return None

    def _published(self, staging: Path, step: int) -> Exception | None:
        staged, best = staging / f"checkpoint-{step}", self.state.best_global_step
        try:
            publish(staged, self.run_folder, step, self.args.world_size, self.made_of, self.keep, best)
        except (OSError, CheckpointError) as error:
            return error
        return None

    def _agree_on(self, failure: Exception | None, step: int) -> None:
        """Wait for all ranks; where one has failed, all do.

        Raises:
            TrainingError: naming the rank and the reason.
        """
        reasons = gather(None if failure is None else " ".join(str(failure).split()))
        failed = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
        if failed is not None:
            where = f" by rank {failed}" if self.args.world_size > 1 else ""
            raise TrainingError(
                f"{self.run_folder}: checkpoint {step} could not be written{where}: {reasons[failed]}",
                hint="the checkpoints before it are whole; the same command goes on from the last",
            ) from failure


class _EvaluationEnded(Exception):
    """A signal came while evaluating."""


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
    """The last step is evaluated and saved, and none is evaluated twice."""

    evaluated: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluated = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_evaluate &= self.evaluated != state.global_step
        return control
