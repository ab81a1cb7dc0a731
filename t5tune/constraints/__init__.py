"""Replies that follow a JSON schema, a regular expression, a grammar, or a list of answers.

A `Matcher` holds the state of one reply: `GrammarCompiler.compile` and `Answers.start` make it.
"""

from typing import Protocol, Self

import numpy as np
import numpy.typing as npt


class Matcher(Protocol):
    def copy(self) -> Self: ...

    def find_allowed(self) -> npt.NDArray[np.bool_]:
        """Find the ids that may come next, among them the stop ids if the reply is complete: an array of V booleans."""
        ...

    def accept(self, index: int) -> bool:
        """Continue with an id; return whether it was allowed. A stop id leaves the state unchanged."""
        ...
