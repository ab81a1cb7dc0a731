"""Read the cells of a sheet in an Excel workbook, `tickets.xlsx` or `tickets.xlsx:Answers`, which may be untrusted.

calamine reads the values. It shows errors and formulas without a value as empty cells, and limits neither the size of
the XML nor of the table up to the last cell, so the XML is checked first, and calamine gets only the checked parts.
"""

import io
import posixpath
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from xml.etree import ElementTree

from t5tune.data.reading.rejections import BadCell
from t5tune.errors import DataError, DependencyError

MAX_XML_BYTES = MAX_CHARACTERS = 1 << 29
MAX_LIST_BYTES = 1 << 24  # of the XML that lists the sheets
MAX_CELLS = 1 << 25  # from A1 to the last cell, also empty ones
MAX_DEPTH, MAX_CHILDREN = 50, 1 << 16  # of XML tags
PART_ID = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"
FORMULA = BadCell("a formula without a stored value; open the workbook in Excel, and save it")
_PATH = re.compile(r"(.+\.xlsx):([^:/]*)", re.IGNORECASE | re.DOTALL)
_PLACE = re.compile(r"([A-Z]{1,3})(\d{1,7})")


def split_sheet(path: Path) -> tuple[Path, str | None]:
    """Split `tickets.xlsx:Answers` into the file and the sheet; None: not named, or not a workbook."""
    found = _PATH.fullmatch(str(path))
    return (path, None) if found is None else (Path(found[1]), found[2])


def list_sheets(path: Path) -> list[str]:
    """List the names of a workbook's sheets, the visible ones first."""
    with _open_workbook(path) as (_, sheets):
        return [*sheets]


def read_cells(path: Path) -> Iterator[list[str]]:
    """Yield the cells of each row as in a CSV file; DataError: too large, not a workbook, or with merged cells."""
    stored, sheet = split_sheet(path)
    with _open_workbook(stored) as (file, sheets):
        from python_calamine import CalamineWorkbook

        sheet = next(iter(sheets)) if sheet is None else sheet
        if sheet not in sheets:
            raise DataError(f"{stored}: no sheet {sheet!r}", hint=f"it has {', '.join(sheets)}")
        shared = [name for name in file.namelist() if name.endswith((".xml", ".rels")) and name not in sheets.values()]
        parts = _load(file, [sheets[sheet], *shared], MAX_XML_BYTES)
        bad = _check_cells(parts.get("xl/sharedStrings.xml", b"<sst/>"), parts[sheets[sheet]])
        with zipfile.ZipFile(checked := io.BytesIO(), "w") as copy:
            for name, xml in parts.items():
                copy.writestr(name, xml)
        checked.seek(0)
        found = CalamineWorkbook.from_filelike(checked).get_sheet_by_name(sheet)
    if merged := found.merged_cell_ranges:
        problem = f"{path}:{min(merged)[0][0] + 1}: merged cells"
        hint = "in Excel, unmerge them, and write the value into each; delete a title above the names of the columns"
        raise DataError(problem, hint=hint)
    before = [""] * (found.start or (0, 0))[1]  # columns without a cell
    for row, values in enumerate(found.iter_rows()):
        yield [bad.get((row, column)) or _format_value(value) for column, value in enumerate(before + values)]


@contextmanager
def _open_workbook(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, str]]]:
    """Open a workbook, and find the part of each sheet, the visible ones first."""
    try:
        with zipfile.ZipFile(path) as file:
            names = ["xl/workbook.xml", "xl/_rels/workbook.xml.rels"]
            workbook, relations = map(ElementTree.fromstring, _load(file, names, MAX_LIST_BYTES).values())
            parts = {each.get("Id"): posixpath.join("/xl", each.attrib["Target"])[1:] for each in relations}
            found = [*workbook.iterfind(".//{*}sheet")]
            found.sort(key=lambda sheet: sheet.get("state", "visible") != "visible")
            yield file, {sheet.attrib["name"]: parts[sheet.attrib[PART_ID]] for sheet in found}
    except ImportError as error:
        problem = f"{path}: reading workbooks needs python-calamine, which can't be imported: {error}"
        raise DependencyError(problem, hint="pip install 't5tune[excel]'") from error
    except DataError:
        raise
    except Exception as error:  # calamine raises its own exceptions, zipfile and ElementTree many of Python's
        hint = "open it in Excel, remove a password, and save it as .xlsx, or the sheet as CSV"
        raise DataError(f"{path}: can't be read as a workbook: {error}", hint, "data_path") from error


def _load(file: zipfile.ZipFile, names: list[str], max_bytes: int) -> dict[str, bytes]:
    if sum(file.getinfo(name).file_size for name in names) > max_bytes:
        raise ValueError(f"more than {max_bytes >> 20} MiB of XML")
    return {name: file.read(name) for name in names}  # not more than the size that was checked


def _check_cells(strings: bytes, sheet: bytes) -> dict[tuple[int, int], BadCell]:
    """Find the cells without a usable value, by row and column from 0; ValueError: the sheet is too large."""
    bad: dict[tuple[int, int], BadCell] = {}
    lengths = [len("".join(each.itertext())) for each in _iterate_elements(strings, "si")]
    num_rows = num_columns = num_characters = 0
    for cell in _iterate_elements(sheet, "c"):
        if (place := _PLACE.fullmatch(cell.get("r", ""))) is None:
            raise ValueError("a cell without its row and column")
        row, column = int(place[2]), reduce(lambda number, letter: 26 * number + ord(letter) - 64, place[1], 0)
        num_rows, num_columns = max(num_rows, row), max(num_columns, column)
        kind, values = cell.get("t"), [each.text for each in cell.iterfind(".//{*}v") if each.text]
        if kind == "s":
            for value in values:
                if not value.isdecimal() or int(value) >= len(lengths):
                    raise ValueError(
                        f"cell {place[0]} has shared text {value}, but the file has {len(lengths):,} of them"
                    )
                num_characters += lengths[int(value)]
        elif kind == "e":
            bad[row - 1, column - 1] = BadCell(f"the error {' '.join(values)}")
        elif kind != "str" and not values and cell.find("{*}f") is not None:
            bad[row - 1, column - 1] = FORMULA
        if num_rows * num_columns > MAX_CELLS or num_characters > MAX_CHARACTERS:
            size = f"{num_rows:,} rows of {num_columns:,} cells with {num_characters:,} characters"
            raise ValueError(f"too large: {size}")
    return bad


def _iterate_elements(xml: bytes, name: str) -> Iterator[ElementTree.Element]:
    """Yield the elements with a name, and free the elements before them; ValueError: too much is inside one."""
    parents: list[ElementTree.Element] = []
    num_open = 0  # elements with the name
    for event, element in ElementTree.iterparse(io.BytesIO(xml), ["start", "end"]):
        is_named = element.tag.rpartition("}")[2] == name
        if event == "start":
            if len(parents) > MAX_DEPTH or (parents and len(parents[-1]) > MAX_CHILDREN):
                raise ValueError(f"more than {MAX_DEPTH} nested tags, or {MAX_CHILDREN:,} in one")
            parents.append(element)
            num_open += is_named
            continue
        parents.pop()
        if is_named:
            num_open -= 1
            yield element
        if parents and not num_open:
            parents[-1].clear()


def _format_value(value: object) -> str:
    """Write a value as in a CSV file: numbers with Excel's 15 digits, dates as in ISO 8601."""
    if isinstance(value, bool):
        return str(value).upper()
    return f"{value:.15g}" if isinstance(value, int | float) else str(value)
