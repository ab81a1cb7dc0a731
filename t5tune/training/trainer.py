"""Hugging Face's Trainer with our loss, batches, checkpoints, metrics and progress events."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from t5tune.checkpoints.adapter import convert_to_plain_lora, to_peft_name
from t5tune.checkpoints.safetensors import SafetensorsFile
from t5tune.checkpoints.tensors import Tensor
from t5tune.data.cache import Cache
from t5tune.data.tokenizer import Tokenizer, decode_prediction, decode_reference
from t5tune.distributed.collectives import is_distributed
from t5tune.distributed.signals import StopRequest, ignore_signals
from t5tune.errors import T5TuneError
from t5tune.metrics import score
from t5tune.model.device import get_peak_memory
from t5tune.model.loss import IGNORED_LABEL, HeadLoss
from t5tune.progress import Advanced, Finished, Measured, Report, Started
from t5tune.training.batches import BucketSampler, BudgetSampler, ExampleDataset, PackedCollator, PaddedCollator
from t5tune.training.evaluation import find_max_target_length, generate_predictions, measure_losses, select_evenly
from t5tune.training.metrics_log import MetricsLog
from t5tune.training.non_finite import NonFiniteGuard
from t5tune.training.resumable_trainer import CatchUpCallback, ResumableTrainer

TRAIN_TASK = "train"
TOTALS = "T5TuneTotals"
"""Key in the stateful_callbacks of a checkpoint's Trainer state: tokens, sum of the steps' losses, training seconds."""


@dataclass(frozen=True)
class GenerationScorer:
    """Generates predictions for some of the held-out examples and scores them.

    Args:
        answer_suffix: the text that the conversation template adds after each target; it isn't part of a prediction.
        count: number of examples.
    """

    tokenizer: Tokenizer
    answer_suffix: str
    count: int

    def score(self, model: Any, examples: Cache, batch_size: int, report: Report) -> dict[str, float]:
        """Score greedy predictions for evenly spaced examples."""
        chosen = [examples[index] for index in select_evenly(len(examples), self.count)]
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        longest = find_max_target_length(chosen)
        predictions = generate_predictions(model, chosen, eos, pad, batch_size, longest, report=report)
        targets = [decode_reference(self.tokenizer, example.target_T, self.answer_suffix) for example in chosen]
        return score([decode_prediction(self.tokenizer, ids, self.answer_suffix) for ids in predictions], targets)


class T5Trainer(ResumableTrainer):
    """Trains a PEFT model on a token cache.

    Args:
        collator: makes the batches of training and evaluation; packs them if the model is set up for packing.
        write: writes the trained tensors and their accompanying files to a checkpoint's folder.
        weights_file: name of the file in it that contains the tensors.
        subtracted: initial LoRA matrices that were subtracted from the base weights (PiSSA and OLoRA).
        loraplus_lr_ratio: LoRA+: learning-rate ratio of B to A.
        group_by_length: fill each step with examples of similar length.
        tokens_per_batch: maximum number of source and target tokens per micro-batch; None: a fixed number of examples.
        label_smoothing: probability mass spread uniformly over the vocabulary.
        run_identity: the configuration that the run depends on, for its checkpoints.
        keep: number of checkpoints to keep in addition to the best one; None: all.
        scorer: generates and scores predictions in evaluations; None: evaluations measure only the loss.
        patience: number of evaluations without improvement after which training stops; None: never.
        stop: request to stop, set by a signal.
        non_finite: handles steps with a non-finite loss or gradient.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        train: Cache,
        held_out: Cache | None,
        collator: PaddedCollator | PackedCollator,
        write: Callable[[Path, dict[str, Tensor]], None],
        weights_file: str,
        subtracted: dict[str, Tensor],
        loraplus_lr_ratio: float | None,
        group_by_length: bool,
        tokens_per_batch: int | None,
        label_smoothing: float,
        run_identity: dict[str, Any],
        keep: int | None,
        scorer: GenerationScorer | None,
        patience: int | None,
        stop: StopRequest,
        non_finite: NonFiniteGuard,
        report: Report,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=ExampleDataset(train),
            eval_dataset=ExampleDataset(held_out) if held_out is not None else None,
            data_collator=collator,
            compute_loss_func=_compute_mean_over_step,
        )
        self.write = write
        self.weights_file = weights_file
        self.subtracted = subtracted
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.head_loss = HeadLoss(model, label_smoothing)
        self.train_sampler = self._make_sampler(train, group_by_length, tokens_per_batch)
        self.run_identity = run_identity
        self.keep = keep
        self.scorer = scorer
        self.patience = patience
        self.stop = stop
        self.non_finite = non_finite
        self.report = report
        self.run_folder = Path(args.output_dir)
        self.metrics_log = MetricsLog(self.run_folder, report=report)
        self.tokens = torch.zeros((), dtype=torch.int64, device=args.device)
        self.first_step_at: float | None = None
        self.seconds_outside_training = 0.0  # spent in evaluations and saves
        self.last_logged = (0, 0.0)  # tokens and seconds at the last line of metrics
        self.totals_before = {"tokens": 0, "loss": 0.0, "seconds": 0.0}  # of the run, when this process resumed it
        # DeepSpeed leaves frozen weights out of a checkpoint only under their first names; T5's embedding has three
        model.register_state_dict_post_hook(_drop_frozen)
        self._replace_callbacks(report)

    def _replace_callbacks(self, report: Report) -> None:
        self.remove_callback(PrinterCallback)
        self.add_callback(_ReportEvents(report))
        if self.is_world_process_zero():
            self.add_callback(_WriteHeartbeats(self.metrics_log))
        self.add_callback(_SetSamplerEpoch(self.train_sampler))
        self.add_callback(CatchUpCallback(self))  # the last one: see there

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self.first_step_at is None:
            self.first_step_at = time.monotonic()
        is_packed = "packing" in inputs
        targets = inputs["labels"].ne(IGNORED_LABEL).sum()
        sources = inputs["input_ids"].numel() if is_packed else inputs["attention_mask"].sum()
        self.tokens += (targets + sources) * targets.ne(0)  # a filler, which has no targets, isn't counted
        loss: torch.Tensor = self.record_step_loss(super().training_step(model, inputs, num_items_in_batch))
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """Compute the loss as the Trainer does, except that the head returns its sum (see model/loss.py)."""
        with self.head_loss.replace_logits_with_sum(inputs["labels"]):
            return super().compute_loss(model, inputs, *arguments, **options)

    def _make_sampler(
        self, cache: Cache, group_by_length: bool, tokens_per_batch: int | None
    ) -> BucketSampler | BudgetSampler:
        args = self.args
        sources, targets = cache.read_lengths()
        batches = args.gradient_accumulation_steps * args.world_size
        if tokens_per_batch is not None:
            is_packed = isinstance(self.data_collator, PackedCollator)
            return BudgetSampler(sources, targets, tokens_per_batch, is_packed, batches, args.seed)
        lengths = sources + targets if group_by_length else np.zeros_like(sources)
        return BucketSampler(lengths, args.train_batch_size, batches, args.seed)

    def get_train_dataloader(self) -> Any:
        """Make the data loader of our sampler's batches."""
        self.accelerator.even_batches = False  # the sampler already yields the same number of batches for every rank
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.train_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=ignore_signals,
        )
        return self.accelerator.prepare(loader)

    def list_examples_of_step(self, epoch: int, step: int) -> list[int]:
        """List the indices in the cache of the examples in an epoch's step (from 0), over all ranks."""
        batches, size = iter(self.train_sampler), self.train_sampler.step_size
        mine = islice(batches, step * size, (step + 1) * size)
        return [self.train_dataset.cache.index_in_whole_cache(index) for batch in mine for index in batch if index >= 0]

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> EvalLoopOutput:
        """Measure the loss per target token of the held-out examples, and the scores of a sample of predictions.

        The Trainer's own loop averages over batches, which depends on how the examples are batched, and it changes
        the random state, because its data loader draws from it. This loop draws no random numbers.
        """
        examples, batch_size = self.eval_dataset.cache, self.args.per_device_eval_batch_size
        report = self.stop_evaluation_on_request
        loss = measure_losses(self.model, self.head_loss, examples, self.data_collator, batch_size, report).mean
        values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # exp of more than 709 overflows
        if self.scorer is not None:
            values |= self.scorer.score(self.model, examples, batch_size, report)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(examples))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> list[Any]:
        """Return nothing: `evaluation_loop` makes its own batches."""
        return []

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Request a save if this is the best checkpoint so far, and a stop if there was no improvement for too long."""
        if (name := self.args.metric_for_best_model) is None or not metrics:
            return False
        name = f"eval_{name.removeprefix('eval_')}"
        history = {line["step"]: line for line in self.state.log_history if "eval_loss" in line}
        best = history.get(self.state.best_global_step)
        is_best = math.isfinite(metrics["eval_loss"]) and (best is None or self._is_better(metrics, best, name))
        if is_best:
            self.state.best_metric, self.state.best_global_step = metrics[name], self.state.global_step
        since = sum(step > (self.state.best_global_step or 0) for step in history)
        is_over = self.patience is not None and since >= self.patience
        self.control.should_training_stop |= is_over
        self.control.should_save |= (is_best or is_over) and self.last_saved != self.state.global_step
        return is_best

    def _is_better(self, metrics: dict[str, float], best: dict[str, float], name: str) -> bool:
        """Compare the metric `name` of two evaluations; of equal ones, the one with the lower loss is better."""
        sign = 1 if self.args.greater_is_better else -1
        return (sign * metrics[name], -metrics["eval_loss"]) > (sign * best[name], -best["eval_loss"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens per second and peak memory to training metrics, and append the line to metrics.jsonl."""
        if "loss" in logs:
            tokens, seconds = self.count_tokens(), self.measure_training_seconds()
            logs["tokens_per_second"] = round(
                (tokens - self.last_logged[0]) / max(seconds - self.last_logged[1], 1e-9), 1
            )
            self.last_logged = (tokens, seconds)
            logs["peak_memory_bytes"] = get_peak_memory(self.args.device)
        if "train_loss" in logs:  # the Trainer's value covers only the steps of this process
            logs["train_loss"] = self.compute_mean_loss() or logs["train_loss"]
        super().log(logs, start_time)
        if self.is_world_process_zero():
            self.metrics_log.write(self.state.global_step, logs)

    def measure_training_seconds(self) -> float:
        """Measure the run's training time since the first step, of all its processes, without evaluations and saves."""
        before = float(self.totals_before["seconds"])
        if self.first_step_at is None:
            return before
        return before + (time.monotonic() - self.first_step_at - self.seconds_outside_training)

    @contextmanager
    def _exclude_from_training_time(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            if self.first_step_at is not None:  # a resumed run may evaluate before its first step
                self.seconds_outside_training += time.monotonic() - started

    def _evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        with self._exclude_from_training_time():
            return super()._evaluate(*arguments, **options)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._exclude_from_training_time():
            if self.last_saved != self.state.global_step:
                self.state.stateful_callbacks[TOTALS] = self._collect_totals()
            super()._save_checkpoint(model, trial)

    def _collect_totals(self) -> dict[str, float]:
        """Return the totals that a run which resumes from here continues with. Call on every rank."""
        # the Trainer adds _tr_loss, a loss per rank, to _total_loss_scalar only when it logs
        not_logged = self._tr_loss.detach().clone()
        if is_distributed():
            dist.all_reduce(not_logged)
            not_logged /= dist.get_world_size()
        return {
            "tokens": self.count_tokens(),
            "loss": self.totals_before["loss"] + self._total_loss_scalar + float(not_logged),
            "seconds": self.measure_training_seconds(),
        }

    def on_resumed(self) -> None:
        """Continue from the totals at the time when the checkpoint was saved."""
        self.totals_before = {**self.totals_before, **self.state.stateful_callbacks.get(TOTALS, {})}
        self.last_logged = (self.count_tokens(), self.measure_training_seconds())

    def compute_mean_loss(self) -> float | None:
        """Return the mean loss over all steps of the run; None before the first one. Call on every rank."""
        return self._collect_totals()["loss"] / self.state.global_step if self.state.global_step else None

    def count_tokens(self) -> int:
        """Count the source and target tokens that the run has trained on, over all ranks. Call on every rank."""
        total = self.tokens.clone()
        if is_distributed():
            dist.all_reduce(total)
        return int(self.totals_before["tokens"]) + int(total)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors in fp32: under DeepSpeed, the optimizer's master copies."""
        state = self.collect_trained_state()  # on every rank, because ZeRO gathers
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.write(folder, convert_to_plain_lora(state, self.subtracted))
            except (OSError, T5TuneError) as error:
                self.failures.append(error)

    def collect_trained_state(self) -> dict[str, Tensor]:
        """Return every trained tensor by its saved name, in fp32. Under ZeRO, gather the optimizer's master copies."""
        state = {}
        masters = _map_stage_0_masters(self.model_wrapped)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                values = masters.get(id(parameter), _gather_fp32_master(parameter)).detach().float().cpu().numpy()
                state[to_peft_name(name)] = Tensor("F32", np.array(values))
        return state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Set every trained parameter to the values that `save_model` wrote."""
        file = SafetensorsFile(Path(resume_from_checkpoint) / self.weights_file)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                values = torch.from_numpy(file.get_tensor(to_peft_name(name)).to_float32().copy())
                # with PiSSA and OLoRA, the saved matrices have the subtracted ones appended: take only the first part
                parameter.data.copy_(values[tuple(slice(size) for size in parameter.shape)])

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer. With LoRA+, the B matrices and DoRA's magnitudes have their own learning rate.

        The magnitudes are in that group in PEFT too.
        """
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer: Any = optimizer_class(self._make_parameter_groups(self.loraplus_lr_ratio), **options)
        return self.optimizer

    def _make_parameter_groups(self, ratio: float) -> list[dict[str, Any]]:
        named = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        # ZeRO-3 replaces each parameter with a one-dimensional placeholder; `ds_shape` has its shape
        is_fast = {
            name: ".lora_B." in name or len(getattr(value, "ds_shape", value.shape)) == 1 for name, value in named
        }
        slow = [value for name, value in named if not is_fast[name]]
        fast = [value for name, value in named if is_fast[name]]
        learning_rate, decay = self.args.learning_rate, self.args.weight_decay
        return [
            {"params": slow, "lr": learning_rate, "weight_decay": decay},
            {"params": fast, "lr": learning_rate * ratio, "weight_decay": decay},
        ]


class _WriteHeartbeats(TrainerCallback):  # type: ignore[misc]
    """Writes heartbeats to metrics.jsonl while nothing else is logged."""

    def __init__(self, metrics_log: MetricsLog) -> None:
        self.metrics_log = metrics_log

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.metrics_log.write_heartbeat(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.metrics_log.write_heartbeat(state.global_step)


class _SetSamplerEpoch(TrainerCallback):  # type: ignore[misc]
    """Sets the sampler's epoch, which the Trainer fails to do when it resumes on several ranks.

    accelerate then wraps the sampler in more layers than the Trainer looks through.
    """

    def __init__(self, sampler: BucketSampler | BudgetSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class _ReportEvents(TrainerCallback):  # type: ignore[misc]
    """Reports progress events."""

    NAMES = {
        "loss": "loss",
        "learning_rate": "lr",
        "grad_norm": "grad norm",
        "tokens_per_second": "tokens/s",
        "eval_loss": "eval loss",
        "eval_exact_match": "exact match",
        "eval_rougeL": "rougeL",
    }

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(Started(TRAIN_TASK, state.max_steps, "steps"))
        self.report(Advanced(TRAIN_TASK, state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(Advanced(TRAIN_TASK, state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        values = {self.NAMES[name]: float(value) for name, value in logs.items() if name in self.NAMES}
        if values:
            self.report(Measured(TRAIN_TASK, state.global_step, values))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(Finished(TRAIN_TASK))


def _compute_mean_over_step(outputs: Any, _labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """Divide the head's sum by the step's number of target tokens: of all its micro-batches on all ranks."""
    return outputs["logits"] / num_items_in_batch  # type: ignore[no-any-return]


def _gather_fp32_master(parameter: Any) -> torch.Tensor:
    """Gather the fp32 master copy that DeepSpeed's optimizer updates; without DeepSpeed, return the parameter."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        values = safe_get_full_fp32_param(parameter)
        if values is not None:
            return values.reshape(getattr(parameter, "ds_shape", parameter.shape))  # type: ignore[no-any-return]
    return parameter  # type: ignore[no-any-return]


def _map_stage_0_masters(engine: Any) -> dict[int, torch.Tensor]:
    """Map the id of each bf16 parameter to its fp32 master copy, for stage 0, where DeepSpeed keeps these in lists."""
    optimizer = getattr(engine, "optimizer", None)
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    return {
        id(parameter): master
        for parameters, masters in groups
        for parameter, master in zip(parameters, masters, strict=True)
    }


def _drop_frozen(model: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Remove frozen weights from a state dict, under all of their names (a state-dict hook of torch)."""
    trained = {name for name, value in model.named_parameters(remove_duplicate=False) if value.requires_grad}
    for name in list(state):
        if name.startswith(prefix) and name.removeprefix(prefix) not in trained:
            del state[name]
