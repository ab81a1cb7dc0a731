"""Which ids may come next in a reply that is one of a list of answers, even of 100,000.

    answers = Answers.sort([[1465], [2841]], stop_ids=[1], num_rows=32128)
    matcher = answers.start()
    matcher.find_allowed()

The answers' ids are sorted rows in a single array, so the answers that begin with the ids of a reply are neighbors,
which a binary search finds. A grammar of 10,000 answers takes llguidance a second to start.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

from t5tune.constraints import Allowed

Integers = npt.NDArray[np.int64]
MIN_KEPT = 64  # answers with equal beginnings, whose next ids are kept; fewer are searched faster than kept


@dataclass(frozen=True)
class Answers:
    """Sorted answers.

    Args:
        ids: the ids of all answers, each with a stop id at its end.
        starts: where each answer begins in `ids`, and the end of `ids`.
        num_rows: the number of the model's logits.
        stop_ids: the tokens that end a reply; the first ends the answers.
    """

    ids: npt.NDArray[np.int32]
    starts: Integers
    num_rows: int
    stop_ids: Sequence[int]
    _found: dict[tuple[int, int, int], tuple[npt.NDArray[np.int32], Integers]] = field(default_factory=dict)

    @classmethod
    def sort(cls, rows: Sequence[list[int]], stop_ids: Sequence[int], num_rows: int) -> "Answers":
        """Sort the ids of answers, given without a stop id."""
        rows = sorted([*ids, stop_ids[0]] for ids in rows)
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.fromiter(chain.from_iterable(rows), np.int32, starts[-1]), starts, num_rows, stop_ids)

    def start(self) -> "AnswerMatcher":
        return AnswerMatcher(self, 0, len(self.starts) - 1, 0)

    def find_next(self, low: int, high: int, depth: int) -> tuple[npt.NDArray[np.int32], Integers]:
        """Find the ids after the first `depth` ids, which the answers from `low` to `high` share.

        Returns:
            The ids, each once; the first answer with each, and `high`.
        """
        if (found := self._found.get((low, high, depth))) is None:
            ids, firsts = np.unique(self.ids[self.starts[low:high] + depth], return_index=True)
            found = ids, np.append(firsts + low, high)
            if high - low > MIN_KEPT:
                self._found[low, high, depth] = found
        return found


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
        found, _ = self.answers.find_next(self.low, self.high, self.depth)
        allowed[found] = True
        allowed[list(self.answers.stop_ids)] = self.answers.stop_ids[0] in found
        return allowed

    def check_reply(self, ids: Sequence[int]) -> None:
        """Do nothing: accept() has only allowed the ids of an answer."""

    def accept(self, index: int) -> bool:
        is_stop = index in self.answers.stop_ids
        ids, bounds = self.answers.find_next(self.low, self.high, self.depth)
        wanted = self.answers.stop_ids[0] if is_stop else index
        place = int(np.searchsorted(ids, wanted))
        if place == len(ids) or ids[place] != wanted:
            return False
        if not is_stop:
            self.low, self.high, self.depth = int(bounds[place]), int(bounds[place + 1]), self.depth + 1
        return True
