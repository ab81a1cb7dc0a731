"""Where to compute, and how much memory it took."""

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

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of mallopt(3)
NVIDIA = Path("/proc/driver/nvidia/version")
SPINS = "3000"
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def choose_device(use_cpu: bool, local_rank: int = 0, name: str | None = None) -> Any:
    """The device of that name, else the GPU of this rank, else the CPU.

    Raises:
        SettingsError: torch knows no such device, or this machine has none.
    """
    import torch

    if name not in (None, "cpu"):
        try:
            return torch.zeros(1, device=name).device
        except (RuntimeError, AssertionError) as error:  # torch's words differ by device and by how it was built
            reason = str(error).splitlines()[0]
            raise SettingsError(f"device: {name}: {reason}", hint="cpu always works") from None
    if name == "cpu" or use_cpu or not torch.cuda.is_available():
        # DeepSpeed, which transformers imports, else looks for an accelerator and complains that there is none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def check_bf16(device: Any) -> None:
    """Refuse bf16 on a GPU that only emulates it: products take several times as long, and attention keeps all scores.

    Raises:
        SettingsError: the GPU has no bf16 arithmetic (NVIDIA's have it from compute capability 8.0 on).
    """
    import torch

    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise SettingsError(
            f"bf16: {torch.cuda.get_device_name(device)} has no bf16 arithmetic and would emulate it",
            hint="--no-bf16 computes in fp32, with --q-lora too",
        )


def nvidia_driver() -> str | None:
    """The NVIDIA driver's version as the kernel tells it; None: there is none."""
    try:
        words = NVIDIA.read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), "of an unknown version")


def keep_freed_memory() -> None:
    """Let glibc keep large tensors' memory for the next ones, in place of giving it back to Linux at once.

    Each step would get it anew, page by page, zeroed. What the user has set in the environment stays, and other C
    libraries stay as they are.
    """
    if sys.platform != "linux" or any(name in os.environ for name in MALLOC_VARIABLES):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 64 << 20)):
        libc.mallopt(option, value)


def wait_briefly() -> None:
    """Let the CPU's threads wait for each other awake for some microseconds, then asleep.

    GNU's OpenMP else spins for milliseconds, and takes the core from the thread it waits for wherever something
    else computes too. It reads this when torch is imported. What the user has set stays.
    """
    if not any(name in os.environ for name in SPIN_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPINS


@contextmanager
def memory_is_named(what: str, hint: str) -> Iterator[None]:
    """Tell of memory that wasn't there in a line.

    Args:
        what: what was being done, and with what batch.

    Raises:
        OutOfMemory: in place of the many errors by which torch and Python say so.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked = _ASKED.search(str(error))
        raise OutOfMemory(f"out of memory: {what}{f'; {asked[1]} at once' if asked else ''}", hint=hint) from error


_ASKED = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]iB))", re.IGNORECASE)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is one of the many by which torch and Python say that memory ran out."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or bool(_ASKED.search(str(error)))


def peak_memory(device: Any) -> int:
    """Bytes that this process held at its peak: of the GPU's memory, or on the CPU of the machine's."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        # getrusage would tell of the process that started this one, if that was larger
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
