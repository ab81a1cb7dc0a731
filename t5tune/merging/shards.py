"""Write the files of a merged checkpoint tensor by tensor, split like the base's files or into new shards.

Unchanged tensors are copied from the base's files within the kernel (copy_file_range).
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import starmap, zip_longest
from pathlib import Path

import numpy as np

from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.tensor_files.safetensors import build_header
from t5tune.checkpoints.tensor_files.tensors import FLOAT_DTYPES, NUMPY_DTYPES, count_tensor_bytes
from t5tune.errors import CheckpointError
from t5tune.families.architecture import Architecture
from t5tune.file_names import INDEX_SUFFIX, MODEL_FILE
from t5tune.io.atomic import write_json
from t5tune.io.processes import count_cores
from t5tune.merging.fold import WeightDelta, convert_dtype, fold_tensor

NUM_THREADS = 2  # to copy and compute at the same time
COPY_CHUNK_BYTES = 32 << 20
# by CTranslate2's quantization type; types such as int8_float16 have int8 weights
BYTES_PER_WEIGHT = {"int8": 1, "int16": 2, "float16": 2, "bfloat16": 2, "float32": 4}
CONVERTED_HEADER_BYTES = 256  # upper limit for the names, shapes and dtypes of a weight and its scale
Job = Callable[[], int]
Entries = dict[str, tuple[str, tuple[int, ...]]]  # name of a tensor -> its dtype and shape in the merged checkpoint


@dataclass(frozen=True)
class Shard:
    """One file to write: its header, its tensors in file order, and its size in bytes."""

    name: str
    header: bytes
    entries: Entries
    size: int


def plan_shards(base: Checkpoint, dtype: str | None, max_size: int | None) -> list[Shard]:
    """Plan the files to write.

    Args:
        dtype: dtype of every floating-point tensor; None: unchanged.
        max_size: limit on the bytes of tensors in one file, unless a single tensor is larger; None: the base's shards.
    """
    parts = [_get_entries(base, names, dtype) for _, names in base.shards if names]
    if dtype is None and max_size is None and base.files and not base.architecture.writes_model_names:
        # with the base's own headers, so that every tensor keeps its position
        return [
            Shard(file.path.name, file.read_header(), entries, file.path.stat().st_size)
            for file, entries in zip(base.files, parts, strict=True)
        ]
    if max_size is not None:
        parts = list(_split_by_size(parts, max_size))
    shards = []
    for number, entries in enumerate(parts, 1):
        file_name = MODEL_FILE if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        header = build_header({base.get_file_name(name): entry for name, entry in entries.items()}, {"format": "pt"})
        size = len(header) + sum(starmap(count_tensor_bytes, entries.values()))
        shards.append(Shard(file_name, header, entries, size))
    return shards


def _get_entries(base: Checkpoint, names: list[str], dtype: str | None) -> Entries:
    entries = {}
    for name in names:
        own, shape = base.get_dtype_and_shape(name)
        entries[name] = (dtype if dtype is not None and own in FLOAT_DTYPES else own, shape)
    return entries


def _split_by_size(parts: list[Entries], max_size: int) -> Iterator[Entries]:
    part: Entries = {}
    size = 0
    for name, entry in (item for entries in parts for item in entries.items()):
        more = count_tensor_bytes(*entry)
        if part and size + more > max_size:
            yield part
            part, size = {}, 0
        part[name] = entry
        size += more
    yield part


def write_shards(
    base: Checkpoint, shards: list[Shard], deltas: Mapping[str, WeightDelta], folder: Path
) -> Iterator[int]:
    """Write the files, and an index if there are several; yields the number of bytes of each write.

    Deltas are folded into their tensors; all remaining tensors are copied, or converted to the shard's dtype. A few
    threads share the work, since both the kernel's copying and numpy's sums release Python's global lock.
    """
    for shard in shards:
        with open(folder / shard.name, "xb") as file:
            yield file.write(shard.header)
    jobs = [_make_jobs(base, shard, deltas, folder / shard.name) for shard in shards]
    # the kernel lets only one thread at a time write to a file, so alternate between the files
    yield from _run_jobs(job for turn in zip_longest(*jobs) for job in turn if job is not None)
    for shard in shards:
        if (written := (folder / shard.name).stat().st_size) != shard.size:
            raise CheckpointError(f"{folder / shard.name}: {written} bytes written, expected {shard.size}")
    if len(shards) > 1 or (base.index is not None and shards[0].name != MODEL_FILE):
        weight_map = {base.get_file_name(name): shard.name for shard in shards for name in shard.entries}
        metadata = {
            "total_parameters": sum(math.prod(shape) for shard in shards for _, shape in shard.entries.values()),
            "total_size": sum(shard.size - len(shard.header) for shard in shards),
        }
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{MODEL_FILE}{INDEX_SUFFIX}", index)


def _run_jobs(jobs: Iterable[Job]) -> Iterator[int]:
    """Run the jobs in a few threads; yields the results in order, so that the first faulty job decides the error."""
    with ThreadPoolExecutor(min(NUM_THREADS, count_cores())) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _make_jobs(base: Checkpoint, shard: Shard, deltas: Mapping[str, WeightDelta], target: Path) -> Iterator[Job]:
    """Make the jobs that write a shard's tensors, each to its range of the file."""
    position = len(shard.header)
    for name, (dtype, shape) in shard.entries.items():
        size = count_tensor_bytes(dtype, shape)
        source = base.get_file_range(name)
        if source is None or name in deltas or dtype != base.get_dtype_and_shape(name)[0]:
            yield partial(_write_blocks, base, name, deltas.get(name), dtype, target, position)
        else:
            for begin in range(0, size, COPY_CHUNK_BYTES):
                length = min(COPY_CHUNK_BYTES, size - begin)
                yield partial(_copy_range, source.path, source.begin + begin, length, target, position + begin)
        position += size


def _copy_range(source: Path, begin: int, length: int, target: Path, position: int) -> int:
    # each job opens its files, since a process may not have all of them open at the same time
    with open(source, "rb", buffering=0) as file, open(target, "r+b", buffering=0) as output:
        done = 0
        while done < length:
            left, at, to = length - done, begin + done, position + done
            try:
                copied = os.copy_file_range(file.fileno(), output.fileno(), left, at, to)
            except (AttributeError, OSError):  # not on Linux, or not supported by the file system
                copied = os.pwrite(output.fileno(), os.pread(file.fileno(), min(left, 1 << 20), at), to)
            if copied == 0:
                raise CheckpointError(f"{source}: ended unexpectedly at byte {at}")
            done += copied
    return done


def _write_blocks(
    base: Checkpoint, name: str, delta: WeightDelta | None, dtype: str, target: Path, position: int
) -> int:
    done = 0
    tensor = base.get_tensor(name)
    blocks = convert_dtype(name, tensor, dtype) if delta is None else fold_tensor(name, tensor, delta, dtype)
    with open(target, "r+b", buffering=0) as output:
        output.seek(position)
        for block in blocks:
            rest = np.ascontiguousarray(block.array).reshape(-1).view(np.uint8).data
            while rest:
                written = output.write(rest)
                rest = rest[written:]
                done += written
    return done


def estimate_converted_size(weights: Entries, quantization: str | None, architecture: Architecture) -> int:
    """Estimate the bytes of a model in CTranslate2's format, rather too many than too few.

    Args:
        quantization: one of CTranslate2's quantization types; None keeps the weights' dtype.
    """
    dtypes = {dtype for dtype, _ in weights.values()}
    if quantization is not None:
        width = BYTES_PER_WEIGHT[quantization.partition("_")[0]]
    else:  # the converter loads weights of mixed dtypes in fp32
        width = NUMPY_DTYPES[dtypes.pop()].itemsize if len(dtypes) == 1 else 4
    size = 0
    for name, (_, shape) in weights.items():
        is_quantized = len(shape) == 2 and architecture.classify(name) != "rest"
        scales = 4 * shape[0] if is_quantized else 0  # int8 has one for each row
        size += math.prod(shape) * (width if is_quantized else max(width, 4)) + scales + CONVERTED_HEADER_BYTES
    return size
