"""What DeepSpeed compiles at first use, and whether this machine can."""

import os
import shutil

SHARED_MEMORY_OP = "deepspeed_shm_comm"


def has_compiler() -> bool:
    """Whether torch's builder of extensions finds a C++ compiler and ninja."""
    return shutil.which(os.environ.get("CXX", "c++")) is not None and shutil.which("ninja") is not None
