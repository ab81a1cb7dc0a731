"""`t5tune plan`: what a training run will take, before anything runs, from config.json alone.

    result = plan(PlanSettings(model_name_or_path="google/flan-t5-xxl", q_lora=True, gpu_memory="24GiB"))
    result.stages[0].total, result.suggestion

The bytes of weights are counted on a model without data, those of a step by running it on tensors without data
(model/memory.py). How ZeRO shares them out follows its paper (Rajbhandari et al. 2020).
"""

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.checkpoints.base import find_config, read_config
from t5tune.data.batching import Integers, budget_batches, epoch_order, num_batches
from t5tune.data.cache import is_cache, open_cache
from t5tune.errors import SettingsError
from t5tune.families import family_of, of_type
from t5tune.model.known_configs import SIZES
from t5tune.progress import Advanced, Finished, Note, Report, Started, silent
from t5tune.settings import PlanSettings, TrainSettings, packaged_templates

MIB, GIB = 1 << 20, 1 << 30
GPU_RUNTIME = 800 * MIB  # CUDA's context, kernels and cuBLAS's workspace, which torch doesn't count
USABLE = 0.92  # of a GPU: the allocator's pieces don't fit together without gaps
HEAP_HOLES = 1.85  # a CPU's heap was seen to take 1.5 to 2.4 times the tensors of a checkpointed step
NUM_ADDED_TOKENS = 19  # about what prepare adds to T5's vocabulary, where there is room for it
LARGEST_SUGGESTED_BATCH = 64
GOOD_BATCH = 4  # examples a micro-step from which a GPU is busy
STAGES = ("none", "zero1", "zero2", "zero3", "zero3-offload")


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each device under one way of sharing; `host` is what is offloaded to the machine's memory, for all.

    Args:
        stage: none (each process holds all), or the name of a DeepSpeed preset.
        runtime: Python's libraries and, on a GPU, CUDA's own.
    """

    stage: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    runtime: int
    total: int
    host: int
    fits: bool | None


@dataclass(frozen=True)
class Suggestion:
    """Settings that fit, their largest batch, and what they take on each device (bytes)."""

    flags: str
    per_device_train_batch_size: int
    total: int


@dataclass(frozen=True)
class Plan:
    """What train would take. Lengths in tokens; memory in bytes; `padding` is a share, 0 to 1."""

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
    suggestion: Suggestion | None


@dataclass(frozen=True)
class _Machine:
    """Where it is to run; `memory` of each device, where known."""

    on_gpu: bool
    count: int
    memory: int | None
    name: str


@dataclass(frozen=True)
class _Data:
    """Lengths to plan for: those of a cache, or of any number of examples that are all alike."""

    sources: Integers
    targets: Integers
    num_added_tokens: int = NUM_ADDED_TOKENS
    is_real: bool = False


def plan(settings: PlanSettings, report: Report = silent) -> Plan:
    """Plan the run that these settings would make.

    Raises:
        SettingsError: a memory size that can't be read, or lengths that don't fit tokens_per_batch.
        ModelError: no config.json, or one of another family.
        DataError: a cache that can't be used.
    """
    machine = _machine(settings)
    data = _data(settings, report)
    config, place = _config(settings, report)
    config = family_of(config, place, settings.family).completed(config)
    chosen = settings.deepspeed or "none"
    batches = _batches(settings, machine.count, data)
    sources, targets = _largest(batches, data)
    with _told(report) as step_done:
        measured = _Measured(config, settings, machine, data.num_added_tokens, step_done)
        names = list(dict.fromkeys([chosen, *STAGES]))
        stages = [measured.memory(name, sources, targets) for name in names]
        suggestion = _suggestion(config, settings, machine, data, step_done)
    counts = measured.counts
    return Plan(
        model=settings.model_name_or_path,
        total_parameters=counts[1],
        trainable_parameters=counts[0],
        weights=measured.weights,
        precision=precision(settings),
        device=machine.name,
        device_memory=machine.memory,
        processes=machine.count,
        examples=len(data.sources) if data.is_real else None,
        source_length=max(sources),
        target_length=max(targets),
        batch_size=len(sources),
        padding=_padding(settings, batches, data) if data.is_real else None,
        steps=_steps(settings, machine.count, len(batches)) if data.is_real else settings.max_steps,
        chosen=chosen,
        stages=stages,
        suggestion=suggestion,
    )


@contextmanager
def _told(report: Report) -> Iterator[Callable[[], None]]:
    """Report how many steps were measured, each after it: a large model's takes seconds."""
    task, done = "measuring steps without data", itertools.count(1)
    report(Started(task, unit="steps"))
    try:
        yield lambda: report(Advanced(task, next(done)))
    finally:
        report(Finished(task))


def precision(settings: PlanSettings) -> str:
    """`nf4 base, bf16`, `bf16`, `fp32`."""
    dtype = "bf16" if settings.bf16 else "fp32"
    return f"{settings.quant_type} base, {dtype}" if settings.q_lora else dtype


def read_size(text: str) -> int:
    """Bytes of `24GiB`, `24GB`, `24G` or `24` (both GiB), `800MiB`.

    Raises:
        SettingsError: none of these.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?B)?\s*", text, re.IGNORECASE)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise SettingsError(f"gpu_memory: {text!r}: expected a size such as 24GiB")
    power = "KMGT".index((match[2] or "G").upper()) + 1
    return int(number * (1000 if (match[3] or "").upper() == "B" else 1024) ** power)


class _Measured:
    """A model and its steps, measured once for each way of training."""

    def __init__(
        self,
        config: dict[str, Any],
        settings: PlanSettings,
        machine: _Machine,
        num_added_tokens: int,
        step_done: Callable[[], None],
    ) -> None:
        from t5tune.model.memory import parameter_counts, weight_bytes

        self.config, self.settings, self.machine, self.step_done = config, settings, machine, step_done
        self.num_token_rows = min(num_added_tokens, of_type(config).room)
        model = self._model(deepspeed=False)
        self.weights = weight_bytes(model, settings)
        self.counts = parameter_counts(model)
        self._steps: dict[Any, Any] = {}

    def memory(self, stage: str, sources: tuple[int, ...], targets: tuple[int, ...]) -> StageMemory:
        """What a stage takes on each device for a micro-batch."""
        level = _zero(stage).get("stage", 0)
        step = self._step(sources, targets, stage != "none", level == 3)
        has_holes = self.settings.gradient_checkpointing and not self.machine.on_gpu
        return self._shared_out(stage, step.gradients, int(step.activations * (HEAP_HOLES if has_holes else 1)))

    def could_fit(self, stage: str) -> bool:
        """Whether there is room for what is held between steps: measuring one takes seconds."""
        return self._shared_out(stage, 0, 0).fits is not False

    def _shared_out(self, stage: str, gradients: int, activations: int) -> StageMemory:
        zero = _zero(stage)
        level, count = int(zero.get("stage", 0)), self.machine.count
        under_deepspeed = stage != "none"
        trainable = self.counts[0]
        weights = sum(self.weights.values())
        width = 2 if self.settings.bf16 else 4
        # LoRA's matrices; DeepSpeed's are in the compute dtype, with fp32 masters among the optimizer's states
        adapters = 0 if self.settings.train_mode == "full" else trainable * (width if under_deepspeed else 4)
        if self.settings.train_mode == "full":
            weights = trainable * (width if under_deepspeed else 4)
        masters = 4 * trainable if under_deepspeed and self.settings.bf16 else 0
        optimizer = masters + _optimizer_bytes(self.settings.optim) * trainable
        host = 0
        if level >= 1:
            optimizer //= count
        if level >= 2:
            gradients //= count
        held = weights + adapters
        # ZeRO-3 gathers what it needs, and keeps so many parameters for their next use
        gathered = int(zero.get("stage3_max_live_parameters", 10**9)) * held // self.counts[1]
        if level == 3:
            held //= count
            activations += min(weights + adapters - held, gathered)
        if zero.get("offload_optimizer", {}).get("device") == "cpu":
            host, optimizer = host + optimizer * count, 0
        if zero.get("offload_param", {}).get("device") == "cpu":
            activations += min(held, gathered)
            host, held = host + held * count, 0
        runtime = GPU_RUNTIME if self.machine.on_gpu else own_memory()
        total = held + gradients + optimizer + activations + runtime
        if not self.machine.on_gpu:
            total += host // count
        memory = self.machine.memory
        fits = None if memory is None else total <= memory * (USABLE if self.machine.on_gpu else 1.0)
        return StageMemory(stage, held, gradients, optimizer, activations, runtime, total, host, fits)

    def _model(self, deepspeed: bool) -> Any:
        from t5tune.model.memory import empty_model_of

        return empty_model_of(self.config, self.settings, self.num_token_rows, deepspeed)

    def _step(self, sources: tuple[int, ...], targets: tuple[int, ...], deepspeed: bool, reentrant: bool) -> Any:
        from t5tune.model.memory import Lengths, measure_step

        key = (sources, targets, deepspeed, reentrant and self.settings.gradient_checkpointing)
        if key not in self._steps:
            model = self._model(deepspeed)
            self._steps[key] = measure_step(
                model, Lengths(sources, targets), self.settings, self.machine.on_gpu, reentrant, autocast=not deepspeed
            )
            self.step_done()
        return self._steps[key]


def _zero(stage: str) -> dict[str, Any]:
    return {} if stage == "none" else dict(packaged_templates.read_deepspeed(stage).get("zero_optimization", {}))


def own_memory() -> int:
    """Bytes that this process holds now: Python and the libraries that training loads too."""
    import transformers.trainer  # noqa: F401  what training loads and planning does not

    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 700 * MIB
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


def _optimizer_bytes(name: str) -> int:
    """Of the two moments of each parameter that trains."""
    if "8bit" in name:
        return 2
    if name == "adafactor":
        return 1  # a row and a column for each matrix
    return 4 if name == "sgd" else 8


def _machine(settings: PlanSettings) -> _Machine:
    import torch

    memory = read_size(settings.gpu_memory) if settings.gpu_memory else None
    found = 0 if settings.use_cpu else torch.cuda.device_count()
    if memory is None and settings.num_processes is None and found:
        properties = torch.cuda.get_device_properties(0)
        return _Machine(True, settings.num_gpus or found, int(properties.total_memory), properties.name)
    if memory is not None or settings.num_gpus:
        return _Machine(True, settings.num_gpus or 1, memory, "GPU")
    lines = Path("/proc/meminfo").read_text(encoding="utf-8") if Path("/proc/meminfo").exists() else ""
    total = re.search(r"MemTotal:\s+(\d+)", lines)
    count = settings.num_processes or 1
    return _Machine(False, count, int(total[1]) * 1024 // count if total else None, "CPU")


def _config(settings: PlanSettings, report: Report) -> tuple[dict[str, Any], Path]:
    """config.json of a file, a folder, the family's known checkpoints or the hub, and where it stands."""
    name = settings.model_name_or_path
    path = Path(name)
    if path.is_file():
        return read_config(path), path.parent
    if name in SIZES and not path.exists():
        report(Note(f"{name}: planned from the shape that t5tune knows of it"))
        return SIZES[name], path
    folder = find_config(settings)
    return read_config(folder), folder


def _data(settings: PlanSettings, report: Report) -> _Data:
    folder = Path(settings.data_path[0]) if settings.data_path else None
    if folder is not None and is_cache(folder):
        cache, _ = open_cache(folder).parts()
        if settings.num_data is not None:
            cache = cache.first(settings.num_data)
        return _Data(*cache.lengths(), len(cache.added_tokens), is_real=True)
    if folder is not None:
        lengths = f"{settings.source_length} + {settings.target_length}"
        report(Note(f"{folder}: not prepared yet, so examples of {lengths} tokens are planned for"))
    tokens = settings.source_length + settings.target_length
    count = settings.tokens_per_batch // tokens if settings.tokens_per_batch else settings.per_device_train_batch_size
    if count == 0:
        raise SettingsError(f"tokens_per_batch: {settings.tokens_per_batch}: an example has {tokens} tokens")
    return _Data(np.full(count, settings.source_length), np.full(count, settings.target_length))


def _batches(settings: PlanSettings, count: int, data: _Data) -> list[Integers]:
    """The micro-batches of the first epoch, as the trainer takes them."""
    if not data.is_real:
        return [np.arange(len(data.sources))]
    sources, targets, steps = data.sources, data.targets, settings.gradient_accumulation_steps * count
    if (tokens := settings.tokens_per_batch) is not None:
        packs = settings.packing != "off"
        number = num_batches(sources, targets, tokens, packs, steps, settings.seed)
        return budget_batches(sources, targets, tokens, packs, steps, number, settings.seed, 0)
    size = settings.per_device_train_batch_size
    if settings.group_by_length:
        order = epoch_order(sources + targets, size * steps, settings.seed, 0)
    else:
        order = np.random.default_rng(settings.seed).permutation(len(sources))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _largest(batches: list[Integers], data: _Data) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(source lengths, target lengths) of the micro-batch with the most tokens, padding counted."""

    def tokens(batch: Integers) -> int:
        return len(batch) * int(data.sources[batch].max() + data.targets[batch].max())

    largest = max(batches, key=tokens)
    return tuple(data.sources[largest].tolist()), tuple(data.targets[largest].tolist())


def _padding(settings: PlanSettings, batches: list[Integers], data: _Data) -> float:
    if settings.packing != "off":
        return 0.0
    useful = int(data.sources.sum() + data.targets.sum())
    padded = sum(len(b) * int(data.sources[b].max() + data.targets[b].max()) for b in batches)
    return round(1 - useful / padded, 4)


def _steps(settings: PlanSettings, count: int, num_batches: int) -> int:
    if settings.max_steps is not None:
        return settings.max_steps
    per_epoch = max(1, -(-num_batches // (settings.gradient_accumulation_steps * count)))
    return max(1, round(per_epoch * settings.num_train_epochs))


def _suggestion(
    config: dict[str, Any], settings: PlanSettings, machine: _Machine, data: _Data, step_done: Callable[[], None]
) -> Suggestion | None:
    """The first of some ways that fits a good batch, else the one that fits most; None: none of them fits.

    The ways go from the fastest to the one that takes least; a batch is of the longest examples.
    """
    if machine.memory is None:
        return None
    dtype: dict[str, Any] = {"bf16": True} if machine.on_gpu else {"bf16": settings.bf16}
    light = {"gradient_checkpointing": True}
    ways: list[dict[str, Any]] = [{}, light]
    if machine.count > 1 and machine.on_gpu:
        ways.append({**light, "deepspeed": "zero3"})
    if settings.train_mode == "lora":
        ways.append({**light, "q_lora": True})
    if machine.on_gpu:
        ways.append({**light, "deepspeed": "zero3-offload"})
    best: Suggestion | None = None
    for way in ways:
        base = {"q_lora": False, "gradient_checkpointing": False, "tokens_per_batch": None, **dtype}
        tried = settings.model_copy(update={**base, **way})
        measured = _Measured(config, tried, machine, data.num_added_tokens, step_done)
        found = _largest_batch(measured, way.get("deepspeed", "none"), data)
        if found is not None and (best is None or found[0] > best.per_device_train_batch_size):
            flags = {name: value for name, value in {**dtype, **way}.items() if value}
            best = Suggestion(_flags({**flags, "per_device_train_batch_size": found[0]}, machine), *found)
        if best is not None and best.per_device_train_batch_size >= GOOD_BATCH:
            break
    return best


def _largest_batch(measured: _Measured, stage: str, data: _Data) -> tuple[int, int] | None:
    """(examples, bytes) of the largest batch of the longest examples that fits, a power of two."""
    longest = int(data.sources.max()), int(data.targets.max())

    def memory(size: int) -> StageMemory:
        return measured.memory(stage, (longest[0],) * size, (longest[1],) * size)

    if not measured.could_fit(stage) or not (first := memory(1)).fits:
        return None
    second = memory(2)
    size, each = 1, max(1, second.total - first.total)  # a step's memory grows by as much with each example
    limit = (measured.machine.memory or 0) * (USABLE if measured.machine.on_gpu else 1.0)
    while size < LARGEST_SUGGESTED_BATCH and first.total + (2 * size - 1) * each <= limit:
        size *= 2
    return size, first.total + (size - 1) * each


def _flags(values: dict[str, Any], machine: _Machine) -> str:
    if machine.count > 1:
        values = {**values, "num_gpus" if machine.on_gpu else "num_processes": machine.count}
    words = (f"--{n.replace('_', '-')}" + ("" if value is True else f" {value}") for n, value in values.items())
    return " ".join(words)


def plan_of(settings: TrainSettings) -> PlanSettings:
    """The plan's settings for a run's: what it would be asked on the command line."""
    values = {name: getattr(settings, name) for name in PlanSettings.model_fields if hasattr(settings, name)}
    return PlanSettings(**values)
