"""What a check of the machine found."""

from dataclasses import dataclass
from typing import Literal

State = Literal["good", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of doctor.

    Args:
        check: what was looked at.
        found: in a few words.
        mend: the command or the step that helps; empty where nothing is wrong.
    """

    check: str
    state: State
    found: str
    mend: str = ""
