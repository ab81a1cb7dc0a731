"""CTranslate2 as t5tune uses it, without what it changes in this process."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def load_translator(folder: Path, **options: Any) -> Any:
    """Load a converted model.

    In a thread of its own: there CTranslate2 sets the number of threads of OpenMP, and so of torch's operations.

    Args:
        options: of `ctranslate2.Translator`.

    Raises:
        RuntimeError: CTranslate2 can't read the folder, or doesn't support an option on this machine.
    """
    import ctranslate2

    ctranslate2.set_log_level(logging.ERROR)  # it warns if the device computes in another type than the weights'
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(ctranslate2.Translator, str(folder), **options).result()
