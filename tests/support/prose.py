"""English text to train small tokenizers on."""

from tests.support.paths import REPOSITORY


def english_text() -> str:
    """Files that hardly ever change: what a random model replies depends on its tokenizer."""
    paths = ("LICENSE", "examples/pocket/words.py", "examples/pocket/facts.py")
    return "\n".join((REPOSITORY / path).read_text(encoding="utf-8") for path in paths)
