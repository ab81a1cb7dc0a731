"""Generated parts of documents, whose remaining text is written by hand.

They are between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

BLOCK = re.compile(r"(<!-- generated: ([\w ]+) -->\n)(?:(?!<!-- end -->).)*(<!-- end -->\n)", re.DOTALL)


def fill_blocks(page: Path, generated: Mapping[str, Callable[[], Iterable[str]]]) -> str:
    """Return a page's text with its generated parts as they should be.

    Args:
        generated: name of a part -> function that returns its lines.
    """

    def fill(block: re.Match[str]) -> str:
        begin, name, end = block.groups()
        return begin + "\n".join([*generated[name](), end])

    return BLOCK.sub(fill, page.read_text(encoding="utf-8"))
