"""DeepSpeed's ops, which are compiled at first use: missing build tools, and locks that a killed build leaves."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from t5tune.model.kernels.build_tools import find_missing_headers

MAX_COMPILE_SECONDS = 1800.0  # no op takes longer than this
# network filesystems: the process that holds a lock may run on a different machine
SHARED_FILESYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "9p", "fuse", "afs", "pvfs", "orangefs")


def compiles_for_offloading(config: dict[str, Any]) -> bool:
    """Whether a config compiles DeepSpeed's CPU optimizer, or its access to NVMe.

    Accelerate replaces torch's optimizer with DeepSpeed's unless zero_force_ds_cpu_optimizer is false, as it is in
    zero2-offload and zero3-offload.
    """
    zero = config.get("zero_optimization", {})
    optimizer, weights = (zero.get(f"offload_{name}", {}).get("device", "none") for name in ("optimizer", "param"))
    is_replaced = optimizer != "none" and config.get("zero_force_ds_cpu_optimizer", True)
    return is_replaced or "nvme" in (optimizer, weights)


def find_missing_build_tools() -> str | None:
    """Describe the missing tools or folder to compile an op; None: nothing is missing."""
    if shutil.which(os.environ.get("CXX", "c++")) is None or shutil.which("ninja") is None:
        return "a C++ compiler or ninja is missing from the PATH"
    if find_missing_headers("DeepSpeed compiles") is not None:
        return "Python's headers are missing"
    folder = _get_extensions_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        return None
    return f"{folder} isn't a writable folder; TORCH_EXTENSIONS_DIR can name a different folder"


def remove_stale_locks() -> list[Path]:
    """Remove the locks of builds whose process no longer runs, and return their paths.

    Torch's FileBaton creates the file and keeps it open during the build. A killed build leaves the file, and every
    later build waits for its removal, silently and without a timeout (torch 2.8 to 2.13; later releases lock the file
    instead). https://github.com/pytorch/pytorch/issues/189245
    """
    removed = []
    # each op has a folder, by default inside a folder for the Python and CUDA versions
    for lock in _get_extensions_folder().glob("**/lock"):
        aside = lock.with_name(f"lock.{os.getpid()}")
        with suppress(OSError):  # the lock was released meanwhile, or belongs to another user
            if _is_held(lock) or (_is_shared(lock) and time.time() - lock.stat().st_mtime < MAX_COMPILE_SECONDS):
                continue
            lock.rename(aside)
            if _is_held(aside):  # between the two checks, a rank took the lock and is building
                aside.rename(lock)
            else:
                aside.unlink()
                removed.append(lock)
    return removed


def _get_extensions_folder() -> Path:
    """Torch's get_default_build_root without importing torch: `doctor` calls this on machines where torch may hang."""
    caches = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.realpath(os.path.join(caches, "torch_extensions")))


def _is_held(lock: Path) -> bool:
    """Whether a process of this user on this machine has the file open."""
    name = str(lock.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # the process has ended, or belongs to another user
            if any(file.path == name for file in process.open_files()):
                return True
    return False


def _is_shared(path: Path) -> bool:
    """Whether the file is on a network filesystem, which other machines may mount too."""
    kinds = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((kinds[place] for place in path.resolve().parents if place in kinds), "")
    return kind.lower().startswith(SHARED_FILESYSTEMS)
