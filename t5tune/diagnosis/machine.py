"""Checks that load no library: Python, package versions, compiler, Hugging Face token, folders, disk and memory."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from t5tune.compat.requirements import is_older, make_upgrade_command, parse_release, read_oldest_releases
from t5tune.diagnosis.finding import CheckResult, Finding

GIB = 1 << 30
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
# package -> newest release that the tests have run with; the oldest supported one is in pyproject.toml
NEWEST_TESTED = {
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
TEST_PROGRAM = "#include <atomic>\nint main() { std::atomic<int> one{1}; return one.load() - 1; }\n"


def inspect_machine() -> list[Finding]:
    """Run all checks; one that raises an error results in a warning."""
    checks: dict[str, Callable[[], CheckResult]] = {
        "python": _check_python,
        "compiler": _check_compiler,
        "hub token": _check_hub_token,
        "hub folder": _check_hub_folder,
        "disk": _check_disk,
        "memory": _check_memory,
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
    """Compare package versions: one finding for all tested releases, and one for each package outside that range."""
    findings, known = [], []
    for package, oldest in read_oldest_releases().items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, "broken", "not installed", f"pip install '{package}>={oldest}'"))
            continue
        newest = NEWEST_TESTED.get(package)
        if is_older(version, oldest):
            found = f"{version}; t5tune needs {oldest} or newer"
            findings.append(Finding(package, "broken", found, make_upgrade_command(package, oldest)))
        elif newest is not None and parse_release(version)[: len(parse_release(newest))] > parse_release(newest):
            fix = f"if something fails, pip install '{package}=={newest}.*'"
            findings.append(Finding(package, "warning", f"{version}; tested up to {newest}", fix))
        elif newest is not None:
            known.append(f"{package} {version}")
    if known:
        findings.append(Finding("packages", "good", ", ".join(known)))
    return findings


def _check_python() -> CheckResult:
    version = sys.version_info[:2]
    found = f"Python {sys.version.split()[0]}, {sys.executable}"
    if version < OLDEST_PYTHON:
        return "broken", found, "install Python 3.11 or newer"
    if version > NEWEST_PYTHON:
        return (
            "warning",
            f"{found}; tested up to {'.'.join(map(str, NEWEST_PYTHON))}",
            "if something fails, use Python 3.13",
        )
    return "good", found, ""


def _check_compiler() -> CheckResult:
    """Check for a C++ compiler and ninja: DeepSpeed compiles its CPU Adam for offloading at first use."""
    fix = "apt install g++ ninja-build, or dnf install gcc-c++ ninja-build; needed for --deepspeed with offloading"
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "warning", "no C++ compiler on PATH", fix
    with tempfile.TemporaryDirectory(prefix="t5tune-doctor-") as folder:
        source, program = Path(folder, "one.cpp"), Path(folder, "one")
        source.write_text(TEST_PROGRAM, encoding="utf-8")
        done = subprocess.run([compiler, source, "-o", program], capture_output=True, timeout=60)
        if done.returncode:
            errors = done.stderr.decode(errors="replace").strip().splitlines() or ["no error message"]
            return "warning", f"{compiler} can't compile: {errors[0][:200]}", fix
    if shutil.which("ninja") is None:
        return (
            "warning",
            f"{compiler}, but no ninja on PATH",
            "pip install ninja, and add this Python's scripts folder to PATH",
        )
    return "good", f"{compiler} and ninja", ""


def _check_hub_token() -> CheckResult:
    """Check whether there is a Hugging Face token, without ever showing it."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "good", "set in the environment", ""
    path = Path(os.environ.get("HF_TOKEN_PATH") or _find_hub_home() / "token")
    if path.is_file() and path.stat().st_size:
        return "good", f"set in {path}", ""
    return "good", "none: public models can be downloaded, gated ones need `hf auth login`", ""


def _check_hub_folder() -> CheckResult:
    folder = Path(os.environ.get("HF_HUB_CACHE") or _find_hub_home() / "hub")
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
        return (
            "warning",
            found,
            "the checkpoints of an XL model take several GiB; set --output-dir to another disk",
        )
    return "good", found, ""


def _check_memory() -> CheckResult:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    values = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
    available, total = values["MemAvailable"] / GIB, values["MemTotal"] / GIB
    found = f"{available:.1f} of {total:.1f} GiB available"
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


def _find_hub_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(os.environ.get("HF_HOME") or Path(cache, "huggingface"))
