"""The documents: links resolve, commands are valid, and generated pages are up to date.

`python tests/test_docs.py` regenerates docs/commands.md and the table of docs/families.md.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo

from t5tune.cli.arguments import parse_arguments, unwrap_type
from t5tune.cli.summaries import SUMMARIES
from t5tune.errors import SettingsError
from t5tune.families import CONVERTERS, FAMILIES, PLANNED_MODELS, TARGET_MODULE_GROUPS
from t5tune.settings import COMMANDS, Settings
from t5tune.settings.loading import load_settings

REPOSITORY = Path(__file__).parents[1]
REFERENCE = REPOSITORY / "docs" / "commands.md"
FAMILY_PAGE = REPOSITORY / "docs" / "families.md"
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for path in REPOSITORY.glob(pattern)
)


def get_name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def build_reference() -> str:
    """Return the text of docs/commands.md: each command with its settings, by panel, and their defaults and help."""
    lines = [
        "# Commands",
        "",
        "Each setting is a flag (`--lora-r 16`), a key of the YAML file that `--config` reads (`lora_r: 16`) and an",
        "environment variable (`T5TUNE_LORA_R`). A flag overrides the variable, and the variable overrides the file.",
        "Every command has `--config`, `--json`, `--quiet` and `--debug`. `--help` shows the settings that most people",
        "use, `--help-all` all of them. On the command line, `lora_r=16` is the same as `--lora-r 16`.",
        "",
        "This page is generated from the settings by `python tests/test_docs.py`.",
    ]
    for model in COMMANDS:
        lines += ["", f"## t5tune {model.command}", "", SUMMARIES[model.command]]
        required = [name for name, field in model.model_fields.items() if field.is_required()]
        essential = ", ".join(f"`{name}`" for name in (*required, *model.essential))
        lines += ["", f"What most people use: {essential}."]
        if model.also_positional:
            lines += [
                "",
                f"The first word after `{model.command}` may be the `{model.also_positional}`, without its flag.",
            ]
        panels: dict[str, list[str]] = {}
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else format_default(field.default)
            row = f"| `{name}` | {default} | {format_description(field)} |"
            panels.setdefault(model.find_panel(name), []).append(row)
        for panel, rows in panels.items():
            lines += ["", f"**{panel}**", "", "| setting | default | |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def build_families_table() -> str:
    """Return the table of docs/families.md, from the facts in t5tune/families.py."""
    head = [
        "model",
        "such as",
        "`model_type`",
        "head",
        "feed-forward",
        "tokenizer",
        "unused embedding rows",
        "`--family`",
    ]
    rows = [[*head, *CONVERTERS], ["---"] * (len(head) + len(CONVERTERS))]
    for key, family in FAMILIES.items():
        facts = [
            family.name,
            ", ".join(f"`{name}`" for name in family.checkpoints),
            f"`{family.model_type}`",
            "tied" if family.tied else "its own",
            family.feed_forward,
            family.tokenizer,
            f"{family.num_unused_rows} of {family.num_rows:,}",
            f"`{key}`",
        ]
        rows.append([*facts, *("yes" if converter in family.converters else "**no**" for converter in CONVERTERS)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def format_description(field: FieldInfo) -> str:
    text = field.description or ""
    if typing.get_origin(unwrap_type(field)) is typing.Literal:
        text += f" One of {', '.join(f'`{choice}`' for choice in typing.get_args(unwrap_type(field)))}."
    return text.replace("|", "\\|")


def format_default(default: object) -> str:
    if default in (None, "", {}, []):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{' '.join(map(str, default)) if isinstance(default, list) else default}`"


def find_anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return set(map(anchor_of, headings))


def anchor_of(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def find_commands(path: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `t5tune` command in a document's `sh` blocks."""
    for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["t5tune"]:
                yield words[1:]


def find_settings_model(command: str) -> type[Settings]:
    return next(model for model in COMMANDS if model.command == command)


@pytest.mark.parametrize("path", DOCUMENTS, ids=get_name)
def test_links_of_the_documents_resolve(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in find_anchors(linked), f"{target}: no such heading"


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [REPOSITORY / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in reached or path.suffix != ".md":
            continue
        reached.add(path)
        for target in re.findall(r"\]\(([^)\s#]+)", path.read_text(encoding="utf-8")):
            linked = (path.parent / target).resolve()
            if not target.startswith("http") and linked.is_file():
                waiting.append(linked)
    assert [get_name(path) for path in (REPOSITORY / "docs").rglob("*.md") if path not in reached] == []


def pages_of(nav: Any) -> Iterator[str]:
    """The files of mkdocs.yml's nav, in its order."""
    match nav:
        case str():
            yield nav
        case dict():
            yield from pages_of(list(nav.values()))
        case list():
            for entry in nav:
                yield from pages_of(entry)


def test_the_site_has_every_document() -> None:
    pages = list(pages_of(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    documents = {path.relative_to(REPOSITORY / "docs").as_posix() for path in (REPOSITORY / "docs").rglob("*.md")}
    assert set(pages) == documents | {"contributing.md", "changelog.md"}  # those two by mkdocs_hooks.py
    assert len(pages) == len(set(pages))


def test_the_first_page_links_to_every_document_in_the_order_of_the_site() -> None:
    pages = list(pages_of(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    linked = re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / "docs" / "README.md").read_text(encoding="utf-8"))
    included = {"contributing.md": "../CONTRIBUTING.md", "changelog.md": "../CHANGELOG.md"}
    expected = [page for page in pages[1:] if page == "decisions/README.md" or not page.startswith("decisions/")]
    linked = [target for target in linked if target.endswith(".md")]
    assert linked == [included.get(page, page) for page in expected]


def test_the_index_of_decisions_lists_every_entry() -> None:
    folder = REPOSITORY / "docs" / "decisions"
    entries = {
        (date, title, f"{page.name}#{anchor_of(title)}")
        for page in folder.glob("[a-z]*.md")
        for title, date in re.findall(r"^### (.*)\n\n\*([\d-]+)\.\* ", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    headings = [
        heading
        for page in folder.glob("[a-z]*.md")
        for heading in re.findall(r"^### (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sorted(title for _, title, _ in entries) == sorted(headings), "each entry begins with its date"
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^- ([\d-]+): \[(.*)\]\((.*)\)$", index, re.MULTILINE)) == entries


@pytest.mark.parametrize("path", DOCUMENTS, ids=get_name)
def test_commands_in_the_documents_are_valid(path: Path) -> None:
    """Each command is parsed as on the command line, but not run."""
    for command, *arguments in find_commands(path):
        assert command in SUMMARIES, command
        model = find_settings_model(command)
        parsed = parse_arguments(arguments, model)
        try:
            load_settings(model, parsed.config, {}, parsed.values, parsed.problems)
        except SettingsError as error:
            pytest.fail(f"t5tune {command} {' '.join(arguments)}: {error.message}")


def test_the_command_reference_matches_the_settings() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == build_reference(), "regenerate it: python tests/test_docs.py"


def test_the_families_page_contains_the_generated_table() -> None:
    page = FAMILY_PAGE.read_text(encoding="utf-8")
    assert "".join(TABLE.findall(page)) == build_families_table(), "regenerate it: python tests/test_docs.py"
    for name in [*TARGET_MODULE_GROUPS, *PLANNED_MODELS.values()]:
        assert name in page


@pytest.mark.slow
def test_the_commands_of_the_getting_started_page_work(tmp_path: Path) -> None:
    """Run the commands of docs/start.md on the built-in model unchanged; a variable keeps the training short."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    own, _, _ = (REPOSITORY / "docs" / "start.md").read_text(encoding="utf-8").partition("## 5.")
    section = tmp_path / "start.md"
    section.write_text(own, encoding="utf-8")
    ran = []
    for words in find_commands(section):
        done = subprocess.run(
            [sys.executable, "-m", "t5tune", *words, "--quiet"],
            cwd=tmp_path,
            env={**os.environ, "T5TUNE_MAX_STEPS": "2", "T5TUNE_MAX_NEW_TOKENS": "4"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        ran.append(words[0])
    assert ran == ["train", "chat", "evaluate", "merge"]
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_prompt_of_the_getting_started_page_is_a_held_out_example() -> None:
    """The run learns to reply to held-out conversations, but not to names and dishes that are in no example."""
    start, heldout = (REPOSITORY / name for name in ("docs/start.md", "examples/quickstart/heldout.jsonl"))
    (asked,) = [words[words.index("--prompt") + 1] for words in find_commands(start) if "--prompt" in words]
    assert asked in {json.loads(line)["conversations"][0]["value"] for line in heldout.read_text("utf-8").splitlines()}


if __name__ == "__main__":
    REFERENCE.write_text(build_reference(), encoding="utf-8")
    page = TABLE.sub(lambda _: build_families_table(), FAMILY_PAGE.read_text(encoding="utf-8"), count=1)
    FAMILY_PAGE.write_text(page, encoding="utf-8")
    print(REFERENCE, FAMILY_PAGE)
