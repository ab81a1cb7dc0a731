"""What DeepSpeed compiles at first use, and whether this machine can."""

import os
import shutil
from pathlib import Path

SHARED_MEMORY_OP = "deepspeed_shm_comm"


def lack() -> str | None:
    """What is missing here to compile an op and keep it, in words; None: nothing."""
    if shutil.which(os.environ.get("CXX", "c++")) is None or shutil.which("ninja") is None:
        return "no C++ compiler or no ninja is on the PATH"
    from torch.utils.cpp_extension import get_default_build_root

    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return f"{folder} can't be made, and TORCH_EXTENSIONS_DIR names no other"
    return None if os.access(folder, os.W_OK) else f"{folder} can't be written, and TORCH_EXTENSIONS_DIR names no other"
