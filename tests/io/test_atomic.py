"""Folders that are complete or absent."""

from pathlib import Path

import pytest

from t5tune.errors import CheckpointError
from t5tune.io.atomic import make_scratch_folder


def test_errors_name_the_target_of_a_hidden_folder(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    with pytest.raises(CheckpointError) as caught, make_scratch_folder(target) as staged:
        raise CheckpointError(f"{staged}/config.json: can't be read", hint=f"look at {staged}")
    assert str(caught.value) == f"{target}/config.json: can't be read; look at {target}"
    assert list(tmp_path.iterdir()) == []
