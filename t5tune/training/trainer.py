"""Hugging Face's Trainer with the house's loss, checkpoints and events."""

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

from t5tune.checkpoints.adapter import saved_name, without_start
from t5tune.checkpoints.safetensors import SafetensorsFile
from t5tune.checkpoints.tensors import Tensor
from t5tune.data.cache import Cache
from t5tune.data.tokenizer import Tokenizer, answer_text, true_text
from t5tune.distributed.collectives import is_distributed
from t5tune.distributed.signals import StopRequest, outlast_signals
from t5tune.errors import T5TuneError
from t5tune.metrics import score
from t5tune.model.device import peak_memory
from t5tune.model.loss import IGNORED_LABEL, HeadLoss
from t5tune.progress import Advanced, Finished, Measured, Report, Started
from t5tune.training.batches import BucketSampler, BudgetSampler, ExampleDataset, PackedCollator, PaddedCollator
from t5tune.training.evaluation import generate_replies, longest_target, measure_losses, spread
from t5tune.training.metrics_log import Journal
from t5tune.training.non_finite import NonFiniteSteps
from t5tune.training.resumable_trainer import Begin, SealingTrainer

TASK = "train"
TOTALS = "T5TuneTotals"
"""Among Trainer's stateful_callbacks of a checkpoint: tokens, summed loss of the steps, and seconds of training."""


@dataclass(frozen=True)
class Answers:
    """How evaluation generates: answers to `count` of the examples, without what the layout puts behind them."""

    tokenizer: Tokenizer
    answer_end: str
    count: int

    def score(self, model: Any, examples: Cache, batch_size: int, report: Report) -> dict[str, float]:
        """Scores of greedy answers to evenly spread examples."""
        chosen = [examples[index] for index in spread(len(examples), self.count)]
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        longest = longest_target(chosen)
        replies = generate_replies(model, chosen, eos, pad, batch_size, longest, report=report)
        targets = [true_text(self.tokenizer, example.target_T, self.answer_end) for example in chosen]
        return score([answer_text(self.tokenizer, reply, self.answer_end) for reply in replies], targets)


class T5Trainer(SealingTrainer):
    """Trains a PEFT model on a cache.

    Args:
        write: puts the trained tensors, and what belongs to them, into a checkpoint's folder.
        weights_file: the file in it that `write` puts the tensors into.
        taken_out: LoRA matrices that were taken out of the base's weights (see weights.adapter.without_start).
        loraplus_lr_ratio: learning rate of the B matrices over that of the others.
        collator: of the batches of training and evaluation, packed where the model packs.
        group_by_length: fill each step with examples of about the same length.
        tokens_per_batch: source and target tokens of a micro-batch; None: a fixed number of examples.
        label_smoothing: share of the target's probability that goes to all words alike.
        made_of: what the run is made of, for its checkpoints' seals.
        keep: number of checkpoints to keep beside the best; None: all.
        answers: how evaluation generates; None: it measures the loss alone.
        patience: evaluations without a better figure after which training stops; None: it goes on.
        stop: what signals asked of this process.
        non_finite: what is done about a loss or gradient that is no finite number.
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
        taken_out: dict[str, Tensor],
        loraplus_lr_ratio: float | None,
        group_by_length: bool,
        tokens_per_batch: int | None,
        label_smoothing: float,
        made_of: dict[str, Any],
        keep: int | None,
        answers: Answers | None,
        patience: int | None,
        stop: StopRequest,
        non_finite: NonFiniteSteps,
        report: Report,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=ExampleDataset(train),
            eval_dataset=ExampleDataset(held_out) if held_out is not None else None,
            data_collator=collator,
            compute_loss_func=_over_the_step,
        )
        self.write = write
        self.weights_file = weights_file
        self.taken_out = taken_out
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.head_loss = HeadLoss(model, label_smoothing)
        self.train_sampler = self._sampler(train, group_by_length, tokens_per_batch)
        self.made_of = made_of
        self.keep = keep
        self.answers = answers
        self.patience = patience
        self.stop = stop
        self.non_finite = non_finite
        self.report = report
        self.run_folder = Path(args.output_dir)
        self.journal = Journal(self.run_folder, report=report)
        self.tokens = torch.zeros((), dtype=torch.int64, device=args.device)
        self.first_step_at: float | None = None
        self.seconds_beside = 0.0  # since then, in evaluations and saves
        self.logged = (0, 0.0)  # tokens and seconds
        self.before = {"tokens": 0, "loss": 0.0, "seconds": 0.0}  # of the run, until this process resumed it
        # DeepSpeed leaves frozen weights out of a checkpoint by their first names; T5's embedding has three
        model.register_state_dict_post_hook(_drop_frozen)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Events(report))
        if self.is_world_process_zero():
            self.add_callback(_Heartbeat(self.journal))
        self.add_callback(_EpochOf(self.train_sampler))
        self.add_callback(Begin(self))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self.first_step_at is None:
            self.first_step_at = time.monotonic()
        is_packed = "packing" in inputs
        targets = inputs["labels"].ne(IGNORED_LABEL).sum()
        sources = inputs["input_ids"].numel() if is_packed else inputs["attention_mask"].sum()
        self.tokens += (targets + sources) * targets.ne(0)  # what only fills a batch counts for nothing
        loss: torch.Tensor = self.watched(super().training_step(model, inputs, num_items_in_batch))
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """Trainer's, the head giving the sum over this micro-batch (see model/loss.py)."""
        with self.head_loss.of(inputs["labels"]):
            return super().compute_loss(model, inputs, *arguments, **options)

    def _sampler(
        self, cache: Cache, group_by_length: bool, tokens_per_batch: int | None
    ) -> BucketSampler | BudgetSampler:
        args = self.args
        sources, targets = cache.lengths()
        batches = args.gradient_accumulation_steps * args.world_size
        if tokens_per_batch is not None:
            is_packed = isinstance(self.data_collator, PackedCollator)
            return BudgetSampler(sources, targets, tokens_per_batch, is_packed, batches, args.seed)
        lengths = sources + targets if group_by_length else np.zeros_like(sources)
        return BucketSampler(lengths, args.train_batch_size, batches, args.seed)

    def get_train_dataloader(self) -> Any:
        """The sampler's own batches."""
        self.accelerator.even_batches = False  # every rank gets as many from the sampler
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.train_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=outlast_signals,
        )
        return self.accelerator.prepare(loader)

    def examples_of_step(self, epoch: int, step: int) -> list[int]:
        """The numbers in the cache of the examples of an epoch's step (from 0), over all ranks."""
        batches, size = iter(self.train_sampler), self.train_sampler.step_size
        mine = islice(batches, step * size, (step + 1) * size)
        return [self.train_dataset.cache.number(index) for batch in mine for index in batch if index >= 0]

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> EvalLoopOutput:
        """The loss per target token of the held-out examples, and the scores of a sample of answers.

        Trainer's own loop takes means of batches, which depend on how examples fall into them, and leaves the
        random state changed: its data loader draws from it. This one draws nothing.
        """
        examples, batch_size = self.eval_dataset.cache, self.args.per_device_eval_batch_size
        report = self.end_evaluation_when_asked
        loss = measure_losses(self.model, self.head_loss, examples, self.data_collator, batch_size, report).mean
        figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.answers is not None:
            figures |= self.answers.score(self.model, examples, batch_size, report)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(examples))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> list[Any]:
        """None is needed: see `evaluation_loop`."""
        return []

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save what is best so far (of equals the one of lower loss); stop where nothing better has come for long."""
        if (name := self.args.metric_for_best_model) is None or not metrics:
            return False
        name = f"eval_{name.removeprefix('eval_')}"
        sign = 1 if self.args.greater_is_better else -1
        history = {line["step"]: line for line in self.state.log_history if "eval_loss" in line}
        best = history.get(self.state.best_global_step)

        def rank(line: dict[str, float]) -> tuple[float, float]:
            return sign * line[name], -line["eval_loss"]

        is_best = math.isfinite(metrics["eval_loss"]) and (best is None or rank(metrics) > rank(best))
        if is_best:
            self.state.best_metric, self.state.best_global_step = metrics[name], self.state.global_step
        since = sum(step > (self.state.best_global_step or 0) for step in history)
        is_over = self.patience is not None and since >= self.patience
        self.control.should_training_stop |= is_over
        self.control.should_save |= (is_best or is_over) and self.last_saved != self.state.global_step
        return is_best

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens per second and memory to the training figures, and append the line to metrics.jsonl."""
        if "loss" in logs:
            tokens, seconds = self.total_tokens(), self.seconds_training()
            logs["tokens_per_second"] = round((tokens - self.logged[0]) / max(seconds - self.logged[1], 1e-9), 1)
            self.logged = (tokens, seconds)
            logs["peak_memory_bytes"] = peak_memory(self.args.device)
        if "train_loss" in logs:  # Trainer's covers the steps of this process alone
            logs["train_loss"] = self.mean_loss() or logs["train_loss"]
        super().log(logs, start_time)
        if self.is_world_process_zero():
            self.journal.write(self.state.global_step, logs)

    def seconds_training(self) -> float:
        """Of the run, from each process's first step on, without evaluations and saves."""
        here = time.monotonic() - self.first_step_at - self.seconds_beside if self.first_step_at is not None else 0.0
        return float(self.before["seconds"]) + here

    @contextmanager
    def _beside_training(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds_beside += time.monotonic() - started

    def _evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        with self._beside_training():
            return super()._evaluate(*arguments, **options)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._beside_training():
            if self.last_saved != self.state.global_step:
                self.state.stateful_callbacks[TOTALS] = self._totals()
            super()._save_checkpoint(model, trial)

    def _totals(self) -> dict[str, float]:
        """What a run that resumes from here has to add to. Every rank calls this."""
        not_logged = self._tr_loss.detach().clone()
        if is_distributed():
            dist.all_reduce(not_logged)
            not_logged /= dist.get_world_size()
        return {
            "tokens": self.total_tokens(),
            "loss": self.before["loss"] + self._total_loss_scalar + float(not_logged),
            "seconds": self.seconds_training(),
        }

    def on_resumed(self) -> None:
        """Continue from what the run had counted when the checkpoint was saved."""
        self.before = {**self.before, **self.state.stateful_callbacks.get(TOTALS, {})}
        self.logged = (self.total_tokens(), self.seconds_training())

    def mean_loss(self) -> float | None:
        """The loss per target token, over all steps of the run; None before the first."""
        return self._totals()["loss"] / self.state.global_step if self.state.global_step else None

    def total_tokens(self) -> int:
        """Source and target tokens that the run has trained on, over all ranks. Every rank calls this."""
        total = self.tokens.clone()
        if is_distributed():
            dist.all_reduce(total)
        return int(self.before["tokens"]) + int(total)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors with the fp32 values that the optimizer holds."""
        state = self.trained_state()  # on every rank: ZeRO gathers
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.write(folder, without_start(state, self.taken_out))
            except (OSError, T5TuneError) as error:
                self.failures.append(error)

    def trained_state(self) -> dict[str, Tensor]:
        """Every trained tensor by its saved name, in fp32; under ZeRO the optimizer's master copy, gathered."""
        state = {}
        masters = _unsharded_masters(self.model_wrapped)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                values = masters.get(id(parameter), _master(parameter)).detach().float().cpu().numpy()
                state[saved_name(name)] = Tensor("F32", np.array(values))
        return state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Set every trained parameter to the value that `save_model` wrote."""
        file = SafetensorsFile(Path(resume_from_checkpoint) / self.weights_file)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                values = torch.from_numpy(file.tensor(saved_name(name)).to_float32().copy())
                # the matrices of PiSSA and OLoRA have what was taken out of the base behind them
                parameter.data.copy_(values[tuple(slice(size) for size in parameter.shape)])

    def create_optimizer(self, model: Any = None) -> Any:
        """With LoRA+ the B matrices, and DoRA's norms as in PEFT's, learn at their own rate."""
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        named = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        # ZeRO-3 leaves a one-dimensional placeholder in each parameter, and the shape in `ds_shape`
        is_fast = {
            name: ".lora_B." in name or len(getattr(value, "ds_shape", value.shape)) == 1 for name, value in named
        }
        rate, decay = self.args.learning_rate, self.args.weight_decay
        groups = [
            {"params": [value for name, value in named if not is_fast[name]], "lr": rate, "weight_decay": decay},
            {
                "params": [value for name, value in named if is_fast[name]],
                "lr": rate * self.loraplus_lr_ratio,
                "weight_decay": decay,
            },
        ]
        self.optimizer: Any = optimizer_class(groups, **options)
        return self.optimizer


class _Heartbeat(TrainerCallback):  # type: ignore[misc]
    """A sign of life in metrics.jsonl where steps are slow."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.journal.beat(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.journal.beat(state.global_step)


class _EpochOf(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler its epoch. Trainer doesn't where it resumes on several ranks: accelerate wraps it too often."""

    def __init__(self, sampler: BucketSampler | BudgetSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class _Events(TrainerCallback):  # type: ignore[misc]
    """Trainer's callbacks as the house's events."""

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
        self.report(Started(TASK, state.max_steps, "steps"))
        self.report(Advanced(TASK, state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(Advanced(TASK, state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        values = {self.NAMES[name]: float(value) for name, value in logs.items() if name in self.NAMES}
        if values:
            self.report(Measured(TASK, state.global_step, values))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(Finished(TASK))


def _over_the_step(outputs: Any, _labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """The head's sum over the number of target tokens of the step: all its micro-batches on all ranks."""
    return outputs["logits"] / num_items_in_batch  # type: ignore[no-any-return]


def _master(parameter: Any) -> torch.Tensor:
    """The fp32 copy that DeepSpeed steps, whole on every rank; without DeepSpeed the parameter itself."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        values = safe_get_full_fp32_param(parameter)
        if values is not None:
            return values.reshape(getattr(parameter, "ds_shape", parameter.shape))  # type: ignore[no-any-return]
    return parameter  # type: ignore[no-any-return]


def _unsharded_masters(engine: Any) -> dict[int, torch.Tensor]:
    """id of a bf16 parameter -> its fp32 copy, in DeepSpeed's stage 0, which keeps them in lists of its own."""
    optimizer = getattr(engine, "optimizer", None)
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    return {
        id(parameter): master
        for parameters, masters in groups
        for parameter, master in zip(parameters, masters, strict=True)
    }


def _drop_frozen(model: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    trained = {name for name, value in model.named_parameters(remove_duplicate=False) if value.requires_grad}
    for name in list(state):
        if name.startswith(prefix) and name.removeprefix(prefix) not in trained:
            del state[name]
