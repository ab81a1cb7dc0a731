"""Merge adapters into one tensor of the base, one block of rows at a time.

The result is bit-identical to PEFT's `merge_and_unload` on a CPU: the adapters are converted to fp32, and
W + scale · B·A is computed in fp32 and rounded once to W's dtype. torch_arithmetic.py explains why numpy computes it.

In shapes, O is out, I in, R rank, K trained rows, D width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from t5tune.checkpoints.tensor_files.tensors import Tensor, from_float32
from t5tune.errors import CheckpointError
from t5tune.merging.torch_arithmetic import Floats, compute_low_rank_product, row_norms

OTHER_BASE_HINT = "give the base that the adapter was trained on"
RANGE_HINT = "use a dtype with a larger range: --dtype bfloat16 or float32"
UPDATABLE = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class LowRankUpdate:
    """The update of one weight, scale · B·A, with A [R, I] and B [O, R]. DoRA adds the row norms [O]."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = None


@dataclass(frozen=True)
class TrainedRows:
    """Trained rows of an embedding or head; `positions` maps each token id to its row of `trained_KD`."""

    positions: dict[int, int]
    trained_KD: Tensor


@dataclass
class WeightDelta:
    """The changes of one tensor of the base: (change, weight of its adapter in the merge)."""

    base_transform: Callable[[Tensor], Tensor] | None = None  # computes the trained-on weight from the base's weight
    replacements: list[tuple[Tensor, float]] = field(default_factory=list)  # whole modules (modules_to_save)
    updates: list[tuple[LowRankUpdate, float]] = field(default_factory=list)
    biases: list[tuple[Tensor, float]] = field(default_factory=list)  # of lora_B; the weight includes LoRA's scale
    rows: list[tuple[TrainedRows, float]] = field(default_factory=list)


def fold_tensor(name: str, tensor: Tensor, delta: WeightDelta, dtype: str) -> Iterator[Tensor]:
    """Apply the change to a tensor; yields its blocks of rows in `dtype`."""
    if tensor.dtype not in UPDATABLE:
        raise CheckpointError(f"{name}: a tensor of dtype {tensor.dtype} can't be updated", hint=OTHER_BASE_HINT)
    if misfit := _find_misfit(tensor, delta):
        problem = f"{name}: shape {list(tensor.shape)} in the base, but {misfit} in the adapter"
        raise CheckpointError(problem, hint=OTHER_BASE_HINT)
    if delta.base_transform is not None:
        tensor = delta.base_transform(tensor)
    low_rank = _combine_factors(delta.updates) if delta.updates else None
    for begin, block in tensor.iter_blocks():
        values = block.array if block.dtype == "F32" else block.to_float32()
        end = begin + len(values)
        if delta.replacements:
            values = _add_weighted(
                values, [(part.read_rows(begin, end).to_float32(), weight) for part, weight in delta.replacements]
            )
        if low_rank is not None:
            values = _add_low_rank(values, low_rank, begin)
        for bias, scale in delta.biases:
            values += bias.read_rows(begin, end).to_float32() * np.float32(scale)
        _set_rows(values, delta.rows, begin)
        result = from_float32(values, dtype)
        if not _is_finite(result):
            raise CheckpointError(f"{name}: W + scale · B·A exceeds the range of {dtype}", hint=RANGE_HINT)
        yield result


def convert_dtype(name: str, tensor: Tensor, dtype: str) -> Iterator[Tensor]:
    """Convert a tensor to a dtype; yields its blocks of rows, unchanged if it already has this dtype."""
    for _, block in tensor.iter_blocks():
        if block.dtype == dtype:
            yield block
            continue
        result = from_float32(block.to_float32(), dtype)
        if not _is_finite(result) and _is_finite(block):
            raise CheckpointError(f"{name}: values exceed the range of {dtype}", hint=RANGE_HINT)
        yield result


@dataclass(frozen=True)
class _Factors:
    """The factors of scale · B·A, and DoRA's norms."""

    b_OR: Floats
    a_RI: Floats
    scale: np.float32
    magnitude_O: Floats | None


def _combine_factors(updates: list[tuple[LowRankUpdate, float]]) -> _Factors:
    """Return one adapter's B, A and scale, or several adapters' B and A concatenated, scales in A (PEFT's `cat`)."""
    (first, weight), *others = updates
    if not others and weight == 1:
        magnitude = first.magnitude_O.to_float32().reshape(-1) if first.magnitude_O is not None else None
        return _Factors(first.b_OR.to_float32(), first.a_RI.to_float32(), np.float32(first.scale), magnitude)
    a_RI = [u.a_RI.to_float32() * np.float32(weight) * np.float32(u.scale) for u, weight in updates]
    b_OR = [u.b_OR.to_float32() for u, _ in updates]
    return _Factors(np.concatenate(b_OR, 1), np.concatenate(a_RI, 0), np.float32(1), None)


def _add_low_rank(values_OI: Floats, factors: _Factors, begin: int) -> Floats:
    b_OR = factors.b_OR[begin : begin + len(values_OI)]
    product_OI = compute_low_rank_product(b_OR, factors.a_RI)
    product_OI *= factors.scale
    values_OI += product_OI
    if factors.magnitude_O is not None:
        # DoRA (Liu et al. 2024, equation 5): W + scale · B·A gives each row's direction, its norm is trained
        with np.errstate(divide="ignore", invalid="ignore"):
            values_OI *= (factors.magnitude_O[begin : begin + len(values_OI)] / row_norms(values_OI))[:, None]
    return values_OI


def _add_weighted(values: Floats, targets: list[tuple[Floats, float]]) -> Floats:
    """Return W + Σ weight · (trained - W). A single replacement of weight 1 is returned unchanged, to keep its bits."""
    (first, weight), *others = targets
    if not others and weight == 1:
        return first
    result = values.copy()
    for trained, weight in targets:
        result += (trained - values) * np.float32(weight)
    return result


def _set_rows(values: Floats, trained_rows: list[tuple[TrainedRows, float]], begin: int) -> None:
    wanted: dict[int, list[tuple[Floats, float]]] = {}
    for rows, weight in trained_rows:
        for row, position in rows.positions.items():
            if begin <= row < begin + len(values):
                trained = rows.trained_KD.read_rows(position, position + 1).to_float32()[0]
                wanted.setdefault(row - begin, []).append((trained, weight))
    for row, targets in wanted.items():
        values[row] = _add_weighted(values[row], targets)


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == "BF16":
        return not bool(((tensor.array & 0x7F80) == 0x7F80).any())
    if tensor.dtype == "F32":
        flat = tensor.array.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            # three times as fast as the check below, but may overflow although all values are finite
            if np.isfinite(flat @ flat):
                return True
    return bool(np.isfinite(tensor.array).all())


def _find_misfit(tensor: Tensor, delta: WeightDelta) -> str | None:
    """Describe the first change that doesn't fit the tensor; None: all fit."""
    for update, _ in delta.updates:
        rows, (rank, columns) = update.b_OR.shape[0], update.a_RI.shape
        if (rows, columns) != tensor.shape or update.b_OR.shape[1] != rank:
            return f"B·A is {[rows, columns]}"
        if update.magnitude_O is not None and np.prod(update.magnitude_O.shape) != rows:
            return f"DoRA's norms are {list(update.magnitude_O.shape)}"
    for trained, _ in delta.replacements + delta.biases:
        if trained.shape != tensor.shape:
            return f"it is {list(trained.shape)}"
    for token_rows, _ in delta.rows:
        ids, shape = token_rows.positions, token_rows.trained_KD.shape
        fits = bool(ids) and min(ids) >= 0 and max(ids) < tensor.shape[0]
        if not fits or shape != (len(ids), *tensor.shape[1:]):
            return f"token rows {str(sorted(ids)):.80} are {list(shape)}"
    return None
