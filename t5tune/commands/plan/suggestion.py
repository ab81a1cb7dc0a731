"""Settings that would fit on the machine of a planned run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from t5tune.commands.plan.example_lengths import ExampleLengths
from t5tune.planning.layer_memory import BatchLengths
from t5tune.planning.run_memory import USABLE_GPU_SHARE, Machine, MemoryEstimator, StageMemory
from t5tune.settings import PlanSettings, TrainSettings
from t5tune.settings.groups.memory import MemorySettings
from t5tune.settings.messages import get_reason

MAX_SUGGESTED_BATCH_SIZE = 64
MAX_NONLINEARITY = 0.1  # maximum relative change of the growth per example for memory to count as linear
GOOD_BATCH_SIZE = 4  # examples per micro-batch that use a GPU well


@dataclass(frozen=True)
class Suggestion:
    """Settings that fit, their largest batch size, and the total bytes per device."""

    flags: str
    per_device_train_batch_size: int
    total: int


def suggest_settings(
    settings: PlanSettings, asked: MemoryEstimator, data: ExampleLengths, step_done: Callable[[int], None]
) -> Suggestion | None:
    """Return the fastest settings that fit GOOD_BATCH_SIZE examples, else those that fit the most; None: nothing fits.

    Every example is assumed to be as long as the longest.

    Args:
        asked: the estimator for the user's settings.
    """
    machine = asked.machine
    if machine.memory is None:
        return None
    best: Suggestion | None = None
    for changes in _list_candidates(settings, machine):
        candidate = settings.model_copy(update=changes)
        if find_refusals(candidate):
            continue
        part, estimator = candidate.select_part(MemorySettings), asked
        if part != asked.settings:
            estimator = MemoryEstimator(asked.architecture, part, machine, asked.num_token_rows, step_done)
        found = _find_largest_batch_size(estimator, candidate.deepspeed or "none", data)
        if found is not None and (best is None or found[0] > best.per_device_train_batch_size):
            flags = _format_flags(settings, {**changes, "per_device_train_batch_size": found[0]}, machine)
            best = Suggestion(flags, *found)
        if best is not None and best.per_device_train_batch_size >= GOOD_BATCH_SIZE:
            break
    return best


def _list_candidates(settings: PlanSettings, machine: Machine) -> list[dict[str, Any]]:
    """List changes of the settings, from the fastest to those that need the least memory; `train` may refuse some."""
    base: dict[str, Any] = {
        # train refuses bf16 on a GPU that only emulates it
        "bf16": machine.has_bf16 or (settings.bf16 and not machine.on_gpu),
        "gradient_checkpointing": False,
        "q_lora": False,
        "deepspeed": None,
        "tokens_per_batch": None,
    }
    light = {**base, "gradient_checkpointing": True}
    candidates = [base, light]
    if machine.count > 1 and machine.on_gpu:
        stages = ("zero2", "zero3") if settings.train_mode == "full" else ("zero3",)
        candidates += [{**light, "deepspeed": stage} for stage in stages]
    if settings.train_mode == "lora":
        candidates.append({**light, "q_lora": True})
    if machine.on_gpu:
        candidates.append({**light, "deepspeed": "zero3-offload"})
    return candidates


def find_refusals(settings: PlanSettings) -> list[str]:
    given = {name: value for name, value in settings if name in TrainSettings.model_fields}
    try:
        TrainSettings.model_validate({**given, "data": None, "data_path": ["-"], "output_dir": "-"})
    except ValidationError as error:
        return [get_reason(detail) for detail in error.errors()]
    return []


def _find_largest_batch_size(estimator: MemoryEstimator, stage: str, data: ExampleLengths) -> tuple[int, int] | None:
    """Find the largest batch size, a power of two, that fits if every example is as long as the longest.

    Returns:
        (examples per batch, bytes per device), or None if a single example doesn't fit.
    """
    longest = int(data.sources.max()), int(data.targets.max())

    def estimate(size: int) -> StageMemory:
        return estimator.estimate(stage, BatchLengths((longest[0],) * size, (longest[1],) * size))

    if not estimator.can_fit(stage) or not (first := estimate(1)).fits:
        return None
    limit = (estimator.machine.memory or 0) * (USABLE_GPU_SHARE if estimator.machine.on_gpu else 1.0)
    size, total, each, is_linear = 1, first.total, 0.0, False
    # Memory is linear in the number of examples once the batch sets the peak. With a small batch, something else may
    # set it, such as the gradient of a large embedding. Estimating a large batch takes minutes, so extrapolate.
    while size < MAX_SUGGESTED_BATCH_SIZE:
        if is_linear:
            larger, fits = total + int(size * each), total + size * each <= limit
        else:
            found = estimate(2 * size)
            larger, fits = found.total, found.fits is not False
            growth = (larger - total) / size
            is_linear, each = growth > 0 and abs(growth - each) <= MAX_NONLINEARITY * growth, growth
        if not fits:
            break
        size, total = 2 * size, larger
    return size, total


def _format_flags(settings: PlanSettings, changes: dict[str, Any], machine: Machine) -> str:
    """Format the flags that change the settings, including flags that turn something off."""
    if machine.count > 1:
        changes = {**changes, "num_gpus" if machine.on_gpu else "num_processes": machine.count}
    # q_lora turns bf16 on unless --no-bf16 is given
    is_shown = {"bf16"} if changes["q_lora"] else set()
    shown = {n: v for n, v in changes.items() if v or v != getattr(settings, n) or n in is_shown}
    return " ".join(_format_flag(name, value) for name, value in shown.items())


def _format_flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {'none' if value is None else value}"
