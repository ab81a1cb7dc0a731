"""Environment variables, which other libraries read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def restore_environment() -> Iterator[None]:
    """Undo all changes to environment variables at the end of this block.

    torch.distributed and DeepSpeed read the address of rank 0 from variables. A later run in the same process would
    take those that this one has set for a launcher's.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
