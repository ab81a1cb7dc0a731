"""Fold what adapters trained into one tensor of the base, a block of rows at a time, in torch's arithmetic.

The bits are those of PEFT's `merge_and_unload` on a CPU: adapters in fp32, W + scale · B·A summed in fp32 and rounded
once to W's dtype. numpy computes it, since importing torch takes longer than the sums, and more memory.
In shapes, O is out, I in, R rank, K trained rows, D width.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from t5tune.checkpoints.adapter import LowRank
from t5tune.checkpoints.tensors import Tensor, from_float32
from t5tune.errors import CheckpointError

Floats = npt.NDArray[np.float32]
OTHER_BASE = "name the base that the adapter was trained on"
LANES = 8  # torch's kernel for norms keeps so many sums side by side
UPDATABLE = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class Rows:
    """Trained rows of an embedding or head: `places` tells which of the [K, D] tensor's rows is which."""

    places: dict[int, int]
    trained_KD: Tensor


@dataclass
class Change:
    """What adapters do to one tensor of the base, each with its weight in the merge.

    `prepare` gives the weight that they were trained on, where that isn't the base's own.
    """

    prepare: Callable[[Tensor], Tensor] | None = None
    whole: list[tuple[Tensor, float]] = field(default_factory=list)
    updates: list[tuple[LowRank, float]] = field(default_factory=list)
    biases: list[tuple[Tensor, float]] = field(default_factory=list)
    rows: list[tuple[Rows, float]] = field(default_factory=list)


def folded(name: str, tensor: Tensor, change: Change, dtype: str) -> Iterator[Tensor]:
    """The tensor's blocks of rows with the change in them, in `dtype`.

    Raises:
        CheckpointError: shapes that don't fit, or a sum that the dtype can't hold.
    """
    if tensor.dtype not in UPDATABLE:
        raise CheckpointError(f"{name}: dtype {tensor.dtype} can't take an update")
    _check_shapes(name, tensor, change)
    if change.prepare is not None:
        tensor = change.prepare(tensor)
    low_rank = _factors(change.updates) if change.updates else None
    for begin, block in tensor.blocks():
        values = block.array if block.dtype == "F32" else block.to_float32()
        end = begin + len(values)
        if change.whole:
            values = _moved(values, [(part.rows(begin, end).to_float32(), weight) for part, weight in change.whole])
        if low_rank is not None:
            values = _add_low_rank(values, low_rank, begin)
        for bias, scale in change.biases:
            values += bias.rows(begin, end).to_float32() * np.float32(scale)
        _set_rows(values, change.rows, begin)
        result = from_float32(values, dtype)
        if not _is_finite(result):
            raise CheckpointError(f"{name}: W + scale · B·A holds values that {dtype} can't")
        yield result


def converted(name: str, tensor: Tensor, dtype: str) -> Iterator[Tensor]:
    """The tensor's blocks of rows in a dtype, its own or another.

    Raises:
        CheckpointError: a value that the dtype can't hold.
    """
    for _, block in tensor.blocks():
        if block.dtype == dtype:
            yield block
            continue
        result = from_float32(block.to_float32(), dtype)
        if not _is_finite(result) and _is_finite(block):
            raise CheckpointError(f"{name}: holds values that {dtype} can't", hint="take bfloat16 or float32")
        yield result


@dataclass(frozen=True)
class _Factors:
    """scale · B·A, and DoRA's norms."""

    b_OR: Floats
    a_RI: Floats
    scale: np.float32
    magnitude_O: Floats | None


def _factors(updates: list[tuple[LowRank, float]]) -> _Factors:
    """One adapter's B, A and scale; several stand side by side, their scales in A (PEFT's combination `cat`)."""
    (first, weight), *others = updates
    if not others and weight == 1:
        magnitude = first.magnitude_O.to_float32().reshape(-1) if first.magnitude_O is not None else None
        return _Factors(first.b_OR.to_float32(), first.a_RI.to_float32(), np.float32(first.scale), magnitude)
    a_RI = [u.a_RI.to_float32() * np.float32(weight) * np.float32(u.scale) for u, weight in updates]
    b_OR = [u.b_OR.to_float32() for u, _ in updates]
    return _Factors(np.concatenate(b_OR, 1), np.concatenate(a_RI, 0), np.float32(1), None)


def _add_low_rank(values_OI: Floats, factors: _Factors, begin: int) -> Floats:
    b_OR = factors.b_OR[begin : begin + len(values_OI)]
    product_OI = low_rank_product(b_OR, factors.a_RI)
    product_OI *= factors.scale
    values_OI += product_OI
    if factors.magnitude_O is not None:
        # DoRA: the direction is W + scale · B·A, each row's norm is trained (Liu et al. 2024, equation 5)
        with np.errstate(divide="ignore", invalid="ignore"):
            values_OI *= (factors.magnitude_O[begin : begin + len(values_OI)] / row_norms(values_OI))[:, None]
    return values_OI


def low_rank_product(b_OR: Floats, a_RI: Floats) -> Floats:
    """B·A, summed rank by rank with fused multiply-adds, as torch's BLAS does: the same bits on every machine.

    With less than 4 rows or 15 columns torch's own order depends on the processor; no weight of a T5 is so small.

    numpy's BLAS chooses kernels by processor and shape. Where a trial of the same shape shows that its sums are the
    same to the bit, it computes.
    """
    if _blas_sums_in_order(b_OR.shape[0], *a_RI.shape):
        return b_OR @ a_RI
    return _product_in_order(b_OR, a_RI)


@functools.cache
def _blas_sums_in_order(rows: int, rank: int, columns: int) -> bool:
    random = np.random.default_rng(0)
    b_OR = random.standard_normal((rows, rank), np.float32)
    a_RI = random.standard_normal((rank, columns), np.float32)
    return bool(np.array_equal(b_OR @ a_RI, _product_in_order(b_OR, a_RI)))


def _product_in_order(b_OR: Floats, a_RI: Floats) -> Floats:
    """A product of two fp32 is exact in fp64, so adding it there and rounding to fp32 is a fused multiply-add."""
    product_OI = np.zeros((b_OR.shape[0], a_RI.shape[1]), np.float32)
    for rank in range(a_RI.shape[0]):
        terms = b_OR[:, rank, None].astype(np.float64) * a_RI[None, rank].astype(np.float64)
        sums = product_OI + terms
        # a sum that fp64 rounded to halfway between two fp32 would be rounded twice: take it off the middle
        halfway = (sums.view(np.uint64) & 0x1FFFFFFF) == 0x10000000
        if halfway.any():
            total, one, two = sums[halfway], product_OI[halfway].astype(np.float64), terms[halfway]
            part = total - one
            lost = (one - (total - part)) + (two - part)  # Knuth's two-sum
            sums[halfway] = np.where(lost == 0, total, np.nextafter(total, np.copysign(np.inf, lost)))
        product_OI = sums.astype(np.float32)
    return product_OI


def row_norms(values_OI: Floats) -> Floats:
    """The 2-norm of each row, added up in the order of torch.linalg.norm on x86, in rows of a multiple of 8."""
    whole = values_OI.shape[1] // LANES * LANES
    lanes_OL = np.zeros((len(values_OI), LANES), np.float32)
    for column in range(0, whole, LANES):
        part_OL = values_OI[:, column : column + LANES]
        lanes_OL += part_OL * part_OL
    norms_O = lanes_OL[:, 0].copy()
    for lane in range(1, LANES):
        norms_O += lanes_OL[:, lane]
    for column in range(whole, values_OI.shape[1]):
        norms_O += values_OI[:, column] * values_OI[:, column]
    return np.sqrt(norms_O)


def _moved(values: Floats, targets: list[tuple[Floats, float]]) -> Floats:
    """W + Σ weight · (trained - W); a single one of weight 1 is what was trained, to the bit."""
    (first, weight), *others = targets
    if not others and weight == 1:
        return first
    result = values.copy()
    for trained, weight in targets:
        result += (trained - values) * np.float32(weight)
    return result


def _set_rows(values: Floats, changes: list[tuple[Rows, float]], begin: int) -> None:
    wanted: dict[int, list[tuple[Floats, float]]] = {}
    for rows, weight in changes:
        for row, place in rows.places.items():
            if begin <= row < begin + len(values):
                trained = rows.trained_KD.rows(place, place + 1).to_float32()[0]
                wanted.setdefault(row - begin, []).append((trained, weight))
    for row, targets in wanted.items():
        values[row] = _moved(values[row], targets)


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == "BF16":
        return not bool(((tensor.array & 0x7F80) == 0x7F80).any())
    if tensor.dtype == "F32":
        flat = tensor.array.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(flat @ flat):  # a third of the time; large values may overflow in it
                return True
    return bool(np.isfinite(tensor.array).all())


def _check_shapes(name: str, tensor: Tensor, change: Change) -> None:
    for update, _ in change.updates:
        b_OR, a_RI = update.b_OR, update.a_RI
        if (b_OR.shape[0], a_RI.shape[1]) != tensor.shape or b_OR.shape[1] != a_RI.shape[0]:
            shape = [b_OR.shape[0], a_RI.shape[1]]
            raise CheckpointError(
                f"{name}: {list(tensor.shape)} in the base, the adapter's B·A is {shape}", hint=OTHER_BASE
            )
        if update.magnitude_O is not None and np.prod(update.magnitude_O.shape) != tensor.shape[0]:
            raise CheckpointError(f"{name}: {tensor.shape[0]} rows, {list(update.magnitude_O.shape)} norms of DoRA")
    for trained, _ in change.whole + change.biases:
        if trained.shape != tensor.shape:
            raise CheckpointError(
                f"{name}: {list(tensor.shape)} in the base, {list(trained.shape)} in the adapter", hint=OTHER_BASE
            )
    for rows, _ in change.rows:
        places = rows.places
        fits = bool(places) and min(places) >= 0 and max(places) < tensor.shape[0]
        if not fits or rows.trained_KD.shape != (len(places), *tensor.shape[1:]):
            raise CheckpointError(
                f"{name}: {list(tensor.shape)} in the base, the adapter's {len(places)} rows are "
                f"{list(rows.trained_KD.shape)}"
            )
