"""Hugging Face's Trainer with the house's loss, checkpoints and events."""

import json
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PrinterCallback, Trainer, TrainerCallback

from t5tune.data.cache import Cache
from t5tune.errors import TrainingError
from t5tune.model.loss import IGNORED_LABEL, step_loss
from t5tune.progress import Advanced, Finished, Measured, Report, Started
from t5tune.training.batches import ExampleDataset, PaddedCollator
from t5tune.training.checkpoint import STAGED, publish
from t5tune.weights.adapter import WEIGHTS, TrainedWith, saved_name, write_adapter
from t5tune.weights.streaming import SafetensorsFile
from t5tune.weights.tensors import Tensor

TASK = "train"


class T5Trainer(Trainer):  # type: ignore[misc]
    """Trains a PEFT model on a cache.

    Args:
        trained_with: what goes into each checkpoint's adapter files beside the tensors.
        keep: number of checkpoints to keep; None: all.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        train: Cache,
        held_out: Cache | None,
        collator: PaddedCollator,
        trained_with: TrainedWith,
        keep: int | None,
        report: Report,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=ExampleDataset(train),
            eval_dataset=ExampleDataset(held_out) if held_out is not None else None,
            data_collator=collator,
            compute_loss_func=step_loss,
        )
        self.trained_with = trained_with
        self.keep = keep
        self.run_folder = Path(args.output_dir)
        self.tokens = torch.zeros((), dtype=torch.int64, device=args.device)
        self.tokens_logged = 0
        self.logged_at = time.monotonic()
        self.staging: Path | None = None
        # DeepSpeed leaves frozen weights out of a checkpoint by their first names; T5's embedding has three
        model.register_state_dict_post_hook(_drop_frozen)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Events(report))
        self.add_callback(_SaveLastStep())

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.tokens += inputs["attention_mask"].sum().to(self.tokens.device)
        self.tokens += inputs["labels"].ne(IGNORED_LABEL).sum().to(self.tokens.device)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}; no update was made",
                hint="lower the learning rate, or look at the data with --num-data; the last checkpoint is whole",
            )
        return loss

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Leave the random state as it was: a data loader draws from it, and dropout would come out otherwise."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return super().evaluate(*arguments, **options)  # type: ignore[no-any-return]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens per second to the training figures, and append the line to metrics.jsonl."""
        if "loss" in logs:
            tokens, now = self.total_tokens(), time.monotonic()
            logs["tokens_per_second"] = round((tokens - self.tokens_logged) / max(now - self.logged_at, 1e-9), 1)
            self.tokens_logged, self.logged_at = tokens, now
        super().log(logs, start_time)
        if self.is_world_process_zero():
            line = {"step": self.state.global_step, **logs}
            with open(self.run_folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def total_tokens(self) -> int:
        """Source and target tokens trained on since this process started, over all ranks."""
        if not _is_distributed():
            return int(self.tokens)
        total = self.tokens.clone()
        dist.all_reduce(total)
        return int(total)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter's files, with the fp32 values that the optimizer holds."""
        state = self.adapter_state()  # on every rank: ZeRO gathers
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_adapter(folder, state, self.trained_with, non_lora={})

    def adapter_state(self) -> dict[str, Tensor]:
        """Every trained tensor by PEFT's name, in fp32; under ZeRO the optimizer's master copy, gathered."""
        state = {}
        masters = _unsharded_masters(self.model_wrapped)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                values = masters.get(id(parameter), _master(parameter)).detach().float().cpu().numpy()
                state[saved_name(name)] = Tensor("F32", np.array(values))
        return state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Set every trained parameter to the value that `save_model` wrote."""
        file = SafetensorsFile(Path(resume_from_checkpoint) / WEIGHTS)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                values = torch.from_numpy(file.tensor(saved_name(name)).to_float32().copy())
                parameter.data.copy_(values)

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self.staging or super()._get_output_dir(trial=trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Stage, wait for every rank's success, then seal and rename (see training/checkpoint.py)."""
        step = self.state.global_step
        if (self.run_folder / f"checkpoint-{step}").exists() and self.last_saved == step:
            return
        self.staging = self.run_folder / f"{STAGED}{_agree(uuid.uuid4().hex[:8])}"
        failure: Exception | None = None
        try:
            self.staging.mkdir(exist_ok=True)
            super()._save_checkpoint(model, trial)
        except Exception as error:
            failure = error
        staging, self.staging = self.staging, None
        failed = [rank for rank, ok in enumerate(_gather(failure is None)) if not ok]
        try:
            if failed:
                reason = f": {failure}" if failure else ""
                raise TrainingError(f"checkpoint {step} could not be written by rank {failed[0]}{reason}") from failure
            if self.args.process_index == 0:
                publish(staging / f"checkpoint-{step}", self.run_folder, step, self.args.world_size, self.keep)
        finally:
            if self.args.process_index == 0:
                shutil.rmtree(staging, ignore_errors=True)
        _barrier()
        self.last_saved = step

    last_saved: int | None = None


class _SaveLastStep(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_save = True
        return control


class _Events(TrainerCallback):  # type: ignore[misc]
    """Trainer's callbacks as the house's events."""

    NAMES = {
        "loss": "loss",
        "learning_rate": "lr",
        "grad_norm": "grad norm",
        "tokens_per_second": "tokens/s",
        "eval_loss": "eval loss",
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


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _barrier() -> None:
    if _is_distributed():
        dist.barrier()


def _agree(value: str) -> str:
    """Rank 0's value, on every rank."""
    if not _is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gather(value: bool) -> list[bool]:
    if not _is_distributed():
        return [value]
    values: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return [bool(item) for item in values]
