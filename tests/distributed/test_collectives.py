"""Collectives between two processes."""

import signal
from pathlib import Path

import pytest

from t5tune.distributed.collectives import report_lost_ranks
from t5tune.distributed.world import World
from t5tune.errors import RankLost
from tests.support.processes.runs import read_lines, send_signal, start_two_ranks

pytestmark = pytest.mark.slow

JOINED = """
import signal, sys, time
from torch.distributed import distributed_c10d
from t5tune.distributed.collectives import report_lost_ranks, run_on_rank_0
from t5tune.distributed.process_group import join_process_group
from t5tune.distributed.watch import watch_ranks
from t5tune.distributed.world import World
from t5tune.errors import DataError
from t5tune.progress import silent
from t5tune.settings import TrainSettings

world = World.from_environment()
settings = TrainSettings(
    model_name_or_path="pocket", data_path="pocket", output_dir="run", use_cpu=True, process_group_timeout=2
)
with join_process_group(world, settings, "cpu", silent), watch_ranks(world, 2), report_lost_ranks(world):
    store = distributed_c10d._get_default_store()

    def count_polls():  # of the store by rank 1: one each fifth of a second
        return store.add("t5tune/watch/1/polls/1", 0)
"""


def test_ranks_outwait_the_timeout_and_raise_rank_0_s_error(tmp_path: Path) -> None:
    code = """
    def work():
        first = count_polls()
        while count_polls() < first + 30:  # three timeouts
            time.sleep(0.05)
        return world.rank, "prepared"

    def fail():
        raise DataError("data_path: chats.jsonl: no conversations", hint="see t5tune inspect")

    print(run_on_rank_0(world, work), flush=True)
    print(run_on_rank_0(world, lambda: (world.rank, "again")), flush=True)
    try:
        run_on_rank_0(world, fail)
    except DataError as error:
        print(error, flush=True)
"""
    ranks = start_two_ranks(JOINED + code, tmp_path)
    with ranks[0], ranks[1]:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[1].log.read_text()
    error = "data_path: chats.jsonl: no conversations; see t5tune inspect"
    for rank in ranks:
        assert read_lines(rank) == ["(0, 'prepared')", "(0, 'again')", error]


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.variants("9")
def test_a_waiting_rank_reports_that_rank_0_does_not_answer(number: signal.Signals, tmp_path: Path) -> None:
    code = """
    def work():
        print("working", flush=True)
        while True:
            signal.pause()

    try:
        run_on_rank_0(world, work)
    finally:
        print("unwinding", flush=True)
"""
    code = (
        JOINED.replace(
            "    store =", "    sys.excepthook = lambda kind, error, _: print(f'error: {error}')\n    store ="
        )
        + code
    )
    ranks = start_two_ranks(code, tmp_path)
    with ranks[0], ranks[1]:
        ranks[0].wait_until(lambda: "working" in ranks[0].log.read_text())
        send_signal(ranks[0].process.pid, number)
        assert ranks[1].wait() == 1
    assert read_lines(ranks[1])[-1] == "error: rank 1: rank 0 doesn't answer; run the same command again"


def test_objects_and_flags_use_gloo_in_a_group_with_gpus(tmp_path: Path) -> None:
    """The group's other backend does nothing, and returns at once: a value that went through it would be wrong."""
    code = """
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from torch.distributed import distributed_c10d
from t5tune.distributed import collectives
from t5tune.distributed.world import World

world = World.from_environment()
dist.init_process_group("cpu:gloo,cuda:fake")
print(collectives.all_gather(world.rank))
print(collectives.broadcast_from_rank_0(f"from {world.rank}"))
print(collectives.any_rank(world.rank == 1), collectives.any_rank(False))
print(collectives.run_on_rank_0(world, lambda: world.rank))
store = distributed_c10d._get_default_store()
if world.rank == 0:
    store.set("first", "yes")
collectives.barrier()
print(store.check(["first"]))
group = dist.new_group()
print(distributed_c10d.get_backend_config(group), sorted(device.type for device in group._device_types))
collectives.barrier()  # rank 0 has the store that rank 1 needs for the group
"""
    ranks = start_two_ranks(code, tmp_path)
    with ranks[0], ranks[1]:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[1].log.read_text()
    expected = ["[0, 1]", "from 0", "True False", "0", "True", "cpu:gloo,cuda:fake ['cpu', 'cuda']"]
    for rank in ranks:
        assert read_lines(rank) == expected


@pytest.mark.parametrize(
    ("rank", "size", "silent", "said"),
    [
        (0, 3, [2], "rank 2 doesn't answer"),
        (0, 3, [1, 2], "at least one of ranks 1, 2 is lost"),
        (2, 3, None, "rank 0 doesn't answer: it is lost, or it ended because another rank is lost"),
        (1, 2, None, "rank 0 doesn't answer"),
        (0, 2, None, "the connection to another rank broke"),
    ],
)
def test_a_rank_that_may_only_wait_is_not_called_lost(
    rank: int, size: int, silent: list[int] | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_unanswered(world: World) -> list[int]:
        if silent is None:
            raise RuntimeError("the store has ended with rank 0")
        return silent

    monkeypatch.setattr("t5tune.distributed.collectives._find_unanswered", find_unanswered)
    with pytest.raises(RankLost) as lost, report_lost_ranks(World(rank=rank, size=size), hint="try again"):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")
    assert str(lost.value) == f"rank {rank}: {said}; try again"
