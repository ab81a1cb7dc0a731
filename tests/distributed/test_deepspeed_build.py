"""Locks of compilations: those of the dead go, those of the living stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_default_build_root

from t5tune.distributed import deepspeed_build
from t5tune.distributed.deepspeed_build import release_dead_locks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch's FileBaton would put an op's lock."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "some_op").mkdir()
    return tmp_path / "some_op" / "lock"


def test_a_lock_is_left_to_a_process_that_lives_and_taken_from_one_that_was_killed(lock: Path) -> None:
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
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert release_dead_locks() == []
        assert lock.exists()
        process.kill()
    assert lock.exists()
    assert release_dead_locks() == [lock]
    assert list(lock.parent.iterdir()) == []


def test_where_other_machines_look_too_a_lock_stays_until_nobody_can_compile_any_more(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_build, "_is_shared", lambda _: True)
    lock.touch()
    assert release_dead_locks() == []
    os.utime(lock, (0, 0))
    assert release_dead_locks() == [lock]


def test_the_folder_is_the_one_that_torch_compiles_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert str(deepspeed_build._extensions()) == get_default_build_root()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(deepspeed_build._extensions()) == get_default_build_root()
