"""The exceptions that t5tune raises on purpose, and the explanation of all other exceptions.

    T5TuneError               exit 1   the command failed
    ├── SettingsError         exit 2   a flag, a YAML key or an environment variable is wrong
    ├── DataError             exit 2   conversations or a token cache can't be used
    ├── ModelError            exit 2   a base checkpoint can't be used
    ├── CheckpointError       exit 2   a training checkpoint or an adapter can't be used
    ├── DependencyError       exit 1   a required package is missing or doesn't work on this machine
    ├── UploadError           exit 1   the Hugging Face Hub can't be reached, so nothing was uploaded
    ├── WriteError            exit 1   a disk is full or broken
    ├── OutOfMemory           exit 1   the GPU or the machine doesn't have enough memory
    ├── TrainingError         exit 1   training can't continue
    │   └── RankLost          exit 1   a rank died or hangs
    ├── InvalidReplyError     exit 1   a reply doesn't satisfy its JSON schema
    ├── Stopped               exit 143 stopped by a signal; progress is saved
    └── Unexpected            exit 1   any other exception, on the command line

A message names the key or the file and the value found; `hint` is the next step. A message is always a single line.
"""

import difflib
import errno
import os
import re
import signal
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

MAX_MESSAGE_LENGTH = 1000  # characters
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def make_printable(text: str) -> str:
    """Make a text printable on one line: escape control characters, and shorten a long text in its middle."""
    if len(text) > MAX_MESSAGE_LENGTH:
        text = f"{text[: MAX_MESSAGE_LENGTH * 2 // 3]} … {text[-MAX_MESSAGE_LENGTH // 3 :]}"
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean lora_r?`, or an empty string if no known name is close."""
    close = find_close_name(name, known)
    return f"; did you mean {close}?" if close else ""


def find_close_name(name: str, known: Iterable[str]) -> str | None:
    """Find the known name that a mistyped one most likely means."""
    known = list(known)
    # a name with more words is close: `--model` suggests `--model-name-or-path`
    longer = [other for other in known if other.startswith((f"{name}-", f"{name}_"))]
    # below 0.7, `serve` would suggest `merge`
    close = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return close[0] if close else None


class T5TuneError(Exception):
    """Base class of all errors. `hint` is the next step, shown after the message.

    Args:
        setting: the setting that the message begins with; `naming_settings` may replace it.
    """

    exit_code = 1
    is_of_rank_0 = False
    """Whether rank 0 raised the error, which it also shows."""

    def __init__(self, message: str, hint: str | None = None, setting: str | None = None) -> None:
        super().__init__(make_printable(message))
        self.hint = make_printable(hint) if hint else None
        self.setting = setting

    @property
    def message(self) -> str:
        """The message without the hint."""
        return f"{self.setting}: {self.args[0]}" if self.setting else str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def _render_traceback_(self) -> list[str]:
        """Show one line in IPython, as on the command line: the message says what to change."""
        return [f"{self.kind}: {self}"]

    def replace_text(self, old: str, new: str) -> None:
        """Replace a text in the message and the hint."""
        self.args = tuple(each.replace(old, new) if isinstance(each, str) else each for each in self.args)
        self.hint = self.hint and self.hint.replace(old, new)

    @property
    def kind(self) -> str:
        """The name of the class, as `--json` shows it."""
        return type(self).__name__


class SettingsError(T5TuneError):
    """One or more settings are wrong; the message has a line for each.

    Args:
        heading: a line to show above the list of problems.
        choices: the next steps to choose from, instead of a single hint.
    """

    exit_code = 2

    def __init__(
        self, *problems: str, hint: str | None = None, heading: str | None = None, choices: Iterable[str] = ()
    ) -> None:
        self.heading = heading and make_printable(heading)
        self.choices = tuple(map(make_printable, choices))
        super().__init__("", hint or "; ".join(self.choices))
        self.args = tuple(map(make_printable, problems))  # unpickling calls the class with them

    @property
    def problems(self) -> tuple[str, ...]:
        return self.args

    @property
    def message(self) -> str:
        return "\n".join(filter(None, [self.heading, *self.problems]))


@contextmanager
def naming_settings(**names: str) -> Iterator[None]:
    """Replace the `setting` of errors in this block: `adapter="teacher_adapter"` when a teacher is loaded."""
    try:
        yield
    except T5TuneError as error:
        error.setting = names.get(error.setting or "", error.setting)
        raise


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


class UploadError(T5TuneError):
    """The Hugging Face Hub can't be reached, so nothing was uploaded."""


class OutOfMemory(T5TuneError):
    """The GPU or the machine doesn't have enough memory."""


class TrainingError(T5TuneError):
    """Training can't continue."""


class RankLost(TrainingError):
    """A rank died or doesn't respond. Run the same command again; training resumes from the last checkpoint."""


class InvalidReplyError(T5TuneError):
    """A complete reply doesn't satisfy its JSON schema, although it followed the schema's grammar."""


class Stopped(T5TuneError):
    """A signal (130: Ctrl-C) stopped the run. If training had begun, a checkpoint has its progress."""

    exit_code = 143


class Interrupted(T5TuneError):
    """Ctrl-C or a signal ended the command; the exit code is 128 plus the number of the signal."""

    exit_code = 130


class Unexpected(T5TuneError):
    """A bug in t5tune: run again with `--debug`."""


def to_t5tune_error(error: BaseException) -> T5TuneError:
    """Return a T5TuneError unchanged, and turn all other errors into one."""
    match error:
        case T5TuneError():
            return error
        case KeyboardInterrupt():
            interrupted = Interrupted("interrupted")
            # SIGTERM and SIGHUP arrive as a KeyboardInterrupt with their number
            interrupted.exit_code = 128 + int(error.args[0] if error.args else signal.SIGINT)
            return interrupted
        case ImportError() if (explained := _explain_import_error(error)) is not None:
            return explained
        case OSError(errno=errno.ENAMETOOLONG, filename=str() | bytes() as path):
            return SettingsError(f"{os.fsdecode(path)}: {error.strerror}", hint="give a shorter name")
        case OSError(filename=str() | bytes() as path):
            return T5TuneError(f"{os.fsdecode(path)}: {error.strerror or error}")
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Unexpected(message, hint="run with --debug to see the traceback")


def unwrap_interrupt(error: BaseException) -> BaseException:
    """Return the KeyboardInterrupt that an error was made of, as Python 3.11 does in __set_name__; else the error."""
    return error.__cause__ if isinstance(error.__cause__, KeyboardInterrupt) else error


def _explain_import_error(error: ImportError) -> DependencyError | None:
    """Name the missing or broken library and its fix; None for a module of t5tune."""
    # transformers wraps every failed import in a generic message; the cause has the library's name
    while isinstance(error.__cause__, ImportError):
        error = error.__cause__
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name = (error.name or frame.f_globals["__name__"]).partition(".")[0]
    if name == "t5tune":
        return None
    return DependencyError(
        f"{name} can't be imported: {' '.join(str(error).split())}",
        hint=f"pip install --force-reinstall {name}; t5tune doctor checks what else doesn't work here",
    )
