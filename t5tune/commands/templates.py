"""`t5tune templates`: list, show and copy what comes with t5tune: runs, conversation layouts, DeepSpeed files.

templates(TemplatesSettings(action="copy", name="pocket", to="."))
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from t5tune.errors import SettingsError, suggestion
from t5tune.io.atomic import write_file
from t5tune.progress import Report, silent
from t5tune.settings import TemplatesSettings, packaged_templates

KINDS = ("runs", "conversations", "deepspeed")
SCHEMA = "train.schema.json"
PACKAGED_SCHEMA = "schemas/train.json"  # below templates/


@dataclass(frozen=True)
class Templates:
    """The names by kind; the file that was asked for; what was copied."""

    names: dict[str, list[str]]
    shown: Path | None
    copied: list[Path]


def templates(settings: TemplatesSettings, report: Report = silent) -> Templates:
    """List all, or show or copy one.

    Raises:
        SettingsError: no such template, or a file that stands in the way.
    """
    names = {kind: packaged_templates.names(kind) for kind in KINDS}
    if settings.action == "list":
        return Templates(names, None, [])
    if settings.name is None:
        raise SettingsError(
            f"name: missing; t5tune templates {settings.action} NAME", hint="t5tune templates lists them"
        )
    source = _find(settings.name, names)
    if settings.action == "show":
        return Templates(names, source, [])
    target = settings.to / source.name if settings.to.is_dir() else settings.to
    return Templates(names, source, _copy(source, target))


def _find(name: str, names: dict[str, list[str]]) -> Path:
    """The file of `pocket` or `runs/pocket`."""
    kind, _, stem = name.rpartition("/")
    found = [k for k, stems in names.items() if stem in stems and kind in ("", k)]
    if not found:
        known = [f"{k}/{stem}" for k, stems in names.items() for stem in stems]
        close = suggestion(name, [*known, *chain.from_iterable(names.values())])
        raise SettingsError(f"name: {name}: no such template{close}", hint=f"there are {', '.join(known)}")
    suffix = ".json" if found[0] == "deepspeed" else ".yaml"
    return packaged_templates.templates_folder() / found[0] / (stem + suffix)


def _copy(source: Path, target: Path) -> list[Path]:
    """Copy, and put beside a run the schema that its first line names."""
    if target.exists():
        raise SettingsError(f"to: {target}: stands there already", hint="name another file, or move it")
    text = source.read_text(encoding="utf-8")
    files = {target: text.replace(f"$schema=../{PACKAGED_SCHEMA}", f"$schema={SCHEMA}", 1)}
    schema = target.with_name(SCHEMA)
    if source.parent.name == "runs" and not schema.exists():
        files[schema] = (packaged_templates.templates_folder() / PACKAGED_SCHEMA).read_text(encoding="utf-8")
    for path, words in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, words.encode())
        except OSError as error:
            raise SettingsError(f"to: {path}: can't be written: {error.strerror}") from error
    return list(files)
