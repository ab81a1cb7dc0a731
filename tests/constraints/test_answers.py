"""A reply that is one of a list of answers: exactly the ids that continue an answer are allowed."""

import random

import numpy as np

from t5tune.checkpoints.pocket import pocket_folder
from t5tune.constraints.answers import AnswerMatcher, Answers
from t5tune.data.tokens.encoders import Beginning, make_encoder
from t5tune.data.tokens.tokenizer import load_tokenizer

NUM_ROWS, STOP_IDS = 1536, [1, 1530]
WORDS = ["six", "coffees", "and", "teas", "please", "for", "Aida", "at", "noon", "tomorrow"]


def encode_answers(texts: list[str]) -> tuple[Answers, list[list[int]]]:
    rows = [ids.tolist() for ids in make_encoder(load_tokenizer(pocket_folder())).encode([*map(Beginning, texts)])]
    return Answers.sort(rows, STOP_IDS, NUM_ROWS), rows


def find_allowed(matcher: AnswerMatcher) -> list[int]:
    return np.flatnonzero(matcher.find_allowed()).tolist()


def test_the_allowed_ids_continue_an_answer() -> None:
    chooser = random.Random(1)
    texts = sorted({" ".join(chooser.choices(WORDS, k=chooser.randint(1, 4))) for _ in range(300)})
    answers, rows = encode_answers(texts)
    ended = [[*ids, 1] for ids in rows]
    for ids in [*rows[:40], chooser.choices(range(3, 1500), k=5)]:
        matcher = answers.start()
        for place in range(len(ids) + 1):
            following = {row[place] for row in ended if row[:place] == ids[:place]}
            assert find_allowed(matcher) == sorted({*following, *(STOP_IDS if 1 in following else [])})
            if place == len(ids) or ids[place] not in following:
                break
            assert matcher.copy().accept(ids[place])
            assert matcher.accept(ids[place])
    assert [answers.start().accept(index) for index in (STOP_IDS[0], STOP_IDS[1], 1499)] == [False] * 3


def test_any_stop_id_ends_a_complete_answer() -> None:
    answers, (ids, _) = encode_answers(["six coffees", "six coffees and teas"])
    matcher = answers.start()
    assert all(matcher.accept(index) for index in ids)
    assert all(matcher.accept(index) for index in STOP_IDS)
    assert len(find_allowed(matcher)) == 3
