"""The checks of `t5tune doctor`, and what one of them finds."""

from dataclasses import dataclass
from typing import Literal

State = Literal["good", "warning", "broken"]
CheckResult = tuple[State, str, str]  # (state, result in a few words, how to fix a problem)


@dataclass(frozen=True)
class Finding:
    """One line of doctor's output: a check's name, its state, the result in a few words, and how to fix a problem.

    The last field is a command or a step, and empty if nothing is wrong. The names of the fields are the keys of
    doctor's JSON output.
    """

    check: str
    state: State
    found: str
    mend: str = ""
