"""Compare the values in a DeepSpeed config with those of the settings.

transformers compares them too, but only once the model is loaded, and under other names. Without a difference here,
it finds none there.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from t5tune.settings import TrainSettings

ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
"""The defaults of TrainingArguments; other values are under training_args."""
WARMUP = "scheduler.params.warmup_num_steps"


@dataclass(frozen=True)
class _Expected:
    """What a value of a DeepSpeed config must be.

    Args:
        setting: the name of the setting that it must agree with.
        value: the value of this setting.
        result: what follows from this and from other settings.
    """

    setting: str
    value: Any
    result: Any


def find_mismatches(
    settings: TrainSettings, configuration: dict[str, Any], world_size: int, num_steps: int | None
) -> list[str]:
    """List the values of the DeepSpeed config that are neither "auto" nor those of the settings.

    Args:
        num_steps: the number of steps of the run; None if it isn't known yet.
    """
    problems = []
    for key, expected in _list_expected(settings, world_size, num_steps).items():
        given = _get_value(configuration, key)
        if key == WARMUP and given == 0:
            problem = f"deepspeed: {settings.deepspeed}: {key}: 0: DeepSpeed needs at least 1"
            problems.append(f'{problem}; set "auto" there')
        # transformers turns no warmup into one step of it
        elif given not in (None, "auto", max(1, expected.result) if key == WARMUP else expected.result):
            problems.append(_describe_mismatch(str(settings.deepspeed), key, given, expected))
    return problems


def _list_expected(settings: TrainSettings, world_size: int, num_steps: int | None) -> dict[str, _Expected]:
    """Map the keys of a DeepSpeed config that transformers compares to what they must be."""
    adam = {name: settings.training_args.get(name, default) for name, default in ADAM_DEFAULTS.items()}
    keys = {
        "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "gradient_clipping": "max_grad_norm",
        "bf16.enabled": "bf16",
        "optimizer.params.lr": "learning_rate",
        "optimizer.params.weight_decay": "weight_decay",
        "scheduler.params.warmup_max_lr": "learning_rate",
    }
    expected = {key: _Expected(name, getattr(settings, name), getattr(settings, name)) for key, name in keys.items()}
    batch_size = settings.per_device_train_batch_size
    betas, epsilon = [adam["adam_beta1"], adam["adam_beta2"]], adam["adam_epsilon"]
    expected |= {
        "train_batch_size": _Expected(
            "per_device_train_batch_size", batch_size, batch_size * settings.gradient_accumulation_steps * world_size
        ),
        "optimizer.params.betas": _Expected("training_args.adam_beta1 and adam_beta2", betas, betas),
        "optimizer.params.eps": _Expected("training_args.adam_epsilon", epsilon, epsilon),
    }
    if num_steps is not None:
        name = "num_train_epochs" if settings.max_steps is None else "max_steps"
        expected["scheduler.params.total_num_steps"] = _Expected(name, getattr(settings, name), num_steps)
    warmup = settings.warmup_steps
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
        return f'{problem}; set "auto" there, or the same value here'
    return f'{problem}, but the settings make it {_show(expected.result)}; set "auto" there'


def _show(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else json.dumps(value)
