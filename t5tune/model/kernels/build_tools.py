"""Compilers for torch.compile, which compiles C++ for a CPU, and for a GPU the C code that starts kernels."""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import NamedTuple


class MissingTool(NamedTuple):
    what: str
    fix: str


def find_missing_compiler(on_gpu: bool) -> MissingTool | None:
    """Find the tool that torch.compile lacks to compile for a CPU, or with Triton for a GPU."""
    if not on_gpu:
        if shutil.which(os.environ.get("CXX", "g++")) is not None:
            return None
        return MissingTool("no C++ compiler is on the PATH", "install g++ (apt install g++), or set CXX")
    # as Triton looks for them (triton/runtime/build.py, 3.4 to 3.9)
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        problem = "Triton compiles for the GPU with a C compiler, and there is no C compiler on the PATH"
        return MissingTool(problem, "install gcc (apt install gcc, or dnf install gcc), or set CC")
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").is_file():
        problem = f"Triton compiles for the GPU with Python's headers, and {folder} has no Python.h"
        return MissingTool(problem, "install them (apt install python3-dev, or dnf install python3-devel)")
    return None
