"""What can be seen of the machine without loading a library: Python, versions, compiler, token, folders, room."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from t5tune.compat.requirements import is_older, oldest_releases, release_numbers, upgrade_command
from t5tune.diagnosis.finding import Finding, State

GIB = 1 << 30
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
# package -> the newest releases that the tests have run with; the oldest is what pyproject.toml asks for
NEWEST = {
    "torch": "2.13",
    "transformers": "5.24",
    "peft": "0.21",
    "accelerate": "1.15",
    "deepspeed": "0.19",
    "bitsandbytes": "0.50",
    "tokenizers": "0.23",
    "safetensors": "0.8",
    "huggingface-hub": "2",
    "numpy": "2",
    "pydantic": "2",
    "protobuf": "7",
}
PROGRAM = "#include <atomic>\nint main() { std::atomic<int> one{1}; return one.load() - 1; }\n"


def look() -> list[Finding]:
    """The findings, one a check; a check that fails makes a warning."""
    checks: dict[str, Callable[[], tuple[State, str, str]]] = {
        "python": _python,
        "compiler": _compiler,
        "hub token": _hub_token,
        "hub folder": _hub_folder,
        "disk": _disk,
        "memory": _memory,
    }
    findings = []
    for name, check in checks.items():
        try:
            findings.append(Finding(name, *check()))
        except Exception as error:
            found = f"can't be checked: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            findings.append(Finding(name, "warning", found))
    return findings


def compare_versions() -> list[Finding]:
    """One line for the packages whose releases the tests know, and one for each other."""
    findings, known = [], []
    for package, oldest in oldest_releases().items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, "broken", "not installed", f"pip install '{package}>={oldest}'"))
            continue
        newest = NEWEST.get(package)
        if is_older(version, oldest):
            found = f"{version}; t5tune needs {oldest} or newer"
            findings.append(Finding(package, "broken", found, upgrade_command(package, oldest)))
        elif newest is not None and release_numbers(version)[: len(release_numbers(newest))] > release_numbers(newest):
            mend = f"if something fails: pip install '{package}=={newest}.*'"
            findings.append(Finding(package, "warning", f"{version}; tested up to {newest}", mend))
        elif newest is not None:
            known.append(f"{package} {version}")
    if known:
        findings.append(Finding("packages", "good", ", ".join(known)))
    return findings


def _python() -> tuple[State, str, str]:
    version = sys.version_info[:2]
    found = f"Python {sys.version.split()[0]}, {sys.executable}"
    if version < OLDEST_PYTHON:
        return "broken", found, "install Python 3.11 or newer"
    if version > NEWEST_PYTHON:
        return (
            "warning",
            f"{found}; tested up to {'.'.join(map(str, NEWEST_PYTHON))}",
            "if something fails: Python 3.13",
        )
    return "good", found, ""


def _compiler() -> tuple[State, str, str]:
    """DeepSpeed compiles Adam for offloading at first use."""
    mend = "apt install g++ ninja-build, or dnf install gcc-c++ ninja-build; --deepspeed with offloading needs it"
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "warning", "no C++ compiler is on PATH", mend
    with tempfile.TemporaryDirectory(prefix="t5tune-doctor-") as folder:
        source, program = Path(folder, "one.cpp"), Path(folder, "one")
        source.write_text(PROGRAM, encoding="utf-8")
        done = subprocess.run([compiler, source, "-o", program], capture_output=True, timeout=60)
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
            return "warning", f"{compiler} can't compile: {words[0][:200]}", mend
    if shutil.which("ninja") is None:
        return (
            "warning",
            f"{compiler}, but no ninja on PATH",
            "pip install ninja, and put this Python's scripts on PATH",
        )
    return "good", f"{compiler} and ninja", ""


def _hub_token() -> tuple[State, str, str]:
    """Whether there is one; it is never shown."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "good", "set in the environment", ""
    path = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token")
    if path.is_file() and path.stat().st_size:
        return "good", f"stands in {path}", ""
    return "good", "none: public models can be loaded, gated ones need `hf auth login`", ""


def _hub_folder() -> tuple[State, str, str]:
    folder = Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub")
    mend = "export HF_HOME=/a/folder/of/yours"
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not _can_write(place):
        return "warning", f"{folder}: can't be written, so no model can be downloaded", mend
    return "good", f"{folder} can be written", ""


def _disk() -> tuple[State, str, str]:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.0f} GiB free in {folder}"
    if not _can_write(folder):
        return "warning", f"{folder} can't be written", "cd to a folder of yours, or give an --output-dir elsewhere"
    if free < 5 * GIB:
        return (
            "warning",
            found,
            "a run of an XL model with its checkpoints takes some GiB; give an --output-dir elsewhere",
        )
    return "good", found, ""


def _memory() -> tuple[State, str, str]:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    values = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
    available, total = values["MemAvailable"] / GIB, values["MemTotal"] / GIB
    found = f"{available:.1f} of {total:.1f} GiB available"
    if available < 4:
        return "warning", found, "t5tune plan tells what a model needs"
    return "good", found, ""


def _can_write(folder: Path) -> bool:
    """By writing: permissions say yes on file systems that are mounted read-only, and to root always."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _hub_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(os.environ.get("HF_HOME") or Path(cache, "huggingface"))
