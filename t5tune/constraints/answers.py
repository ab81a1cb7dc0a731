"""Which ids may come next in a reply that is one of a list of answers, even of 100,000.

    answers = Answers.encode(["positive", "negative"], encode, stop_ids=[1], num_rows=32128, place="choices")
    matcher = answers.start()
    matcher.find_allowed()

The answers' ids are sorted rows in a single array, so the answers that begin with the ids of a reply are neighbors,
which a binary search finds. A grammar of 10,000 answers takes llguidance a second to start.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

from t5tune.constraints.grammars import Allowed
from t5tune.errors import SettingsError
from t5tune.settings.messages import shorten_value

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """Sorted answers.

    Args:
        ids: the ids of all answers, each with a stop id at its end.
        starts: the place of each answer in `ids`, and the end.
        num_rows: the number of the model's logits.
        stop_ids: the tokens that end a reply; the first ends the answers.
    """

    ids: npt.NDArray[np.int32]
    starts: Integers
    num_rows: int
    stop_ids: Sequence[int]
    _allowed: dict[tuple[int, int], npt.NDArray[np.int32]] = field(default_factory=dict)  # of the first ids

    @classmethod
    def encode(
        cls,
        texts: Sequence[str],
        encode: Callable[[list[str]], list[list[int]]],
        decode: Callable[[list[int]], str],
        stop_ids: Sequence[int],
        num_rows: int,
        place: str,
    ) -> "Answers":
        """Encode answers as the targets of training.

        Args:
            place: the beginning of an error message, such as `choices_file: labels.txt`.

        Raises:
            SettingsError: an answer is empty, or encoding changes it.
        """
        rows = encode(list(texts))
        for text, ids in zip(texts, rows, strict=True):
            if decode(ids) != text:
                problem = f"{place}: {shorten_value(text)}: this tokenizer writes it as {shorten_value(decode(ids))}"
                raise SettingsError(problem, hint="change the answer, or train with --add-tokens auto")
        rows = sorted([*ids, stop_ids[0]] for ids in rows)
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.fromiter(chain.from_iterable(rows), np.int32, starts[-1]), starts, num_rows, stop_ids)

    def start(self) -> "AnswerMatcher":
        return AnswerMatcher(self, 0, len(self.starts) - 1, 0)

    def get_column(self, low: int, high: int, depth: int) -> npt.NDArray[np.int32]:
        """Return the ids at this depth of the answers from `low` to `high`, which begin with equal ids."""
        return self.ids[self.starts[low:high] + depth]

    def find_next(self, low: int, high: int, depth: int) -> npt.NDArray[np.int32]:
        if depth > 1:  # few answers are left
            return np.unique(self.get_column(low, high, depth))
        if (low, high) not in self._allowed:
            self._allowed[low, high] = np.unique(self.get_column(low, high, depth))
        return self._allowed[low, high]


@dataclass
class AnswerMatcher:
    """The state of one reply: the answers from `low` to `high` begin with its `depth` ids."""

    answers: Answers
    low: int
    high: int
    depth: int

    def copy(self) -> "AnswerMatcher":
        return AnswerMatcher(self.answers, self.low, self.high, self.depth)

    def find_allowed(self) -> Allowed:
        allowed = np.zeros(self.answers.num_rows, bool)
        found = self.answers.find_next(self.low, self.high, self.depth)
        allowed[found] = True
        allowed[list(self.answers.stop_ids)] = self.answers.stop_ids[0] in found
        return allowed

    def accept(self, index: int) -> bool:
        is_stop = index in self.answers.stop_ids
        column = self.answers.get_column(self.low, self.high, self.depth)
        wanted = self.answers.stop_ids[0] if is_stop else index
        low, high = (int(np.searchsorted(column, wanted, side)) for side in ("left", "right"))
        if low == high or is_stop:
            return low < high
        self.low, self.high, self.depth = self.low + low, self.low + high, self.depth + 1
        return True
