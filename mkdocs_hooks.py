"""Include CONTRIBUTING.md and CHANGELOG.md, which are outside of docs/, in the site that `make docs` builds."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parent
INCLUDED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the included documents as pages of docs/."""
    for page, name in INCLUDED.items():
        text = (REPOSITORY / name).read_text(encoding="utf-8").replace("](docs/", "](")
        # the site has only the documents: links to other files become text
        text = re.sub(r"\[([^]]*)\]\((?:benchmarks|examples)/[^)]*\)", r"\1", text)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let a page's links to the included documents lead to their pages."""
    for page, name in INCLUDED.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return markdown
