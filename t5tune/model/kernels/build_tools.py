"""Compilers for torch.compile, which compiles C++ for a CPU, and for a GPU the C code that starts kernels.

Both include Python's headers.
"""

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
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return MissingTool("no C++ compiler is on the PATH", "install g++ (apt install g++), or set CXX")
        return find_missing_headers("torch.compile compiles C++")
    # as Triton looks for them (triton/runtime/build.py, 3.4 to 3.9)
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        problem = "Triton compiles for the GPU with a C compiler, and there is no C compiler on the PATH"
        return MissingTool(problem, "install gcc (apt install gcc, or dnf install gcc), or set CC")
    return find_missing_headers("Triton compiles for the GPU")


def find_missing_headers(use: str) -> MissingTool | None:
    """Find whether Python's headers are missing for a `use` such as "Triton compiles for the GPU"."""
    folder = Path(sysconfig.get_path("include"))
    if (folder / "Python.h").is_file():
        return None
    problem = f"{use} with Python's headers, and {folder} has no Python.h"
    return MissingTool(problem, "install them (apt install python3-dev, or dnf install python3-devel)")
