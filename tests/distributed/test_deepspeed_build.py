"""Locks of DeepSpeed's builds: those of killed processes are removed, those of running ones are kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_default_build_root

from t5tune.distributed import deepspeed_build
from t5tune.distributed.deepspeed_build import remove_stale_locks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path at which torch's FileBaton would create an op's lock."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "some_op").mkdir()
    return tmp_path / "some_op" / "lock"


@pytest.mark.slow
def test_only_the_lock_of_a_killed_process_is_removed(lock: Path) -> None:
    compiling = f"""
import sys
from torch.utils.file_baton import FileBaton
baton = FileBaton({str(lock)!r})
print(baton.try_acquire(), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", compiling], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "True\n"
        assert remove_stale_locks() == []
        assert lock.exists()
        process.kill()
    assert lock.exists()
    assert remove_stale_locks() == [lock]
    assert list(lock.parent.iterdir()) == []


def test_a_recent_lock_on_a_shared_filesystem_is_kept(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_build, "_is_shared", lambda _: True)
    lock.touch()
    assert remove_stale_locks() == []
    os.utime(lock, (0, 0))
    assert remove_stale_locks() == [lock]


def test_the_extensions_folder_is_the_one_that_torch_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert str(deepspeed_build._get_extensions_folder()) == get_default_build_root()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(deepspeed_build._get_extensions_folder()) == get_default_build_root()
