"""Patches of torch, each undone at the end of its block."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed import distributed_c10d
from torch.nn import functional

from t5tune.errors import WriteError
from t5tune.io.atomic import explain_write_errors


@contextmanager
def _replace(owner: Any, **replacements: Any) -> Iterator[None]:
    """Set attributes of a module until the end of this block."""
    before = {name: getattr(owner, name) for name in replacements}
    try:
        for name, value in replacements.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def use_default_timeout(timeout: timedelta) -> AbstractContextManager[None]:
    """Set the timeout of process groups that are made without one.

    DeepSpeed makes several groups without a timeout, whose collectives wait for a lost rank for torch's default, 10
    minutes with NCCL and 30 with gloo, whatever process_group_timeout says. torch reads both names when it makes a
    group (`_get_default_timeout`, torch 2.8 to 2.13). https://github.com/huggingface/transformers/issues/32036
    """
    return _replace(distributed_c10d, default_pg_timeout=timeout, default_pg_nccl_timeout=timeout)


def replace_attention_kernel(kernel: Callable[..., torch.Tensor]) -> AbstractContextManager[None]:
    """Replace `torch.nn.functional.scaled_dot_product_attention`.

    `plan` measures a GPU's memory on a CPU, where torch's attention with dropout stores all scores (up to at least
    2.13), unlike a GPU's fused kernels. The patch works because transformers and model/attention look the function up
    at each call.
    """
    return _replace(functional, scaled_dot_product_attention=kernel)


@contextmanager
def restore_determinism() -> Iterator[None]:
    """Restore at the end of this block the process's settings that `full_determinism` of TrainingArguments changes.

    transformers' `enable_full_determinism` never turns it off (up to at least 5.24), and in a notebook the process
    continues. `restore_environment` restores the environment variables that it sets.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    try:
        with _replace(cudnn, deterministic=cudnn.deterministic, benchmark=cudnn.benchmark):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@contextmanager
def collect_save_errors() -> Iterator[list[Exception]]:
    """Make `torch.save` write through Python files. Yield a list that receives its errors, which aren't raised.

    On a full disk torch's own file writer only reports "unexpected pos 64 vs 0" (caffe2/serialize/inline_container.cc,
    torch 2.8 to 2.13), but Python's files report the system's reason. https://github.com/pytorch/pytorch/issues/156955

    A rank whose write failed must continue to the collectives in which DeepSpeed's other ranks wait for it: the ranks
    exchange their errors afterwards. DeepSpeed's extension point, CheckpointEngine, would cover only a part: the
    Trainer saves its optimizer, its scheduler and the random states with `torch.save`, too.
    """
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

    with _replace(torch, save=save_or_collect):
        yield failures


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
        """Do nothing: closing the file flushes it outside of the C++ code, where an error may be raised."""
