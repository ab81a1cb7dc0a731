"""Files of rows of unsigned integers, each column in the narrowest type that fits its values.

    types = write_narrow_table(wide, folder / "examples.bin", ("conversation", "turn"))
    # {"conversation": "<u2", "turn": 1}
    IntegerTable(folder / "examples.bin", types).row(7)  # (3, 1)

The values of a row are stored consecutively, little-endian. A column with the same value in every row isn't stored.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field

WIDE_DTYPE = np.dtype("<u8")
ROWS_PER_CHUNK = 1 << 14  # rows that are converted at once
# column name -> its type in the file, or the one value of all rows; the first column is always stored
ColumnTypes = dict[str, Literal["|u1", "<u2", "<u4", "<u8"] | Annotated[int, Field(ge=0, lt=1 << 64)]]


class IntegerTable:
    """The rows of a file, read from disk on access."""

    def __init__(self, path: Path, types: ColumnTypes) -> None:
        stored = [(name, kind) for name, kind in types.items() if isinstance(kind, str)]
        self._types = types
        self._rows = memory_map(path, np.dtype(stored))
        constant = {name: kind for name, kind in types.items() if not isinstance(kind, str)}
        self._constant = tuple(constant.values())
        found = [*(name for name, _ in stored), *constant]  # the order in which `row` finds them
        self._in_order = itemgetter(*(found.index(name) for name in types))

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> tuple[int, ...]:
        """Return the values of a row, in the order of the columns."""
        values: tuple[int, ...] = self._in_order(self._rows[index].tolist() + self._constant)
        return values

    def column(self, name: str, indices: Any = ...) -> npt.NDArray[Any]:
        """Return a column's values, unsigned, in the rows at `indices`."""
        kind = self._types[name]
        if isinstance(kind, str):
            return np.asarray(self._rows[name][indices])
        return np.asarray(np.broadcast_to(np.array(kind, np.min_scalar_type(kind)), len(self._rows))[indices])


def column_types(names: Sequence[str]) -> Any:
    """Return a pydantic type: ColumnTypes of exactly these columns, the first of which is stored."""

    def check(types: ColumnTypes) -> ColumnTypes:
        if list(types) != list(names):
            raise ValueError(f"expected {', '.join(names)}")
        if not isinstance(types[names[0]], str):
            raise ValueError(f"{names[0]} must be stored")
        return types

    return Annotated[ColumnTypes, AfterValidator(check)]


def write_narrow_table(
    wide: Path, target: Path, names: Sequence[str], visit: Callable[[npt.NDArray[Any]], None] = lambda rows: None
) -> ColumnTypes:
    """Convert the uint64 rows of `wide` to the narrowest types that fit, write them to `target`, and remove `wide`.

    Args:
        visit: called with each chunk of the rows, shape (N, columns).
    """
    smallest, largest = _find_bounds(wide, len(names), visit)
    types: ColumnTypes = {}
    for number, name in enumerate(names):
        is_one = number > 0 and smallest[number] >= largest[number]
        types[name] = int(largest[number]) if is_one else _find_narrowest_type(int(largest[number]))
    dtype = np.dtype([(name, kind) for name, kind in types.items() if isinstance(kind, str)])
    with open(wide, "rb") as file, open(target, "wb") as output:
        while len(rows := _read_rows(file, len(names))):
            narrowed = np.empty(len(rows), dtype)
            for name in dtype.names or ():
                narrowed[name] = rows[:, names.index(name)]
            output.write(narrowed.tobytes())
    wide.unlink()
    return types


def _find_bounds(
    wide: Path, num_columns: int, visit: Callable[[npt.NDArray[Any]], None]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Find the (smallest, largest) value of each column, and call `visit` with each chunk of the rows."""
    smallest, largest = np.full(num_columns, np.iinfo(WIDE_DTYPE).max, WIDE_DTYPE), np.zeros(num_columns, WIDE_DTYPE)
    with open(wide, "rb") as file:
        while len(rows := _read_rows(file, num_columns)):
            smallest, largest = np.minimum(smallest, rows.min(axis=0)), np.maximum(largest, rows.max(axis=0))
            visit(rows)
    return smallest, largest


def memory_map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Memory-map a file's values as an array."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    # slicing np.memmap is several times slower than slicing a plain array over the same pages
    return np.memmap(path, dtype, "r").view(np.ndarray)


def _read_rows(file: Any, columns: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(file.read(ROWS_PER_CHUNK * columns * WIDE_DTYPE.itemsize), WIDE_DTYPE).reshape(-1, columns)


def _find_narrowest_type(largest: int) -> Any:
    return next(kind for kind in ("|u1", "<u2", "<u4", "<u8") if largest <= np.iinfo(kind).max)
