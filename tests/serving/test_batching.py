"""Which replies are generated together, and which next."""

from t5tune.serving.batching import Schedule, choose_batch
from tests.serving.fake_engine import Asked, FakeEngine


def list_chosen(requests: list[list[Asked]], max_tokens: int) -> list[int]:
    replies = [[one.generation for one in request] for request in requests]
    return [chosen.source[0] for chosen in choose_batch(replies, max_tokens)]


def test_a_batch_has_the_first_reply_and_similar_replies() -> None:
    engine = FakeEngine()
    waiting = [
        [Asked(engine, 10, size=6)],
        [Asked(engine, 20, size=40)],
        [Asked(engine, 30, size=8)],
        [Asked(engine, 40)],
    ]
    # sizes with the longest reply: 10, 44, 12, 7
    assert list_chosen(waiting, 36) == [10, 30, 40]
    assert list_chosen(waiting, 35) == [10, 30]
    assert list_chosen(waiting, 4 * 44) == [10, 30, 40, 20]
    assert list_chosen(waiting, 5) == [10]  # larger than the limit, and alone


def test_a_batch_takes_one_reply_of_each_request_first() -> None:
    engine = FakeEngine()
    many = [Asked(engine, 10 + number) for number in range(5)]
    few = [Asked(engine, 20, size=30), Asked(engine, 21, size=30)]
    waiting = [many, few, [Asked(engine, 30)]]
    # sizes with the longest reply: 7, but 34 of `few`
    assert list_chosen(waiting, 3 * 34) == [10, 30, 20]
    assert list_chosen(waiting, 5 * 34) == [10, 30, 20, 11, 21]
    assert list_chosen(waiting, 2 * 34 - 1) == [10, 30, 11, 12, 13, 14]


def test_a_batch_has_one_engine_and_one_decoding() -> None:
    engine, other = FakeEngine(), FakeEngine()
    waiting = [[Asked(engine, 10)], [Asked(other, 20)], [Asked(engine, 30, temperature=1.0)], [Asked(engine, 40)]]
    assert list_chosen(waiting, 1000) == [10, 40]


def test_memory_of_an_interrupted_batch_counts_for_what_fits() -> None:
    engine = FakeEngine()
    schedule = Schedule(max_batch_tokens=300, max_waiting=100)
    large = [Asked(engine, number, length=27).generation for number in range(10)]  # of size 30
    schedule.add(large)
    outer = schedule.begin(schedule.choose_next())
    schedule.add([Asked(engine, 100 + number).generation for number in range(10)])  # of size 7
    inner = schedule.take_smaller(outer)
    assert inner is not None
    assert len(inner.replies) == 10
    schedule.reduce_limit(inner, inner.replies)  # 300 and 70 tokens don't fit, 185 may
    assert not schedule.is_full(large[:5])
    assert schedule.is_full(large[:6])
