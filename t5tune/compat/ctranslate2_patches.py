"""Load CTranslate2 models, without changes to torch in this process."""

import ctypes
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CUBLAS_PACKAGE = "nvidia-cublas-cu12"
CUBLAS_LIBRARIES = ("libcublasLt.so.12", "libcublas.so.12")  # the second needs the first


def load_cublas() -> bool:
    """Load cuBLAS 12, so that CTranslate2 finds it. Return whether that is possible.

    CTranslate2's wheel, at least up to 4.8.5, doesn't contain it, and loads it by its name at the first computation.
    torch brought it until its wheels changed to CUDA 13. The system's loader doesn't search Python's packages.
    """
    spec = find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        for name in CUBLAS_LIBRARIES:
            with suppress(OSError):
                ctypes.CDLL(f"{folder}/cublas/lib/{name}", ctypes.RTLD_GLOBAL)
    try:
        ctypes.CDLL(CUBLAS_LIBRARIES[-1])
    except OSError:
        return False
    return True


def load_translator(folder: Path, **options: Any) -> Any:
    """Load a converted model, with options of `ctranslate2.Translator`.

    CTranslate2 sets the number of OpenMP's threads, which torch uses, but only in the thread that loads the model.

    Raises:
        RuntimeError: CTranslate2 can't read the folder, or doesn't support an option on this machine.
    """
    import ctranslate2

    if options.get("device") == "cuda":
        load_cublas()
    ctranslate2.set_log_level(logging.ERROR)  # it warns if the device doesn't compute in the weights' type
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(ctranslate2.Translator, str(folder), **options).result()
