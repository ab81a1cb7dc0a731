"""Checks that load the libraries. Each runs in its own process, so that a crash doesn't affect the others.

    python -m t5tune.diagnosis.probes torch     prints a Finding as JSON, such as {"check": "torch", "state": "good", …}

A probe returns (state, result, how to fix a problem). It raises an error if a library doesn't work.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from t5tune.compat.bitsandbytes_patches import keep_training_layout
from t5tune.compat.deepspeed_patches import import_deepspeed
from t5tune.diagnosis.finding import CheckResult, Finding
from t5tune.io.processes import make_module_command
from t5tune.model.device import read_nvidia_driver

SLOW_BF16 = 3.0  # bf16 time / fp32 time of a matrix product above which a CPU has no useful bf16 arithmetic
MAX_RELATIVE_ERROR = 0.2  # of a product with NF4 weights, which have only 16 values
NEWER_DRIVER_FIX = "install a newer NVIDIA driver, or a torch build for an older CUDA version"
CUDA_BUILD_FIX = "pip install --force-reinstall torch, with the --index-url of a CUDA build"
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
    """Return the shortest time of a few matrix products, in seconds."""
    a = torch.randn(512, 512).to(dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return best


def probe_bitsandbytes() -> CheckResult:
    """Quantize a layer to NF4, run its forward pass, and compute the gradient of its input."""
    import bitsandbytes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 128, bias=False)
    layer = bitsandbytes.nn.Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    keep_training_layout(layer)
    layer.requires_grad_(False)
    layer.to(device)
    x = torch.randn(4, 256, device=device, requires_grad=True)
    output, expected = layer(x), plain.to(device)(x.detach())
    output.sum().backward()
    error = float((output - expected).norm() / expected.norm())
    assert error < MAX_RELATIVE_ERROR, f"NF4 products have an error of {error:.0%} on {device}"
    has_gradient = x.grad is not None and bool(x.grad.any())
    assert has_gradient, f"no gradient flows through an NF4 layer on {device}"
    found = f"bitsandbytes {bitsandbytes.__version__} computes with NF4 weights on {device} (error {error:.1%})"
    return "good", found, ""


def probe_collectives() -> CheckResult:
    """Run all-reduce in two processes on the CPU (gloo), or in one process per GPU (NCCL)."""
    backend, size = ("nccl", torch.cuda.device_count()) if torch.cuda.is_available() else ("gloo", 2)
    _run_in_processes(_check_all_reduce, size, backend)
    return "good", f"all-reduce with {backend} works in {size} processes", ""


def probe_deepspeed() -> CheckResult:
    """Train a tiny model for one step with ZeRO-3 in two processes, or fewer if there are fewer GPUs."""
    backend, size = ("nccl", min(2, torch.cuda.device_count())) if torch.cuda.is_available() else ("gloo", 2)
    version = import_deepspeed(on_cpu=backend == "gloo").__version__
    _run_in_processes(_check_zero3_step, size, backend)
    return "good", f"deepspeed {version} completes a ZeRO-3 step in {size} processes", ""


def probe_training() -> CheckResult:
    """Train the built-in model with LoRA for one step, in a temporary folder."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="t5tune-doctor-") as folder:
        settings = ["--config", "pocket", "--output-dir", str(Path(folder, "run")), "--num-data", "16"]
        command = make_module_command(
            "t5tune", "train", *settings, "--max-steps", "1", "--report-samples", "0", "--quiet"
        )
        # the user's own settings say nothing about the machine
        environment = {name: value for name, value in os.environ.items() if not name.startswith("T5TUNE_")}
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr.rpartition("error: ")[2] or f"t5tune train exited with code {done.returncode}")
    seconds = time.monotonic() - started
    return "good", f"one LoRA step with the built-in model, from conversations to adapter, in {seconds:.1f} s", ""


def _run_in_processes(function: Callable[[int, int, str, str], None], size: int, backend: str) -> None:
    """Run the function in `size` processes, with an address to meet; raises the error of the first one to fail."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="t5tune-doctor-") as folder:
        try:
            spawn(function, args=(size, backend, f"file://{folder}/meet"), nprocs=size)  # type: ignore[no-untyped-call]
        except ProcessRaisedException as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from None


def _check_all_reduce(rank: int, size: int, backend: str, place: str) -> None:
    dist.init_process_group(backend, init_method=place, rank=rank, world_size=size)
    total = torch.tensor([float(rank)], device=f"cuda:{rank}" if backend == "nccl" else "cpu")
    dist.all_reduce(total)
    assert total.item() == size * (size - 1) / 2, f"{backend} gave {total.item()}"
    dist.destroy_process_group()


def _check_zero3_step(rank: int, size: int, backend: str, place: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = import_deepspeed(on_cpu=backend == "gloo")
    deepspeed.init_distributed(
        backend, auto_mpi_discovery=False, verbose=False, init_method=place, rank=rank, world_size=size
    )
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    before = model.weight.detach().clone()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1_000_000_000,
        },
    )
    engine.backward(engine(torch.ones(1, 8, device=device, dtype=torch.bfloat16)).float().sum())
    engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        moved = (engine.module.weight.float().cpu() - before).abs().max().item()
    assert 0 < moved < 1, f"the weights changed by {moved}"
    dist.destroy_process_group()


PROBES: dict[str, Callable[[], CheckResult]] = {
    "torch": probe_torch,
    "bf16": probe_bf16,
    "bitsandbytes": probe_bitsandbytes,
    "processes": probe_collectives,
    "deepspeed": probe_deepspeed,
    "training": probe_training,
}


if __name__ == "__main__":
    # libraries may print to stdout: redirect them to stderr, and keep stdout for the result
    result = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    name = sys.argv[1]
    print(json.dumps(asdict(Finding(name, *PROBES[name]()))), file=result, flush=True)
