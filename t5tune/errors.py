"""Everything that t5tune raises on purpose.

    T5TuneError               exit 1   it failed
    ├── SettingsError         exit 2   a flag, a YAML key or an environment variable is wrong
    ├── DataError             exit 2   conversations or a token cache can't be used
    ├── ModelError            exit 2   a base checkpoint can't be used
    ├── CheckpointError       exit 2   a training checkpoint or an adapter can't be used
    ├── DependencyError       exit 1   a package that this needs is missing or doesn't work here
    ├── TrainingError         exit 1   training can't go on
    └── Stopped               exit 143 a signal asked to stop; the work so far is sealed

A message names the key or the file, the value found, and, as `hint`, the next step.
"""


class T5TuneError(Exception):
    """Base of the tree. `hint` is the next step, shown behind the message."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def kind(self) -> str:
        """The class's name, as `--json` shows it."""
        return type(self).__name__


class SettingsError(T5TuneError):
    """One or more settings are wrong; `problems` holds one line for each."""

    exit_code = 2

    def __init__(self, *problems: str, hint: str | None = None) -> None:
        super().__init__("\n".join(problems), hint)
        self.problems = problems


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


class TrainingError(T5TuneError):
    """Training can't go on."""


class Stopped(T5TuneError):
    """A signal asked to stop, and the work so far is sealed."""

    exit_code = 143
