"""Matrix products and norms in numpy, bit-identical to torch's on a CPU.

`merge` must write the bits of PEFT's `merge_and_unload` on a CPU, so its sums need the order and rounding of torch's
kernels. numpy imitates them, because importing torch takes more time and memory than the sums themselves: without
torch, `merge` streams a base of any size in about 100 MB.

In shapes, O is out, I in, R rank, L lanes.
"""

import functools

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
ROWS, RANKS = 64, 192  # of a part of a product, so that numpy's BLAS adds 256 products in one chain
LANES = 8  # torch's kernel for norms accumulates this many partial sums per row


def compute_low_rank_product(b_OR: Floats, a_RI: Floats) -> Floats:
    """Multiply B·A, accumulating over the rank with fused multiply-adds as torch's BLAS does.

    The bits are the same on every machine, and torch's up to a rank of 256. For higher ranks, torch splits its sums
    into chains whose length depends on the processor (at most 384 with AVX-512), so its bits differ by rounding between
    machines; they are summed in one chain here. With fewer than 4 rows or 15 columns, torch's order depends on the
    processor, too; no weight of a T5 is that small. numpy's BLAS chooses kernels by processor and shape, so it is used
    only for shapes where a trial gives the same bits.
    """
    rank, columns = a_RI.shape
    if rank > RANKS and _blas_sums_in_order(ROWS, ROWS + RANKS, columns):
        return _multiply_in_parts(b_OR, a_RI)
    if _blas_sums_in_order(b_OR.shape[0], rank, columns):
        return b_OR @ a_RI
    return _multiply_in_order(b_OR, a_RI)


def _multiply_in_parts(b_OR: Floats, a_RI: Floats) -> Floats:
    # [I | B₂]·[P; A₂] continues the sums of P, the product of earlier ranks: its first terms are 1·P and zeros. Zeros
    # fill the last parts, so that all have the shape of the trial.
    more_ranks = -len(a_RI) % RANKS
    a_RI = np.pad(a_RI, ((0, more_ranks), (0, 0)))
    left = np.eye(ROWS, ROWS + RANKS, dtype=np.float32)
    product_OI = np.zeros((len(b_OR) + -len(b_OR) % ROWS, a_RI.shape[1]), np.float32)
    for row in range(0, len(b_OR), ROWS):
        b_PR = np.pad(b_OR[row : row + ROWS], ((0, max(0, row + ROWS - len(b_OR))), (0, more_ranks)))
        product_PI = product_OI[row : row + ROWS]
        for rank in range(0, len(a_RI), RANKS):
            left[:, ROWS:] = b_PR[:, rank : rank + RANKS]
            product_PI[:] = left @ np.vstack([product_PI, a_RI[rank : rank + RANKS]])
    return product_OI[: len(b_OR)]


@functools.cache
def _blas_sums_in_order(rows: int, rank: int, columns: int) -> bool:
    random = np.random.default_rng(0)
    b_OR = random.standard_normal((rows, rank), np.float32)
    a_RI = random.standard_normal((rank, columns), np.float32)
    return bool(np.array_equal(b_OR @ a_RI, _multiply_in_order(b_OR, a_RI)))


def _multiply_in_order(b_OR: Floats, a_RI: Floats) -> Floats:
    # A product of two fp32 numbers is exact in fp64, so adding it there and rounding to fp32 is a fused multiply-add.
    product_OI = np.zeros((b_OR.shape[0], a_RI.shape[1]), np.float32)
    for rank in range(a_RI.shape[0]):
        terms = b_OR[:, rank, None].astype(np.float64) * a_RI[None, rank].astype(np.float64)
        sums = product_OI + terms
        # A sum that fp64 rounded to the midpoint of two fp32 numbers would be rounded twice, maybe in the wrong
        # direction. Move it from the midpoint toward the exact sum.
        halfway = (sums.view(np.uint64) & 0x1FFFFFFF) == 0x10000000
        if halfway.any():
            total, one, two = sums[halfway], product_OI[halfway].astype(np.float64), terms[halfway]
            part = total - one
            lost = (one - (total - part)) + (two - part)  # the rounding error, by Knuth's two-sum
            sums[halfway] = np.where(lost == 0, total, np.nextafter(total, np.copysign(np.inf, lost)))
        product_OI = sums.astype(np.float32)
    return product_OI


def row_norms(values_OI: Floats) -> Floats:
    """Compute the 2-norm of each row, with the summation order of torch.linalg.norm on x86 if I is a multiple of 8."""
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
