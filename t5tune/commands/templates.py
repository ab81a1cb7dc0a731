"""`t5tune templates`: list, show or copy the packaged run configs, conversation templates and DeepSpeed configs.

templates(TemplatesSettings(action="copy", name="pocket", to="."))
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from t5tune.errors import SettingsError, suggest_name
from t5tune.io.atomic import write_file
from t5tune.progress import Report, silent
from t5tune.settings import TemplatesSettings, packaged_templates

KINDS = ("runs", "conversations", "deepspeed")  # the folders in templates/
SCHEMA_FILE = "train.schema.json"  # the name of a copied schema
PACKAGED_SCHEMA = "schemas/train.json"  # in templates/


@dataclass(frozen=True)
class Templates:
    """The names of all templates by kind; the file to show or copy, if any; the files that were written.

    Args:
        descriptions: a sentence for each template, by kind and name.
    """

    names: dict[str, list[str]]
    descriptions: dict[str, dict[str, str]]
    shown: Path | None
    copied: list[Path]


def templates(settings: TemplatesSettings, report: Report = silent) -> Templates:
    """List all templates, or show or copy one.

    Raises:
        SettingsError: there is no such template, or the target file already exists.
    """
    descriptions = {kind: packaged_templates.describe_templates(kind) for kind in KINDS}
    names = {kind: list(found) for kind, found in descriptions.items()}
    if settings.action == "list":
        return Templates(names, descriptions, None, [])
    if settings.name is None:
        raise SettingsError(
            f"name: missing; use t5tune templates {settings.action} NAME", hint="t5tune templates lists the names"
        )
    source = _find_template_file(settings.name, names)
    if settings.action == "show":
        return Templates(names, descriptions, source, [])
    target = settings.to / source.name if settings.to.is_dir() else settings.to
    return Templates(names, descriptions, source, _copy_template(source, target))


def _find_template_file(name: str, names: dict[str, list[str]]) -> Path:
    """Return the file of a template, which is named with or without its kind: `pocket` or `runs/pocket`."""
    kind, _, stem = name.rpartition("/")
    found = [k for k, stems in names.items() if stem in stems and kind in ("", k)]
    if not found:
        known = [f"{k}/{stem}" for k, stems in names.items() for stem in stems]
        close = suggest_name(name, [*known, *chain.from_iterable(names.values())])
        raise SettingsError(f"name: {name}: no such template{close or '; the templates are ' + ', '.join(known)}")
    suffix = ".json" if found[0] == "deepspeed" else ".yaml"
    return packaged_templates.find_templates_folder() / found[0] / (stem + suffix)


def _copy_template(source: Path, target: Path) -> list[Path]:
    """Copy a template, and for a run config also the JSON schema that its first line names.

    Returns:
        The files that were written.
    """
    if target.exists():
        raise SettingsError(f"to: {target}: already exists", hint="choose a different file, or move this file away")
    text = source.read_text(encoding="utf-8")
    files = {target: text.replace(f"$schema=../{PACKAGED_SCHEMA}", f"$schema={SCHEMA_FILE}", 1)}
    schema = target.with_name(SCHEMA_FILE)
    if source.parent.name == "runs" and not schema.exists():
        files[schema] = (packaged_templates.find_templates_folder() / PACKAGED_SCHEMA).read_text(encoding="utf-8")
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content.encode())
        except OSError as error:
            raise SettingsError(f"to: {path}: can't be written: {error.strerror}") from error
    return list(files)
