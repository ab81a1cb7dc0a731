"""The documents: links lead somewhere, commands are ones that t5tune takes, and what is generated is up to date.

`python tests/test_docs.py` writes docs/commands.md and the table of docs/families.md anew.
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

import pytest
import yaml
from pydantic.fields import FieldInfo

from t5tune.cli.options import _plain_type, normalise
from t5tune.cli.summaries import SUMMARIES
from t5tune.errors import SettingsError
from t5tune.families import CONVERTERS, FAMILIES, GROUPS, LATER
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


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def reference_text() -> str:
    """docs/commands.md: each command, its panels, and their settings with default and description."""
    lines = [
        "# Commands",
        "",
        "Written from the settings by `python tests/test_docs.py`. A setting is a flag (`--lora-r 16`), a key of the",
        "YAML that `--config` reads (`lora_r: 16`) and an environment variable (`T5TUNE_LORA_R`). A flag wins over",
        "the variable, that over the file. Every command has `--config`, `--json`, `--quiet` and `--debug`.",
    ]
    for model in COMMANDS:
        lines += ["", f"## t5tune {model.command}", "", SUMMARIES[model.command]]
        panels: dict[str, list[str]] = {}
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else shown(field.default)
            row = f"| `{name}` | {default} | {described(field)} |"
            panels.setdefault(model.panel_of(name), []).append(row)
        for panel, rows in panels.items():
            lines += ["", f"**{panel}**", "", "| setting | default | |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def families_table() -> str:
    """The table of docs/families.md: that of t5tune/families.py."""
    head = ["member", "such as", "`model_type`", "head", "feed-forward", "tokenizer", "free rows", "`--family`"]
    rows = [[*head, *CONVERTERS], ["---"] * (len(head) + len(CONVERTERS))]
    for key, family in FAMILIES.items():
        facts = [
            family.name,
            ", ".join(f"`{name}`" for name in family.checkpoints),
            f"`{family.model_type}`",
            "tied" if family.tied else "its own",
            family.feed_forward,
            family.tokenizer,
            f"{family.room} of {family.rows:,}",
            f"`{key}`",
        ]
        rows.append([*facts, *("yes" if converter in family.converters else "**no**" for converter in CONVERTERS)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def described(field: FieldInfo) -> str:
    text = field.description or ""
    if typing.get_origin(_plain_type(field)) is typing.Literal:
        text += f" One of {', '.join(f'`{choice}`' for choice in typing.get_args(_plain_type(field)))}."
    return text.replace("|", "\\|")


def shown(default: object) -> str:
    if default in (None, "", {}, []):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{' '.join(map(str, default)) if isinstance(default, list) else default}`"


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each `t5tune` command in a document's `sh` blocks, after `t5tune`."""
    for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["t5tune"]:
                yield words[1:]


def settings_model(verb: str) -> type[Settings]:
    return next(model for model in COMMANDS if model.command == verb)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


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
    assert [name_of(path) for path in (REPOSITORY / "docs").rglob("*.md") if path not in reached] == []


def test_the_site_and_its_first_page_name_every_document() -> None:
    named = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    documents = {path.name for path in (REPOSITORY / "docs").glob("*.md")}
    assert set(named) == documents
    linked = re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / "docs" / "README.md").read_text(encoding="utf-8"))
    assert linked == named[1:]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_of_the_documents_are_taken(path: Path) -> None:
    """Each is parsed as the command line would be, up to the point where it would begin to work."""
    for verb, *arguments in commands(path):
        assert verb in SUMMARIES, verb
        model = settings_model(verb)
        flags: dict[str, object] = {}
        positional = [
            name
            for name, field in model.model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("positional")
        ]
        rest = normalise(arguments, model)
        assert "--problem" not in rest, rest
        while rest:
            word = rest.pop(0)
            if not word.startswith("--"):
                flags[positional.pop(0)] = word
            elif word in ("--json", "--quiet", "--debug"):
                continue
            else:
                value: object = rest.pop(0)
                name = word.removeprefix("--").replace("-", "_")
                if name == "renamed":
                    name, _, value = str(value).partition("=")
                if name in flags:
                    value = f"{flags[name]} {value}"
                flags[name] = value
        config = flags.pop("config", None)
        try:
            load_settings(model, str(config) if config else None, {}, flags)
        except SettingsError as error:
            pytest.fail(f"t5tune {verb} {' '.join(arguments)}: {error.message}")


def test_the_reference_is_that_of_the_settings() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference_text(), "renew it: python tests/test_docs.py"


def test_the_page_of_families_holds_the_table() -> None:
    page = FAMILY_PAGE.read_text(encoding="utf-8")
    assert "".join(TABLE.findall(page)) == families_table(), "renew it: python tests/test_docs.py"
    for name in [*GROUPS, *LATER.values()]:
        assert name in page


def test_the_start_is_what_happens(tmp_path: Path) -> None:
    """The commands of docs/start.md up to the user's own model, word for word; a variable makes training short."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    own, _, _ = (REPOSITORY / "docs" / "start.md").read_text(encoding="utf-8").partition("## 5.")
    section = tmp_path / "start.md"
    section.write_text(own, encoding="utf-8")
    ran = []
    for words in commands(section):
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


def test_the_question_of_the_start_is_one_that_the_run_learns_to_answer() -> None:
    """Of the held-out conversations nearly all are answered; names and dishes of no example aren't."""
    start, heldout = (REPOSITORY / name for name in ("docs/start.md", "examples/quickstart/heldout.jsonl"))
    (asked,) = [words[words.index("--prompt") + 1] for words in commands(start) if "--prompt" in words]
    assert asked in {json.loads(line)["conversations"][0]["value"] for line in heldout.read_text("utf-8").splitlines()}


if __name__ == "__main__":
    REFERENCE.write_text(reference_text(), encoding="utf-8")
    page = TABLE.sub(lambda _: families_table(), FAMILY_PAGE.read_text(encoding="utf-8"), count=1)
    FAMILY_PAGE.write_text(page, encoding="utf-8")
    print(REFERENCE, FAMILY_PAGE)
