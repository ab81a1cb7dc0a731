"""Estimate the memory of a training run: per device with each DeepSpeed config, and of the machine.

    estimator = MemoryEstimator(architecture, settings, machine, num_token_rows=19, step_done=print)
    estimator.estimate("zero3", BatchLengths((512,) * 8, (128,) * 8)).total

The weights are counted on a model without data, and a step's memory is measured by running the step on empty tensors
(planning/layer_memory.py). How ZeRO partitions them follows its paper (Rajbhandari et al. 2020).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from t5tune.evaluation.scoring import compute_generation_budget
from t5tune.families.architecture import Architecture
from t5tune.model.load import LOAD_CHUNK_BYTES, count_parameters
from t5tune.planning.layer_memory import (
    BatchLengths,
    StepMemory,
    build_empty_training_model,
    count_weight_bytes,
    find_blocks,
    measure_losses_memory,
    measure_step,
)
from t5tune.settings import packaged_templates
from t5tune.settings.groups.memory import MemorySettings

MIB = 1 << 20
GPU_RUNTIME_BYTES = 800 * MIB  # the CUDA context, kernels and cuBLAS workspace, which torch's allocator doesn't count
TRAINER_BYTES = 85 * MIB  # of transformers' Trainer 5.24 and its imports, which `plan` doesn't import
USABLE_GPU_SHARE = 0.92  # the rest is lost to fragmentation in the allocator
# with gradient checkpointing on a CPU, the heap was 1.5 to 2.4 times the size of the step's tensors
HEAP_FRAGMENTATION = 1.85


@dataclass(frozen=True)
class StageMemory:
    """Bytes per device with one DeepSpeed config. Fields with `host` are bytes of the machine, summed over processes.

    Args:
        stage: `none` (no partitioning: each process has everything), or the name of a packaged DeepSpeed config.
        runtime: memory of Python's libraries on a CPU, of the CUDA context on a GPU.
        host: offloaded from the devices.
        loading, loading_host: the peak while the base is loaded; on the host with Python's libraries.
        saving_host: while rank 0 collects the trained weights for a checkpoint, with Python's libraries.
    """

    stage: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    runtime: int
    total: int
    host: int
    loading: int
    loading_host: int
    saving_host: int
    fits: bool | None


@dataclass(frozen=True)
class Machine:
    """The devices of a run; `memory` is in bytes per device, None if unknown."""

    on_gpu: bool
    count: int
    memory: int | None
    name: str
    has_bf16: bool


class MemoryEstimator:
    """Estimates memory per device for one way of training; each kind of step is measured once and cached."""

    def __init__(
        self,
        architecture: Architecture,
        settings: MemorySettings,
        machine: Machine,
        num_token_rows: int,
        step_done: Callable[[int], None],
    ) -> None:
        self.architecture, self.settings, self.machine, self.step_done = architecture, settings, machine, step_done
        self.num_token_rows = num_token_rows
        self._models: dict[bool, Any] = {}
        model = self._get_empty_model(deepspeed=False)
        self.weights = count_weight_bytes(model, settings)
        self.counts = count_parameters(model)
        self._blocks = [block for blocks in find_blocks(model) for block in blocks]
        self.most_elements = max(parameter.numel() for parameter in model.parameters())
        self._steps: dict[Any, StepMemory] = {}
        self._evaluations: dict[tuple[bool, BatchLengths], int] = {}

    def estimate(self, stage: str, lengths: BatchLengths) -> StageMemory:
        """Estimate the bytes per device with a DeepSpeed config, for one micro-batch of these lengths."""
        step = self._measure_step(lengths, stage != "none", _read_zero_config(stage).get("stage", 0) == 3)
        is_fragmented = self.settings.gradient_checkpointing and not self.machine.on_gpu
        activations = int(step.activations * (HEAP_FRAGMENTATION if is_fragmented else 1))
        return self._partition(stage, step.gradients, activations)

    def estimate_evaluation(self, stage: str, lengths: BatchLengths) -> int:
        """Estimate the bytes per device during an evaluation whose largest batch has these lengths."""
        under_deepspeed = self.settings.bf16 and stage != "none"
        key = (under_deepspeed, lengths)
        if key not in self._evaluations:
            model = self._get_empty_model(under_deepspeed)
            losses = measure_losses_memory(model, lengths, self.settings, self.machine.on_gpu, not under_deepspeed)
            generates = model.label_task is None
            self._evaluations[key] = max(losses, compute_generation_budget(model) if generates else 0)
            self.step_done(1)
        return self._partition(stage, 0, self._evaluations[key]).total

    def can_fit(self, stage: str) -> bool:
        """Whether the memory between steps fits: a quick check before measuring a step, which takes seconds."""
        return self._partition(stage, 0, 0).fits is not False

    def _partition(self, stage: str, gradients: int, activations: int) -> StageMemory:
        """Distribute the memory over the devices and the host, as DeepSpeed's ZeRO stage and offloading do."""
        zero = _read_zero_config(stage)
        level, count = int(zero.get("stage", 0)), self.machine.count
        under_deepspeed = stage != "none"
        trainable = self.counts[0]
        # trained weights are fp32; DeepSpeed keeps them in the compute dtype, with an fp32 copy in the optimizer
        width, masters = (2, 4 * trainable) if under_deepspeed and self.settings.bf16 else (4, 0)
        frozen = 0 if self.settings.train_mode == "full" else sum(self.weights.values())
        held = whole = frozen + width * trainable
        optimizer = masters + _count_optimizer_bytes(self.settings.optim) * trainable
        host = offloaded = 0
        if level >= 1:
            optimizer //= count
        if level >= 2:
            gradients //= count
        gathered = self._count_gathered(zero, whole)
        if level == 3:
            held //= count
            activations += gathered
        if zero.get("offload_optimizer", {}).get("device") == "cpu":
            host, optimizer = host + optimizer * count, 0
        if zero.get("offload_param", {}).get("device") == "cpu":
            offloaded, held = held * count, 0
            host += offloaded
        runtime = GPU_RUNTIME_BYTES if self.machine.on_gpu else _measure_libraries()
        total = held + gradients + optimizer + activations + runtime
        if not self.machine.on_gpu:
            total += host // count
        in_bf16 = self.settings.bf16 and (under_deepspeed or self.settings.train_mode == "lora")
        largest = self.most_elements * (2 if in_bf16 else 4)
        loading, loading_host = self._estimate_loading(largest, level == 3, held, offloaded, runtime)
        # rank 0 collects all trained weights in fp32; on a CPU without partitioning, they aren't copied
        collected = 4 * trainable if self.machine.on_gpu or level >= 1 else 0
        each = _measure_libraries() if self.machine.on_gpu else held + optimizer + runtime
        saving_host = each * count + host + collected
        needed = max(total, loading) if self.machine.on_gpu else max(total, loading, saving_host // count)
        memory = self.machine.memory
        share = USABLE_GPU_SHARE if self.machine.on_gpu else 1.0
        fits = None if memory is None else needed <= memory * share
        in_use = (held, gradients, optimizer, activations, runtime, total, host)
        return StageMemory(stage, *in_use, loading, loading_host, saving_host, fits)

    def _count_gathered(self, zero: dict[str, Any], whole: int) -> int:
        """Count the bytes of the weights that ZeRO-3 gathers in addition to a device's partition, at their peak.

        These are two blocks, the embedding or the head, and the weights that DeepSpeed keeps after the forward pass
        because the backward pass reads them within `stage3_max_reuse_distance` parameters. `whole` is all weights.
        """
        sizes = [sum(each.numel() for each in block.parameters()) for block in self._blocks]
        in_blocks = self.weights["attention"] + self.weights["feed-forward"]
        working = 2 * max(sizes) * in_blocks // sum(sizes) + max(self.weights["embedding"], self.weights["head"])
        kept = min(zero.get("stage3_max_reuse_distance", 10**9), zero.get("stage3_max_live_parameters", 10**9))
        return int(min(whole, working * whole // sum(self.weights.values()) + kept * whole // self.counts[1]))

    def _estimate_loading(
        self, largest: int, partitions: bool, held: int, offloaded: int, runtime: int
    ) -> tuple[int, int]:
        """Estimate the peak (per device, of the machine) while the base is loaded, tensor by tensor (model/load.py).

        In bytes: the largest unquantized tensor, the weights that stay on the device, the weights offloaded to the
        machine, and each device without weights.
        """
        q_lora, quant_type = self.settings.q_lora, self.settings.quant_type
        whole = largest if partitions or q_lora else 0  # a tensor that isn't partitioned or quantized yet
        if not self.machine.on_gpu:
            each = held + whole + runtime
            return each + offloaded // self.machine.count, each * self.machine.count + offloaded
        # int8 weights are quantized on their way from the machine's memory; other tensors are read in chunks
        buffer = largest if q_lora and quant_type == "int8" else LOAD_CHUNK_BYTES
        libraries = _measure_libraries()
        return held + whole + runtime, (libraries + buffer) * self.machine.count + offloaded

    def _get_empty_model(self, deepspeed: bool) -> Any:
        if deepspeed not in self._models:
            self._models[deepspeed] = build_empty_training_model(
                self.architecture, self.settings, self.num_token_rows, deepspeed
            )
        return self._models[deepspeed]

    def _measure_step(self, lengths: BatchLengths, deepspeed: bool, reentrant: bool) -> StepMemory:
        deepspeed = deepspeed and self.settings.bf16  # in fp32, DeepSpeed computes like plain PyTorch
        key = (lengths, deepspeed, reentrant and self.settings.gradient_checkpointing)
        if key not in self._steps:
            model = self._get_empty_model(deepspeed)
            self._steps[key] = measure_step(
                model, lengths, self.settings, self.machine.on_gpu, reentrant, autocast=not deepspeed
            )
            self.step_done(1)
        return self._steps[key]


def _read_zero_config(stage: str) -> dict[str, Any]:
    return {} if stage == "none" else dict(packaged_templates.read_deepspeed_config(stage).get("zero_optimization", {}))


def _count_optimizer_bytes(name: str) -> int:
    """Return the bytes of optimizer state per trainable parameter (two fp32 moments for Adam)."""
    if "8bit" in name:
        return 2
    if name == "adafactor":
        return 1  # one row and one column per matrix
    return 4 if name == "sgd" else 8


def _measure_libraries() -> int:
    """Measure the memory of Python's libraries: this process's, and those that only training imports."""
    size: int = psutil.Process().memory_info().rss
    return size if "transformers.trainer" in sys.modules else size + TRAINER_BYTES
