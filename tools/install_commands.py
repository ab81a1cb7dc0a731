"""The commands that install t5tune, in all documents that show them.

The release on PyPI sets `PACKAGE` and `WHERE`, and runs `make generate`.
"""

from collections.abc import Iterator

from tools import REPOSITORY
from tools.generated_blocks import fill_blocks

PACKAGE = "."  # for pip; on PyPI: "t5tune"
WHERE = "In a clone of this repository, with Python 3.11 or newer:"  # on PyPI: "With Python 3.11 or newer:"
PAGES = ("README.md", "docs/README.md", "docs/install.md", "docs/start.md")


def list_lines() -> Iterator[str]:
    """Yield the lines of a document that say how to install t5tune."""
    yield from (WHERE, "", "```sh", "python3 -m venv .venv", ". .venv/bin/activate", f"pip install {PACKAGE}", "```")


def build_page(name: str) -> str:
    """Return a document's text with the commands."""
    return fill_blocks(REPOSITORY / name, {"install": list_lines})
