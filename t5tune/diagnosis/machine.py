"""Checks that don't import torch: Python, package versions, compiler, folders, disk and memory."""

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from t5tune.compat.requirements import is_older, make_install_command, read_oldest_releases
from t5tune.diagnosis import CheckResult, Finding
from t5tune.formatting import GIB, shorten
from t5tune.io.reasons import join_lines
from t5tune.model.device import get_free_memory, read_nvidia_driver
from t5tune.model.kernels.build_tools import find_missing_compiler, find_missing_headers


def inspect_machine() -> list[Finding]:
    """Run all checks; an error in a check becomes a warning."""
    checks: dict[str, Callable[[], CheckResult]] = {
        "python": _check_python,
        "compiler": _check_compiler,
        "hub folder": _check_hub_folder,
        "disk": _check_disk,
        "memory": _check_memory,
    }
    findings = []
    for name, check in checks.items():
        try:
            findings.append(Finding(name, *check()))
        except Exception as error:
            found = f"can't be checked: {type(error).__name__}: {shorten(join_lines(error), 200)}"
            findings.append(Finding(name, "warning", found))
    return findings


def compare_versions() -> list[Finding]:
    """Compare package versions: one finding for all recent enough packages, and one for each other package."""
    findings, recent = [], []
    for package, oldest in read_oldest_releases().items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, "broken", "not installed", f"pip install '{package}>={oldest}'"))
            continue
        if is_older(version, oldest):
            found = f"{version}; t5tune needs {oldest} or newer"
            findings.append(Finding(package, "broken", found, make_install_command(package)))
        else:
            recent.append(f"{package} {version}")
    if recent:
        findings.append(Finding("packages", "good", ", ".join(recent)))
    return findings


def _check_python() -> CheckResult:
    return "good", f"Python {sys.version.split()[0]}, {sys.executable}", ""


def _check_compiler() -> CheckResult:
    # Triton compiles kernels at first use on a GPU, and DeepSpeed its CPU Adam, with some configs that offload
    if read_nvidia_driver() and (missing := find_missing_compiler(on_gpu=True)):
        return "warning", missing.what, f"{missing.fix}; needed for --torch-compile and for fused kernels"
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        fix = "apt install g++, or dnf install gcc-c++; needed for --torch-compile, and by some files for --deepspeed"
        return "warning", "no C++ compiler on PATH", fix
    if missing := find_missing_headers("torch.compile compiles C++"):
        return "warning", missing.what, f"{missing.fix}; needed for --torch-compile"
    if shutil.which("ninja") is None:
        fix = "pip install ninja, and add this Python's scripts folder to PATH"
        return "warning", f"{compiler}, but no ninja on PATH", fix
    return "good", f"{compiler} and ninja", ""


def _check_hub_folder() -> CheckResult:
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    home = Path(os.environ.get("HF_HOME") or Path(cache, "huggingface"))
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    fix = "export HF_HOME=/a/writable/folder"
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not _can_write(place):
        return "warning", f"{folder} can't be written, so models can't be downloaded", fix
    return "good", f"{folder} is writable", ""


def _check_disk() -> CheckResult:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.0f} GiB free in {folder}"
    if not _can_write(folder):
        return "warning", f"{folder} can't be written", "cd to a writable folder, or set --output-dir to one"
    if free < 5 * GIB:
        return "warning", found, "use an --output-dir on a larger disk; the checkpoints of an XL model take several GiB"
    return "good", found, ""


def _check_memory() -> CheckResult:
    available = get_free_memory() / GIB
    found = f"{available:.1f} GiB available"
    if available < 4:
        return "warning", found, "t5tune plan shows how much memory a model needs"
    return "good", found, ""


def _can_write(folder: Path) -> bool:
    """Try to write a file: permissions prove nothing on a read-only file system, or for root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
