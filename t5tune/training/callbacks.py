"""The Trainer's callbacks: report progress, decide when to log, save, evaluate and stop, and predict for samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from t5tune.data.encoding import Example
from t5tune.data.tokenizer import Tokenizer, decode_prediction, decode_reference
from t5tune.io.atomic import write_json
from t5tune.model.generation import Decoding
from t5tune.progress import Advanced, Finished, Measured, Report, Started
from t5tune.reports.metrics_log import SAMPLES_FILE, MetricsLog, read_samples
from t5tune.training.evaluation import find_max_target_length, generate_predictions

TRAIN_TASK = "train"
MAX_PREDICTED_TOKENS = 64  # a small limit, because under ZeRO-3 every token gathers the whole model
REPORTED_METRICS = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad norm",
    "tokens_per_second": "tokens/s",
    "eval_loss": "eval loss",
    "eval_exact_match": "exact match",
    "eval_rougeL": "rougeL",
}


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

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(Finished(TRAIN_TASK))


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


class SamplePredictions(TrainerCallback):  # type: ignore[misc]
    """Writes the predictions for a few examples, before the first step and after the last one, to samples.json.

    Generates them greedily, on all ranks: under ZeRO-3 each forward pass gathers weights from all of them. A resumed
    run keeps the predictions from before its first step.

    Args:
        answer_suffix: the text that the conversation template adds after each target.
    """

    def __init__(
        self, run_folder: Path, examples: Sequence[Example], tokenizer: Tokenizer, answer_suffix: str, batch_size: int
    ) -> None:
        self.path = run_folder / SAMPLES_FILE
        self.examples = examples
        self.tokenizer = tokenizer
        self.answer_suffix = answer_suffix
        self.batch_size = batch_size

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step > 0:
            return
        predictions = self._generate_predictions(model)
        if state.is_world_process_zero:
            samples = [
                {
                    "source": self.tokenizer.decode(example.source_S[:-1].tolist()),
                    "target": decode_reference(self.tokenizer, example.target_T, self.answer_suffix),
                    "before": prediction,
                }
                for example, prediction in zip(self.examples, predictions, strict=True)
            ]
            write_json(self.path, samples)

    def finish(self, model: Any, is_main_process: bool) -> None:
        """Add the predictions of the trained model. Call on every rank."""
        predictions = self._generate_predictions(model)
        if is_main_process:
            pairs = zip(read_samples(self.path.parent), predictions, strict=False)
            write_json(self.path, [sample | {"after": prediction} for sample, prediction in pairs])

    def _generate_predictions(self, model: Any) -> list[str]:
        max_tokens = min(find_max_target_length(self.examples), MAX_PREDICTED_TOKENS)
        decoding = Decoding(self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, max_tokens)
        predictions = generate_predictions(model, self.examples, decoding, self.batch_size)
        return [decode_prediction(self.tokenizer, ids, self.answer_suffix) for ids in predictions]
