"""Ranks that hang are named, and the others end, also while their main threads wait where no exception reaches them."""

import signal
from pathlib import Path

import pytest

from t5tune import train
from t5tune.distributed.watch import POLLS, RankWatch
from t5tune.distributed.world import RESUME_HINT, World
from tests.support.processes.runs import read_lines, send_signal, start_two_ranks
from tests.support.train_runs import make_settings

WATCHING = """
import signal
import torch.distributed as dist
from t5tune.distributed.watch import watch_ranks
from t5tune.distributed.world import RESUME_HINT, World
world = World.from_environment()
dist.init_process_group("gloo")
with watch_ranks(world, 2, RESUME_HINT) as watch:
    BATCHES
    print("watching", flush=True)
    while True:
        signal.pause()  # as if it waited for its GPU
"""


@pytest.mark.slow
@pytest.mark.parametrize("hung", [0, 1])  # rank 0 has the rendezvous store
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.variants("19-0", "9-1")
def test_a_rank_waiting_for_a_gpu_names_a_silent_rank(hung: int, number: signal.Signals, tmp_path: Path) -> None:
    ranks = start_two_ranks(WATCHING.replace("BATCHES", "pass"), tmp_path)
    with ranks[0], ranks[1]:
        for rank in ranks:
            rank.wait_until(lambda rank=rank: "watching" in rank.log.read_text())
        send_signal(ranks[hung].process.pid, number)
        assert ranks[1 - hung].wait() == 1
    lines = read_lines(ranks[1 - hung])
    assert lines == ["watching", f"error: rank {1 - hung}: rank {hung} doesn't answer; {RESUME_HINT}"]


@pytest.mark.slow
def test_a_rank_whose_main_thread_hangs_is_named(tmp_path: Path) -> None:
    ranks = start_two_ranks(
        WATCHING.replace("BATCHES", "for _ in range(2 - world.rank): watch.count_batch()"), tmp_path
    )
    with ranks[0], ranks[1]:
        assert ranks[0].wait() == 1
    error = "error: rank 0: rank 1 hangs: the other ranks wait for it in a batch that it hasn't begun"
    assert read_lines(ranks[0]) == ["watching", f"{error}; {RESUME_HINT}"]


def compare_often(watch: RankWatch, *ranks: tuple[int, int], times: int = 3 * POLLS) -> list[str | None]:
    """Let the watch poll this often. Each rank is (growth of its poll counter per poll, its batch counter)."""
    return [watch.compare([(poll * moves, batches) for moves, batches in ranks]) for poll in range(1, times + 1)]


def test_ranks_in_the_same_batch_are_never_named() -> None:
    watch = RankWatch(World(rank=0, size=3), 60)
    assert set(compare_often(watch, (1, 7), (1, 7), (1, 7))) == {None}


def test_a_rank_is_named_after_the_timeout_and_not_before() -> None:
    silent = compare_often(RankWatch(World(rank=0, size=2), 60), (1, 7), (0, 7), times=POLLS)
    assert silent == [None] * (POLLS - 1) + ["rank 1 doesn't answer"]
    watch = RankWatch(World(rank=0, size=2), 60)
    assert watch.compare([(0, 7), (0, 6)]) is None  # both have begun new batches
    behind = compare_often(watch, (1, 7), (1, 6), times=POLLS)
    assert behind[:-1] == [None] * (POLLS - 1)
    assert "rank 1 hangs" in str(behind[-1])


def test_a_late_rank_that_becomes_silent_does_not_answer() -> None:
    watch = RankWatch(World(rank=0, size=2), 60)
    assert watch.compare([(1, 7), (1, 6)]) is None
    assert watch.compare([(2, 7), (2, 6)]) is None  # the first poll at which it is late
    silent = [watch.compare([(poll, 7), (2, 6)]) for poll in range(3, 2 + POLLS)]
    assert silent == [None] * (POLLS - 2) + ["rank 1 doesn't answer"]


def test_a_slow_rank_that_begins_batches_is_not_named() -> None:
    watch = RankWatch(World(rank=0, size=2), 60)
    found = [watch.compare([(poll, 100), (poll, poll // (POLLS - 1))]) for poll in range(1, 5 * POLLS)]
    assert set(found) == {None}


def test_all_silent_ranks_are_named_but_never_the_own_one() -> None:
    found = compare_often(RankWatch(World(rank=1, size=4), 60), (0, 7), (1, 6), (1, 7), (0, 6))
    assert found[-1] == "ranks 0, 3 don't answer"
    assert set(compare_often(RankWatch(World(rank=1, size=2), 60), (1, 7), (1, 6))) == {None}


@pytest.mark.slow
def test_each_micro_batch_of_a_run_is_counted(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watches: set[RankWatch] = set()
    count_batch = RankWatch.count_batch

    def count(watch: RankWatch) -> None:
        watches.add(watch)
        count_batch(watch)

    monkeypatch.setattr(RankWatch, "count_batch", count)
    train(make_settings(*inputs, tmp_path / "run", max_steps=3, gradient_accumulation_steps=2))
    assert [watch.num_batches for watch in watches] == [6]
