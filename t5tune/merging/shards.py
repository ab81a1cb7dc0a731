"""The files of a merged checkpoint: the base's own, or cut anew, written tensor by tensor.

What nothing changes is copied inside the kernel from where it lies in the base's file.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np

from t5tune.checkpoints.safetensors import Checkpoint, header_of
from t5tune.checkpoints.tensors import FLOATS, STORAGE, Place, Tensor
from t5tune.errors import CheckpointError
from t5tune.io.atomic import write_json

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
THREADS = 2  # one copies while the other computes
PIECE = 32 << 20
Job = Callable[[], int]


class Blocks(Protocol):
    """What becomes of each tensor."""

    def changes(self, name: str, dtype: str, wanted: str) -> bool:
        """Whether its bytes don't stay as they are."""

    def __call__(self, name: str, tensor: Tensor, wanted: str) -> Iterator[Tensor]:
        """Its new blocks of rows, in the dtype that is wanted."""


@dataclass(frozen=True)
class Shard:
    """One file to write: its header, and the tensors behind it, in the order of their bytes."""

    name: str
    header: bytes
    dtypes: dict[str, str]
    size: int


def plan_shards(base: Checkpoint, dtype: str | None, max_size: int | None) -> list[Shard]:
    """The files to write.

    Args:
        dtype: of every floating tensor; None: as in the base.
        max_size: of a file's tensors (bytes), unless a single one is larger; None: the base's own files.
    """
    parts = [names for _, names in base.parts]
    if max_size is not None:
        parts = list(_cut(base, [name for names in parts for name in names], dtype, max_size))
    if dtype is None and max_size is None and base.files:
        # the same header: every tensor keeps its place
        kept = []
        for (path, names), file in zip(base.parts, base.files, strict=True):
            dtypes = {name: file.entries[name].dtype for name in names}
            kept.append(Shard(path.name, file.read_header(), dtypes, path.stat().st_size))
        return kept
    shards = []
    for number, names in enumerate(parts, 1):
        file_name = MODEL if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        entries = {name: _entry(base, name, dtype) for name in names}
        header = header_of(entries, {"format": "pt"})
        dtypes = {name: own for name, (own, _) in entries.items()}
        shards.append(Shard(file_name, header, dtypes, len(header) + sum(map(_size, entries.values()))))
    return shards


def write_shards(base: Checkpoint, shards: list[Shard], blocks: Blocks, folder: Path) -> Iterator[int]:
    """Write the files, and the index where there are several; yields the bytes of each step.

    A few threads share the work: the kernel's copying and numpy's sums both run outside of Python's lock.
    """
    for shard in shards:
        (folder / shard.name).touch(exist_ok=False)
    jobs = [_jobs(base, shard, blocks, folder / shard.name) for shard in shards]
    # the kernel lets one thread write to a file at a time: take from the files in turn
    yield from _together(job for turn in zip_longest(*jobs) for job in turn if job is not None)
    for shard in shards:
        if (written := (folder / shard.name).stat().st_size) != shard.size:
            raise CheckpointError(f"{folder / shard.name}: {written} bytes written, expected {shard.size}")
    if len(shards) > 1 or (base.index is not None and shards[0].name != MODEL):
        weight_map = {name: shard.name for shard in shards for name in shard.dtypes}
        metadata = {
            "total_parameters": sum(math.prod(base.dtype_and_shape(name)[1]) for name in weight_map),
            "total_size": sum(shard.size - len(shard.header) for shard in shards),
        }
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def _together(jobs: Iterable[Job]) -> Iterator[int]:
    """Run the jobs in a few threads; yields what each returns as it ends, and raises what the first to fail raised."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _jobs(base: Checkpoint, shard: Shard, blocks: Blocks, target: Path) -> Iterator[Job]:
    """What writes the shard's tensors, each job at its own place in the file."""
    yield partial(_write_header, shard, target)
    position = len(shard.header)
    run: _Run | None = None  # bytes that stay as they are, over several tensors
    for name, dtype in shard.dtypes.items():
        size = _size((dtype, base.dtype_and_shape(name)[1]))
        place, is_changed = base.place(name), blocks.changes(name, base.dtype_and_shape(name)[0], dtype)
        if is_changed or place is None:
            yield partial(_write_blocks, blocks, base, name, dtype, target, position)
        elif run is not None and run.continues(place, position):
            run = replace(run, length=run.length + size)
        else:
            yield from _copies(run, target)
            run = _Run(place, size, position)
        position += size
    yield from _copies(run, target)


@dataclass(frozen=True)
class _Run:
    """Bytes to copy: where they lie, how many, and where they go."""

    place: Place
    length: int
    position: int

    def continues(self, place: Place, position: int) -> bool:
        return (
            place.path == self.place.path
            and place.begin == self.place.begin + self.length
            and position == self.position + self.length
        )


@contextmanager
def _opened(target: Path) -> Iterator[int]:
    """A file for one job: there may be more files than a process may hold open."""
    descriptor = os.open(target, os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_header(shard: Shard, target: Path) -> int:
    with _opened(target) as descriptor:
        return os.pwrite(descriptor, shard.header, 0)


def _copies(run: _Run | None, target: Path) -> Iterator[Job]:
    if run is not None:
        for begin in range(0, run.length, PIECE):
            length = min(PIECE, run.length - begin)
            place = Place(run.place.path, run.place.begin + begin)
            yield partial(_copy, _Run(place, length, run.position + begin), target)


def _copy(run: _Run, target: Path) -> int:
    """Copy inside the kernel, where it can."""
    with open(run.place.path, "rb", buffering=0) as source, _opened(target) as descriptor:
        done = 0
        while done < run.length:
            begin, left, to = run.place.begin + done, run.length - done, run.position + done
            try:
                copied = os.copy_file_range(source.fileno(), descriptor, left, begin, to)
            except (AttributeError, OSError):  # another system, or a file system that can't
                copied = os.pwrite(descriptor, os.pread(source.fileno(), min(left, 1 << 20), begin), to)
            if copied == 0:
                raise CheckpointError(f"{run.place.path}: ended at byte {begin}")
            done += copied
    return done


def _write_blocks(blocks: Blocks, base: Checkpoint, name: str, dtype: str, target: Path, position: int) -> int:
    done = 0
    with _opened(target) as descriptor:
        for block in blocks(name, base.tensor(name), dtype):
            rest = np.ascontiguousarray(block.array).reshape(-1).view(np.uint8).data
            while rest:
                written = os.pwrite(descriptor, rest, position + done)
                rest = rest[written:]
                done += written
    return done


def _cut(base: Checkpoint, names: list[str], dtype: str | None, max_size: int) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for name in names:
        more = _size(_entry(base, name, dtype))
        if part and size + more > max_size:
            yield part
            part, size = [], 0
        part.append(name)
        size += more
    yield part


def _entry(base: Checkpoint, name: str, dtype: str | None) -> tuple[str, tuple[int, ...]]:
    own, shape = base.dtype_and_shape(name)
    return dtype if dtype is not None and own in FLOATS else own, shape


def _size(entry: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = entry
    return math.prod(shape) * STORAGE[dtype].itemsize
