"""A patch of imports, which lasts for the process: libraries don't load torch's compiler before they need it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

LIBRARIES = ("bitsandbytes", "deepspeed")


def import_without_compiler() -> None:
    """Make LIBRARIES, once they are imported in this process, compile each of their functions at its first call.

    On import, bitsandbytes 0.50 and DeepSpeed 0.19 pass functions to `torch.compile`, which loads the compiler:
    about a second of CPU and 47 MB in each process. PEFT 0.21 imports bitsandbytes wherever it is installed,
    whether or not weights are quantized.
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/backends/default/ops.py
    https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/muon/original_muon.py
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


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
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in LIBRARIES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _execute(execute: Callable[[Any], None], module: Any) -> None:
    with compile_at_first_call():
        execute(module)
