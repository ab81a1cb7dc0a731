"""torch.save for a while through Python's own files, whose failures are noted.

Its C++ files tell "unexpected pos 64 vs 0" of a full disk; Python's tell the system's reason. And a rank that failed
must go on to the collectives in which DeepSpeed's other ranks wait for it: all of them agree on the failure later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from t5tune.errors import WriteError
from t5tune.io.atomic import writing


@contextmanager
def noted_saves() -> Iterator[list[Exception]]:
    """Yield a list that gets what goes wrong in `torch.save` until the block ends."""
    failures: list[Exception] = []
    save = torch.save

    def save_and_note(value: Any, path: str | Path, *arguments: Any, **options: Any) -> None:
        try:
            with writing(Path(path)):
                Path(path).parent.mkdir(parents=True, exist_ok=True)  # DeepSpeed passes over a failure to make it
                with open(path, "wb") as file:
                    stream = _Stream(file)
                    save(value, stream, *arguments, **options)  # type: ignore[arg-type]
                    if stream.failure is not None:
                        raise stream.failure
        except (OSError, WriteError) as error:
            failures.append(error)

    torch.save = save_and_note  # type: ignore[assignment]
    try:
        yield failures
    finally:
        torch.save = save


class _Stream:
    """A file for torch's C++ code, which no exception may cross."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.failure: OSError | None = None

    def write(self, data: memoryview) -> int:
        if self.failure is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.failure = error
        return data.nbytes

    def flush(self) -> None:
        """The file's own end flushes, and may fail in Python."""
