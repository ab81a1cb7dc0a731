"""Rows of whole numbers in a file, in columns that are as narrow as what stands in them.

layout = narrow(wide, (folder / "examples.bin"), ("conversation", "turn"))  # {"conversation": "<u2", "turn": 1}
Columns(folder / "examples.bin", layout).row(7)  # (3, 1)

A row's values stand one after the other, little-endian. A column whose value is the same in every row isn't stored.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field

WIDE = np.dtype("<u8")
ROWS = 1 << 14  # that are narrowed at a time
# name -> its type in the file, or the one value that it has everywhere; the first column always stands in the file
Layout = dict[str, Literal["|u1", "<u2", "<u4", "<u8"] | Annotated[int, Field(ge=0, lt=1 << 64)]]


class Columns:
    """The rows of a file, read from the disk as they are asked for."""

    def __init__(self, path: Path, layout: Layout) -> None:
        stored = [(name, kind) for name, kind in layout.items() if isinstance(kind, str)]
        self._layout = layout
        self._rows = mapped(path, np.dtype(stored))
        constant = {name: kind for name, kind in layout.items() if not isinstance(kind, str)}
        self._constant = tuple(constant.values())
        found = [*(name for name, _ in stored), *constant]  # the order in which `row` finds them
        self._in_order = itemgetter(*(found.index(name) for name in layout))

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> tuple[int, ...]:
        """A row's values, in the columns' order."""
        values: tuple[int, ...] = self._in_order(self._rows[index].tolist() + self._constant)
        return values

    def column(self, name: str, indices: Any = ...) -> npt.NDArray[Any]:
        """A column's values in the rows at `indices`, unsigned."""
        kind = self._layout[name]
        if isinstance(kind, str):
            return np.asarray(self._rows[name][indices])
        return np.asarray(np.broadcast_to(np.array(kind, np.min_scalar_type(kind)), len(self._rows))[indices])


def columns_named(names: Sequence[str]) -> Any:
    """The type of a Layout of just these columns, for pydantic."""

    def check(layout: Layout) -> Layout:
        if list(layout) != list(names):
            raise ValueError(f"expected {', '.join(names)}")
        if not isinstance(layout[names[0]], str):
            raise ValueError(f"{names[0]} must be stored")
        return layout

    return Annotated[Layout, AfterValidator(check)]


def narrow(
    wide: Path, target: Path, names: Sequence[str], look: Callable[[npt.NDArray[Any]], None] = lambda rows: None
) -> Layout:
    """Write the rows of `wide`, whose values are uint64, as narrow as they allow, and remove it.

    Args:
        look: is given the rows, shape (N, columns), a part at a time.
    """
    smallest, largest = np.full(len(names), np.iinfo(WIDE).max, WIDE), np.zeros(len(names), WIDE)
    with open(wide, "rb") as file:
        while len(rows := _read(file, len(names))):
            smallest, largest = np.minimum(smallest, rows.min(axis=0)), np.maximum(largest, rows.max(axis=0))
            look(rows)
    layout: Layout = {}
    for number, name in enumerate(names):
        is_one = number > 0 and smallest[number] >= largest[number]
        layout[name] = int(largest[number]) if is_one else _type_of(int(largest[number]))
    dtype = np.dtype([(name, kind) for name, kind in layout.items() if isinstance(kind, str)])
    with open(wide, "rb") as file, open(target, "wb") as output:
        while len(rows := _read(file, len(names))):
            narrowed = np.empty(len(rows), dtype)
            for name in dtype.names or ():
                narrowed[name] = rows[:, names.index(name)]
            output.write(narrowed.tobytes())
    wide.unlink()
    return layout


def mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A file's values as an array, read from the disk as they are used."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    # a slice of a memmap costs several times that of a plain array over the same pages
    return np.memmap(path, dtype, "r").view(np.ndarray)


def _read(file: Any, columns: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(file.read(ROWS * columns * WIDE.itemsize), WIDE).reshape(-1, columns)


def _type_of(largest: int) -> Any:
    return next(kind for kind in ("|u1", "<u2", "<u4", "<u8") if largest <= np.iinfo(kind).max)
