"""Write every file that is generated from the code, or with --check print how they would change.

    python -m tools.generate [--check]

`make generate` and `make check` call it. It takes half a minute, nearly all of it for docs/memory.md.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Callable
from functools import partial

from t5tune.commands.schema import schema
from t5tune.settings import SchemaSettings
from tools import (
    REPOSITORY,
    agents_page,
    commands_page,
    families_page,
    install_commands,
    memory_page,
    options_list,
    python_stub,
    support_matrix,
)


def build_schema() -> str:
    """Return the text of the schema that the packaged run configs name."""
    return json.dumps(schema(SchemaSettings(of="train")), indent=2, ensure_ascii=False) + "\n"


# file: the function that returns its text
FILES: dict[str, Callable[[], str]] = {
    **{name: partial(install_commands.build_page, name) for name in install_commands.PAGES},
    "docs/commands.md": commands_page.build_page,
    "docs/families.md": families_page.build_page,
    "docs/for-agents.md": agents_page.build_page,
    "docs/memory.md": memory_page.build_page,
    "docs/support.md": support_matrix.build_page,
    "t5tune/__init__.pyi": python_stub.build_stub,
    "templates/schemas/train.json": build_schema,
    "tests/golden/options.txt": options_list.build_list,
}


def find_change(name: str, write: bool = False) -> str:
    """Return the diff between a file and its generated text; `write` makes the change."""
    path, text = REPOSITORY / name, FILES[name]()
    lines = path.read_text(encoding="utf-8").splitlines(), text.splitlines()
    if write:
        path.write_text(text, encoding="utf-8")
    return "\n".join(difflib.unified_diff(*lines, name, "generated", n=0, lineterm=""))


def main() -> str | None:
    """Generate the files. Return a message if `--check` found changes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a file would change")
    is_check = parser.parse_args().check
    changes = [change for name in FILES if (change := find_change(name, write=not is_check))]
    print(*changes, sep="\n")
    return "generated files are out of date: run make generate" if is_check and changes else None


if __name__ == "__main__":
    sys.exit(main())
