"""doctor on a machine that works, and on ones that are broken on purpose: a line a check, never a traceback."""

import importlib.metadata
import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from t5tune.commands import doctor as doctor_module
from t5tune.commands.doctor import PROBES, _probe
from t5tune.compat.requirements import check_versions, oldest_releases
from t5tune.diagnosis import machine, probes
from t5tune.diagnosis.finding import Finding
from tests.conftest import REPOSITORY, t5tune

CANARY = "hf_canary0123456789"


def blocked(folder: Path, module: str, text: str) -> str:
    """A PYTHONPATH on which a module is `text` instead."""
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(text)
    return os.pathsep.join([str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])


def declaring(folder: Path, *requirements: str) -> str:
    """A PYTHONPATH on which t5tune is installed and declares these requirements alone."""
    metadata = folder / "t5tune-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    lines = ["Metadata-Version: 2.4", "Name: t5tune", "Version: 0.1.0", *(f"Requires-Dist: {r}" for r in requirements)]
    metadata.write_text("\n".join(lines) + "\n")
    return os.pathsep.join([str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_a_machine_that_works_is_good_and_its_token_stays_secret() -> None:
    done = t5tune("doctor", "--json", env={"HF_TOKEN": CANARY})
    assert done.code == 0, done.stdout + done.stderr
    found = {finding["check"]: finding for finding in done.json["findings"]}
    assert done.json["ok"] is True
    assert {"python", "compiler", "hub token", "hub folder", "disk", "memory", *PROBES} <= found.keys()
    assert {name: found[name]["state"] for name in PROBES if name != "bf16"} == dict.fromkeys(
        ("torch", "bitsandbytes", "processes", "deepspeed", "training"), "good"
    )
    assert "set in the environment" in found["hub token"]["found"]
    assert CANARY not in done.stdout + done.stderr
    for finding in found.values():
        assert bool(finding["mend"]) is (finding["state"] != "good"), finding


@pytest.mark.parametrize("locale", ["de_DE.ISO-8859-1", "C"])
def test_a_machine_where_nothing_works_gets_plain_lines_and_exit_1(locale: str, tmp_path: Path) -> None:
    """No torch, no compiler, no home, 80 columns, a dumb terminal, no colours, a pipe, another alphabet."""
    env = {
        "PYTHONPATH": blocked(tmp_path, "torch", 'raise ImportError("broken on purpose: Größe")'),
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
    assert lines[-1] == "training can't run here: mend what is broken"
    for name in PROBES:
        (line,) = [line for line in lines if line.startswith(f"broken  {name} ")]
        assert "ImportError: broken on purpose" in line
        assert lines[lines.index(line) + 1].lstrip().startswith("mend: ")
    assert any(line.startswith("warning compiler ") for line in lines)
    assert any(line.startswith("warning hub folder ") and "can't be written" in line for line in lines)
    assert "Traceback" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "text", "found"),
    [
        ("bitsandbytes", 'raise ModuleNotFoundError("no bitsandbytes")', "ModuleNotFoundError: no bitsandbytes"),
        ("torch", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed with SIGSEGV"),
        ("torch", "import os; os._exit(7)", "ended with 7 and said nothing"),
        ("torch", "import threading; threading.Event().wait()", "no answer in 2 s"),
    ],
)
def test_a_library_that_fails_makes_a_line(
    module: str, text: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", blocked(tmp_path, module, text))
    finding = _probe("bitsandbytes", timeout=2 if "wait" in text else 60)
    assert finding.state == ("warning" if "wait" in text else "broken")  # whoever is slow may still work
    assert found in finding.found
    assert ("--timeout" if "wait" in text else "pip install") in finding.mend


def test_only_what_training_needs_decides_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from t5tune.settings import DoctorSettings

    def diagnosed(broken: str) -> bool:
        monkeypatch.setattr(
            doctor_module, "_probe", lambda name, _: Finding(name, "broken" if name == broken else "good", "")
        )
        return doctor_module.doctor(DoctorSettings()).ok

    assert [diagnosed(name) for name in ("nothing", "bitsandbytes", "deepspeed", "torch", "training")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_versions_outside_of_what_was_tested_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_versions(versions: dict[str, str]) -> dict[str, Finding]:
        real: Callable[[str], str] = machine.importlib.metadata.version
        with monkeypatch.context() as patch:
            patch.setattr(machine.importlib.metadata, "version", lambda name: versions.get(name) or real(name))
            return by_name(machine.compare_versions())

    found = with_versions({"torch": "2.1.0+cu118", "peft": "0.99.0", "transformers": "5.23.1"})
    assert (found["torch"].state, found["peft"].state) == ("broken", "warning")
    oldest = oldest_releases()["torch"]
    assert f"t5tune needs {oldest} or newer" in found["torch"].found
    assert f"pip install --upgrade 'torch>={oldest}'" in found["torch"].mend
    assert "tested up to" in found["peft"].found
    assert "transformers 5.23.1" in found["packages"].found


def test_an_older_release_than_declared_is_refused_with_the_upgrade(tmp_path: Path) -> None:
    """doctor, train and chat judge by the requirements that the installed t5tune declares."""
    env = {"PYTHONPATH": declaring(tmp_path, "transformers>=99.5", "numpy>=1.26", "absent-package>=1.0; extra == 'x'")}
    version = importlib.metadata.version("transformers")
    done = t5tune("doctor", "--json", env=env)
    assert done.code == 1
    found = {finding["check"]: finding for finding in done.json["findings"]}
    assert found["transformers"] == {
        "check": "transformers", "state": "broken", "found": f"{version}; t5tune needs 99.5 or newer",
        "mend": "pip install --upgrade 'transformers>=99.5'",
    }  # fmt: skip
    assert found["packages"]["found"].startswith("numpy ")
    assert "absent-package" not in found

    run = ("--data-path", "pocket", "--output-dir", tmp_path / "run")
    for command in (("train", *run), ("train", *run, "--dry-run"), ("chat", "--prompt", "hello")):
        done = t5tune(*command, "--model-name-or-path", "pocket", env=env)
        assert (done.code, done.errors) == (
            1,
            [
                f"error: transformers: version {version} is installed; t5tune needs 99.5 or newer; "
                "pip install --upgrade 'transformers>=99.5'"
            ],
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("package", "flags"),
    [("bitsandbytes", ("--q-lora",)), ("deepspeed", ("--deepspeed", "zero2"))],
)
def test_only_what_a_run_uses_must_be_recent(package: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    env = {"PYTHONPATH": declaring(tmp_path, f"{package}>=99.5")}
    run = ("train", "--model-name-or-path", "pocket", "--data-path", "pocket", "--output-dir", tmp_path / "run")
    assert t5tune(*run, "--dry-run", env=env).code == 0
    done = t5tune(*run, "--dry-run", *flags, env=env)
    assert done.code == 1
    (error,) = done.errors
    assert f"{package}: version {importlib.metadata.version(package)} is installed; t5tune needs 99.5" in error


def test_without_metadata_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where t5tune runs from a source folder that was never installed."""

    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    check_versions("torch", "transformers")
    assert machine.compare_versions() == []


def test_each_dependency_declares_the_oldest_release_that_works() -> None:
    """`make floors` installs it, and doctor compares with it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = [re.fullmatch(r"([a-z0-9.-]+)>=([\d.]+)(;.*)?", line) for line in project["dependencies"]]
    assert all(declared), project["dependencies"]
    names = {match[1] for match in declared if match}
    assert set(machine.NEWEST) <= names
    assert {name.replace("-", ".") for name in oldest_releases()} <= {name.replace("-", ".") for name in names}


def test_a_driver_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(probes, "nvidia_driver", lambda: "470.82")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for build, mend in (("12.8", "newer NVIDIA driver"), (None, "CUDA build")):
        monkeypatch.setattr(torch.version, "cuda", build)
        state, found, how = probes.try_torch()
        assert state == "warning"
        assert "470.82" in found
        assert mend in how


def test_a_compiler_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: atomic: no such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CXX", raising=False)
    state, found, mend = machine._compiler()
    assert state == "warning"
    assert "fatal error: atomic" in found
    assert "g++" in mend


def test_json_is_one_object_also_where_training_cannot_run(tmp_path: Path) -> None:
    done = t5tune("doctor", "--json", env={"PYTHONPATH": blocked(tmp_path, "torch", 'raise ImportError("gone")')})
    assert done.code == 1
    assert json.loads(done.stdout)["ok"] is False
