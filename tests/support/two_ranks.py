"""Two processes that run a piece of code as the ranks of a group."""

import os
import sys
from pathlib import Path

from t5tune.distributed.launcher import find_free_port
from tests.support.runs import Running


def start_two_ranks(code: str, folder: Path) -> list[Running]:
    """Start the code as ranks 0 and 1 of a launcher that isn't t5tune's. Their output is in their logs."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(find_free_port())}
    return [
        Running([sys.executable, "-c", code], folder / f"rank-{rank}", **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(2)
    ]


def read_lines(rank: Running) -> list[str]:
    """Read a rank's output, without the lines that gloo prints in torch 2.8."""
    return [line for line in rank.log.read_text().splitlines() if not line.startswith("[Gloo]")]


def set_on_rank_1(name: str, value: str) -> None:
    """Set an environment variable, if this process is rank 1."""
    if os.environ["RANK"] == "1":
        os.environ[name] = value
