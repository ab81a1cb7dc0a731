"""On a full disk the error names the path and the bytes, the last checkpoint is kept, and the run can resume."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from t5tune.commands.train import train
from tests.support.processes.forks import ForkServer
from tests.support.processes.runs import LONG, list_complete_steps, make_arguments, make_settings, read_adapter

pytestmark = pytest.mark.slow

SIZES = range(3600, 7850, 425) if LONG else [5200]  # KiB


@contextmanager
def mount_small_disk(folder: Path, kibibytes: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_costs_no_checkpoint(
    size: int, fork_server: ForkServer, inputs: list[Path], uninterrupted: bytes, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    run = disk / "run"
    with mount_small_disk(disk, size):
        done = fork_server.run(make_arguments(*inputs, run, "--save-steps=2"))
        assert done.codes == [1], done.log
        assert str(run) in done.log
        assert "bytes are free" in done.log
        assert "Traceback" not in done.log
        before = list_complete_steps(run)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        result = train(make_settings(*inputs, run, save_steps=2))
        assert (result.resumed_from is not None) == bool(before)
        assert read_adapter(run) == uninterrupted
