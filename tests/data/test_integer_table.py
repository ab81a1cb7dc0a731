"""Integer tables: rows of unsigned integers in columns as narrow as their values."""

from pathlib import Path

import numpy as np
import pytest

from t5tune.data.integer_table import ROWS_PER_CHUNK, WIDE_DTYPE, ColumnTypes, IntegerTable, write_narrow_table

NAMES = ("first", "second", "third")


def write_table(values: list[tuple[int, int, int]], folder: Path) -> tuple[IntegerTable, ColumnTypes, int]:
    """Write the rows; return (the table, its column types, the file size in bytes)."""
    (folder / "wide").write_bytes(np.array(values, WIDE_DTYPE).tobytes())
    types = write_narrow_table(folder / "wide", folder / "rows.bin", NAMES)
    assert [path.name for path in folder.iterdir()] == ["rows.bin"]
    return IntegerTable(folder / "rows.bin", types), types, (folder / "rows.bin").stat().st_size


@pytest.mark.parametrize(
    ("largest", "kind"),
    [
        (255, "|u1"),
        (256, "<u2"),
        (65_535, "<u2"),
        (65_536, "<u4"),
        (2**32 - 1, "<u4"),
        (2**32, "<u8"),
        (2**64 - 1, "<u8"),
    ],
)
def test_a_column_is_as_narrow_as_its_largest_value(largest: int, kind: str, tmp_path: Path) -> None:
    values = [(3, largest, 7), (1, 0, 7), (2, 1, 7)]
    columns, types, size = write_table(values, tmp_path)
    assert types == {"first": "|u1", "second": kind, "third": 7}
    assert size == 3 * (1 + np.dtype(kind).itemsize)
    assert [columns.row(index) for index in range(len(columns))] == values
    assert columns.column("second", [2, 0]).tolist() == [1, largest]
    assert columns.column("third", [2, 0]).tolist() == [7, 7]
    assert columns.column("first").tolist() == [3, 1, 2]


def test_the_first_column_is_always_stored(tmp_path: Path) -> None:
    columns, types, size = write_table([(0, 2**64 - 1, 0)] * 5, tmp_path)
    assert (types, size) == ({"first": "|u1", "second": 2**64 - 1, "third": 0}, 5)
    assert len(columns) == 5
    assert columns.row(4) == (0, 2**64 - 1, 0)
    assert columns.column("second").tolist() == [2**64 - 1] * 5


def test_many_chunks_of_rows_are_complete_and_a_late_large_value_widens_the_column(tmp_path: Path) -> None:
    values = [(number, number % 7, 0) for number in range(ROWS_PER_CHUNK + 5)] + [(0, 70_000, 1)]
    columns, types, _ = write_table(values, tmp_path)
    assert types == {"first": "<u2", "second": "<u4", "third": "|u1"}
    assert len(columns) == len(values)
    assert np.stack([columns.column(name) for name in NAMES], 1).tolist() == [list(row) for row in values]
    assert columns.row(ROWS_PER_CHUNK + 5) == (0, 70_000, 1)


def test_a_table_can_be_empty(tmp_path: Path) -> None:
    columns, types, size = write_table([], tmp_path)
    assert (len(columns), size, list(types)) == (0, 0, list(NAMES))
    assert columns.column("second").tolist() == []
