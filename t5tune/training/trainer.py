"""The trainer: Hugging Face's, with our batches, loss, exact resuming, and atomic checkpoints.

    trainer = T5Trainer(model, training_arguments, TrainerParts(...))
    trainer.train(resume_from_checkpoint=None)

flow.py makes the decisions after a step. The Trainer's remaining parts are unchanged: its loop, optimizers, schedules,
callbacks of trackers, and DeepSpeed.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer
from transformers import __version__ as transformers_version
from transformers.trainer_utils import EvalLoopOutput

from t5tune.compat.requirements import make_install_command
from t5tune.compat.transformers_patches import leave_empty_bias_without_gradient, skip_module_walks
from t5tune.data.caches.examples import Examples
from t5tune.distributed.collectives import is_distributed
from t5tune.distributed.signals import StopRequest, ignore_signals
from t5tune.distributed.watch import RankWatch
from t5tune.errors import DependencyError, SettingsError
from t5tune.evaluation.scoring import GenerationScorer
from t5tune.io.reasons import join_lines
from t5tune.model.batches import Collator
from t5tune.model.device import get_peak_memory, get_reserved_memory
from t5tune.progress import Note, Report
from t5tune.runs.metrics_log import EVAL_LABELS, SUMMARY, MetricsLog
from t5tune.runs.publisher import CheckpointPublisher
from t5tune.runs.reshard import load_resharded
from t5tune.settings.groups.evaluation import EvaluationSettings
from t5tune.settings.groups.steps import SCHEDULES_BY_METRIC
from t5tune.training.callbacks.progress import ReportProgress
from t5tune.training.flow import CatchUp, TrainingFlow
from t5tune.training.non_finite import NonFiniteGuard
from t5tune.training.objectives import EvaluationOptions, Pairs, RunObjective
from t5tune.training.steps import ExampleDataset, StepSampler
from t5tune.training.totals import NUM_ITEMS, NUM_TOKENS, TOTALS_KEY, CountingCollator, RunTotals
from t5tune.training.trained_weights import TrainedWeights, drop_frozen


@dataclass(frozen=True)
class TrainerParts:
    """The parts of a run, in addition to its model and the Trainer's arguments.

    Args:
        held_out: the examples to evaluate on; None: no evaluations.
        collator: makes the batches of training and evaluation; packs them if the model is set up for packing.
        reshards: whether the checkpoint to resume from has ZeRO's shards for a different number of ranks or stage.
        forgets_evaluations: whether evaluations before the checkpoint to resume from can't be compared with later ones.
        has_new_held_out: whether those evaluations were on different examples.
        scorer: generates and scores predictions in evaluations; None: evaluations measure only the loss.
        reference: the log-probabilities of preference pairs under the reference model.
        loraplus_lr_ratio: LoRA+: learning-rate ratio of B to A; None: one learning rate.
        metric_names: the metrics that evaluations are expected to have.
    """

    examples: Examples
    held_out: Examples | None
    sampler: StepSampler
    collator: Collator
    weights: TrainedWeights
    publisher: CheckpointPublisher
    reshards: bool
    forgets_evaluations: bool
    has_new_held_out: bool
    non_finite: NonFiniteGuard
    stop: StopRequest
    watch: RankWatch
    scorer: GenerationScorer | None
    objective: RunObjective
    reference: Pairs | None
    loraplus_lr_ratio: float | None
    metric_names: Sequence[str]
    evaluation: EvaluationSettings
    report: Report


class T5Trainer(Trainer):  # type: ignore[misc]
    """Trains a model on a token cache."""

    def __init__(self, model: Any, args: Any, parts: TrainerParts) -> None:
        check_overridden_methods(Trainer)
        super().__init__(
            model=model,
            args=args,
            train_dataset=ExampleDataset(parts.examples, parts.reference),
            eval_dataset=ExampleDataset(parts.held_out) if parts.held_out is not None else None,
            data_collator=parts.collator,
        )
        # compute_loss divides by the step's number of target tokens, which the Trainer then counts
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.parts = parts
        self.totals = RunTotals()
        self.metrics_log = MetricsLog(Path(args.output_dir), report=parts.report)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.register_state_dict_post_hook(drop_frozen)
        self.remove_callback(PrinterCallback)
        self.flow = TrainingFlow(self)
        self.add_callback(self.flow)
        metrics_log = self.metrics_log if self.is_world_process_zero() else None
        datasets = [] if parts.held_out is None else [name for name, _ in parts.held_out.list_datasets()]
        self.add_callback(ReportProgress(parts.report, metrics_log, datasets))
        self.add_callback(CatchUp(self.flow))
        self.accelerator.clip_grad_norm_ = partial(self._clip_and_check, self.accelerator.clip_grad_norm_)

    def get_train_dataloader(self) -> Any:
        self.accelerator.even_batches = False  # the sampler already yields the same number of batches for every rank
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.parts.sampler,
            collate_fn=CountingCollator(self.data_collator, self.parts.objective.count_items),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=ignore_signals,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.parts.watch.count_batch()
        self.totals.count(inputs.pop(NUM_TOKENS))
        inputs.pop(NUM_ITEMS, None)
        return self.parts.non_finite.record_loss(super().training_step(model, inputs, num_items_in_batch))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the mean loss over the items of the step: of all its micro-batches on all ranks."""
        total = self.parts.objective.compute_total(model, self.model.architecture, inputs)
        # the gradients are averaged over the ranks
        loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Get a step's micro-batches, and the number of items in them over all ranks.

        No batches if training is over: nothing else keeps the Trainer from a step once it has begun an epoch.
        """
        self.flow.finish_step()
        if self.control.should_training_stop:
            return [], None
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and NUM_ITEMS in batches[0]:
            count = torch.tensor(sum(batch[NUM_ITEMS] for batch in batches), device=device)
            count = self.accelerator.gather(count).sum()
        return batches, count

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count no operations: the Trainer would walk over all modules for `total_flos`, which nothing reads."""
        return 0

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer. With LoRA+, B and DoRA's magnitudes have a separate learning rate, as in PEFT."""
        with _name_setting_in_errors("optim", self.args.optim.value):
            if self.parts.loraplus_lr_ratio is None or self.optimizer is not None:
                super().create_optimizer(model)
            else:
                groups = self._make_loraplus_groups(self.parts.loraplus_lr_ratio)
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer: Any = optimizer_class(groups, **options)
        return self.optimizer

    def _make_loraplus_groups(self, ratio: float) -> list[dict[str, Any]]:
        rates = {False: self.args.learning_rate, True: self.args.learning_rate * ratio}
        decays = {True: self.args.weight_decay, False: 0.0}  # norms and biases aren't decayed
        groups: dict[tuple[bool, bool], dict[str, Any]] = {
            (is_fast, has_decay): {"params": [], "lr": rate, "weight_decay": decay}
            for is_fast, rate in rates.items()
            for has_decay, decay in decays.items()
        }
        decayed = set(self.get_decay_parameter_names(self.model))
        for name, value in self.model.named_parameters():
            if value.requires_grad:
                # ZeRO-3 replaces each parameter with a one-dimensional placeholder; `ds_shape` has its shape
                is_fast = ".lora_B." in name or len(getattr(value, "ds_shape", value.shape)) == 1
                groups[is_fast, name in decayed]["params"].append(value)
        return [group for group in groups.values() if group["params"]]

    def create_scheduler(self, *arguments: Any, **options: Any) -> Any:
        with _name_setting_in_errors("lr_scheduler_type", self.args.lr_scheduler_type.value):
            return super().create_scheduler(*arguments, **options)

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> EvalLoopOutput:
        """Measure the objective's metrics of the held-out examples, and the scores of a sample of predictions.

        The Trainer's own loop averages over batches, so its result depends on the batches. It also changes the random
        state: its data loader draws random numbers, and this loop doesn't.
        """
        parts, examples = self.parts, self.eval_dataset.examples
        batch_size, stop = parts.evaluation.per_device_eval_batch_size, parts.stop
        how = EvaluationOptions(self.data_collator, batch_size, parts.report, lambda: stop.is_set)
        values = parts.objective.evaluate(self.model, examples, how)
        labels = parts.objective.tables
        if parts.scorer is not None:
            scores, labels = parts.scorer.score(self.model, examples, batch_size, parts.report, how.is_stopped)
            values |= self._select_finite(scores, values)
        if labels and self.is_world_process_zero():
            self.metrics_log.write(self.state.global_step, {EVAL_LABELS: labels})
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(examples))

    def _select_finite(self, scores: dict[str, float], values: dict[str, float]) -> dict[str, float]:
        """Select the finite scores, and report those that aren't finite."""
        step, schedule = f"step {self.state.global_step:,}", self.args.lr_scheduler_type
        if (best := self.args.metric_for_best_model or "loss") not in values | scores:
            names = ", ".join([*values, *scores])
            raise SettingsError(f"metric_for_best_model: {best}: not among this evaluation's metrics: {names}")
        if schedule in SCHEDULES_BY_METRIC and not math.isfinite(scores.get(best, 0)):
            problem = f"{best} is {scores[best]} at {step}"
            raise SettingsError(f"lr_scheduler_type: {schedule.value} needs metric_for_best_model, but {problem}")
        finite = {name: score for name, score in scores.items() if math.isfinite(score)}
        for name in (name for name in scores if name not in finite):
            text = f"metric: the evaluation at {step} omits {name}, which is {scores[name]}"
            self.parts.report(Note(text, warning=True))
        return finite

    def get_eval_dataloader(self, eval_dataset: Any = None) -> list[Any]:
        """Return nothing: `evaluation_loop` makes its own batches."""
        return []

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens per second and peak memory to training metrics, and append the line to metrics.jsonl."""
        if "loss" in logs:
            logs |= self.parts.objective.take_metrics()
            logs["tokens_per_second"] = self.totals.measure_speed()
            logs["peak_memory_bytes"] = get_peak_memory(self.args.device)
            logs |= get_reserved_memory(self.args.device)
        if SUMMARY in logs:  # the Trainer's value covers only the steps of this process
            logs[SUMMARY] = self.compute_mean_loss() or logs[SUMMARY]
        super().log(logs, start_time)
        step = self.state.global_step
        if self.is_world_process_zero() and not (SUMMARY in logs and self.metrics_log.has_summary(step)):
            self.metrics_log.write(step, logs)

    def compute_mean_loss(self) -> float | None:
        """Return the mean loss over all steps of the run; None before the first step. Call on every rank."""
        return self._sum_losses() / self.state.global_step if self.state.global_step else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors in fp32: under DeepSpeed, the optimizer's master copies."""
        state = self.parts.weights.collect(self.model, self.model_wrapped, keeps=self.args.should_save)
        if self.args.should_save:
            with self.parts.publisher.collect_error():
                self.parts.weights.write(Path(output_dir or self.args.output_dir), state)

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the current step, if not saved yet, and tell the callbacks. Call on every rank."""
        if self.parts.publisher.last_step != self.state.global_step:
            self._save_checkpoint(self.model, None)
            self.callback_handler.on_save(self.args, self.state, self.control)

    def _clip_and_check(self, clip: Any, _parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """Clip the gradient with accelerate's `clip_grad_norm_`, and check its norm.

        The Trainer calls this in each step, also without clipping, and passes all parameters: most are frozen.
        """
        norm, step = clip(self._trained, max_norm, norm_type), self.state.global_step + 1
        return self.parts.non_finite.check(norm, step, self._trained, self._list_examples_of_step)

    def _list_examples_of_step(self) -> list[int | str]:
        """List the examples of the step that is being trained on, over all ranks, as `Cache.name_example` does."""
        sampler, step = self.parts.sampler, self.state.global_step % self.flow.steps_per_epoch
        batches = islice(iter(sampler), step * sampler.step_size, (step + 1) * sampler.step_size)
        draws = (draw for batch in batches for draw in batch if not draw.is_filler)
        return [self.parts.examples.name_example(draw.example) for draw in draws]

    # From here on, methods override or read private members of transformers' Trainer. Known to work with transformers
    # 5.18 to 5.24, so pyproject.toml has an upper bound; `check_overridden_methods` names a method that a different
    # release has renamed.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let the Trainer and DeepSpeed write their files, and publish them as a checkpoint."""
        publisher, step, write_files = self.parts.publisher, self.state.global_step, super()._save_checkpoint

        def write(staging: Path) -> None:
            folder, self.args.output_dir = self.args.output_dir, str(staging)
            try:
                write_files(model, trial)
            finally:
                self.args.output_dir = folder

        with self.totals.exclude_time():
            if publisher.last_step != step:
                tokens, seconds = self.totals.count_tokens(), self.totals.measure_seconds()
                totals = {"tokens": tokens, "loss": self._sum_losses(), "seconds": seconds}
                self.state.stateful_callbacks[TOTALS_KEY] = totals
            publisher.save(step, self.state.best_global_step, write, rotates=not self.flow.will_evaluate)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Wrap the model, create the optimizer, and load the checkpoint. DeepSpeed can't load different shards."""
        prepare, reshards = super()._prepare_for_training, self.parts.reshards
        prepared = prepare(max_steps, train_dataloader, None if reshards else resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            if reshards:
                load_resharded(self.model_wrapped, Path(resume_from_checkpoint))
                self._load_optimizer_and_scheduler(resume_from_checkpoint)  # with DeepSpeed, only the schedule
            self._apply_new_length()
        self.parts.non_finite.watch(self.model_wrapped if self.is_deepspeed_enabled else None)
        skip_module_walks(self.model, self.model_wrapped, self._trained)
        leave_empty_bias_without_gradient(self.model)
        self.totals.resume(self.state)
        return prepared

    def _apply_new_length(self) -> None:
        """Set the next step's learning rate: the loaded state has the rate for the run's previous length."""
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it under DeepSpeed
        if not isinstance(schedule, LambdaLR):
            return
        schedule._last_lr = [
            rate * compute_factor(schedule.last_epoch)
            for rate, compute_factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.parts.weights.load(Path(resume_from_checkpoint), self.model)

    def _sum_losses(self) -> float:
        # the Trainer adds _tr_loss, a loss per rank, to _total_loss_scalar only when it logs
        not_logged = self._tr_loss.detach().clone()
        if is_distributed():
            dist.all_reduce(not_logged)
            not_logged /= dist.get_world_size()
        return float(self.totals.before["loss"] + self._total_loss_scalar + float(not_logged))


@contextmanager
def _name_setting_in_errors(setting: str, value: str) -> Iterator[None]:
    """Name the setting in an error of this block: transformers lacks a package or an argument."""
    try:
        yield
    except (ImportError, TypeError, ValueError) as error:
        raise SettingsError(f"{setting}: {value}: {join_lines(error)}") from error


OVERRIDDEN_METHODS = ("get_batch_samples", "_save_checkpoint", "_load_from_checkpoint", "_prepare_for_training")


def check_overridden_methods(trainer_class: Any) -> None:
    """Check that Trainer has the methods that T5Trainer overrides: after a renaming, ours would never be called."""
    for name in OVERRIDDEN_METHODS:
        if not callable(getattr(trainer_class, name, None)):
            raise DependencyError(
                f"transformers {transformers_version}: Trainer has no method {name}, which t5tune replaces",
                hint=f"install a release that t5tune knows: {make_install_command('transformers')}",
            )
