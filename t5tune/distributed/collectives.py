"""Collectives: run on rank 0 and broadcast, gather, and report which ranks were lost."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from t5tune.distributed.world import RERUN_HINT, World
from t5tune.errors import RankLost, T5TuneError, TrainingError
from t5tune.io.reasons import join_lines

Value = TypeVar("Value")
ANSWER_SECONDS = 1.0
MAX_PAUSE = 0.25  # seconds between two polls of the store
RENDEZVOUS_HINT = "start all ranks with the same MASTER_ADDR and MASTER_PORT; every rank must reach this address"
# parts of gloo's messages, whose errors are plain RuntimeErrors
RANK_LOSS_MESSAGES = (
    "gloo",
    "Gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Application timeout",
)


def is_distributed() -> bool:
    """Whether this process is in an initialized process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank_and_size() -> tuple[int, int]:
    """Return this process's rank in its group, and the group's size; (0, 1) without a group."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. A collective: every rank must call it at the same point."""
    if not is_distributed():
        return flag
    found = torch.tensor(int(flag))  # on the CPU, so that it doesn't wait for a GPU
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def barrier() -> None:
    """Wait for all ranks, but unlike torch's barrier not for their GPUs."""
    any_rank(False)


def all_gather(value: Value) -> list[Value]:
    """Return the values of all ranks, in the order of ranks, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_rank_0(value: Value) -> Value:
    """Return rank 0's value on every rank."""
    if not is_distributed():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def run_on_rank_0(world: World, act: Callable[[], Value]) -> Value:
    """Call `act` on rank 0 while the rest wait, and return its result on every rank.

    `act` may take longer than the timeout of a collective: waiting ranks poll the rendezvous store until it is done. If
    rank 0 stops answering, the rank watch ends them (see watch.py).

    Raises:
        T5TuneError: `act` raised it; every rank raises it.
    """
    if world.size == 1:
        return act()
    store = distributed_c10d._get_default_store()
    # calls are counted in the store, because a later run of the same processes may get the same store
    done = f"t5tune/done/{store.add(f't5tune/calls/{world.rank}', 1)}"
    found: Value | T5TuneError | None = None
    if world.rank == 0:
        try:
            found = act()
        except T5TuneError as error:
            found = error
        finally:  # after an unexpected error, waiting ranks lose their connection in the broadcast
            store.set(done, "yes")
    else:
        wait_until(lambda: bool(store.check([done])))
    found = broadcast_from_rank_0(found)
    if isinstance(found, T5TuneError):
        found.is_of_rank_0 = world.rank > 0
        raise found
    return found  # type: ignore[return-value]


def run_only_on_rank_0(world: World, act: Callable[[], Value]) -> Value | None:
    """Call `act` on rank 0 like `run_on_rank_0`, but return its result only there, and None elsewhere."""
    kept: list[Value] = []
    run_on_rank_0(world, lambda: kept.append(act()))
    return kept[0] if kept else None


def wait_until(is_over: Callable[[], bool]) -> None:
    """Poll `is_over`, which reads the store: `store.wait` would keep Python from handling signals."""
    pause = 0.01
    while not is_over():
        time.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE)


@contextmanager
def report_rendezvous_errors() -> Iterator[None]:
    """Turn errors of the rendezvous into messages that name its address: a TrainingError or a RankLost."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        rank, host, port = (os.environ.get(name, "?") for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise TrainingError(
                f"MASTER_PORT: {port}: already in use by another process",
                hint="set another port for all ranks, such as MASTER_PORT=29511",
            ) from error
        problem = f"rank {rank}: no answer at {host}:{port}, the ranks' rendezvous"
        raise RankLost(problem, hint=RENDEZVOUS_HINT) from error
    except RuntimeError as error:  # NCCL's, or gloo's, which has no separate type
        if not _is_rank_loss(error):
            raise
        raise RankLost(
            f"rank {os.environ.get('RANK', '?')}: can't connect to the other ranks: {join_lines(error)}",
            hint="set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface that connects the machines, "
            "such as eth0; NCCL_DEBUG=WARN shows more about GPUs",
        ) from error


@contextmanager
def report_lost_ranks(world: World, hint: str = RERUN_HINT) -> Iterator[None]:
    """Turn a collective's network error into a RankLost that names the lost ranks, if the store can be reached."""
    try:
        yield
    except T5TuneError:
        raise
    except Exception as error:
        if world.size == 1 or not _is_rank_loss(error):
            raise
        raise RankLost(f"rank {world.rank}: {_describe_loss(world)}", hint=hint) from error


def describe_silence(ranks: list[int]) -> str:
    """Name the ranks that don't answer; for no ranks, report a broken connection."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} doesn't answer"
    if ranks:
        return f"ranks {', '.join(map(str, ranks))} don't answer"
    return "the connection to another rank broke"


def _is_rank_loss(error: Exception) -> bool:
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in RANK_LOSS_MESSAGES)
    )


def _describe_loss(world: World) -> str:
    silent = _find_silent_ranks(world)
    if silent is None:
        if world.rank == 0:
            return describe_silence([])
        reason = "" if world.size == 2 else ": it is lost, or it ended because another rank is lost"
        return f"{describe_silence([0])}{reason}"
    if len(silent) > 1:  # some of them may wait for a lost rank without having noticed the loss
        return f"at least one of ranks {', '.join(map(str, silent))} is lost"
    return describe_silence(silent)


def _find_silent_ranks(world: World) -> list[int] | None:
    """Find the ranks that don't set their key in the rendezvous store; None: rank 0's store doesn't answer."""
    found: list[list[int]] = []

    def ask() -> None:
        with suppress(Exception):  # the store raises errors of several types
            found.append(_find_unanswered(world))

    # in a thread: if rank 0 is suspended, its connections stay open, and a call to the store blocks without a timeout
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * ANSWER_SECONDS)
    return found[0] if found else None


def _find_unanswered(world: World) -> list[int]:
    others = {rank for rank in range(world.size) if rank != world.rank}
    store = distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
    store.set(f"t5tune/answers/{world.rank}", "yes")
    until = time.monotonic() + ANSWER_SECONDS
    while others and time.monotonic() < until:
        others -= {rank for rank in others if store.check([f"t5tune/answers/{rank}"])}
        time.sleep(0.05)
    return sorted(others)
