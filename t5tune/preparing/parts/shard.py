"""Find from the launcher's variables which part `--shard auto` prepares in this process, and on how many cores."""

import os
import re

from t5tune.distributed.world import World
from t5tune.errors import SettingsError
from t5tune.io.processes import count_cores
from t5tune.settings.groups.shard import AUTO, Shard, parse_shard

ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_STEP")
KUBERNETES_INDEX = "JOB_COMPLETION_INDEX"


def find_shard(shard: str) -> Shard:
    """Return the part that `shard` names; for `auto`, the part of this process's rank or of its task in a job array.

    If each task of a job array starts several ranks, each rank of each task has a part.
    """
    if shard != AUTO:
        return parse_shard(shard)
    task, ranks = _read_array_task(), _read_rank()
    if task is not None and ranks is not None:
        return Shard(task.index * ranks.count + ranks.index, task.count * ranks.count)
    if (found := task or ranks) is None:
        raise _make_missing_error()
    return found


def count_cores_of(shard: str | None) -> int:
    """Count the cores on which a part is encoded: with `auto`, the parts on a node share its cores."""
    return count_rank_cores() if shard == AUTO else count_cores()


def count_rank_cores() -> int:
    """Count the cores for this rank: its share of them, if the ranks on its node use the same cores.

    With --cpus-per-task, srun gives each task its own cores. torchrun and deepspeed don't.
    """
    cores = count_cores()
    if cores_per_task := _read_count("SLURM_CPUS_PER_TASK"):
        cores = min(cores, cores_per_task)
    if num_ranks := _read_count("LOCAL_WORLD_SIZE") or _read_count("LOCAL_SIZE"):
        return max(1, cores // num_ranks)
    if not cores_per_task and "SLURM_STEP_ID" in os.environ:
        # such as 4(x2),3: two nodes with four tasks, and one with three
        numbers = re.findall(r"(?:^|,)(\d+)", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return max(1, cores // max(1, 1, *map(int, numbers)))
    return cores


def _read_count(name: str) -> int:
    """Read a number of at least 1; 0 if the variable is missing or has a different value."""
    value = os.environ.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else 0


def _read_rank() -> Shard | None:
    """Read the rank and the world size that torchrun, deepspeed or srun set."""
    world = World.from_environment()
    if world.launched or {"SLURM_STEP_ID", "SLURM_PROCID"} <= os.environ.keys():  # the only task of srun has rank 0
        return Shard(world.rank, world.size)
    return None


def _read_array_task() -> Shard | None:
    """Read the place of this task in a SLURM job array, whose ids must be evenly spaced."""
    if ARRAY[0] not in os.environ:
        return None
    numbers = []
    for name in ARRAY:
        value = os.environ.get(name, "1" if name == ARRAY[3] else "")
        if not (value.isascii() and value.isdigit()):
            found = f"{value!r} in the environment" if value else "missing from the environment"
            raise SettingsError(f"shard: auto: {name}: {found}: expected a whole number", hint=_suggest(ARRAY[0]))
        numbers.append(int(value))
    task, first, count, step = numbers
    index, rest = divmod(task - first, max(step, 1))
    if rest or not 0 <= index < count:
        problem = f"shard: auto: task {task} of the {count} in the job array, which begin at {first}"
        raise SettingsError(f"{problem}: the ids aren't evenly spaced", hint=_suggest(ARRAY[0]))
    return Shard(index, count)


def _make_missing_error() -> SettingsError:
    if KUBERNETES_INDEX in os.environ:
        problem = f"shard: auto: {KUBERNETES_INDEX} is set, but Kubernetes doesn't tell a pod the number of completions"
        return SettingsError(problem, hint=_suggest(KUBERNETES_INDEX))
    for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_ID")):
        present = [name for name in names if name in os.environ]
        if len(present) == 1:
            (missing,) = set(names) - set(present)
            return SettingsError(f"shard: auto: {present[0]} is set, but {missing} is missing", hint="give --shard I/N")
    expected = "RANK and WORLD_SIZE (torchrun), SLURM_PROCID (srun), or SLURM_ARRAY_TASK_ID (a job array)"
    return SettingsError(f"shard: auto: the environment lacks {expected}", hint="give --shard I/N")


def _suggest(name: str) -> str:
    return f'give --shard "${name}/N" in the script of the job, where N is the number of parts'
