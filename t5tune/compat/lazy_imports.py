"""Patches of imports, which last for the process: libraries load torch's compiler, and each other, only for use."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from operator import contains
from typing import Any

COMPILING = ("bitsandbytes", "deepspeed")
# module -> its functions that say whether a library is installed; now they say whether it has been imported
CHECKS = {
    "accelerate.utils.other": {"is_deepspeed_available": "deepspeed"},
    "peft.import_utils": {"is_bnb_available": "bitsandbytes", "is_bnb_4bit_available": "bitsandbytes"},
}
IMPORTS_BITSANDBYTES = "peft.helpers"
TRANSFORMERS_CHECKS = "transformers.utils.import_utils"
UNUSED = ("datasets", "scipy", "sklearn")


def import_lazily(uses_only_t5: bool = False) -> None:
    """Make libraries, once they are imported in this process, load less.

    On import, bitsandbytes 0.50 and DeepSpeed 0.19 pass functions to `torch.compile`, which loads the compiler: about a
    second of CPU and 47 MB in each process. Now each of these functions is compiled at its first call.
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/backends/default/ops.py
    https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/muon/original_muon.py

    PEFT 0.21 imports bitsandbytes wherever it is installed, whether or not weights are quantized, and accelerate 1.15
    imports DeepSpeed to find out whether it wraps a model. Now they use these libraries only if we have imported them.

    Args:
        uses_only_t5: whether transformers also leaves out SciPy and scikit-learn, which it uses for other models, and
            `datasets`, which Trainer imports.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(uses_only_t5))


@contextmanager
def compile_at_first_call() -> Iterator[None]:
    """Make `torch.compile`, in this block, return functions that torch compiles when they are first called."""
    import torch

    compile_now = torch.compile

    def compile_later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return partial(compile_later, **options)
        get_compiled = cache(partial(compile_now, function, **options))
        return wraps(function)(lambda *args, **kwargs: get_compiled()(*args, **kwargs))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


class _Finder(MetaPathFinder):
    def __init__(self, uses_only_t5: bool) -> None:
        self._changed = {*CHECKS, IMPORTS_BITSANDBYTES, *([TRANSFORMERS_CHECKS] if uses_only_t5 else [])}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self._changed and name.partition(".")[0] not in COMPILING:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _execute(execute: Callable[[Any], None], module: Any) -> None:
    name = module.__name__
    if name.partition(".")[0] in COMPILING:
        with compile_at_first_call():
            execute(module)
    elif name == IMPORTS_BITSANDBYTES and "bitsandbytes" not in sys.modules:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # importing it fails, which PEFT expects
        try:
            execute(module)
        finally:
            del sys.modules["bitsandbytes"]
    else:
        execute(module)
        for check, library in CHECKS.get(name, {}).items():
            setattr(module, check, partial(contains, sys.modules, library))
        if name == TRANSFORMERS_CHECKS:  # Trainer asks later, too: the answer must stay as it was on import
            vars(module).update({f"is_{each}_available": partial(bool, each in sys.modules) for each in UNUSED})
