"""Which replies are computed together and when, and what one of them does to the others."""

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence

import pytest

from t5tune.errors import OutOfMemory, T5TuneError
from t5tune.serving.batching import Batcher, QueueFull, choose_batch
from t5tune.serving.generation import DecodingOptions, Generation

END = 1
LONG_WAIT = 60.0


class FakeEngine:
    """Replies with the first id of the source, counted up, as many times as the option says.

    Attributes:
        batches: the first ids of the sources of each batch.
        gate: each batch waits until it is set.
        fits: the largest batch that fits into memory.
    """

    name = "fake"
    stop_ids = frozenset({END})
    has_seeds = False

    def can_read(self, source: list[int]) -> bool:
        return True

    def __init__(self, max_batches: int = 1) -> None:
        self.max_batches = max_batches
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.fits = 1000
        self.fail_after: int | None = None
        self.halves_differ = False  # whether a batch that fits has other tokens than one that doesn't

    def get_group(self, options: DecodingOptions) -> Hashable:
        return options.temperature

    def generate(self, generations: Sequence[Generation]) -> None:
        self.batches.append([generation.source[0] for generation in generations])
        self.entered.release()
        assert self.gate.wait(LONG_WAIT)
        going = list(generations)
        for step in range(max(generation.options.max_new_tokens for generation in generations)):
            if len(generations) > self.fits and step == 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if self.fail_after == step:
                raise ValueError("broken")
            other = 500 if self.halves_differ and len(generations) <= self.fits else 0
            going = [generation for generation in going if not generation.add(generation.source[0] + step + other)]
            if not going:
                break


class Asked:
    """A reply that was asked for, and an event that is set when it has ended."""

    def __init__(
        self, engine: FakeEngine, first: int, length: int = 4, size: int = 3, follows: bool = True, **options: float
    ) -> None:
        self.done = threading.Event()
        self.lengths: list[int] = []
        self.generation = Generation(
            engine, [first] * size, DecodingOptions(max_new_tokens=length, **options), self.note, follows
        )

    def note(self) -> None:
        self.lengths.append(len(self.generation.ids))
        if self.generation.ended is not None:
            self.done.set()

    def wait(self) -> list[int]:
        assert self.done.wait(LONG_WAIT)
        return self.generation.ids


@pytest.fixture
def make() -> Iterator[Callable[..., Batcher]]:
    batchers: list[Batcher] = []

    def make_batcher(**changes: float) -> Batcher:
        values = {"max_batch_tokens": 1000, "max_delay": 0.0, "max_waiting": 100} | changes
        batchers.append(Batcher(**values))  # type: ignore[arg-type]
        return batchers[-1]

    yield make_batcher
    for batcher in batchers:
        batcher.close()


def submit(batcher: Batcher, *asked: Asked) -> None:
    batcher.submit([one.generation for one in asked])


def list_chosen(waiting: list[Asked], max_tokens: int) -> list[int]:
    return [chosen.source[0] for chosen in choose_batch([one.generation for one in waiting], max_tokens)]


def test_a_batch_has_the_oldest_reply_and_those_nearest_to_it_in_size() -> None:
    engine = FakeEngine()
    waiting = [Asked(engine, 10, size=6), Asked(engine, 20, size=40), Asked(engine, 30, size=8), Asked(engine, 40)]
    # sizes with the longest reply: 10, 44, 12, 7
    assert list_chosen(waiting, 36) == [10, 30, 40]
    assert list_chosen(waiting, 35) == [10, 30]
    assert list_chosen(waiting, 4 * 44) == [10, 30, 40, 20]
    assert list_chosen(waiting, 5) == [10]  # larger than the limit, and alone
    assert list_chosen([], 5) == []


def test_a_batch_is_of_one_engine_and_of_one_way_to_decode() -> None:
    engine, other = FakeEngine(), FakeEngine()
    waiting = [Asked(engine, 10), Asked(other, 20), Asked(engine, 30, temperature=1.0), Asked(engine, 40)]
    assert list_chosen(waiting, 1000) == [10, 40]


def test_what_waits_while_a_batch_is_computed_is_the_next_batch(make: Callable[..., Batcher]) -> None:
    engine, batcher = FakeEngine(), make()
    engine.gate.clear()
    asked = [Asked(engine, 10 * number) for number in range(1, 6)]
    submit(batcher, asked[0])
    assert engine.entered.acquire(timeout=LONG_WAIT)
    for one in asked[1:]:
        submit(batcher, one)
    assert (batcher.num_running, batcher.num_waiting) == (1, 4)
    engine.gate.set()
    assert [one.wait() for one in asked] == [[10 * n + step for step in range(4)] for n in range(1, 6)]
    assert engine.batches == [[10], [20, 30, 40, 50]]
    assert asked[2].lengths == [1, 2, 3, 4]
    assert [one.generation.ended for one in asked] == ["length"] * 5


def test_an_idle_engine_waits_for_others_but_not_if_the_batch_is_full(make: Callable[..., Batcher]) -> None:
    engine = FakeEngine()
    batcher = make(max_delay=LONG_WAIT * 10, max_batch_tokens=14)
    first, second = Asked(engine, 10), Asked(engine, 20)
    submit(batcher, first)
    assert not engine.entered.acquire(timeout=0.05)
    submit(batcher, second)  # two replies of size 7 are all that fits
    assert first.wait()
    assert second.wait()
    assert engine.batches == [[10, 20]]


def test_a_short_reply_ends_before_a_longer_one_of_its_batch(make: Callable[..., Batcher]) -> None:
    engine, batcher = FakeEngine(), make(max_batch_tokens=10**9)
    engine.gate.clear()
    short, long = Asked(engine, 10, length=2), Asked(engine, 20, length=100_000)
    submit(batcher, short, long)
    engine.gate.set()
    assert short.wait() == [10, 11]
    assert long.generation.ended is None
    batcher.cancel([long.generation])


def test_a_stop_token_ends_a_reply_and_is_not_part_of_it(make: Callable[..., Batcher]) -> None:
    engine, batcher = FakeEngine(), make()
    asked = Asked(engine, END - 2, length=8)
    submit(batcher, asked)
    assert asked.wait() == [END - 2, END - 1]
    assert asked.generation.ended == "stop"


def test_a_canceled_reply_leaves_the_queue_or_the_batch(make: Callable[..., Batcher]) -> None:
    engine, batcher = FakeEngine(), make()
    engine.gate.clear()
    running, neighbor, waiting = Asked(engine, 10), Asked(engine, 20), Asked(engine, 30)
    submit(batcher, running, neighbor)
    assert engine.entered.acquire(timeout=LONG_WAIT)
    submit(batcher, waiting)
    batcher.cancel([running.generation, waiting.generation])
    assert batcher.num_waiting == 0
    engine.gate.set()
    assert neighbor.wait() == [20, 21, 22, 23]
    batcher.close()
    assert engine.batches == [[10, 20]]
    assert running.generation.ids == waiting.generation.ids == []


def test_a_full_queue_refuses_all_replies_of_a_request(make: Callable[..., Batcher]) -> None:
    engine, batcher = FakeEngine(), make(max_waiting=3)
    engine.gate.clear()
    first, *others = (Asked(engine, 10 * number) for number in range(1, 7))
    submit(batcher, first)
    assert engine.entered.acquire(timeout=LONG_WAIT)
    submit(batcher, *others[:2])
    with pytest.raises(QueueFull):
        submit(batcher, *others[2:4])
    submit(batcher, others[4])
    engine.gate.set()
    for one in (first, *others[:2], others[4]):
        assert len(one.wait()) == 4


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_no_token_is_lost_or_sent_twice(
    make: Callable[..., Batcher],
) -> None:
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
    assert max(map(len, engine.batches)) <= 2  # what didn't fit isn't tried again


def test_what_goes_wrong_ends_the_replies_of_its_batch_alone(make: Callable[..., Batcher]) -> None:
    engine, other, batcher = FakeEngine(), FakeEngine(), make()
    engine.fail_after, engine.fits = 1, 0
    broken, whole = Asked(engine, 10), Asked(other, 20)
    submit(batcher, broken, whole)
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


def test_a_sampled_reply_that_was_begun_is_not_continued_by_another_run(make: Callable[..., Batcher]) -> None:
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
def test_a_reply_is_never_spliced_from_batches_that_differ(temperature: float, make: Callable[..., Batcher]) -> None:
    """What isn't sent token by token is computed again from its beginning; what was sent can only end."""
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


def test_engines_compute_as_many_batches_at_the_same_time_as_they_can(make: Callable[..., Batcher]) -> None:
    single, double = FakeEngine(), FakeEngine(max_batches=2)
    batcher = make(num_threads=2, max_batch_tokens=7)
    single.gate.clear()
    double.gate.clear()
    asked = [Asked(single, 10), Asked(single, 20), Asked(double, 30), Asked(double, 40)]
    submit(batcher, *asked)
    assert single.entered.acquire(timeout=LONG_WAIT)
    assert double.entered.acquire(timeout=LONG_WAIT)
    assert (single.batches, double.batches) == ([[10]], [[30]])  # the second one of `single` has let `double` go first
    double.gate.set()
    assert asked[2].wait()
    assert asked[3].wait()
    assert single.batches == [[10]]
    single.gate.set()
    assert asked[0].wait()
    assert asked[1].wait()
    assert single.batches == [[10], [20]]


def test_closing_finishes_what_waits_and_cuts_off_what_takes_too_long(make: Callable[..., Batcher]) -> None:
    engine, batcher = FakeEngine(), make()
    asked = [Asked(engine, 10 * number) for number in range(1, 4)]
    submit(batcher, *asked)
    batcher.close()
    assert all(len(one.wait()) == 4 for one in asked)
    assert not batcher.is_alive
    endless, late = Asked(engine, 10, length=1 << 40), Asked(engine, 20)
    batcher = make(max_batch_tokens=1)
    submit(batcher, endless, late)
    started = time.monotonic()
    batcher.close(timeout=0.1)
    assert time.monotonic() - started < LONG_WAIT
    assert endless.generation.ended is late.generation.ended is None
