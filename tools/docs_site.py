"""Collect the pages of the documentation site for zensical.toml: docs/, CONTRIBUTING.md and CHANGELOG.md.

    python -m tools.docs_site build/docs build/live

The documents have links that work on GitHub, also to files that aren't pages of the site. On the site, these links
become plain text. The second folder is the live page, if tools/live_page.py made it: then some documents link to it.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from tools import REPOSITORY

DOCUMENTS = REPOSITORY / "docs"
INCLUDED = {REPOSITORY / "CONTRIBUTING.md": "contributing.md", REPOSITORY / "CHANGELOG.md": "changelog.md"}
# not an image; `[text](file#anchor)`
LIVE_MARK, LIVE_FOLDER = "<!-- live page -->", "live"
LIVE_LINK = "[**Order six coffees in this browser**]({path}), before you install anything."
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def main(folder: Path, live: Path | None = None) -> None:
    """Write the pages into `folder`, which is emptied first, and the `live` page if there is one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCUMENTS, folder)
    has_live_page = live is not None and live.is_dir()
    if live is not None and has_live_page:
        shutil.copytree(live, folder / LIVE_FOLDER)
    for document, page in {**list_pages(), **INCLUDED}.items():
        link = LIVE_LINK.format(path=f"{LIVE_FOLDER}/index.html") if has_live_page else ""
        (folder / page).write_text(adapt_links(document).replace(LIVE_MARK, link), encoding="utf-8")


def list_pages() -> dict[Path, str]:
    """Return the page of each document under docs/, as a path within the site."""
    return {path: path.relative_to(DOCUMENTS).as_posix() for path in DOCUMENTS.rglob("*.md")}


def adapt_links(document: Path) -> str:
    """Return a document's text with links to pages of the site."""
    pages = {**list_pages(), **INCLUDED}
    folder = Path(pages[document]).parent

    def adapt(link: re.Match[str]) -> str:
        text, file, anchor = link.groups(default="")
        target = Path(os.path.normpath(document.parent / file))
        if target in pages:
            return f"[{text}]({os.path.relpath(pages[target], folder)}{anchor})"
        return text if target.exists() else link[0]

    return LINK.sub(adapt, document.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
