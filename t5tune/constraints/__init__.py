"""Replies that follow a JSON schema, a regular expression, a grammar, or a list of answers.

compiler = Compiler(tokenizer, num_rows=32128, stop_ids=[1])        # for one model
matcher = compiler.start(read_constraint(settings, trained_schema=None))    # for one reply
matcher.find_allowed(), matcher.accept(index)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

Allowed = npt.NDArray[np.bool_]
"""For each id of a model, whether it may come next: an array of V booleans."""


@dataclass(frozen=True)
class Constraint:
    """A rule for replies.

    Args:
        text: a JSON schema, a regular expression, a Lark grammar with the rule `start`, or a JSON list of answers.
        place: the beginning of an error message about it, such as `json_schema: order.json`.
    """

    kind: Literal["json_schema", "regex", "grammar", "choices"]
    text: str
    place: str

    @property
    def answers(self) -> list[str]:
        """The answers in a list of answers, each once."""
        return list(dict.fromkeys(json.loads(self.text))) if self.kind == "choices" else []


class Matcher(Protocol):
    """The state of one reply."""

    def copy(self) -> Self: ...

    def find_allowed(self) -> Allowed:
        """Find the ids that may come next, among them the stop ids if the reply is complete."""
        ...

    def check_reply(self, ids: Sequence[int]) -> None:
        """Check a complete reply, given by all its ids without the stop id, independently of the grammar.

        Raises:
            InvalidReplyError: it violates the constraint.
        """
        ...

    def accept(self, index: int) -> bool:
        """Continue with an id, and return True; return False if it isn't allowed.

        A stop id and a refused id leave the state unchanged.
        """
        ...
