"""What a terminal shows of the bytes that a program writes to it."""

import re

# cursor up, erase the line or the rest of it, and the codes that don't change the text: colors, the cursor's visibility
CODE = re.compile(r"\x1b\[(\d*)A|\x1b\[(\d*)K|\x1b\[\??[\d;]*[a-zA-Z]|(\r)|(\n)|([^\x1b])")


def read_screen(text: str, width: int) -> list[str]:
    """Return the lines that the terminal shows after the text, including those that have scrolled away."""
    rows: list[list[str]] = [[]]
    row = column = 0
    for found in CODE.finditer(text):
        up, erased, is_return, is_newline, character = found.groups()
        if character is not None and column == width:
            row, column = row + 1, 0
        elif is_newline:
            row += 1
        while len(rows) <= row:
            rows.append([])
        if up is not None:
            row -= int(up or 1)
        elif erased is not None:
            del rows[row][0 if erased == "2" else column :]
        elif is_return or is_newline:
            column = 0
        elif character is not None:
            rows[row].extend(" " * (column + 1 - len(rows[row])))
            rows[row][column] = character
            column += 1
    lines = ["".join(each).rstrip() for each in rows]
    while lines and not lines[-1]:
        lines.pop()
    return lines
