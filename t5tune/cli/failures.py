"""Turn any exception into a T5TuneError, whose message says what to do."""

import os
import signal
import traceback

from t5tune.errors import DependencyError, T5TuneError


class Unexpected(T5TuneError):
    """An error that t5tune doesn't raise on purpose."""


def to_t5tune_error(error: BaseException) -> T5TuneError:
    """Return the error itself if it is a T5TuneError, otherwise one that explains it."""
    match error:
        case T5TuneError():
            return error
        case KeyboardInterrupt():
            interrupted = T5TuneError("interrupted")
            # SIGTERM and SIGHUP arrive as a KeyboardInterrupt with their number
            interrupted.exit_code = 128 + int(error.args[0] if error.args else signal.SIGINT)
            return interrupted
        case ImportError() if (explained := _explain_import_error(error)) is not None:
            return explained
        case OSError(filename=str() | bytes() as path):
            return T5TuneError(f"{os.fsdecode(path)}: {error.strerror}")
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Unexpected(message, hint="run with --debug to see the traceback")


def _explain_import_error(error: ImportError) -> DependencyError | None:
    """Name the missing or broken library and say how to fix it; None if the module is one of t5tune."""
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
