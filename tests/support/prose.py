"""English text to train small tokenizers on."""

from tests.support.paths import REPOSITORY


def english_text() -> str:
    """The pages of docs/decisions but their index, about 1,000 lines."""
    pages = sorted((REPOSITORY / "docs" / "decisions").glob("[a-z]*.md"))
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)
