"""The table of docs/families.md, from the facts in t5tune/families. The rest of the page is written by hand."""

import re

from t5tune.families import FAMILIES
from tools import REPOSITORY

PAGE = REPOSITORY / "docs" / "families.md"
HEAD = "| model | such as | `model_type` | head | feed-forward | tokenizer | unused embedding rows | `--family` |\n"
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


def build_page() -> str:
    """Return the page's text with the table as it should be."""
    table = HEAD + "| --- " * (HEAD.count("|") - 1) + "|\n"
    for key, family in FAMILIES.items():
        facts = (
            family.name,
            ", ".join(f"`{name}`" for name in family.checkpoints),
            f"`{family.model_type}`",
            "tied" if family.tied else "its own",
            family.feed_forward,
            family.tokenizer,
            f"{family.num_unused_rows} of {family.num_rows:,}",
            f"`{key}`",
        )
        table += f"| {' | '.join(facts)} |\n"
    return TABLE.sub(lambda _: table, PAGE.read_text(encoding="utf-8"), count=1)
