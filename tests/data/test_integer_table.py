"""Rows of whole numbers, in columns as narrow as their values."""

from pathlib import Path

import numpy as np
import pytest

from t5tune.data.integer_table import ROWS, WIDE, Columns, Layout, narrow

NAMES = ("first", "second", "third")


def written(values: list[tuple[int, int, int]], folder: Path) -> tuple[Columns, Layout, int]:
    """(the rows, their layout, the file's bytes)"""
    (folder / "wide").write_bytes(np.array(values, WIDE).tobytes())
    layout = narrow(folder / "wide", folder / "rows.bin", NAMES)
    assert [path.name for path in folder.iterdir()] == ["rows.bin"]
    return Columns(folder / "rows.bin", layout), layout, (folder / "rows.bin").stat().st_size


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
    columns, layout, size = written(values, tmp_path)
    assert layout == {"first": "|u1", "second": kind, "third": 7}
    assert size == 3 * (1 + np.dtype(kind).itemsize)
    assert [columns.row(index) for index in range(len(columns))] == values
    assert columns.column("second", [2, 0]).tolist() == [1, largest]
    assert columns.column("third", [2, 0]).tolist() == [7, 7]
    assert columns.column("first").tolist() == [3, 1, 2]


def test_the_first_column_counts_the_rows(tmp_path: Path) -> None:
    columns, layout, size = written([(0, 2**64 - 1, 0)] * 5, tmp_path)
    assert (layout, size) == ({"first": "|u1", "second": 2**64 - 1, "third": 0}, 5)
    assert len(columns) == 5
    assert columns.row(4) == (0, 2**64 - 1, 0)
    assert columns.column("second").tolist() == [2**64 - 1] * 5


def test_rows_beyond_one_part_are_whole_and_a_later_value_widens_all(tmp_path: Path) -> None:
    values = [(number, number % 7, 0) for number in range(ROWS + 5)] + [(0, 70_000, 1)]
    columns, layout, _ = written(values, tmp_path)
    assert layout == {"first": "<u2", "second": "<u4", "third": "|u1"}
    assert len(columns) == len(values)
    assert np.stack([columns.column(name) for name in NAMES], 1).tolist() == [list(row) for row in values]
    assert columns.row(ROWS + 5) == (0, 70_000, 1)


def test_no_rows(tmp_path: Path) -> None:
    columns, layout, size = written([], tmp_path)
    assert (len(columns), size, list(layout)) == (0, 0, list(NAMES))
    assert columns.column("second").tolist() == []
