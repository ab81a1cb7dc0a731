"""`t5tune plan`: estimate a training run's memory, steps and time before it starts.

    result = plan(PlanSettings(model_name_or_path="google/flan-t5-xxl", q_lora=True, gpu_memory="24GiB"))
    result.stages[0].total, result.suggestion

planning/run_memory.py estimates the memory, and planning/run_time.py the time, from steps that were timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from pydantic import ValidationError

from t5tune.checkpoints.base import find_base, read_config
from t5tune.commands.plan.example_lengths import (
    ExampleLengths,
    compute_padding,
    find_largest_batch,
    find_largest_loss_batch,
    make_batches,
    read_lengths,
)
from t5tune.commands.plan.timing import estimate_time
from t5tune.commands.train.run_plan import list_values_of_caches, resolve_training_data
from t5tune.errors import SettingsError, T5TuneError
from t5tune.families import find_family
from t5tune.families.encoder import make_encoder
from t5tune.model.device import has_bf16
from t5tune.planning.known_configs import KNOWN_CONFIGS, KNOWN_ENCODERS
from t5tune.planning.layer_memory import BatchLengths
from t5tune.planning.run_memory import USABLE_GPU_SHARE, Machine, MemoryEstimator, StageMemory
from t5tune.planning.run_time import RunTime
from t5tune.planning.unused_rows import suggest_trimming
from t5tune.progress import Note, Report, count_done, silent
from t5tune.runs.checks import find_unusable_optimizer
from t5tune.runs.plan import RunPlan
from t5tune.settings import PlanSettings, TrainSettings
from t5tune.settings.field_types import parse_gpu_memory
from t5tune.settings.groups.memory import MemorySettings
from t5tune.settings.groups.steps import choose_learning_rate
from t5tune.settings.messages import get_reason
from t5tune.training.steps import count_steps

MAX_SUGGESTED_BATCH_SIZE = 64
MAX_NONLINEARITY = 0.1  # maximum relative change of the growth per example for memory to count as linear
GOOD_BATCH_SIZE = 4  # examples per micro-batch that use a GPU well
COSTS = {
    "gradient_checkpointing": "computes the forward pass twice",
    "q_lora": "rounds the base's weights, and dequantizes them in each step",
    "deepspeed": "spends time on dividing or moving weights",
}
"""The costs of settings that save memory: reasons for turning them off if a run fits without them."""


@dataclass(frozen=True)
class Suggestion:
    """Settings that fit, their largest batch size, and the total bytes per device.

    Args:
        not_needed: given settings that the flags turn off, since the run fits without them -> their cost.
    """

    flags: str
    per_device_train_batch_size: int
    total: int
    not_needed: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """What train would need. Lengths are in tokens, memory is in bytes, `padding` is a share from 0 to 1.

    Args:
        evaluation: by stage, the memory of each device while held-out examples are evaluated.
        time: estimated from the run's first steps, which were timed.
        time_unknown: why they couldn't be timed.
    """

    model: str
    total_parameters: int
    trainable_parameters: int
    weights: dict[str, int]
    precision: str
    device: str
    device_memory: int | None
    processes: int
    examples: int | None
    source_length: int
    target_length: int
    batch_size: int
    padding: float | None
    steps: int | None
    learning_rate: float
    chosen: str
    stages: list[StageMemory]
    evaluation: dict[str, int]
    suggestion: Suggestion | None
    time: RunTime | None
    time_unknown: str | None


def plan(settings: PlanSettings, report: Report = silent, in_fork: bool = False) -> Plan:
    """Estimate the memory and steps of a training run with these settings.

    Args:
        in_fork: time the run's first steps in a fork of this process, which must not have computed anything with torch.

    Raises:
        SettingsError: `train` would refuse the settings, or the lengths don't fit tokens_per_batch.
        ModelError: there is no config.json, or its model type isn't supported.
        DataError: the token cache can't be used.
    """
    machine = _detect_machine(settings)
    if refusals := _find_refusals(settings) + find_unusable_optimizer(settings.optim, on_cpu=not machine.on_gpu):
        raise SettingsError(*refusals)
    with TemporaryDirectory(prefix="t5tune-plan-") as folder:
        return _make_plan(settings, machine, Path(folder), report, in_fork)


def _make_plan(settings: PlanSettings, machine: Machine, folder: Path, report: Report, in_fork: bool) -> Plan:
    config, place = _read_model_config(settings, report)  # first: its errors say more
    data = read_lengths(settings, folder, report)
    family = find_family(config, place, settings.family)
    architecture = make_encoder(family.bind(config), data.task)
    num_token_rows = min(data.num_added_tokens, family.num_unused_rows)
    chosen = settings.deepspeed or "none"
    batches = make_batches(settings, machine.count, data)
    largest = find_largest_batch(batches, data, packed=settings.packing != "off")
    # each step takes seconds for a large model
    with count_done("measuring memory", report, unit="steps") as step_done:
        estimator = MemoryEstimator(
            architecture, settings.select_part(MemorySettings), machine, num_token_rows, step_done
        )
        stages = [estimator.estimate(name, largest) for name in dict.fromkeys([chosen, *_list_stages(machine)])]
        evaluated = find_largest_loss_batch(data)
        evaluation = {stage.stage: estimator.estimate_evaluation(stage.stage, evaluated) for stage in stages}
        suggestion = _suggest_settings(settings, estimator, data, step_done)
    _suggest_trimming(settings, estimator, stages[0], data, report)
    trainable, total = estimator.counts
    steps, per_epoch = settings.max_steps, 1
    if data.share is not None:
        num_batches, step_size = round(len(batches) / data.share), settings.gradient_accumulation_steps * machine.count
        per_epoch = count_steps(num_batches, step_size, 1)
        steps = steps or count_steps(num_batches, step_size, settings.num_train_epochs)
    time, unknown = None, None if stages[0].fits is not False else "the run doesn't fit"
    if unknown is None:
        try:
            with count_done("timing steps", report):
                time = estimate_time(settings, data, machine, steps or 0, per_epoch, folder, in_fork)
        except T5TuneError as error:
            unknown = error.message
    dtype = "bf16" if settings.bf16 else "fp32"
    return Plan(
        model=settings.model_name_or_path,
        total_parameters=total,
        trainable_parameters=trainable,
        weights=estimator.weights,
        precision=f"{settings.quant_type} base, {dtype}" if settings.q_lora else dtype,
        device=machine.name,
        device_memory=machine.memory,
        processes=machine.count,
        examples=None if data.share is None else round(len(data.sources) / data.share),
        source_length=max(largest.sources),
        target_length=max(largest.targets),
        batch_size=len(largest.sources),
        padding=compute_padding(settings, batches, data) if data.is_real else None,
        steps=steps,
        learning_rate=_choose_learning_rate(settings),
        chosen=chosen,
        stages=stages,
        evaluation=evaluation,
        suggestion=suggestion,
        time=time,
        time_unknown=unknown,
    )


def _choose_learning_rate(settings: PlanSettings) -> float:
    """Choose the learning rate as train does: the default also depends on the objective of given token caches."""
    objective = settings.objective
    if settings.learning_rate is None and not (settings.data is None and settings.data_path is None):
        datasets, _ = resolve_training_data(settings)
        objective = list_values_of_caches(settings, datasets).get("objective", objective)
    return choose_learning_rate(settings.learning_rate, settings.train_mode, objective)


def _suggest_trimming(
    settings: PlanSettings, estimator: MemoryEstimator, chosen: StageMemory, data: ExampleLengths, report: Report
) -> None:
    """Suggest a smaller base if the data is known, and doesn't use most of the base's memory."""
    if data.examples is None:
        return
    weights, num_rows = estimator.weights, estimator.architecture.dimensions.num_rows
    trained = chosen.gradients + chosen.optimizer if settings.train_mode == "full" else 0
    row_bytes = (chosen.weights + trained) * (weights["embedding"] + weights["head"]) // sum(weights.values())
    caches = [dataset.cache for dataset in data.examples.datasets]
    suggest_trimming(caches, num_rows, row_bytes, chosen.total, report)


def _detect_machine(settings: PlanSettings) -> Machine:
    memory = parse_gpu_memory(settings.gpu_memory) if settings.gpu_memory else None
    found = 0 if settings.use_cpu else torch.cuda.device_count()
    if memory is None and settings.num_processes is None and found:
        properties = torch.cuda.get_device_properties(0)
        count, has_own_bf16 = settings.num_gpus or found, has_bf16(torch.device("cuda"))
        return Machine(True, count, int(properties.total_memory), properties.name, has_own_bf16)
    if memory is not None or settings.num_gpus:
        return Machine(True, settings.num_gpus or 1, memory, "GPU", has_bf16=True)
    count = settings.num_processes or 1
    return Machine(False, count, psutil.virtual_memory().total // count, "CPU", has_bf16=False)


def _list_stages(machine: Machine) -> list[str]:
    """List the ways to divide memory that help on this machine: sharding needs several devices, offloading a GPU."""
    sharded = ["zero1", "zero2", "zero3"] if machine.count > 1 else []
    return ["none", *sharded, *(["zero3-offload"] if machine.on_gpu else [])]


def _read_model_config(settings: PlanSettings, report: Report) -> tuple[dict[str, Any], Path]:
    """Read config.json from a file, a folder, the table of known checkpoints or the Hub.

    Returns:
        (config, its folder)
    """
    name = settings.model_name_or_path
    path = Path(name)
    if path.is_file():
        return read_config(path), path.parent
    known = KNOWN_CONFIGS | (KNOWN_ENCODERS if settings.kind == "labels" else {})
    if name in known and not path.exists():
        report(Note(f"{name}: using the model shape that is built into t5tune"))
        return known[name], path
    folder = find_base(settings, with_weights=False, report=report)
    return read_config(folder), folder


def _suggest_settings(
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
        if _find_refusals(candidate):
            continue
        part, estimator = candidate.select_part(MemorySettings), asked
        if part != asked.settings:
            estimator = MemoryEstimator(asked.architecture, part, machine, asked.num_token_rows, step_done)
        found = _find_largest_batch_size(estimator, candidate.deepspeed or "none", data)
        if found is not None and (best is None or found[0] > best.per_device_train_batch_size):
            flags = _format_flags(settings, {**changes, "per_device_train_batch_size": found[0]}, machine)
            not_needed = {name: cost for name, cost in COSTS.items() if getattr(settings, name) and not changes[name]}
            best = Suggestion(flags, *found, not_needed)
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


def _find_refusals(settings: PlanSettings) -> list[str]:
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


def to_plan_settings(run_plan: RunPlan) -> PlanSettings:
    """Convert the settings of a training run to settings of `t5tune plan`."""
    given = run_plan.given
    values = {name: getattr(given, name) for name in given.model_fields_set & PlanSettings.model_fields.keys()}
    if given.data is not None:  # type: ignore[attr-defined]
        values.pop("data_path", None)  # the datasets have the paths
    values["time_run"] = False  # a dry run takes seconds, and runs nothing
    values["dropout"] = run_plan.model.layers.dropout
    if run_plan.data.kind == "pairs":  # two targets for each source, if the lengths are assumed
        values["target_length"] = 2 * PlanSettings.model_fields["target_length"].default
    return PlanSettings(**values)
