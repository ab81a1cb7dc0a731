"""The benchmarks are run by hand; what of them must hold on any machine."""

import os
import subprocess
import sys

from tests.conftest import REPOSITORY


def test_the_benchmark_of_a_gpu_refuses_a_machine_without_one() -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no GPU" in line
