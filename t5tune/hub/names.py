"""Names on the Hugging Face Hub: `owner/name` and `owner/name@revision`."""

import re
from pathlib import Path

_SNAPSHOT = re.compile(r"(?:models|datasets)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?P<file>/.+)?")
_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `owner/name@revision`; without a revision, or for a name that can't be on the Hub, it is (name, None)."""
    found = _NAME.fullmatch(name)
    return (found["name"], found["revision"]) if found else (name, None)


def is_hub_name(name: str) -> bool:
    """Whether a name without a local file may be a name on the Hub, not a path."""
    return not name.startswith((".", "/", "~")) and split_revision(name)[0].count("/") <= 1


def is_published(name: str) -> bool:
    """Whether a base's name is a name on the Hub, as far as one can tell offline: no folder has it."""
    return name != "pocket" and is_hub_name(name) and not Path(name).exists()


def name_snapshot(path: Path) -> str:
    """Name a folder or a file for people: `owner/name@commit` if it is in the Hub's cache, otherwise its path."""
    found = _SNAPSHOT.search(path.as_posix())
    return f"{found['name'].replace('--', '/')}@{found['commit']}{found['file'] or ''}" if found else str(path)
