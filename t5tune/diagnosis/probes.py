"""Checks that load the libraries. Each runs in a process of its own, so that none can hurt another.

    python -m t5tune.diagnosis.probes torch     prints {"state": "good", "found": "...", "mend": ""}

A probe returns (state, found, mend); what it raises is a library that doesn't work.
"""

import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from t5tune.diagnosis.finding import State
from t5tune.distributed.deepspeed_build import leave_out_shared_memory
from t5tune.model.device import nvidia_driver

Probed = tuple[State, str, str]
SLOW_BF16 = 3.0  # times fp32's time for a product, from which on a CPU has no bf16 arithmetic to speak of
LARGEST_ERROR = 0.2  # of a product with NF4 weights, relative: they have 16 values
NEWER_DRIVER = "install a newer NVIDIA driver, or pip install a torch built for an older CUDA"


def try_torch() -> Probed:
    """torch's build beside the driver that it finds."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    name = f"torch {torch.__version__} ({build})"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.cuda.is_available():
        torch.ones(2, device="cuda").sum().item()
        return "good", f"{name}, {len(gpus)} × {gpus[0]}, driver {nvidia_driver() or 'unknown'}", ""
    if driver := nvidia_driver():
        reason = f"an NVIDIA driver ({driver}) is here, but torch can't use it"
        mend = NEWER_DRIVER if torch.version.cuda else "pip install --force-reinstall torch, from a CUDA build's index"
        return "warning", f"{name}: {reason}; training runs on the CPU", mend
    return "good", f"{name}, no GPU: training runs on {torch.get_num_threads()} CPU threads", ""


def try_bf16() -> Probed:
    """Whether this device computes in bfloat16, or only pretends to."""
    import torch

    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "good", "this GPU computes in bf16", ""
        return (
            "warning",
            "this GPU has no bf16 arithmetic",
            "train in fp32: leave --bf16 out, and --no-bf16 with --q-lora",
        )
    fp32_seconds, bf16_seconds = (_product_seconds(torch, dtype) for dtype in (torch.float32, torch.bfloat16))
    ratio = bf16_seconds / fp32_seconds
    if ratio > SLOW_BF16:
        return (
            "warning",
            f"a bf16 product takes {ratio:.0f} times as long as one in fp32 on this CPU",
            "train in fp32: leave --bf16 out, and give --no-bf16 with --q-lora",
        )
    return "good", f"a bf16 product takes {ratio:.2f} of one in fp32 on this CPU", ""


def try_bitsandbytes() -> Probed:
    """Quantise a layer to NF4, multiply, and take the gradient of its input."""
    import torch
    from bitsandbytes import __version__
    from bitsandbytes.nn import Linear4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 128, bias=False)
    layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    layer.support_avx512bf16_for_cpu = False  # see model/load.py
    layer.requires_grad_(False)
    layer.to(device)
    x = torch.randn(4, 256, device=device, requires_grad=True)
    output, expected = layer(x), plain.to(device)(x.detach())
    output.sum().backward()
    error = float((output - expected).norm() / expected.norm())
    if x.grad is None or not x.grad.abs().sum() > 0:
        return (
            "broken",
            f"bitsandbytes {__version__}: no gradient passes an NF4 layer on {device}",
            _again("bitsandbytes"),
        )
    if not error < LARGEST_ERROR:
        return (
            "broken",
            f"bitsandbytes {__version__}: NF4 products are {error:.0%} off on {device}",
            _again("bitsandbytes"),
        )
    return "good", f"bitsandbytes {__version__} quantises and multiplies in NF4 on {device} ({error:.1%} off)", ""


def try_collectives() -> Probed:
    """Two processes on the CPU (gloo) or one for each GPU (NCCL) add up their ranks."""
    import torch

    backend, size = ("nccl", torch.cuda.device_count()) if torch.cuda.is_available() else ("gloo", 2)
    _in_processes(_all_reduce, size, backend)
    return "good", f"{backend} adds up over {size} processes", ""


def try_deepspeed() -> Probed:
    """Two processes (with GPUs: at most one for each) take a step of a tiny model under ZeRO-3."""
    import torch

    size = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    with redirect_stdout(io.StringIO()):
        from deepspeed import __version__
    _in_processes(_zero3_step, size, "nccl" if torch.cuda.is_available() else "gloo")
    return "good", f"deepspeed {__version__} takes a step under ZeRO-3 in {size} processes", ""


def try_training() -> Probed:
    """The main job: a step of LoRA on the built-in model, into a folder that is deleted."""
    from t5tune.commands.train import train
    from t5tune.settings import TrainSettings, load_settings

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="t5tune-doctor-") as folder:
        flags = {"output_dir": str(Path(folder, "run")), "max_steps": "1", "report_samples": "0", "num_data": "16"}
        train(load_settings(TrainSettings, "pocket", {}, flags)[0])
    seconds = time.monotonic() - started
    return "good", f"a step of LoRA on the built-in model, from conversations to adapter, in {seconds:.1f} s", ""


def _again(package: str) -> str:
    return f"pip install --upgrade --force-reinstall {package}"


def _product_seconds(torch: Any, dtype: Any) -> float:
    """The best of a few products of matrices, in seconds."""
    a = torch.randn(512, 512).to(dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return best


def _in_processes(function: Callable[[int, int, str, str], None], size: int, backend: str) -> None:
    """Run the function in `size` processes that can meet. Raises what the first to fail raised."""
    from torch.multiprocessing.spawn import ProcessRaisedException, spawn

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="t5tune-doctor-") as folder:
        try:
            spawn(function, args=(size, backend, f"file://{folder}/meet"), nprocs=size)  # type: ignore[no-untyped-call]
        except ProcessRaisedException as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from None


def _all_reduce(rank: int, size: int, backend: str, place: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group(backend, init_method=place, rank=rank, world_size=size)
    total = torch.tensor([float(rank)], device=f"cuda:{rank}" if backend == "nccl" else "cpu")
    dist.all_reduce(total)
    assert total.item() == size * (size - 1) / 2, f"{backend} gave {total.item()}"
    dist.destroy_process_group()


def _zero3_step(rank: int, size: int, backend: str, place: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    with redirect_stdout(io.StringIO()):
        import deepspeed
        import torch.distributed as dist

        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            torch.cuda.set_device(device)
        else:
            leave_out_shared_memory()
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
    assert 0 < moved < 1, f"the weights moved by {moved}"
    dist.destroy_process_group()


PROBES: dict[str, Callable[[], Probed]] = {
    "torch": try_torch,
    "bf16": try_bf16,
    "bitsandbytes": try_bitsandbytes,
    "processes": try_collectives,
    "deepspeed": try_deepspeed,
    "training": try_training,
}


if __name__ == "__main__":
    # what libraries print is not the answer
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    state, found, mend = PROBES[sys.argv[1]]()
    print(json.dumps({"state": state, "found": found, "mend": mend}), file=answers, flush=True)
