"""Write the files of a merged checkpoint tensor by tensor, with the base's shards or with new ones.

Unchanged tensors are copied from the base's files within the kernel (copy_file_range).
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap, zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np

from t5tune.checkpoints.checkpoint import Checkpoint
from t5tune.checkpoints.safetensors import build_header
from t5tune.checkpoints.tensors import FLOAT_DTYPES, FileRange, Tensor, count_tensor_bytes
from t5tune.errors import CheckpointError
from t5tune.file_names import INDEX_SUFFIX, MODEL_FILE
from t5tune.io.atomic import write_json

NUM_THREADS = 2  # one copies while the other computes
COPY_CHUNK_BYTES = 32 << 20
Job = Callable[[], int]


class TensorTransform(Protocol):
    """Computes the merged tensors."""

    def is_changed(self, name: str, dtype: str, wanted: str) -> bool:
        """Whether the bytes of a tensor change, if it is converted from `dtype` to `wanted`."""

    def __call__(self, name: str, tensor: Tensor, wanted: str) -> Iterator[Tensor]:
        """Compute a tensor in the dtype `wanted`; yields its blocks of rows."""


@dataclass(frozen=True)
class Shard:
    """One file to write: its header, the dtypes of its tensors in file order, and its size in bytes."""

    name: str
    header: bytes
    dtypes: dict[str, str]
    size: int


def plan_shards(base: Checkpoint, dtype: str | None, max_size: int | None) -> list[Shard]:
    """Plan the files to write.

    Args:
        dtype: dtype of every floating-point tensor; None keeps the base's.
        max_size: limit on the tensors of one file, in bytes, unless a single tensor is larger; None keeps the base's
            shards.
    """
    parts = [names for _, names in base.shards]
    if max_size is not None:
        parts = list(_split_by_size(base, [name for names in parts for name in names], dtype, max_size))
    if dtype is None and max_size is None and base.files:
        return _keep_shards(base)
    shards = []
    for number, names in enumerate(parts, 1):
        file_name = MODEL_FILE if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        entries = {name: _get_output_entry(base, name, dtype) for name in names}
        header = build_header(entries, {"format": "pt"})
        dtypes = {name: own for name, (own, _) in entries.items()}
        size = len(header) + sum(starmap(count_tensor_bytes, entries.values()))
        shards.append(Shard(file_name, header, dtypes, size))
    return shards


def _keep_shards(base: Checkpoint) -> list[Shard]:
    """Plan the base's own files, with the same headers, so that every tensor keeps its position."""
    kept = []
    for (path, names), file in zip(base.shards, base.files, strict=True):
        dtypes = {name: file.entries[name].dtype for name in names}
        kept.append(Shard(path.name, file.read_header(), dtypes, path.stat().st_size))
    return kept


def write_shards(base: Checkpoint, shards: list[Shard], transform: TensorTransform, folder: Path) -> Iterator[int]:
    """Write the files, and an index if there are several; yields the number of bytes of each write.

    A few threads share the work, since both the kernel's copying and numpy's sums release Python's global lock.
    """
    for shard in shards:
        (folder / shard.name).touch(exist_ok=False)
    jobs = [_make_jobs(base, shard, transform, folder / shard.name) for shard in shards]
    # the kernel lets only one thread at a time write to a file, so alternate between the files
    yield from _run_jobs(job for turn in zip_longest(*jobs) for job in turn if job is not None)
    for shard in shards:
        if (written := (folder / shard.name).stat().st_size) != shard.size:
            raise CheckpointError(f"{folder / shard.name}: {written} bytes written, expected {shard.size}")
    if len(shards) > 1 or (base.index is not None and shards[0].name != MODEL_FILE):
        weight_map = {name: shard.name for shard in shards for name in shard.dtypes}
        metadata = {
            "total_parameters": sum(math.prod(base.get_dtype_and_shape(name)[1]) for name in weight_map),
            "total_size": sum(shard.size - len(shard.header) for shard in shards),
        }
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{MODEL_FILE}{INDEX_SUFFIX}", index)


def _run_jobs(jobs: Iterable[Job]) -> Iterator[int]:
    """Run the jobs in a few threads; yields each result when it is done, and raises the error of the first to fail."""
    with ThreadPoolExecutor(min(NUM_THREADS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _make_jobs(base: Checkpoint, shard: Shard, transform: TensorTransform, target: Path) -> Iterator[Job]:
    """Make the jobs that write a shard; each writes to its own range of the file."""
    yield partial(_write_header, shard, target)
    position = len(shard.header)
    run: _CopyRange | None = None  # adjacent unchanged tensors are copied together
    for name, dtype in shard.dtypes.items():
        size = count_tensor_bytes(dtype, base.get_dtype_and_shape(name)[1])
        source = base.get_file_range(name)
        is_changed = transform.is_changed(name, base.get_dtype_and_shape(name)[0], dtype)
        if is_changed or source is None:
            yield partial(_write_blocks, transform, base, name, dtype, target, position)
        elif run is not None and run.is_continued_by(source, position):
            run = replace(run, length=run.length + size)
        else:
            yield from _make_copy_jobs(run, target)
            run = _CopyRange(source, size, position)
        position += size
    yield from _make_copy_jobs(run, target)


@dataclass(frozen=True)
class _CopyRange:
    """Bytes to copy: their range in the source file, their number, and their position in the target file."""

    source: FileRange
    length: int
    position: int

    def is_continued_by(self, source: FileRange, position: int) -> bool:
        return (
            source.path == self.source.path
            and source.begin == self.source.begin + self.length
            and position == self.position + self.length
        )


@contextmanager
def _open_for_writing(target: Path) -> Iterator[int]:
    """Open a file for one job only, since there may be more files than a process may have open."""
    descriptor = os.open(target, os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_header(shard: Shard, target: Path) -> int:
    with _open_for_writing(target) as descriptor:
        return os.pwrite(descriptor, shard.header, 0)


def _make_copy_jobs(run: _CopyRange | None, target: Path) -> Iterator[Job]:
    if run is not None:
        for begin in range(0, run.length, COPY_CHUNK_BYTES):
            length = min(COPY_CHUNK_BYTES, run.length - begin)
            source = FileRange(run.source.path, run.source.begin + begin)
            yield partial(_copy_range, _CopyRange(source, length, run.position + begin), target)


def _copy_range(run: _CopyRange, target: Path) -> int:
    """Copy within the kernel where the system supports it."""
    with open(run.source.path, "rb", buffering=0) as file, _open_for_writing(target) as descriptor:
        done = 0
        while done < run.length:
            begin, left, to = run.source.begin + done, run.length - done, run.position + done
            try:
                copied = os.copy_file_range(file.fileno(), descriptor, left, begin, to)
            except (AttributeError, OSError):  # not Linux, or not supported by the file system
                copied = os.pwrite(descriptor, os.pread(file.fileno(), min(left, 1 << 20), begin), to)
            if copied == 0:
                raise CheckpointError(f"{run.source.path}: ended unexpectedly at byte {begin}")
            done += copied
    return done


def _write_blocks(
    transform: TensorTransform, base: Checkpoint, name: str, dtype: str, target: Path, position: int
) -> int:
    done = 0
    with _open_for_writing(target) as descriptor:
        for block in transform(name, base.get_tensor(name), dtype):
            rest = np.ascontiguousarray(block.array).reshape(-1).view(np.uint8).data
            while rest:
                written = os.pwrite(descriptor, rest, position + done)
                rest = rest[written:]
                done += written
    return done


def _split_by_size(base: Checkpoint, names: list[str], dtype: str | None, max_size: int) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for name in names:
        more = count_tensor_bytes(*_get_output_entry(base, name, dtype))
        if part and size + more > max_size:
            yield part
            part, size = [], 0
        part.append(name)
        size += more
    yield part


def _get_output_entry(base: Checkpoint, name: str, dtype: str | None) -> tuple[str, tuple[int, ...]]:
    own, shape = base.get_dtype_and_shape(name)
    return dtype if dtype is not None and own in FLOAT_DTYPES else own, shape
