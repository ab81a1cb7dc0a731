"""Work that two ranks divide: one that hangs in a piece is named by the other, which has nothing left to do."""

from pathlib import Path

import pytest

from tests.distributed.test_collectives import JOINED
from tests.support.runs import Running
from tests.support.two_ranks import read_lines, start_two_ranks

pytestmark = pytest.mark.slow

WORKING = """
    from t5tune.distributed.collectives import barrier
    from t5tune.distributed.work_queue import WorkQueue
    from t5tune.errors import RankLost
    queue = WorkQueue(PIECES)
    while (number := queue.take()) is not None:
        if number == 1:
            print("took a piece", flush=True)
            while IS_STUCK:
                time.sleep(0.1)
        time.sleep(0.4)
        queue.count_done(1)
    try:
        queue.wait_for_all_ranks(lambda: None)
        print("all arrived", flush=True)
        barrier()  # as in a run, whose ranks go on together: the store ends with rank 0
    except RankLost as error:
        print(f"error: {error}", flush=True)
        raise
"""


def start(pieces: int, is_stuck: str, folder: Path, timeout: int = 2) -> list[Running]:
    code = WORKING.replace("PIECES", str(pieces)).replace("IS_STUCK", is_stuck)
    joined = JOINED.replace("process_group_timeout=2", f"process_group_timeout={timeout}")
    return start_two_ranks(joined + code, folder)


def test_a_rank_that_hangs_is_named_once_nothing_has_been_done_for_the_timeout(tmp_path: Path) -> None:
    ranks = start(3, "True", tmp_path)
    with ranks[0], ranks[1]:
        ranks[0].wait_until(lambda: any("took" in rank.log.read_text() for rank in ranks))
        stuck = 0 if "took" in ranks[0].log.read_text() else 1
        assert ranks[1 - stuck].wait() == 1
    assert "all arrived" not in read_lines(ranks[stuck])  # it may have ended by now: the store ends with rank 0
    problem = f"rank {stuck} hangs or is gone: the others wait, and no batch was finished for 2 seconds"
    hint = "run the same command again; if a batch takes longer than that, set a larger process_group_timeout"
    assert f"error: rank {1 - stuck}: {problem}; {hint}" in read_lines(ranks[1 - stuck])


def test_a_rank_waits_for_one_that_works_on_for_longer_than_the_timeout(tmp_path: Path) -> None:
    # a busy machine may not run a process for a second or two
    ranks = start(2, "queue.count_done(1) or queue.sum_done() < 80", tmp_path, timeout=6)
    with ranks[0], ranks[1]:
        assert [rank.wait() for rank in ranks] == [0, 0], [rank.log.read_text() for rank in ranks]
    assert [read_lines(rank)[-1] for rank in ranks] == ["all arrived", "all arrived"]
