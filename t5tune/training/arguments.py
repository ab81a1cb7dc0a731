"""Settings -> the arguments of Hugging Face's Trainer."""

import dataclasses
from typing import Any

from t5tune.distributed.world import World
from t5tune.errors import SettingsError
from t5tune.progress import Note, Report
from t5tune.settings import TrainSettings
from t5tune.training.trackers import chosen_trackers


def training_arguments(
    settings: TrainSettings,
    deepspeed: dict[str, Any] | None,
    evaluates: bool,
    world: World,
    device: Any,
    report: Report,
) -> Any:
    """What Trainer is told, `training_args` of the settings last.

    Raises:
        SettingsError: Trainer refuses it.
    """
    from transformers import TrainingArguments

    class OneGpuArguments(TrainingArguments):  # type: ignore[misc]
        """One process trains on one GPU, however many it can see.

        TrainingArguments counts them all, and Trainer then multiplies the batch, the loss and the gradient by their
        number: through DataParallel, or through nothing at all where the model is quantized.
        """

        @property
        def n_gpu(self) -> int:
            return min(1, int(super().n_gpu))

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in fields)

    values = {
        name: getattr(settings, name)
        for name in (
            "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
            "max_grad_norm", "optim", "bf16", "seed", "dataloader_num_workers",
            "save_strategy", "save_steps", "logging_steps", "eval_steps",
        )
    }  # fmt: skip
    on_cpu = device.type == "cpu"
    if not on_cpu and settings.optim == "adamw_torch":
        values["optim"] = "adamw_torch_fused"  # a step in one kernel
    values |= {
        "output_dir": str(settings.output_dir),
        "max_steps": settings.max_steps or -1,
        "eval_strategy": settings.eval_strategy or ("steps" if settings.eval_steps else "epoch" if evaluates else "no"),
        "metric_for_best_model": best_by(settings),
        "greater_is_better": best_by(settings) not in {None, "loss", "perplexity"},
        "save_total_limit": None,  # rotation follows the seal: see training/checkpoint.py
        "tf32": _tf32(settings, device, report),
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and world.size > 1 else None,
        "ddp_timeout": settings.process_group_timeout,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": not on_cpu,
        "deepspeed": deepspeed,
        # ZeRO-3 frees a weight after its forward; only the reentrant way fetches it again when it recomputes
        checkpointing: settings.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": stage_of(deepspeed) == 3},
        "report_to": chosen_trackers(settings.report_to),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "average_tokens_across_devices": True,
        "prediction_loss_only": True,
        "log_level": "error",
        "log_level_replica": "error",
        **settings.training_args,
    }
    try:
        return OneGpuArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise SettingsError(f"training settings: {' '.join(str(error).split())}") from error


def _tf32(settings: TrainSettings, device: Any, report: Report) -> bool | None:
    """Whether a GPU multiplies fp32 in TensorFloat-32: by default where it can. None: this device has no such thing."""
    import torch

    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return settings.tf32 is not False
    if settings.tf32:
        report(Note(f"tf32: left out, this {device.type.upper()} has no TensorFloat-32"))
    return None


def best_by(settings: TrainSettings) -> str | None:
    """The figure that says which checkpoint is best; None: the last one is what counts."""
    return settings.metric_for_best_model or ("loss" if settings.early_stopping_patience else None)


def stage_of(deepspeed: dict[str, Any] | None) -> int:
    """Of ZeRO, in a DeepSpeed configuration; 0 where there is none."""
    return int((deepspeed or {}).get("zero_optimization", {}).get("stage", 0))
