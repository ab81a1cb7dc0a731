"""The device to compute on, and its memory."""

import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t5tune.errors import OutOfMemory, SettingsError

# parameters of mallopt(3), from glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
DOCTOR_HINT = "t5tune doctor says how to fix that"
CGROUP_FOLDER = Path("/sys/fs/cgroup")
NVIDIA_DRIVER_FILE = Path("/proc/driver/nvidia/version")
SPIN_COUNT = "3000"
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def choose_device(use_cpu: bool, local_rank: int = 0, name: str | None = None) -> Any:
    """Return the named device, else the GPU of this rank, else the CPU.

    A launcher may show each process all GPUs of the machine, or only its GPU, as SLURM's `--gpus-per-task=1`.

    Raises:
        SettingsError: torch doesn't know the device, or this machine doesn't have it.
    """
    import torch

    if name not in (None, "cpu"):
        try:
            device = torch.zeros(1, device=name).device
            if name != "cuda":  # without a number, each rank takes its GPU
                return device
        except NotImplementedError:  # torch's message lists all of its backends
            raise SettingsError(f"device: {name}: this torch can't compute on it", hint="cpu always works") from None
        except (RuntimeError, AssertionError, ImportError) as error:  # it differs by device and by torch's build
            reason = str(error).splitlines()[0]
            raise SettingsError(f"device: {name}: {reason}", hint="cpu always works") from None
    if name == "cpu" or use_cpu or not torch.cuda.is_available():
        # transformers imports DeepSpeed, which would otherwise look for an accelerator and warn that it found nothing
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def check_bf16(device: Any) -> None:
    """Refuse bf16 on a GPU that only emulates it: products take several times as long, and attention stores all scores.

    Raises:
        SettingsError: the GPU has no bf16 arithmetic.
    """
    import torch

    if device.type == "cuda" and not has_bf16(device):
        raise SettingsError(
            f"bf16: {torch.cuda.get_device_name(device)} has no bf16 arithmetic and would emulate it",
            hint="use --no-bf16 to compute in fp32, also with --q-lora",
        )


def has_bf16(device: Any) -> bool:
    """Whether this is a GPU with bf16 arithmetic (NVIDIA GPUs since compute capability 8.0)."""
    import torch

    return device.type == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def can_compute_bf16(device: Any) -> bool:
    """Whether a model can compute in bf16: on GPUs with bf16 arithmetic, and on CPUs, though some are slow."""
    import torch

    if device.type == "cuda":
        return has_bf16(device)
    try:
        ones = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        ones.mm(ones)
    except (RuntimeError, TypeError):  # Apple's GPUs before macOS 14
        return False
    return True


def describe_device(device: Any) -> str:
    """Name a device in a message: `Tesla T4`, `this CPU`."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "this CPU" if device.type == "cpu" else f"the device {device}"


@contextmanager
def use_gpu_kernels(device: Any, tf32: bool = False) -> Iterator[None]:
    """Choose among torch's kernels for a GPU in this block; do nothing on other devices.

    - cuDNN's attention is off: it makes a plan for every new shape, which takes tens of milliseconds, and packed rows
      and generation have new shapes all the time.
    - `tf32` (multiply fp32 matrices in TensorFloat-32) is set by `torch.set_float32_matmul_precision`. transformers
      sets `torch.backends.fp32_precision = "tf32"`, after which torch's older functions raise an error.
    """
    import torch

    if device.type != "cuda":
        yield
        return
    kernels: Any = torch.backends.cuda
    precision, cudnn = torch.get_float32_matmul_precision(), kernels.cudnn_sdp_enabled()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    kernels.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        kernels.enable_cudnn_sdp(cudnn)
        torch.set_float32_matmul_precision(precision)


def read_nvidia_driver() -> str | None:
    """Read the version of the NVIDIA driver from Linux; None without a driver."""
    try:
        words = NVIDIA_DRIVER_FILE.read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown version")


@contextmanager
def manage_memory_for_loading(device: Any, is_partitioned: bool = False) -> Iterator[None]:
    """On a CPU, return freed memory to Linux while a model is loaded in this block, and keep it afterwards.

    If ZeRO-3 partitions the model, freed memory is returned afterwards, too: a step gathers and frees weights between
    its activations, where they would leave holes.
    """
    if device.type == "cpu":
        return_freed_memory()
    yield
    if device.type == "cpu" and not is_partitioned:
        keep_freed_memory()


def return_freed_memory() -> None:
    """Make glibc return each freed tensor to Linux. Otherwise loading leaves holes between ZeRO-3's partitions."""
    _set_malloc_options({M_MMAP_THRESHOLD: 1 << 17})


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of freed tensors. Otherwise Linux maps and zeroes these pages again in each step."""
    _set_malloc_options({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 1 << 30, M_TOP_PAD: 64 << 20})


def _set_malloc_options(options: dict[int, int]) -> None:
    """Call mallopt(3), unless the user has set values in the environment, or the C library isn't glibc."""
    if sys.platform != "linux" or any(name in os.environ for name in MALLOC_VARIABLES):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    for option, value in options.items():
        libc.mallopt(option, value)


def limit_openmp_spinning() -> None:
    """Make OpenMP threads spin briefly before sleeping.

    By default GNU's OpenMP spins for milliseconds; when other processes use the CPU too, the spinning thread takes the
    core from the very thread that it waits for. OpenMP reads the variable when torch is imported.
    """
    if not any(name in os.environ for name in SPIN_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def let_gpu_memory_grow() -> None:
    """Make torch's GPU allocator extend its segments, instead of reserving a new segment for each size.

    Packed rows have a different length in each step, which would leave more and more reserved memory unused. torch
    reads the variable when it first uses a GPU; the second is its older name.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


@contextmanager
def explain_out_of_memory(what: str, hint: str) -> Iterator[None]:
    """Turn the various out-of-memory errors of torch and Python into OutOfMemory, one line with a hint.

    `what` is the operation that needs the memory, and its batch.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        requested = _REQUESTED_SIZE.search(str(error))
        allocation = f"; tried to allocate {requested[1]}" if requested else ""
        raise OutOfMemory(f"out of memory: {what}{allocation}", hint=hint) from error


_REQUESTED_SIZE = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]iB))", re.IGNORECASE)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error) or bool(_REQUESTED_SIZE.search(str(error)))


# texts of the CUDA and HIP errors after which every later call in the process fails; CTranslate2 has no codes for them
_LOST_DEVICE = re.compile(
    "illegal memory access|illegal instruction|misaligned address|invalid program counter|hardware stack error|"
    "device-side assert|unspecified launch failure|launch timed out|uncorrectable|"
    "not supported on global/shared address space"
)


def is_device_lost(error: Exception) -> bool:
    """Whether after an error of torch or CTranslate2 this process can no longer use its GPU."""
    return bool(_LOST_DEVICE.search(str(error)))


def get_peak_memory(device: Any) -> int:
    """Return the peak memory of this process in bytes: GPU memory on a GPU, else resident memory."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        # ru_maxrss is inherited from the process that started this one, if that was larger; VmHWM isn't
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def get_reserved_memory(device: Any) -> dict[str, int]:
    """Return the peak of the GPU memory that torch reserved, in bytes, as `peak_reserved_bytes`; nothing for a CPU.

    It includes memory that torch's allocator keeps for later or loses to fragmentation: it shows how full the GPU is.
    """
    if device.type != "cuda":
        return {}
    import torch

    return {"peak_reserved_bytes": int(torch.cuda.max_memory_reserved(device))}


def get_free_memory() -> int:
    """Return the bytes that are free on the machine and within the container's limit."""
    import psutil

    available = int(psutil.virtual_memory().available)
    try:
        # cgroup v2; memory of inactive files is page cache, which Linux can reclaim
        limit, used = ((CGROUP_FOLDER / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (CGROUP_FOLDER / "memory.stat").read_text().splitlines())
        cached = statistics["inactive_file"]
    except (OSError, KeyError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - int(used) + int(cached))
