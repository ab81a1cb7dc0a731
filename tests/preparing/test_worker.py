"""The processes that encode records."""

import pickle
import subprocess
import sys

import pytest


@pytest.mark.parametrize("written", [b"", pickle.dumps("a pipeline")[:-5]], ids=["nothing", "a part"])
def test_a_worker_whose_parent_has_ended_prints_nothing(written: bytes) -> None:
    command = [sys.executable, "-m", "t5tune.preparing.worker"]
    done = subprocess.run(command, input=written, capture_output=True, check=False, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
