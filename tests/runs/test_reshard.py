"""Checkpoints that don't fit the engine: each is an error that names the folder, before the engine is changed."""

from pathlib import Path

import pytest

from t5tune.checkpoints.zero.optimizer import ZeroOptimizer
from t5tune.errors import CheckpointError
from t5tune.runs.reshard import _check_contents

STATES = {"global_steps": 6, "global_samples": 24, "skipped_steps": 0, "lr_scheduler": None}


@pytest.mark.parametrize(
    ("missing", "num_groups", "needs_schedule", "problem"),
    [
        ("global_samples", 1, False, "global_step6: the model states contain no global_samples"),
        (None, 1, True, "global_step6: the model states contain no lr_scheduler"),
        (None, 2, False, "global_step6: the optimizer has 1 parameter group, but 2 in this run"),
    ],
)
def test_what_a_checkpoint_lacks_is_named(
    missing: str | None, num_groups: int, needs_schedule: bool, problem: str
) -> None:
    engine = {name: value for name, value in STATES.items() if name != missing}
    saved = ZeroOptimizer(3, {}, {}, {}, [{"lr": 1e-4}], engine)
    with pytest.raises(CheckpointError, match=problem):
        _check_contents(Path("global_step6"), saved, num_groups, needs_schedule)
