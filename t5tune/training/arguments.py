"""Convert the plan of a run to TrainingArguments of Hugging Face's Trainer."""

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from transformers import TrainingArguments

from t5tune.distributed.world import World
from t5tune.errors import SettingsError
from t5tune.io.reasons import join_lines
from t5tune.progress import Note, Report
from t5tune.runs.checks import FIXED_ARGUMENTS, choose_trackers
from t5tune.runs.plan import RunPlan
from t5tune.settings.affects import Affects
from t5tune.settings.groups.layers import LayerSettings
from t5tune.settings.groups.run_output import RunOutputSettings
from t5tune.settings.groups.steps import SCHEDULES_BY_METRIC
from t5tune.settings.packaged_templates import get_zero_stage


class OneGpuArguments(TrainingArguments):  # type: ignore[misc]
    """Arguments for one GPU per process, however many GPUs are visible.

    TrainingArguments counts all visible GPUs, and the Trainer then multiplies batch size, loss and gradient by the
    count: it expects DataParallel to split the batch, but doesn't use DataParallel if the model is quantized.
    """

    @property
    def n_gpu(self) -> int:
        return min(1, int(super().n_gpu))


def make_training_arguments(
    plan: RunPlan, deepspeed: dict[str, Any] | None, losses: Collection[str], world: World, device: torch.device
) -> OneGpuArguments:
    """Make the Trainer's arguments. The setting `training_args` overrides all that `check_plan` allows.

    `losses` are the metrics of evaluations where lower is better; empty: no evaluations.
    """
    steps, evaluation, output = plan.steps, plan.evaluation, plan.output
    values = plan.list_affecting(Affects.TRAINER)
    if device.type != "cpu" and steps.optim == "adamw_torch":
        values["optim"] = "adamw_torch_fused"  # updates all parameters in one kernel
    when = "steps" if evaluation.eval_steps else "epoch" if losses else "no"
    metric, on_cpu = plan.best_metric, device.type == "cpu"
    values |= {
        "output_dir": str(plan.folder),
        "max_steps": steps.max_steps or -1,
        "eval_strategy": evaluation.eval_strategy or when,
        "metric_for_best_model": metric,
        "greater_is_better": metric is not None and metric not in losses,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and world.size > 1 else None,
        "ddp_timeout": plan.processes.process_group_timeout,
        "dataloader_pin_memory": not on_cpu,
        "accelerator_config": {"non_blocking": not on_cpu},  # copy a batch to the GPU without waiting for its work
        "report_to": choose_trackers(output.report_to),
        "run_name": choose_run_name(output),
        "hub_private_repo": plan.hub.hub_private_repo or None,  # trackio's Space, too
    }
    values |= {**_choose_memory_arguments(plan.model.layers, deepspeed), **FIXED_ARGUMENTS, **steps.training_args}
    try:
        arguments = OneGpuArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise SettingsError(f"training settings: {join_lines(error)}") from error
    if arguments.lr_scheduler_type in SCHEDULES_BY_METRIC:  # they expect lower values to be better
        mode = "max" if arguments.greater_is_better else "min"
        arguments.lr_scheduler_kwargs = {"mode": mode, **(arguments.lr_scheduler_kwargs or {})}
    return arguments


def _choose_memory_arguments(layers: LayerSettings, deepspeed: dict[str, Any] | None) -> dict[str, Any]:
    # transformers is renaming these arguments
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in fields)
    return {
        "deepspeed": deepspeed,
        checkpointing: layers.gradient_checkpointing,
        # ZeRO-3 frees a weight after its forward pass; only reentrant checkpointing gathers it again to recompute
        f"{checkpointing}_kwargs": {"use_reentrant": get_zero_stage(deepspeed) == 3},
    }


def choose_tf32(given: bool | None, device: torch.device, report: Report) -> bool:
    """Whether to multiply fp32 matrices in TensorFloat-32; default: if the GPU can. See `use_gpu_kernels`."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return given is not False
    if given:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        report(Note(f"tf32: ignored, since {where} has no TensorFloat-32"))
    return False


def choose_run_name(output: RunOutputSettings) -> str:
    """Return the name of a run in trackers; default: its folder's name."""
    return output.run_name or output.output_dir.resolve().name
