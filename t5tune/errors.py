"""Everything that t5tune raises on purpose.

    T5TuneError               exit 1   it failed
    ├── SettingsError         exit 2   a flag, a YAML key or an environment variable is wrong
    ├── DataError             exit 2   conversations or a token cache can't be used
    ├── ModelError            exit 2   a base checkpoint can't be used
    ├── CheckpointError       exit 2   a training checkpoint or an adapter can't be used
    ├── DependencyError       exit 1   a package that this needs is missing or doesn't work here
    ├── WriteError            exit 1   a disk is full or broken
    ├── OutOfMemory           exit 1   neither the GPU nor the machine has as much memory
    ├── TrainingError         exit 1   training can't go on
    │   └── RankLost          exit 1   another rank died or hangs
    └── Stopped               exit 143 a signal asked to stop; the work so far is sealed

A message names the key or the file, the value found, and, as `hint`, the next step. It is one line, whatever the value.
"""

import difflib
import re
from collections.abc import Iterable

LONGEST = 1000  # characters of a message
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """A text as a line that can be shown: control characters escaped, the middle of a long one left out."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 2 // 3]} … {text[-LONGEST // 3 :]}"
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean lora_r?`, or nothing where no known name is close. One that goes on where `name` ends is."""
    known = list(known)
    longer = [other for other in known if other.startswith((f"{name}-", f"{name}_"))]
    close = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


class T5TuneError(Exception):
    """Base of the tree. `hint` is the next step, shown behind the message."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = one_line(message)
        self.hint = one_line(hint) if hint else None
        super().__init__(self.message)

    @property
    def kind(self) -> str:
        """The class's name, as `--json` shows it."""
        return type(self).__name__


class SettingsError(T5TuneError):
    """One or more settings are wrong; `problems` holds one line for each."""

    exit_code = 2

    def __init__(self, *problems: str, hint: str | None = None) -> None:
        self.problems = tuple(map(one_line, problems))
        super().__init__("", hint)
        self.message = "\n".join(self.problems)
        self.args = (self.message,)


class DataError(T5TuneError):
    """Conversations or a token cache can't be used."""

    exit_code = 2


class ModelError(T5TuneError):
    """A base checkpoint can't be used."""

    exit_code = 2


class CheckpointError(T5TuneError):
    """A training checkpoint or an adapter can't be used."""

    exit_code = 2


class DependencyError(T5TuneError):
    """A package is missing, or doesn't work on this machine."""


class WriteError(T5TuneError):
    """A file can't be written: the disk is full, broken or read-only."""


class OutOfMemory(T5TuneError):
    """Neither the GPU nor the machine has as much memory."""


class TrainingError(T5TuneError):
    """Training can't go on."""


class RankLost(TrainingError):
    """Another rank died or doesn't answer. Starting again goes on from the last checkpoint."""


class Stopped(T5TuneError):
    """A signal asked to stop, and the work so far is sealed."""

    exit_code = 143
