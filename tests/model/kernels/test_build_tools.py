"""Compilers that torch.compile needs, on machines that lack them."""

from pathlib import Path

import pytest

from t5tune.commands.train.run_plan import make_run_plan
from t5tune.diagnosis import machine
from t5tune.errors import DependencyError
from t5tune.model.kernels.build_tools import find_missing_compiler
from t5tune.runs.checks import check_plan
from tests.support.train_runs import make_settings


def make_tool(folder: Path, name: str) -> Path:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)
    return folder / name


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it, and Python's headers in their place."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("t5tune.model.kernels.build_tools.sysconfig.get_path", lambda name: str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("compiler", ["gcc", "clang", "CC"])
def test_a_gpu_needs_a_c_compiler_and_pythons_headers(
    compiler: str, empty_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = find_missing_compiler(on_gpu=True)
    assert "C compiler" in missing.what
    assert "apt install gcc" in missing.fix
    tool = make_tool(empty_path, "my-cc" if compiler == "CC" else compiler)
    if compiler == "CC":
        assert find_missing_compiler(on_gpu=True) == missing  # Triton doesn't look for other names
        monkeypatch.setenv("CC", str(tool))
    assert find_missing_compiler(on_gpu=True) is None
    (empty_path / "Python.h").unlink()
    missing = find_missing_compiler(on_gpu=True)
    assert str(empty_path) in missing.what
    assert "apt install python3-dev" in missing.fix


def test_a_compiler_that_cc_names_must_exist(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tool(empty_path, "gcc")
    monkeypatch.setenv("CC", "icx")
    assert find_missing_compiler(on_gpu=True) is not None


def test_a_cpu_needs_a_cpp_compiler_and_pythons_headers(empty_path: Path) -> None:
    make_tool(empty_path, "gcc")
    missing = find_missing_compiler(on_gpu=False)
    assert "C++" in missing.what
    make_tool(empty_path, "g++")
    assert find_missing_compiler(on_gpu=False) is None
    (empty_path / "Python.h").unlink()
    missing = find_missing_compiler(on_gpu=False)
    assert str(empty_path) in missing.what
    assert "apt install python3-dev" in missing.fix
    make_tool(empty_path, "c++")
    [finding] = [each for each in machine.inspect_machine() if each.check == "compiler"]
    assert (finding.state, finding.found) == ("warning", missing.what)


def test_train_and_doctor_name_the_package_to_install(
    empty_path: Path, untied_base: Path, conversations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(untied_base, conversations, empty_path / "run", use_cpu=False, torch_compile=True)
    monkeypatch.setattr("t5tune.runs.checks._trains_on_cpu", lambda settings: False)
    with pytest.raises(DependencyError, match="torch_compile: Triton compiles for the GPU with a C compiler") as raised:
        check_plan(make_run_plan(settings))
    assert "apt install gcc" in str(raised.value.hint)
    monkeypatch.setattr(machine, "read_nvidia_driver", lambda: "575.51")
    [finding] = [each for each in machine.inspect_machine() if each.check == "compiler"]
    assert finding.state == "warning"
    assert "C compiler" in finding.found
    assert "apt install gcc" in finding.mend
