"""`t5tune docs`: docs/for-agents.md, the page that tells a coding assistant how to use t5tune.

docs(DocsSettings()).text
"""

import re
from dataclasses import dataclass
from pathlib import Path

from t5tune.progress import Report, silent
from t5tune.settings import DocsSettings

PACKAGE = Path(__file__).parents[1]
PAGE = "for-agents.md"
LINK = re.compile(r"\[([^\]]+)\]\(([\w-]+\.md)(?:#[\w-]+)?\)")  # to a page next to this page
MARKER = re.compile(r"^<!--.*-->\n", re.MULTILINE)  # around generated text


@dataclass(frozen=True)
class Documentation:
    """The page, as Markdown, with the places of other pages in the repository instead of links."""

    text: str


def docs(settings: DocsSettings, report: Report = silent) -> Documentation:
    """Read the page, which is in the installed package, or under docs/ in a source checkout."""
    installed = PACKAGE / PAGE
    page = installed if installed.is_file() else PACKAGE.parent / "docs" / PAGE
    text = MARKER.sub("", page.read_text(encoding="utf-8"))
    return Documentation(LINK.sub(r"\1 (docs/\2)", text))
