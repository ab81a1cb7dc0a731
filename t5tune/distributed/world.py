"""This process's rank and world size, read from the environment variables that a launcher sets."""

import os
from dataclasses import dataclass

from t5tune.errors import SettingsError

ERRORS_FOLDER_VARIABLE = "_T5TUNE_ERRORS"
"""Environment variable: the folder for the errors of workers that t5tune started."""
RESTART_VARIABLES = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
LAUNCH_VARIABLES = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
"""Environment variables that identify a launch; a restart has the same value. The first variable that is set counts: a
requeued job may call torchrun with a new id."""
RERUN_HINT = "run the same command again"
RESUME_HINT = f"{RERUN_HINT}; training resumes from the last checkpoint, if there is one"


@dataclass(frozen=True)
class World:
    """This process's rank and world size, from the variables that torchrun, deepspeed, srun or t5tune set.

    Args:
        launched: whether a launcher started this process.
        is_run_set_up: whether t5tune started this process (see launcher.py) and has already set up the run folder.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    launched: bool = False
    is_run_set_up: bool = False

    @staticmethod
    def from_environment() -> "World":
        """Read the variables of torchrun and deepspeed, else SLURM's; without them, this is the only process."""
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        elif _is_slurm_task():
            names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
        else:
            return World()
        rank, local_rank, size = (_read_whole_number(name) for name in names)
        if rank >= size:
            raise SettingsError(
                f"{names[0]}: {rank}: must be less than {names[2]} {size}, since ranks start at 0",
                hint="unset both to run one process",
            )
        return World(rank, local_rank, size, launched=True, is_run_set_up=ERRORS_FOLDER_VARIABLE in os.environ)

    def to_environment(self) -> dict[str, str]:
        """Return the variables that torch.distributed reads: SLURM sets different ones."""
        found = {"RANK": str(self.rank), "LOCAL_RANK": str(self.local_rank), "WORLD_SIZE": str(self.size)}
        if _is_slurm_task():
            nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "localhost"
            # all tasks of a job derive the same port; jobs that share a node rarely derive equal ports
            job = int(os.environ.get("SLURM_JOB_ID", "0"))
            found |= {"MASTER_ADDR": parse_first_host(nodes), "MASTER_PORT": str(20000 + job % 20000)}
        return {name: os.environ.get(name, value) for name, value in found.items()}


def has_restarted() -> bool:
    """Whether torchrun or SLURM has started this command before, in a running or requeued job.

    On each node, torchrun counts only the restarts that a rank of this node caused.
    """
    return any(_read_whole_number(name) > 0 for name in RESTART_VARIABLES)


def identify_launch() -> str | None:
    """Identify this process's SLURM job, or else its torchrun command; None without both."""
    return next((f"{name}={os.environ[name]}" for name in LAUNCH_VARIABLES if name in os.environ), None)


def _read_whole_number(name: str) -> int:
    value = os.environ.get(name, "0")
    if not (value.isascii() and value.isdigit()):
        problem = f"{name}: {value!r} in the environment: expected a whole number"
        raise SettingsError(problem, hint="a launcher sets it; unset it to run one process")
    return int(value)


def _is_slurm_task() -> bool:
    """Whether srun started this process. A batch script has a task's variables, too, but not a step's."""
    return (
        _read_whole_number("SLURM_NTASKS") > 1
        and "SLURM_PROCID" in os.environ
        and bool({"SLURM_STEP_ID", "MASTER_ADDR"} & os.environ.keys())
    )


def parse_first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list: `gpu[007-009,012],login1` -> `gpu007`."""
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return nodes.partition(",")[0]
    number = rest.partition("]")[0].partition(",")[0].partition("-")[0]
    return f"{name}{number}{rest.partition(']')[2].partition(',')[0]}"
