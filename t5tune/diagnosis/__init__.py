"""The checks of `t5tune doctor`."""

from dataclasses import dataclass
from typing import Literal

State = Literal["good", "warning", "broken"]
CheckResult = tuple[State, str, str]  # (state, result in a few words, how to fix a problem, or "")


@dataclass(frozen=True)
class Finding:
    """One line of doctor's output: a check's name and its CheckResult. The fields are the keys of the JSON output."""

    check: str
    state: State
    found: str
    mend: str = ""
