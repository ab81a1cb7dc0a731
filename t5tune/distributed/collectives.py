"""What the ranks do together: one acts for all, all agree, and those that are left say who is missing."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from t5tune.distributed.world import World
from t5tune.errors import RankLost, T5TuneError, TrainingError

Value = TypeVar("Value")
SECONDS_TO_ANSWER = 1.0
# of gloo's errors, which are plain RuntimeErrors
SIGNS_OF_LOSS = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Application timeout",
)


def is_distributed() -> bool:
    """Whether this process is in a group of processes."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def rank_and_size() -> tuple[int, int]:
    """This process's rank in its group, and how many there are."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def any_rank(flag: bool, device: Any) -> bool:
    """Whether the flag is set on any rank. Every rank calls this at the same place."""
    import torch
    import torch.distributed as dist

    if not is_distributed():
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    if is_distributed():
        dist.barrier()


def gather(value: Value) -> list[Value]:
    """Each rank's value, on every rank."""
    import torch.distributed as dist

    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: Value) -> Value:
    """Rank 0's value, on every rank."""
    import torch.distributed as dist

    if not is_distributed():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def by_rank_0(world: World, act: Callable[[], Value]) -> Value:
    """What rank 0 finds, on every rank; the others wait. What it raises on purpose is raised on every rank."""
    found: Value | T5TuneError | None = None
    if world.rank == 0:
        try:
            found = act()
        except T5TuneError as error:
            found = error
    if world.size > 1:
        found = from_rank_0(found)
    if isinstance(found, T5TuneError):
        raise found
    return found  # type: ignore[return-value]


@contextmanager
def default_timeout(timeout: timedelta) -> Iterator[None]:
    """Let groups that are made without a timeout have this one: DeepSpeed makes several so."""
    from torch.distributed import distributed_c10d

    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(distributed_c10d, name) for name in names}
    for name in names:
        setattr(distributed_c10d, name, timeout)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(distributed_c10d, name, value)


@contextmanager
def meeting() -> Iterator[None]:
    """Say where the ranks were to meet, where they can't.

    Raises:
        TrainingError: something else listens on the port of rank 0.
        RankLost: rank 0 isn't there.
    """
    import torch.distributed as dist

    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        rank, host, port = (os.environ.get(name, "?") for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise TrainingError(
                f"MASTER_PORT: {port}: something else listens there", hint="give all ranks another: MASTER_PORT=29511"
            ) from error
        raise RankLost(
            f"rank {rank}: nobody answers at {host}:{port}, where the ranks meet",
            hint="start all ranks, and give them the same MASTER_ADDR and MASTER_PORT, which each can reach",
        ) from error


@contextmanager
def loss_of_ranks(world: World) -> Iterator[None]:
    """Say which rank is missing where a collective fails, instead of what the network says.

    Raises:
        RankLost: naming the ranks that don't answer, where the others can still meet.
    """
    try:
        yield
    except T5TuneError:
        raise
    except Exception as error:
        if world.size == 1 or not _is_loss(error):
            raise
        silent = _silent_ranks(world)
        if len(silent) == 1:
            who = f"rank {silent[0]} doesn't answer"
        elif silent:
            who = f"ranks {', '.join(map(str, silent))} don't answer"
        else:
            who = "the connection to another rank broke"
        raise RankLost(f"rank {world.rank}: {who}", hint="starting again goes on from the last checkpoint") from error


def _is_loss(error: Exception) -> bool:
    import torch.distributed as dist

    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS_OF_LOSS)
    )


def _silent_ranks(world: World) -> list[int]:
    """The ranks that don't sign a list in the store that they all met by. Rank 0, where that itself is silent."""
    found: list[list[int]] = []

    def ask() -> None:
        with suppress(Exception):  # the store's own fall under several types
            found.append(_unsigned(world))

    # a stopped rank 0 keeps its connections open, and the store waits for its word without end
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * SECONDS_TO_ANSWER)
    return found[0] if found else [0] if world.rank else []


def _unsigned(world: World) -> list[int]:
    from torch.distributed import distributed_c10d

    others = {rank for rank in range(world.size) if rank != world.rank}
    store = distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=SECONDS_TO_ANSWER))
    store.set(f"t5tune/answers/{world.rank}", "yes")
    until = time.monotonic() + SECONDS_TO_ANSWER
    while others and time.monotonic() < until:
        others -= {rank for rank in others if store.check([f"t5tune/answers/{rank}"])}
        time.sleep(0.05)
    return sorted(others)
