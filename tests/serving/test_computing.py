"""When replies are computed, and how a reply affects the other replies."""

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from t5tune.errors import OutOfMemory, T5TuneError
from t5tune.serving import batching, computing
from t5tune.serving.batching import QueueFull, Schedule
from t5tune.serving.computing import Batcher, DeviceLost
from tests.serving.fake_engine import END, LONG_WAIT, Asked, FakeEngine

Make = Callable[..., Batcher]


@pytest.fixture
def make() -> Iterator[Make]:
    batchers: list[Batcher] = []

    def make_batcher(
        max_batch_tokens: int = 1000, max_waiting: int = 100, max_delay: float = 0.0, num_threads: int = 1
    ) -> Batcher:
        batchers.append(Batcher(Schedule(max_batch_tokens, max_waiting), max_delay, num_threads))
        return batchers[-1]

    yield make_batcher
    for batcher in batchers:
        batcher.close()


def submit(batcher: Batcher, *asked: Asked) -> None:
    """Submit one request with several replies."""
    batcher.submit([one.generation for one in asked])


def submit_and_hold(batcher: Batcher, engine: FakeEngine, *asked: Asked) -> None:
    """Submit one request, and hold its batch before the first token until `engine.gate` is set."""
    engine.gate.clear()
    submit(batcher, *asked)
    assert engine.entered.acquire(timeout=LONG_WAIT)


def test_replies_that_wait_for_a_batch_are_the_next_batch(make: Make) -> None:
    engine, batcher = FakeEngine(), make()
    asked = [Asked(engine, 10 * number) for number in range(1, 6)]
    submit_and_hold(batcher, engine, asked[0])
    for one in asked[1:]:
        submit(batcher, one)
    assert (batcher.schedule.num_running, batcher.schedule.num_waiting) == (1, 4)
    engine.gate.set()
    assert [one.wait() for one in asked] == [[10 * n + step for step in range(4)] for n in range(1, 6)]
    assert engine.batches == [[10], [20, 30, 40, 50]]
    assert asked[2].lengths == [1, 2, 3, 4]
    assert [one.generation.ended for one in asked] == ["length"] * 5


def test_requests_take_turns(make: Make) -> None:
    engine, batcher = FakeEngine(), make(max_batch_tokens=14)  # two replies of size 7
    many = [Asked(engine, 10 + number) for number in range(6)]
    several = [Asked(engine, 20 + number) for number in range(2)]
    single = Asked(engine, 30)
    submit_and_hold(batcher, engine, *many)
    submit(batcher, *several)
    submit(batcher, single)
    engine.gate.set()
    for one in (*many, *several, single):
        assert one.wait()
    assert engine.batches == [[10, 11], [12, 20], [30, 13], [21, 14], [15]]


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is a turn, which ends when the engine says that time has passed."""
    monkeypatch.setattr(batching, "SECONDS_PER_TURN", 0.0)


@pytest.mark.usefixtures("short_turns")
def test_a_batch_is_interrupted_by_smaller_requests_only(make: Make) -> None:
    engine, other, batcher = FakeEngine(), FakeEngine(), make()
    large = [Asked(engine, 10 + number, length=40) for number in range(2)]
    small, same, equal = Asked(engine, 20, length=30), Asked(other, 30, length=30), Asked(engine, 40, length=80)
    submit_and_hold(batcher, engine, *large)
    for one in (small, same, equal):
        submit(batcher, one)
    engine.gate.set()
    for one in (*large, small, same, equal):
        first = one.generation.source[0]
        assert one.wait() == list(range(first, first + one.generation.options.max_new_tokens))
    assert engine.batches == [[10, 11], [20], [40]]
    assert engine.ended == [[20], [10, 11], [40]]
    assert other.ended == [[30]]
    assert small.generation.started_at is not None
    assert small.generation.started_at < equal.generation.started_at  # type: ignore[operator]


@pytest.mark.usefixtures("short_turns")
def test_each_of_three_nested_batches_is_half_as_large(make: Make) -> None:
    engine, batcher = FakeEngine(), make(max_batch_tokens=80)
    requests = [
        [Asked(engine, first + number, length=length) for number in range(count)]
        for first, length, count in ((100, 4000, 1), (200, 7, 5), (300, 2, 5), (400, 1, 1))
    ]
    waiting = iter(requests)
    submit(batcher, *next(waiting))
    engine.on_step = lambda: submit(batcher, *request) if (request := next(waiting, None)) else None
    for one in (one for request in requests for one in request):
        assert one.wait()
    # four replies of size 10 in 40, and of size 5 in 20; the smallest request has waited for the third batch
    assert engine.batches[:3] == [[100], [200, 201, 202, 203], [300, 301, 302, 303]]
    assert engine.ended[0] == [300, 301, 302, 303]
    assert engine.ended[-1] == [100]


@pytest.mark.usefixtures("short_turns")
def test_a_reply_without_memory_waits_for_the_interrupted_batch(make: Make) -> None:
    engine, batcher = FakeEngine(), make()
    large, small = Asked(engine, 10, length=40), [Asked(engine, 20 + number) for number in range(2)]
    tries = iter(range(2))

    def use_memory() -> None:
        if engine.batches == [[10]] and batcher.schedule.num_waiting == 0:
            submit(batcher, *small)
        elif engine.batches != [[10]] and next(tries, None) is not None:  # both replies, and the first of them
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    engine.on_step = use_memory
    submit(batcher, large)
    assert [one.wait() for one in (large, *small)] == [[*range(10, 50)], [*range(20, 24)], [*range(21, 25)]]
    assert engine.batches == [[10], [20, 21], [20], [21], [20]]
    assert engine.ended == [[21], [10], [20]]


def test_a_large_request_gets_half_of_the_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    for module in (batching, computing):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    engine, other, batcher = FakeEngine(), FakeEngine(), make()
    num_tokens = {engine: 0, other: 0}

    def pass_time(by: FakeEngine) -> None:
        now[0] += 0.03
        num_tokens[by] += 1
        if batcher.schedule.num_waiting == 0 and num_tokens[engine] < 400:
            submit(batcher, Asked(other, 20, length=50))

    engine.on_step, other.on_step = lambda: pass_time(engine), lambda: pass_time(other)
    large = Asked(engine, 10, length=500)
    submit(batcher, large)
    assert len(large.wait()) == 500
    assert 300 <= num_tokens[other] <= 500


def test_an_idle_engine_waits_until_the_batch_is_full(make: Make) -> None:
    engine = FakeEngine()
    batcher = make(max_delay=LONG_WAIT * 10, max_batch_tokens=14)
    first, second = Asked(engine, 10), Asked(engine, 20)
    submit(batcher, first)
    assert not engine.entered.acquire(timeout=0.05)
    submit(batcher, second)  # two replies of size 7 are all that fits
    assert first.wait()
    assert second.wait()
    assert engine.batches == [[10, 20]]


@pytest.mark.parametrize("delays", [2, 11])
def test_a_batch_waits_for_one_more_request_ten_times(delays: int, make: Make) -> None:
    engine = FakeEngine()
    batcher = make(max_delay=LONG_WAIT, max_batch_tokens=21)  # three replies of size 7
    old, new, last = Asked(engine, 10), Asked(engine, 20), Asked(engine, 30)
    old.generation.submitted_at -= delays * LONG_WAIT
    submit(batcher, old, new)
    if delays > 10:
        assert engine.entered.acquire(timeout=LONG_WAIT)
    else:
        assert not engine.entered.acquire(timeout=0.05)
        submit(batcher, last)
        assert last.wait()
    assert old.wait()
    assert new.wait()
    assert engine.batches == ([[10, 20]] if delays > 10 else [[10, 30, 20]])


def test_new_requests_join_those_that_came_during_the_batch(make: Make) -> None:
    engine = FakeEngine()
    batcher = make(max_delay=LONG_WAIT, max_batch_tokens=21)
    first, during, *after = (Asked(engine, 10 * number) for number in range(1, 5))
    for one in (first, during):
        one.generation.submitted_at -= 11 * LONG_WAIT
    submit_and_hold(batcher, engine, first)
    submit(batcher, during)
    engine.gate.set()
    assert first.wait()
    assert not engine.entered.acquire(timeout=0.05)
    for one in after:
        submit(batcher, one)
    assert all(one.wait() for one in (during, *after))
    assert engine.batches == [[10], [20, 30, 40]]


def test_a_short_reply_ends_before_its_batch(make: Make) -> None:
    engine, batcher = FakeEngine(), make(max_batch_tokens=10**9)
    short, long = Asked(engine, 10, length=2), Asked(engine, 20, length=100_000)
    submit_and_hold(batcher, engine, short, long)
    engine.gate.set()
    assert short.wait() == [10, 11]
    assert long.generation.ended is None
    batcher.cancel([long.generation])


def test_a_stop_token_ends_a_reply(make: Make) -> None:
    engine, batcher = FakeEngine(), make()
    asked = Asked(engine, END - 2, length=8)
    submit(batcher, asked)
    assert asked.wait() == [END - 2, END - 1]
    assert asked.generation.ended == "stop"


def test_a_canceled_reply_leaves_the_queue_or_the_batch(make: Make) -> None:
    engine, batcher = FakeEngine(), make()
    running, neighbor, waiting = Asked(engine, 10), Asked(engine, 20), Asked(engine, 30)
    submit_and_hold(batcher, engine, running, neighbor)
    submit(batcher, waiting)
    batcher.cancel([running.generation, waiting.generation])
    assert batcher.schedule.num_waiting == 0
    engine.gate.set()
    assert neighbor.wait() == [20, 21, 22, 23]
    batcher.close()
    assert engine.batches == [[10, 20]]
    assert running.generation.ids == waiting.generation.ids == []


def test_a_full_queue_refuses_all_replies_of_a_request(make: Make) -> None:
    engine, batcher = FakeEngine(), make(max_waiting=3)
    first, *others = (Asked(engine, 10 * number) for number in range(1, 7))
    submit_and_hold(batcher, engine, first)
    submit(batcher, *others[:2])
    with pytest.raises(QueueFull):
        submit(batcher, *others[2:4])
    submit(batcher, others[4])
    engine.gate.set()
    for one in (first, *others[:2], others[4]):
        assert len(one.wait()) == 4


def test_a_batch_without_memory_is_halved_and_loses_no_token(make: Make) -> None:
    engine, batcher = FakeEngine(), make()
    engine.fits = 2
    asked = [Asked(engine, 10 * number) for number in range(1, 6)]
    submit(batcher, *asked)
    assert [one.wait() for one in asked] == [[10 * n + step for step in range(4)] for n in range(1, 6)]
    assert engine.batches == [[10, 20, 30, 40, 50], [10, 20, 30], [10, 20], [30], [40, 50]]
    assert all(one.lengths == [1, 2, 3, 4] for one in asked)
    engine.batches.clear()
    submit(batcher, *(again := [Asked(engine, 10 * number) for number in range(1, 6)]))
    assert all(len(one.wait()) == 4 for one in again)
    assert max(map(len, engine.batches)) <= 2  # a batch that didn't fit isn't tried again


def test_an_error_ends_only_the_replies_of_its_batch(make: Make) -> None:
    engine, other, batcher = FakeEngine(), FakeEngine(), make()
    engine.fail_after, engine.fits = 1, 0
    broken, whole = Asked(engine, 10), Asked(other, 20)
    submit(batcher, broken)
    submit(batcher, whole)
    assert whole.wait() == [20, 21, 22, 23]
    broken.wait()
    assert isinstance(broken.generation.ended, T5TuneError)
    assert broken.generation.ended.message == "the reply couldn't be computed: ValueError: broken"
    engine.fail_after = None
    large = Asked(engine, 30)
    submit(batcher, large)
    large.wait()
    assert isinstance(large.generation.ended, OutOfMemory)
    assert "3 prompt and 4 reply tokens" in large.generation.ended.message


def test_a_gpu_that_has_failed_is_not_tried_again(make: Make) -> None:
    engine, batcher = FakeEngine(), make(max_batch_tokens=7 * 8)
    engine.fail_after, engine.failure = 2, RuntimeError("CUDA error: an illegal memory access was encountered")
    asked = [Asked(engine, 10 * number) for number in range(1, 10)]
    submit_and_hold(batcher, engine, *asked)
    engine.gate.set()
    for one in asked:
        one.wait()
        assert isinstance(one.generation.ended, DeviceLost)
    assert len(engine.batches) == 1  # the ninth request waited
    assert batcher.failure == (
        "the GPU has failed: CUDA error: an illegal memory access was encountered; restart the server"
    )
    with pytest.raises(DeviceLost):
        submit(batcher, Asked(engine, 10))


def test_a_sampled_reply_without_a_seed_is_not_started_over(make: Make) -> None:
    engine, batcher = FakeEngine(), make()
    engine.fits = 1
    asked = [Asked(engine, 10 * number, temperature=1.0) for number in (1, 2)]
    submit(batcher, *asked)
    for one in asked:
        assert len(one.wait()) == 2
        assert isinstance(one.generation.ended, T5TuneError)
    engine.has_seeds = True
    submit(batcher, *(again := [Asked(engine, 10 * number, temperature=1.0) for number in (1, 2)]))
    assert [one.wait() for one in again] == [[10, 11, 12, 13], [20, 21, 22, 23]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reply_is_never_spliced_from_batches_that_differ(temperature: float, make: Make) -> None:
    """A reply that isn't sent token by token is computed again; a reply that was partly sent ends with an error."""
    engine, batcher = FakeEngine(), make()
    engine.fits, engine.halves_differ = 1, True
    whole = Asked(engine, 10, follows=False, temperature=temperature)
    sent = Asked(engine, 20, temperature=temperature)
    submit(batcher, whole, sent)
    assert whole.wait() == [510, 511, 512, 513]
    assert whole.generation.ended == "length"
    assert sent.wait() == [20, 21]
    assert isinstance(sent.generation.ended, T5TuneError)
    assert "the reply couldn't be computed: its batch failed" in sent.generation.ended.message


def test_an_engine_computes_at_most_max_batches_at_once(make: Make) -> None:
    single, double = FakeEngine(), FakeEngine(max_batches=2)
    batcher = make(num_threads=2, max_batch_tokens=7)
    single.gate.clear()
    double.gate.clear()
    asked = [Asked(single, 10), Asked(single, 20), Asked(double, 30), Asked(double, 40)]
    for one in asked:
        submit(batcher, one)
    assert single.entered.acquire(timeout=LONG_WAIT)
    assert double.entered.acquire(timeout=LONG_WAIT)
    assert (single.batches, double.batches) == ([[10]], [[30]])  # the second reply of `single` waits for `double`
    double.gate.set()
    assert asked[2].wait()
    assert asked[3].wait()
    assert single.batches == [[10]]
    single.gate.set()
    assert asked[0].wait()
    assert asked[1].wait()
    assert single.batches == [[10], [20]]


def test_closing_finishes_waiting_replies_until_the_timeout(make: Make) -> None:
    engine, batcher = FakeEngine(), make()
    asked = [Asked(engine, 10 * number) for number in range(1, 4)]
    submit(batcher, *asked)
    batcher.close()
    assert all(len(one.wait()) == 4 for one in asked)
    assert batcher.failure == "the thread that computes replies has ended; restart the server"
    endless, late = Asked(engine, 10, length=1 << 40), Asked(engine, 20, length=1 << 41)
    batcher = make(max_batch_tokens=1)
    submit(batcher, endless)
    submit(batcher, late)
    started = time.monotonic()
    batcher.close(timeout=0.1)
    assert time.monotonic() - started < LONG_WAIT
    assert endless.generation.ended is late.generation.ended is None
