"""doctor on a working machine and on deliberately broken ones: one line per check, and never a traceback."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from t5tune.commands import doctor as doctor_module
from t5tune.commands.doctor import _run_probes
from t5tune.compat.requirements import check_versions, read_oldest_releases
from t5tune.diagnosis import Finding, machine, probes
from t5tune.diagnosis.probe_runner import PROBE_HINTS
from tests.support.paths import REPOSITORY
from tests.support.processes.command_line import t5tune, t5tune_in_fork

pytestmark = pytest.mark.slow

CANARY = "hf_canary0123456789"


def make_path_with_module(folder: Path, module: str, text: str) -> str:
    """Make a PYTHONPATH on which a module is replaced by `text`."""
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(text)
    return os.pathsep.join([str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])


def make_path_with_requirements(folder: Path, *requirements: str) -> str:
    """Make a PYTHONPATH on which t5tune is installed with only these requirements."""
    metadata = folder / "t5tune-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    lines = ["Metadata-Version: 2.4", "Name: t5tune", "Version: 0.1.0", *(f"Requires-Dist: {r}" for r in requirements)]
    metadata.write_text("\n".join(lines) + "\n")
    return os.pathsep.join([str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])


def index_by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


@pytest.mark.long
def test_a_working_machine_is_good_and_its_token_stays_secret() -> None:
    done = t5tune("doctor", "--json", env={"HF_TOKEN": CANARY})
    assert done.code == 0, done.stdout + done.stderr
    found = {finding["check"]: finding for finding in done.json["findings"]}
    assert done.json["ok"] is True
    assert {"python", "compiler", "hub folder", "disk", "memory", *PROBE_HINTS} <= found.keys()
    assert {name: found[name]["state"] for name in PROBE_HINTS if name != "bf16"} == dict.fromkeys(
        ("torch", "kernels", "bitsandbytes", "processes", "deepspeed", "training"), "good"
    )
    assert CANARY not in done.stdout + done.stderr
    for finding in (Finding(**finding) for finding in found.values()):
        assert bool(finding.mend) is (finding.state != "good"), finding


@pytest.mark.parametrize("locale", ["de_DE.ISO-8859-1", "C"])
def test_a_broken_machine_gets_plain_lines_and_exit_code_1(locale: str, tmp_path: Path) -> None:
    """No torch, no compiler, no home, 80 columns, a dumb terminal, no colors, a pipe, another encoding."""
    env = {
        "PYTHONPATH": make_path_with_module(tmp_path, "torch", 'raise ImportError("broken on purpose: Größe")'),
        "PATH": str(tmp_path),
        "HOME": "/proc/nowhere",
        "XDG_CACHE_HOME": "",
        "HF_HOME": "",
        "COLUMNS": "80",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "LC_ALL": locale,
    }
    done = t5tune("doctor", env=env)
    assert done.code == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "training can't run here: fix the problems above"
    for name in PROBE_HINTS:
        (line,) = [line for line in lines if line.startswith(f"broken  {name} ")]
        assert "ImportError: broken on purpose" in line
        assert lines[lines.index(line) + 1].lstrip().startswith("fix: ")
    assert any(line.startswith("warning compiler ") for line in lines)
    assert any(line.startswith("warning hub folder ") and "can't be written" in line for line in lines)
    assert "Traceback" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "text", "found"),
    [
        ("bitsandbytes", 'raise ModuleNotFoundError("no bitsandbytes")', "ModuleNotFoundError: no bitsandbytes"),
        ("torch", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed with SIGSEGV"),
        ("torch", "import os; os._exit(7)", "exited with code 7 and no output"),
        ("torch", "import threading; threading.Event().wait()", "no result within 2 s"),
    ],
)
def test_a_library_that_fails_results_in_one_finding(
    module: str, text: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", make_path_with_module(tmp_path, module, text))
    (finding,) = _run_probes(["bitsandbytes"], timeout=2 if "wait" in text else 60)
    assert finding.state == ("warning" if "wait" in text else "broken")  # a slow library may still work
    assert found in finding.found
    assert ("--timeout" if "wait" in text else "pip install") in finding.mend


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # the process that runs the probes crashes once a probe needs the library
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed with SIGSEGV"),
        ('raise ImportError("no accelerate today")', "no accelerate today"),
    ],
)
def test_a_broken_library_breaks_only_the_probes_that_use_it(
    text: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", make_path_with_module(tmp_path, "accelerate", text))
    findings = index_by_check([*_run_probes(["torch", "training"], timeout=120)])
    assert findings["torch"].state == "good", findings
    assert findings["training"].state == "broken"
    assert found in findings["training"].found
    assert not findings["training"].found.startswith("error:")


def test_ctrl_c_ends_all_processes_of_doctor() -> None:
    command = [sys.executable, "-m", "t5tune", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(started := psutil.Process(process.pid).children(recursive=True)) < 2:  # the runner and a probe
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive


def test_only_checks_that_training_needs_decide_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from t5tune.settings import DoctorSettings

    def is_ok(broken: str) -> bool:
        def run(names: list[str], _: float) -> list[Finding]:
            return [Finding(name, "broken" if name == broken else "good", "") for name in names]

        monkeypatch.setattr(doctor_module, "_run_probes", run)
        return doctor_module.doctor(DoctorSettings()).ok

    assert [is_ok(name) for name in ("nothing", "bitsandbytes", "deepspeed", "torch", "training")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_modules_that_forks_share_do_not_use_the_gpu() -> None:
    """CUDA doesn't work in the fork of a process that has used it, nor has a fork its parent's threads."""
    code = """
import importlib, os
from t5tune.compat.lazy_imports import import_lazily
import_lazily(uses_only_t5=True)
import torch
calls = []
for name in ("is_available", "device_count", "init", "is_bf16_supported"):
    setattr(torch.cuda, name, lambda *_, name=name: calls.append(name))
for name in ("t5tune.diagnosis.probes", "t5tune.training.run"):
    importlib.import_module(name)
print(calls, os.listdir("/proc/self/task") == [str(os.getpid())])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\n"


def test_versions_are_compared_with_the_oldest_supported_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare_with_versions(versions: dict[str, str]) -> dict[str, Finding]:
        real: Callable[[str], str] = machine.importlib.metadata.version
        with monkeypatch.context() as patch:
            patch.setattr(machine.importlib.metadata, "version", lambda name: versions.get(name) or real(name))
            return index_by_check(machine.compare_versions())

    found = compare_with_versions({"torch": "2.1.0+cu118", "transformers": "5.23.1"})
    assert found["torch"].state == "broken"
    assert "torch" not in found["packages"].found
    oldest = read_oldest_releases()["torch"]
    assert f"t5tune needs {oldest} or newer" in found["torch"].found
    assert f"pip install --upgrade 'torch>={oldest}'" in found["torch"].mend
    assert "transformers 5.23.1" in found["packages"].found


def test_too_old_a_release_is_refused_with_the_upgrade_command(tmp_path: Path) -> None:
    """doctor's check, train and chat compare versions with the requirements that the installed t5tune declares."""
    env = {
        "PYTHONPATH": make_path_with_requirements(
            tmp_path, "transformers<99.9,>=99.5", "numpy>=1.26", "absent-package>=1.0; extra == 'x'"
        )
    }
    version = importlib.metadata.version("transformers")
    code = "import json; from t5tune.diagnosis.machine import compare_versions as compare; "
    code += "print(json.dumps([vars(finding) for finding in compare()]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    found = index_by_check([Finding(**finding) for finding in json.loads(done.stdout)])
    assert found["transformers"] == Finding(
        "transformers",
        "broken",
        f"{version}; t5tune needs 99.5 or newer",
        "pip install --upgrade 'transformers>=99.5,<99.9'",
    )
    assert found["packages"].found.startswith("numpy ")
    assert "absent-package" not in found

    run = ("--data-path", "pocket", "--output-dir", tmp_path / "run")
    for command in (("train", *run), ("train", *run, "--dry-run"), ("chat", "--prompt", "hello")):
        done = t5tune_in_fork(*command, "--model-name-or-path", "pocket", env=env)
        assert (done.code, done.errors) == (
            1,
            [
                f"error: transformers: version {version} is installed; t5tune needs 99.5 or newer; "
                "pip install --upgrade 'transformers>=99.5,<99.9'"
            ],
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("package", "flags"),
    [("bitsandbytes", ("--q-lora",)), ("deepspeed", ("--deepspeed", "zero2"))],
)
def test_only_libraries_that_a_run_uses_must_be_recent(package: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    env = {"PYTHONPATH": make_path_with_requirements(tmp_path, f"{package}>=99.5")}
    run = ("train", "--model-name-or-path", "pocket", "--data-path", "pocket", "--output-dir", tmp_path / "run")
    assert t5tune_in_fork(*run, "--dry-run", env=env).code == 0
    done = t5tune_in_fork(*run, "--dry-run", *flags, env=env)
    assert done.code == 1
    (error,) = done.errors
    assert f"{package}: version {importlib.metadata.version(package)} is installed; t5tune needs 99.5" in error


def test_no_version_is_refused_without_package_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when t5tune runs from a source folder without being installed."""

    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    check_versions("torch", "transformers")
    assert machine.compare_versions() == []


def test_each_dependency_declares_an_oldest_release() -> None:
    """`make floors` installs these releases, and doctor compares with them."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = [re.fullmatch(r"([a-z0-9.-]+)>=([\d.]+)(,<[\d.]+)?(; .*)?", line) for line in project["dependencies"]]
    assert all(declared), project["dependencies"]
    names = {match[1] for match in declared if match}
    # the only library whose private methods t5tune replaces
    assert [match[1] for match in declared if match and match[3]] == ["transformers"]
    assert {name.replace("-", ".") for name in read_oldest_releases()} <= {name.replace("-", ".") for name in names}


def test_a_driver_that_torch_cannot_use_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(probes, "read_nvidia_driver", lambda: "470.82")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for build, expected in (("12.8", "newer NVIDIA driver"), (None, "CUDA build")):
        monkeypatch.setattr(torch.version, "cuda", build)
        state, found, fix = probes.probe_torch()
        assert state == "warning"
        assert "470.82" in found
        assert expected in fix


def test_json_is_one_object_even_if_training_cannot_run(tmp_path: Path) -> None:
    done = t5tune(
        "doctor", "--json", env={"PYTHONPATH": make_path_with_module(tmp_path, "torch", 'raise ImportError("gone")')}
    )
    assert done.code == 1
    assert json.loads(done.stdout)["ok"] is False
