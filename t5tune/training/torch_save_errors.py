"""Make `torch.save` write through Python files, and collect its errors instead of raising them.

On a full disk torch's C++ file writer reports "unexpected pos 64 vs 0", whereas Python's files report the system's
reason. And a rank whose write failed must continue to the collectives in which DeepSpeed's other ranks wait for it:
the ranks exchange their errors afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from t5tune.errors import WriteError
from t5tune.io.atomic import explain_write_errors


@contextmanager
def collect_save_errors() -> Iterator[list[Exception]]:
    """Yield a list that receives the errors of `torch.save` within this block."""
    failures: list[Exception] = []
    save = torch.save

    def save_or_collect(value: Any, path: str | Path, *arguments: Any, **options: Any) -> None:
        try:
            with explain_write_errors(Path(path)):
                Path(path).parent.mkdir(parents=True, exist_ok=True)  # DeepSpeed ignores errors in creating it
                with open(path, "wb") as file:
                    stream = _ErrorKeepingFile(file)
                    save(value, stream, *arguments, **options)  # type: ignore[arg-type]
                    if stream.failure is not None:
                        raise stream.failure
        except (OSError, WriteError) as error:
            failures.append(error)

    torch.save = save_or_collect  # type: ignore[assignment]
    try:
        yield failures
    finally:
        torch.save = save


class _ErrorKeepingFile:
    """A writable file for torch's C++ code, through which no exception may pass: it keeps the first error instead."""

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
        """Do nothing: closing the file flushes it, outside of the C++ code, where an error may be raised."""
