"""`--shard auto`: the part of this process and its number of cores, from the variables of what started it."""

import os

import pytest

from t5tune.errors import SettingsError
from t5tune.preparing.parts.shard import count_cores_of, count_rank_cores, find_shard
from t5tune.settings.groups.shard import Shard

TORCHRUN = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}
SRUN = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_STEP": "2", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "JOB_COMPLETION", "LOCAL_")) or name in {*TORCHRUN, "MASTER_ADDR"}:
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "shard"),
    [
        (TORCHRUN, Shard(2, 4)),
        (SRUN, Shard(1, 2)),
        ({**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Shard(0, 1)),
        (ARRAY, Shard(2, 4)),
        (ARRAY | SRUN, Shard(5, 8)),
        (ARRAY | TORCHRUN, Shard(10, 16)),
    ],
    ids=["torchrun", "srun", "one task", "array", "srun in an array", "torchrun in an array"],
)
def test_the_part_is_that_of_the_rank_and_the_task(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], shard: Shard
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_shard("auto") == shard
    assert find_shard("1/3") == Shard(1, 3)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 32),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, 8),
        ({**TORCHRUN, "LOCAL_SIZE": "64"}, 1),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "16"}, 8),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x12),1"}, 16),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1,4(x2)"}, 8),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "32"}, 32),
        ({**ARRAY, "SLURM_CPUS_PER_TASK": "4"}, 4),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "", "SLURM_CPUS_PER_TASK": "many"}, 32),
    ],
)
def test_ranks_on_a_node_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: int
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("t5tune.preparing.parts.shard.count_cores", lambda: 32)
    assert count_rank_cores() == expected


@pytest.mark.parametrize(("shard", "expected"), [("auto", 8), ("0/2", 32), (None, 32)])
def test_only_auto_counts_parts_as_ranks_on_the_node(
    monkeypatch: pytest.MonkeyPatch, shard: str | None, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(32)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert count_cores_of(shard) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, r"shard: auto: the environment lacks RANK and WORLD_SIZE \(torchrun\), .* give --shard I/N"),
        ({"RANK": "1"}, "shard: auto: RANK is set, but WORLD_SIZE is missing; give --shard I/N"),
        ({"JOB_COMPLETION_INDEX": "1"}, r'number of completions; give --shard "\$JOB_COMPLETION_INDEX/N"'),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "4"}, "task 4 of the 4 in the job array, .* aren't evenly spaced; give"),
        ({**ARRAY, "SLURM_ARRAY_TASK_COUNT": "x"}, "SLURM_ARRAY_TASK_COUNT: 'x' in the environment: expected a whole"),
        ({"SLURM_ARRAY_TASK_ID": "4"}, "SLURM_ARRAY_TASK_MIN: missing from the environment: expected a whole number"),
    ],
)
def test_the_error_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        find_shard("auto")
