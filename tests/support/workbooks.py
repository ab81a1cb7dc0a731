"""Excel workbooks, written as Excel does: a zip file with an XML file for each sheet."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
TYPES = "http://schemas.openxmlformats.org/package/2006/content-types"
PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"
Cell = str | float | bool | None
# number formats of cells: 1 is a date, 2 a date with a time, 3 a duration
FORMATS = '<numFmts count="1"><numFmt numFmtId="164" formatCode="[h]:mm:ss"/></numFmts>'
STYLE_IDS = "".join(f'<xf numFmtId="{number}"/>' for number in (0, 14, 22, 164))
STYLES = f'<styleSheet xmlns="{MAIN}">{FORMATS}<cellXfs count="4">{STYLE_IDS}</cellXfs></styleSheet>'


def write_workbook(
    path: Path, sheets: Mapping[str, Sequence[Sequence[Cell]]], merged: str = "", hidden: str = ""
) -> Path:
    """Write sheets of rows to a workbook.

    Args:
        sheets: a text that begins with `<` is the XML of a cell: its attributes, `>`, and its content.
        merged: a range of the first sheet whose cells are merged.
        hidden: the name of a hidden sheet.
    """
    entries, targets, parts = "", "", {}
    for number, (name, rows) in enumerate(sheets.items(), start=1):
        state = "hidden" if name == hidden else "visible"
        entries += f'<sheet name={quoteattr(name)} sheetId="{number}" r:id="rId{number}" state="{state}"/>'
        targets += f'<Relationship Id="rId{number}" Type="{OFFICE}/worksheet" Target="worksheets/sheet{number}.xml"/>'
        merges = f'<mergeCells count="1"><mergeCell ref="{merged}"/></mergeCells>' if merged and number == 1 else ""
        xml = "".join(_write_row(line, row) for line, row in enumerate(rows, start=1))
        xml = f'<worksheet xmlns="{MAIN}"><sheetData>{xml}</sheetData>{merges}</worksheet>'
        parts[f"xl/worksheets/sheet{number}.xml"] = xml
    workbook = f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets>{entries}</sheets></workbook>'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("[Content_Types].xml", f'<Types xmlns="{TYPES}"/>')
        root = f'<Relationship Id="rId1" Type="{OFFICE}/officeDocument" Target="xl/workbook.xml"/>'
        file.writestr("_rels/.rels", f'<Relationships xmlns="{PACKAGE}">{root}</Relationships>')
        file.writestr("xl/workbook.xml", workbook)
        file.writestr("xl/_rels/workbook.xml.rels", f'<Relationships xmlns="{PACKAGE}">{targets}</Relationships>')
        file.writestr("xl/styles.xml", STYLES)
        for part, text in parts.items():
            file.writestr(part, text)
    return path


def _write_row(line: int, row: Sequence[Cell]) -> str:
    cells = "".join(_write_cell(f"{chr(65 + column)}{line}", cell) for column, cell in enumerate(row))
    return f'<row r="{line}">{cells}</row>'


def _write_cell(name: str, value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f'<c r="{name}" t="b"><v>{int(value)}</v></c>'
    if isinstance(value, int | float):
        return f'<c r="{name}"><v>{value}</v></c>'
    if value.startswith("<"):
        return f'<c r="{name}" {value[1:]}</c>'
    return f'<c r="{name}" t="inlineStr"><is><t>{escape(value)}</t></is></c>'
