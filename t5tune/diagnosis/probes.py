"""Checks that load the libraries. Each runs in a separate process, so that a crash doesn't end `doctor`.

    PROBES["torch"]()     # ("good", "torch 2.13.0 (CPU only), no GPU: training runs on 8 CPU threads", "")

A probe raises an error if a library doesn't work. Several probes train the built-in model for one step.
"""

import os
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import torch

from t5tune.compat.deepspeed_patches import import_deepspeed
from t5tune.diagnosis import CheckResult
from t5tune.formatting import format_count
from t5tune.io.processes import start_module
from t5tune.model.device import read_nvidia_driver
from t5tune.model.kernels.flex_check import (
    AttentionShape,
    check_kernel,
    find_unmet_requirement,
    measure_implementations,
)
from t5tune.model.kernels.gated_gelu import find_kernel_problem
from t5tune.settings.loading import VARIABLE_PREFIX

BASE_SHAPE = AttentionShape(num_heads=12, head_width=64, max_distance=128, dropout=0.1)  # of Flan-T5-base
SLOW_BF16 = 3.0  # bf16 time / fp32 time of a matrix product above which a CPU has no useful bf16 arithmetic
TRAIN_ONE_STEP = "train --config pocket --num-data 64 --max-steps 1 --report-samples 0 --quiet --output-dir"
NEWER_DRIVER_FIX = "install a newer NVIDIA driver, or a torch build for an older CUDA version"
CUDA_BUILD_FIX = "pip install --force-reinstall torch, with the --index-url of a CUDA build"
KERNEL_FIX = "training still works; a newer torch, which brings its own Triton, may help"
FP32_FIX = "train in fp32: omit --bf16, and give --no-bf16 with --q-lora"


def probe_torch() -> CheckResult:
    """Compare torch's build with the GPU driver."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    name = f"torch {torch.__version__} ({build})"
    driver = read_nvidia_driver()
    if torch.cuda.is_available():
        torch.ones(2, device="cuda").sum().item()
        gpus = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
        return "good", f"{name}, {gpus}, driver {driver or 'unknown'}", ""
    if driver:
        found = f"{name}: torch can't use the NVIDIA driver ({driver}); training runs on the CPU"
        return "warning", found, NEWER_DRIVER_FIX if torch.version.cuda else CUDA_BUILD_FIX
    return "good", f"{name}, no GPU: training runs on {torch.get_num_threads()} CPU threads", ""


def probe_bf16() -> CheckResult:
    """Check whether this device has fast bfloat16 arithmetic."""
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "good", "this GPU computes in bf16", ""
        return "warning", "this GPU has no bf16 arithmetic", FP32_FIX
    ratio = _time_product(torch.bfloat16) / _time_product(torch.float32)
    found = f"on this CPU, a matrix product in bf16 takes {ratio:.2g} times as long as in fp32"
    return ("warning", found, FP32_FIX) if ratio > SLOW_BF16 else ("good", found, "")


def _time_product(dtype: torch.dtype) -> float:
    a = torch.randn(512, 512).to(dtype)
    return min(timeit.repeat(lambda: torch.mm(a, a), number=1))


def probe_kernels() -> CheckResult:
    """Compare the kernels that are compiled for a GPU with torch's operations: their results, and attention's speed."""
    if not torch.cuda.is_available():
        return "good", "no GPU: attention over packed rows loops over the examples", ""
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    if (problem := find_kernel_problem(device)) is not None:
        return "warning", f"gated activations use torch's operations, which is slower: {problem}", KERNEL_FIX
    if (limit := find_unmet_requirement(BASE_SHAPE, device, dtype, trains_bias=False)) is not None:
        return "warning", f"attention over packed rows loops over the examples, which is slower: {limit}", KERNEL_FIX
    checked = check_kernel([BASE_SHAPE], device, dtype)
    if checked.problem is not None:
        found = f"attention over packed rows can't use one kernel, so it loops over the examples: {checked.problem}"
        return "warning", found, KERNEL_FIX
    seconds = measure_implementations(BASE_SHAPE, device, dtype, checked.num_stages)
    flex, loop = (f"{1000 * seconds[name]:.1f} ms" for name in ("flex", "loop"))
    return "good", f"attention over packed rows in one kernel: {flex}, and {loop} in a loop over the examples", ""


def probe_bitsandbytes() -> CheckResult:
    """Train on a base that is quantized to NF4."""
    import bitsandbytes

    seconds = _train_one_step("--q-lora", "--no-bf16")
    return "good", f"bitsandbytes {bitsandbytes.__version__}: one QLoRA step in {seconds:.1f} s", ""


def probe_processes() -> CheckResult:
    """Train in one process per GPU (NCCL), or in two on the CPU (gloo) if there is at most one GPU."""
    count = torch.cuda.device_count()
    flag, backend, size = ("--num-gpus", "nccl", count) if count > 1 else ("--num-processes", "gloo", 2)
    seconds = _train_one_step(flag, str(size))
    return "good", f"one step with {backend} in {format_count(size, 'process', 'processes')}, in {seconds:.1f} s", ""


def probe_deepspeed() -> CheckResult:
    """Train with ZeRO-3 on two GPUs, on one if there is only one, or in two processes on the CPU."""
    count = torch.cuda.device_count()
    version = import_deepspeed(on_cpu=not count).__version__
    flag, size = ("--num-gpus", min(2, count)) if count else ("--num-processes", 2)
    seconds = _train_one_step(flag, str(size), "--deepspeed", "zero3")
    return "good", f"deepspeed {version}: one ZeRO-3 step at world size {size} in {seconds:.1f} s", ""


def probe_training() -> CheckResult:
    """Train in one process."""
    seconds = _train_one_step()
    return "good", f"one LoRA step with the built-in model, from conversations to adapter, in {seconds:.1f} s", ""


def _train_one_step(*flags: str) -> float:
    """Train the built-in model with LoRA for one step, and return the seconds it took."""
    started = time.monotonic()
    # without the user's settings, which could fail for reasons that have nothing to do with the machine
    environment = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLE_PREFIX)}
    with tempfile.TemporaryDirectory(prefix="t5tune-doctor-") as folder:
        arguments = [*TRAIN_ONE_STEP.split(), str(Path(folder, "run")), *flags]
        code = start_module("t5tune", arguments, environment, None, in_fork=True).wait()
    if code:
        sys.exit(code)  # it has printed the error
    return time.monotonic() - started


PROBES: dict[str, Callable[[], CheckResult]] = {
    "torch": probe_torch,
    "bf16": probe_bf16,
    "kernels": probe_kernels,
    "bitsandbytes": probe_bitsandbytes,
    "processes": probe_processes,
    "deepspeed": probe_deepspeed,
    "training": probe_training,
}
