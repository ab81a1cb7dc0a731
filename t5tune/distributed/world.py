"""This process's rank among the processes of a run, read from the environment that a launcher sets."""

import os
from dataclasses import dataclass

from t5tune.errors import SettingsError

ERRORS_FOLDER = "_T5TUNE_ERRORS"
"""Environment variable: the folder in which workers that t5tune started leave their errors."""


@dataclass(frozen=True)
class World:
    """This process's rank and the number of processes, from the variables that torchrun, deepspeed, srun or t5tune set.

    Args:
        launched: a launcher started this process.
        run_is_open: t5tune started this process (see launcher.py) and has opened the run folder already.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    launched: bool = False
    run_is_open: bool = False

    @staticmethod
    def from_environment() -> "World":
        """
        Raises:
            SettingsError: a variable that isn't a whole number, or a rank that isn't below the world size.
        """
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        elif _is_slurm_task():
            names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
        else:
            return World()
        rank, local_rank, size = (_whole_number(name) for name in names)
        if rank >= size:
            raise SettingsError(
                f"{names[0]}: {rank}, of {names[2]} {size}: ranks count from 0", hint="unset both to run one process"
            )
        return World(rank, local_rank, size, launched=True, run_is_open=ERRORS_FOLDER in os.environ)

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed reads, where the launcher has set others."""
        found = {"RANK": str(self.rank), "LOCAL_RANK": str(self.local_rank), "WORLD_SIZE": str(self.size)}
        if _is_slurm_task():
            # one port for all tasks of a job, and seldom another job's
            job = int(os.environ.get("SLURM_JOB_ID", "0"))
            found |= {"MASTER_ADDR": _first_slurm_host(), "MASTER_PORT": str(20000 + job % 20000)}
        return {name: os.environ.get(name, value) for name, value in found.items()}


def _whole_number(name: str) -> int:
    value = os.environ.get(name, "0")
    if not (value.isascii() and value.isdigit()):
        raise SettingsError(
            f"{name}: {value!r} in the environment: expected a whole number",
            hint="a launcher sets it; unset it to run one process",
        )
    return int(value)


def _is_slurm_task() -> bool:
    """Whether srun started this process. A batch script has a task's variables too, but no step's."""
    return (
        _whole_number("SLURM_NTASKS") > 1
        and "SLURM_PROCID" in os.environ
        and bool({"SLURM_STEP_ID", "MASTER_ADDR"} & os.environ.keys())
    )


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "localhost"
    return first_host(nodes)


def first_host(nodes: str) -> str:
    """The first of a SLURM node list: `gpu[007-009,012],login1` -> `gpu007`."""
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return nodes.partition(",")[0]
    number = rest.partition("]")[0].partition(",")[0].partition("-")[0]
    return f"{name}{number}{rest.partition(']')[2].partition(',')[0]}"
