"""Hide warnings and log messages that libraries address to developers, and keep their output off stdout."""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TextIO

from t5tune.errors import T5TuneError

VARIABLES = {
    "PYTHONWARNINGS": "ignore",  # for child processes
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "DS_LOG_LEVEL": "error",
    "TORCH_CPP_LOG_LEVEL": "FATAL",  # otherwise C++ stack traces appear if a rank is lost or doesn't start
}
# default levels; transformers and huggingface_hub read theirs from a variable when they are imported
LEVELS = {
    "bitsandbytes": logging.NOTSET,
    "accelerate": logging.NOTSET,
    "transformers": logging.WARNING,
    "huggingface_hub": logging.WARNING,
}

_lock = threading.Lock()
_num_blocks = 0  # nested blocks, and blocks of all threads: they change the state of the process
_undo = ExitStack()  # of the first block


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the libraries' messages in this block, unless TRANSFORMERS_VERBOSITY asks for more than errors.

    HF_HUB_VERBOSITY sets the level of huggingface_hub. Where blocks overlap, the first to begin hides the messages, and
    the last to end shows them again. Libraries that are imported in the block may stay quiet after it.
    """
    global _num_blocks
    if os.environ.get("TRANSFORMERS_VERBOSITY", "error").lower() not in ("error", "critical"):
        yield
        return
    with _lock:
        if _num_blocks == 0:
            _undo.enter_context(_hide_messages())
        _num_blocks += 1
        warnings.simplefilter("ignore")  # takes precedence over filters that libraries added since the first block
    try:
        yield
    finally:
        with _lock:
            _num_blocks -= 1
            if _num_blocks == 0:
                _undo.close()


@contextmanager
def _hide_messages() -> Iterator[None]:
    names = [name for name in LEVELS if name != "huggingface_hub" or "HF_HUB_VERBOSITY" not in os.environ]
    levels = {(logger := logging.getLogger(name)): logger.level or LEVELS[name] for name in names}
    added = {name: value for name, value in VARIABLES.items() if name not in os.environ}
    os.environ.update(added)
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def reserve_stdout() -> Iterator[TextIO]:
    """Yield a stream to stdout: until the block ends, all other output to stdout goes to stderr.

    Raises:
        T5TuneError: stdout is closed.
    """
    if sys.stdout is None:
        raise T5TuneError("standard output is closed", hint="redirect it to a file or /dev/null")
    sys.stdout.flush()
    # file descriptors, not sys.stdout: C++ code prints too
    saved = os.dup(1)
    os.dup2(2, 1)
    # bytes of a path that aren't valid UTF-8 are shown as \\udcff, as JSON escapes them
    stream = open(saved, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        yield stream
    finally:
        with suppress(OSError):  # must not replace the error that ended the block
            stream.close()
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
