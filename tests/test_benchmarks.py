"""The benchmarks are run by hand; what of them must hold on any machine."""

import importlib
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.mark.parametrize(
    ("visible", "one"),
    [(None, "0"), ("0,1,2,3", "0"), ("2,3", "2"), ("3", "3"), ("", ""), ("GPU-8a,GPU-1f", "GPU-8a")],
)
def test_each_side_of_a_benchmark_sees_one_gpu(monkeypatch: pytest.MonkeyPatch, visible: str | None, one: str) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sides = importlib.import_module("sides")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    printed = "import json, os; print(json.dumps({'seen': os.environ['CUDA_VISIBLE_DEVICES']}))"
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert sides.run_self(printed) == {"seen": one}


def test_the_benchmark_of_a_gpu_refuses_a_machine_without_one() -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no GPU" in line
