"""Compare the values in a DeepSpeed config with the settings, which are used instead.

Files written for other tools have an optimizer and a scheduler. Their values are accepted if they are "auto" or equal
to the settings.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from t5tune.runs.plan import RunPlan

ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
"""The defaults of TrainingArguments; other values are under training_args."""
WARMUP = "scheduler.params.warmup_num_steps"
LATE_PARAMETERS = {"total_num_steps", "warmup_num_steps"}
"""Parameters that can be compared once the number of steps is known."""
ADAM_TYPES = {"adam", "adamw"}
"""Optimizers of DeepSpeed that compute the same as transformers' optimizers with `adam` in their names."""
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""Schedules of DeepSpeed -> lr_scheduler_type with the same curve."""
KNOWN_PARAMETERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "optimizer": {"torch_adam": (True, False), "adam_w_mode": (True,), "bias_correction": (True,)},
    "scheduler": {"warmup_min_lr": (0,), "warmup_type": ("linear",), "warmup_min_ratio": (0,), "cos_min_ratio": (0,)},
}
"""Parameters of a section of a DeepSpeed config that aren't settings -> values that change nothing."""


@dataclass(frozen=True)
class _Expected:
    """The expected value of a key in a DeepSpeed config.

    Args:
        setting: the name of the setting that it must agree with.
        value: the value of this setting.
        result: the value that follows from this and from other settings.
    """

    setting: str
    value: Any
    result: Any


def find_mismatches(plan: RunPlan, configuration: dict[str, Any], world_size: int, num_steps: int | None) -> list[str]:
    """List the values of the DeepSpeed config that are neither "auto" nor equal to the settings.

    Args:
        configuration: as it is written.
        num_steps: the number of steps of the run; None if it isn't known yet.
    """
    name, problems = str(plan.processes.deepspeed), []
    expected = _list_expected(plan, world_size, num_steps)
    for key, value in expected.items():
        given = _get_value(configuration, key)
        if given not in (None, "auto", value.result):
            problems.append(_describe_mismatch(name, key, given, value))
    for section, known in KNOWN_PARAMETERS.items():
        for key, given in (_get_value(configuration, f"{section}.params") or {}).items():
            is_compared = f"{section}.params.{key}" in expected or (key in LATE_PARAMETERS and num_steps is None)
            if given != "auto" and not is_compared and given not in known.get(key, ()):
                problems.append(f"deepspeed: {name}: {section}.params.{key}: {_show(given)}: isn't used; remove it")
    return problems + _find_other_optimizer(plan, configuration) + _find_other_schedule(name, configuration)


def _find_other_optimizer(plan: RunPlan, configuration: dict[str, Any]) -> list[str]:
    kind, optim = _get_value(configuration, "optimizer.type"), plan.steps.optim
    if kind is None or (str(kind).lower() in ADAM_TYPES and "adam" in optim):
        return []
    used = f"optim {optim}, learning_rate and weight_decay are used"
    return [f"deepspeed: {plan.processes.deepspeed}: optimizer: {kind}; remove `optimizer`: {used}"]


def _find_other_schedule(name: str, configuration: dict[str, Any]) -> list[str]:
    kind = _get_value(configuration, "scheduler.type")
    if kind is None or kind in SCHEDULES:
        return []
    return [f"deepspeed: {name}: scheduler: {kind}; remove `scheduler`, and choose the schedule by lr_scheduler_type"]


def describe_replaced_schedule(plan: RunPlan, configuration: dict[str, Any]) -> str | None:
    """Name the schedule that is used if the DeepSpeed config has a different one; otherwise None."""
    kind, used = _get_value(configuration, "scheduler.type"), plan.steps.lr_scheduler_type
    if kind is None or (own := SCHEDULES[kind]) == used:
        return None
    replaced = f"deepspeed: {plan.processes.deepspeed}: the scheduler {kind} is replaced by lr_scheduler_type {used}"
    return f"{replaced}; --lr-scheduler-type {own} uses the file's schedule"


def _list_expected(plan: RunPlan, world_size: int, num_steps: int | None) -> dict[str, _Expected]:
    """Map keys of a DeepSpeed config to their required values."""
    steps = plan.steps
    adam = {name: steps.training_args.get(name, default) for name, default in ADAM_DEFAULTS.items()}
    keys = {
        "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "gradient_clipping": "max_grad_norm",
        "optimizer.params.lr": "learning_rate",
        "optimizer.params.weight_decay": "weight_decay",
        "scheduler.params.warmup_max_lr": "learning_rate",
    }
    expected = {key: _Expected(name, getattr(steps, name), getattr(steps, name)) for key, name in keys.items()}
    bf16, batch_size = plan.model.precision.bf16, steps.per_device_train_batch_size
    betas, epsilon = [adam["adam_beta1"], adam["adam_beta2"]], adam["adam_epsilon"]
    expected |= {
        "bf16.enabled": _Expected("bf16", bf16, bf16),
        "train_batch_size": _Expected(
            "per_device_train_batch_size", batch_size, batch_size * steps.gradient_accumulation_steps * world_size
        ),
        "optimizer.params.betas": _Expected("training_args.adam_beta1 and adam_beta2", betas, betas),
        "optimizer.params.eps": _Expected("training_args.adam_epsilon", epsilon, epsilon),
    }
    if num_steps is not None:
        name = "num_train_epochs" if steps.max_steps is None else "max_steps"
        expected["scheduler.params.total_num_steps"] = _Expected(name, getattr(steps, name), num_steps)
    warmup = steps.warmup_steps
    if warmup >= 1 or warmup == 0:
        expected[WARMUP] = _Expected("warmup_steps", warmup, int(warmup))
    elif num_steps is not None:
        expected[WARMUP] = _Expected("warmup_steps", warmup, math.ceil(num_steps * warmup))
    return expected


def _get_value(configuration: dict[str, Any], key: str) -> Any:
    value: Any = configuration
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _describe_mismatch(config: str, key: str, given: Any, expected: _Expected) -> str:
    problem = f"{expected.setting}: {_show(expected.value)}: {config} has {key} {_show(given)}"
    if expected.result == expected.value:
        return f'{problem}; set it to "auto", or both to the same value'
    return f'{problem}, but the settings make it {_show(expected.result)}; set it to "auto"'


def _show(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else json.dumps(value)
