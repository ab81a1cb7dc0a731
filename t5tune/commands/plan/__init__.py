"""`t5tune plan`: estimate a training run's memory and steps from config.json alone, before anything runs.

    result = plan(PlanSettings(model_name_or_path="google/flan-t5-xxl", q_lora=True, gpu_memory="24GiB"))
    result.stages[0].total, result.suggestion

The weights are counted on a model without data, and a step's memory is measured by running the step on fake tensors
(planning/layer_memory.py). How ZeRO partitions them follows its paper (Rajbhandari et al. 2020).
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from t5tune.checkpoints.base import find_base, read_config
from t5tune.commands.plan.example_lengths import (
    ExampleLengths,
    compute_padding,
    find_largest_batch,
    find_largest_loss_batch,
    make_batches,
    read_lengths,
)
from t5tune.commands.plan.suggestion import Suggestion, find_refusals, suggest_settings
from t5tune.commands.plan.timing import estimate_time
from t5tune.errors import SettingsError, T5TuneError
from t5tune.families import find_family
from t5tune.model.device import has_bf16
from t5tune.planning.known_configs import KNOWN_CONFIGS
from t5tune.planning.run_memory import Machine, MemoryEstimator, StageMemory
from t5tune.planning.run_time import RunTime
from t5tune.progress import Note, Report, count_done, silent
from t5tune.runs.plan import RunPlan
from t5tune.settings import PlanSettings
from t5tune.settings.field_types import parse_gpu_memory
from t5tune.settings.groups.memory import MemorySettings
from t5tune.training.steps import count_steps


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
    chosen: str
    stages: list[StageMemory]
    evaluation: dict[str, int]
    suggestion: Suggestion | None
    time: RunTime | None
    time_unknown: str | None


def plan(settings: PlanSettings, report: Report = silent) -> Plan:
    """Estimate the memory and steps of a training run with these settings.

    Raises:
        SettingsError: `train` would refuse the settings, or the lengths don't fit tokens_per_batch.
        ModelError: there is no config.json, or its model type isn't supported.
        DataError: the token cache can't be used.
    """
    if refusals := find_refusals(settings):
        raise SettingsError(*refusals)
    with TemporaryDirectory(prefix="t5tune-plan-") as folder:
        return _make_plan(settings, Path(folder), report)


def _make_plan(settings: PlanSettings, folder: Path, report: Report) -> Plan:
    machine = _detect_machine(settings)
    data = read_lengths(settings, folder, report)
    config, place = _read_model_config(settings, report)
    family = find_family(config, place, settings.family)
    architecture = family.bind(config)
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
        suggestion = suggest_settings(settings, estimator, data, step_done)
    trainable, total = estimator.counts
    step_size, steps, time = settings.gradient_accumulation_steps * machine.count, settings.max_steps, None
    unknown = _find_reason_against_timing(settings, data, machine, fits=stages[0].fits is not False)
    if data.share is not None:
        num_batches = round(len(batches) / data.share)
        steps = steps or count_steps(num_batches, step_size, settings.num_train_epochs)
        if unknown is None:
            try:
                steps_per_epoch = count_steps(num_batches, step_size, 1)
                time = estimate_time(settings, data, (steps, steps_per_epoch), folder, report)
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
        chosen=chosen,
        stages=stages,
        evaluation=evaluation,
        suggestion=suggestion,
        time=time,
        time_unknown=unknown,
    )


def _find_reason_against_timing(
    settings: PlanSettings, data: ExampleLengths, machine: Machine, fits: bool
) -> str | None:
    if not settings.time_run:
        return "time_run is off"
    if data.share is None:
        return "the number of examples isn't known" if data.is_real else "no data is given"
    if settings.gpu_memory is not None or (machine.on_gpu and machine.count > torch.cuda.device_count()):
        return "the plan is for a different machine"
    if Path(settings.model_name_or_path).is_file():
        return f"{settings.model_name_or_path} has no weights"
    return None if fits else "the run doesn't fit"


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
    if name in KNOWN_CONFIGS and not path.exists():
        report(Note(f"{name}: using the model shape that is built into t5tune"))
        return KNOWN_CONFIGS[name], path
    folder = find_base(settings, with_weights=False, report=report)
    return read_config(folder), folder


def to_plan_settings(run_plan: RunPlan) -> PlanSettings:
    """Convert the settings of a training run to settings of `t5tune plan`."""
    given = run_plan.given
    values = {name: getattr(given, name) for name in given.model_fields_set & PlanSettings.model_fields.keys()}
    if given.data is not None:  # type: ignore[attr-defined]
        values.pop("data_path", None)  # the datasets have the paths
    values["time_run"] = False  # a dry run takes seconds, and runs nothing
    values["dropout"] = run_plan.model.layers.dropout
    if run_plan.data.reads_preferences:  # two targets for each source, if the lengths are assumed
        values["target_length"] = 2 * PlanSettings.model_fields["target_length"].default
    return PlanSettings(**values)
