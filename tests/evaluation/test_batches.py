"""Batches of an evaluation: their examples, which rank measures them, halving them, and stopping."""

from collections.abc import Callable
from pathlib import Path

import pytest

from t5tune.errors import OutOfMemory
from t5tune.evaluation.batches import SMALL_BATCH, Batches, BatchRun, EvaluationStopped, Lengths, make_batches
from t5tune.progress import Advanced, Event, Note
from tests.distributed.test_collectives import JOINED
from tests.support.processes.runs import read_lines, start_two_ranks


def count_tokens(count: int, source: int, target: int) -> int:
    return count * (source + target)


def make_lengths(count: int) -> list[Lengths]:
    return [Lengths(1 + index * 7 % 30, 1 + index * 11 % 90) for index in range(count)]


@pytest.mark.parametrize(("batch_size", "budget"), [(None, 4000), (7, 4000), (None, 200), (1, 10)])
def test_batches_stay_within_limits_and_long_targets_come_first(batch_size: int | None, budget: int) -> None:
    lengths = make_lengths(300)
    made = make_batches(lengths, batch_size, count_tokens, budget)
    assert sorted(index for batch in made.batches for index in batch) == list(range(300))
    assert all(len(batch) == 1 or made.compute_cost(batch) <= budget for batch in made.batches)
    assert max(map(len, made.batches)) <= (batch_size or 300)
    targets = [lengths[index].target for batch in made.batches for index in batch]
    assert targets == sorted(targets, reverse=True)


def test_the_last_batches_are_small_so_that_ranks_end_together() -> None:
    sizes = [len(batch) for batch in make_batches([Lengths(1, 1)] * 6000, None, count_tokens, 100_000).batches]
    assert sizes[0] == 6000 // 32
    assert sizes == sorted(sizes, reverse=True)
    assert set(sizes[-10:-1]) == {SMALL_BATCH}
    assert [len(batch) for batch in make_batches([Lengths(1, 1)] * 48, None, count_tokens, 1000).batches] == [48]


def run(
    batches: Batches,
    measure: Callable[[list[int]], dict[int, int]],
    events: list[Event],
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[int]:
    return BatchRun(batches, measure, "evaluate: losses", events.append, is_stopped).run(is_sharded=False)


@pytest.mark.slow
def test_only_batches_that_do_not_fit_into_memory_are_halved() -> None:
    """Memory suffices for 3 of the longest examples. A batch as large as one that failed isn't tried."""
    batches = Batches(
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], [Lengths(9, 1)] * 8 + [Lengths(1, 1)] * 4, count_tokens
    )
    tried: list[list[int]] = []
    events: list[Event] = []

    def measure(indices: list[int]) -> dict[int, int]:
        tried.append(indices)
        if batches.compute_cost(indices) > 30:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return {index: index * index for index in indices}

    assert run(batches, measure, events) == [index * index for index in range(12)]
    assert tried == [[0, 1, 2, 3], [0, 1], [2, 3], [4, 5], [6, 7], [8, 9, 10, 11]]
    text = "evaluate: losses: out of memory with 4 examples of up to 1 source and 9 target tokens; continuing with 2"
    assert [event for event in events if isinstance(event, Note)] == [Note(f"{text} at a time", warning=True)]
    assert [event.done for event in events if isinstance(event, Advanced)] == [4, 8, 12]


@pytest.mark.slow
def test_an_example_too_large_for_memory_is_named() -> None:
    batches = make_batches([Lengths(4, 6)] * 4, None, count_tokens, 1000)

    def fail(message: str) -> Callable[[list[int]], dict[int, int]]:
        def measure(_: list[int]) -> dict[int, int]:
            raise RuntimeError(message)

        return measure

    with pytest.raises(OutOfMemory, match="evaluate: losses: one example of 6 source and 4 target tokens"):
        run(batches, fail("CUDA out of memory"), [])
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(batches, fail("size mismatch"), [])


def test_a_stop_ends_the_evaluation_after_the_batch() -> None:
    batches = make_batches(make_lengths(20), 5, count_tokens, 10_000)
    done: list[list[int]] = []

    def measure(indices: list[int]) -> dict[int, int]:
        done.append(indices)
        return dict.fromkeys(indices, 0)

    with pytest.raises(EvaluationStopped):
        run(batches, measure, [], is_stopped=lambda: len(done) == 2)
    assert done == batches.batches[:2]


MEASURING = """
    from t5tune.errors import OutOfMemory
    from t5tune.evaluation.batches import Batches, BatchRun, EvaluationStopped, Lengths
    measured = []

    def measure(batch):
        measured.append(batch)
        if WHAT == "fail" and world.rank == 1:
            raise RuntimeError("CUDA out of memory")
        return {index: index * index for index in batch}

    batches = Batches([[4], [2, 1], [0], [3], [5]], [Lengths(1, 1)] * 6, lambda count, source, target: count)
    run = BatchRun(batches, measure, "losses", silent, lambda: WHAT == "stop" and world.rank == 1)
    try:
        print(run.run(is_sharded=WHAT == "sharded"), measured, flush=True)
    except (OutOfMemory, EvaluationStopped) as error:
        print(type(error).__name__, error, measured, flush=True)
"""
RESULT = "[0, 1, 4, 9, 16, 25]"
FAILURE = "OutOfMemory out of memory: losses: one example of 1 source and 1 target tokens"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("what", "result", "ranks"),
    [
        ("whole", RESULT, ["[[4], [0], [5]]", "[[2, 1], [3], [5]]"]),
        ("sharded", RESULT, ["[[4], [0], [5]]", "[[2, 1], [3], [5]]"]),
        ("stop", "EvaluationStopped ", ["[[4]]", "[[2, 1]]"]),
        ("fail", FAILURE, ["[[4]]", "[[2, 1], [2]]"]),
    ],
    ids=["whole", "sharded", "stop", "fail"],
)
@pytest.mark.variants("sharded", "stop", "fail")
def test_ranks_take_batches_in_turn_and_end_together(what: str, result: str, ranks: list[str], tmp_path: Path) -> None:
    """All ranks measure the same number of batches; a rank without a batch repeats the last batch."""
    running = start_two_ranks(JOINED + MEASURING.replace("WHAT", repr(what)), tmp_path)
    with running[0], running[1]:
        assert [rank.wait() for rank in running] == [0, 0], running[1].log.read_text()
    for rank, measured in zip(running, ranks, strict=True):
        (line,) = read_lines(rank)
        assert line.startswith(result)
        assert line.endswith(measured)
