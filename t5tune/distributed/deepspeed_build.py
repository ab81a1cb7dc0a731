"""What DeepSpeed compiles at first use, whether this machine can, and what a compilation that was cut off leaves."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

SECONDS_TO_COMPILE = 1800.0  # no op takes longer
# where a lock may be held by a process of another machine
SHARED_FILESYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "9p", "fuse", "afs", "pvfs", "orangefs")


def leave_out_shared_memory() -> None:
    """Keep DeepSpeed's ranks on CPUs from compiling sums through shared memory, which takes a minute and a compiler.

    Only its inference calls them (deepspeed.comm.inference_all_reduce); in training gloo sums either way.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def lack() -> str | None:
    """What is missing here to compile an op and keep it, in words; None: nothing."""
    if shutil.which(os.environ.get("CXX", "c++")) is None or shutil.which("ninja") is None:
        return "no C++ compiler or no ninja is on the PATH"
    folder = _extensions()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return f"{folder} can't be made, and TORCH_EXTENSIONS_DIR names no other"
    return None if os.access(folder, os.W_OK) else f"{folder} can't be written, and TORCH_EXTENSIONS_DIR names no other"


def release_dead_locks() -> list[Path]:
    """Remove the locks of compilations whose process is gone, for whose end every later one waits without a word.

    torch.utils.file_baton makes such a file and keeps it open; whoever is killed while compiling leaves it. Returns
    those that were removed.
    """
    removed = []
    for lock in _extensions().glob("**/lock"):  # each op in a folder, that by default in one of its Python and CUDA
        aside = lock.with_name(f"lock.{os.getpid()}")
        with suppress(OSError):  # released meanwhile, or not ours
            if _is_held(lock) or (_is_shared(lock) and time.time() - lock.stat().st_mtime < SECONDS_TO_COMPILE):
                continue
            lock.rename(aside)
            if _is_held(aside):  # another rank was faster, and compiles
                aside.rename(lock)
            else:
                aside.unlink()
                removed.append(lock)
    return removed


def _extensions() -> Path:
    """Torch's get_default_build_root, without loading torch: doctor asks too, where torch may hang."""
    caches = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.realpath(os.path.join(caches, "torch_extensions")))


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the file open."""
    name = str(lock.resolve())
    return any(name in _open_files(process) for process in Path("/proc").glob("[0-9]*"))


def _open_files(process: Path) -> set[str]:
    """Of a folder of /proc; none where the process has ended or is another user's."""
    files = set()
    with suppress(OSError):
        for number in os.listdir(process / "fd"):
            with suppress(OSError):  # closed meanwhile
                files.add(os.readlink(process / "fd" / number))
    return files


def _is_shared(path: Path) -> bool:
    """Whether other machines may see this file too."""
    import psutil

    kinds = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((kinds[place] for place in path.resolve().parents if place in kinds), "")
    return kind.lower().startswith(SHARED_FILESYSTEMS)
