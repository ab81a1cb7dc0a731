"""Changes to the state of the Python process, each undone at the end of its block."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hide_unraisable(kind: type[BaseException]) -> Iterator[None]:
    """Keep Python from printing exceptions of this kind that are raised where it ignores them.

    A signal handler may raise within `__del__` or a weakref's callback. Python prints a traceback of such an exception
    and continues (https://docs.python.org/3/library/sys.html#sys.unraisablehook).
    """
    print_unraisable = sys.unraisablehook
    sys.unraisablehook = lambda found: None if found.exc_type is kind else print_unraisable(found)
    try:
        yield
    finally:
        sys.unraisablehook = print_unraisable


@contextmanager
def restore_environment() -> Iterator[None]:
    """Undo all changes to environment variables at the end of this block.

    torch.distributed and DeepSpeed read the address of rank 0 from variables. A later run in the same process would
    believe that a launcher set them.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Collect no garbage in this block, which imports libraries: that would take a quarter of its time.

    Later collections leave out all objects from before the block's end, until `gc.unfreeze`.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
