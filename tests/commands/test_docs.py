"""docs/for-agents.md and `t5tune docs`: the page's statements are true, and its recipes work."""

import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from t5tune.commands.docs import PACKAGE, docs
from t5tune.commands.prepare import prepare
from t5tune.settings import COMMANDS, DocsSettings, PrepareSettings
from tests.support.paths import REPOSITORY
from tests.support.processes.command_line import CommandResult, t5tune_in_fork
from tests.support.processes.forks import get_fork_server
from tests.test_docs import find_commands
from tools.agents_page import GENERATED, PAGE
from tools.generated_blocks import BLOCK

TEXT = PAGE.read_text(encoding="utf-8")
RECIPES = re.findall(r"^### (.*?)\n(.*?)(?=^##)", TEXT.partition("\n## Recipes\n")[2], re.MULTILINE | re.DOTALL)
ORDER = json.dumps({"name": "Aida", "soda": 4}, indent=2)
# flags of other programs
OTHER_FLAGS = {"--repo-type"}


def test_the_page_has_every_generated_part_and_is_short() -> None:
    assert sorted(name for _, name, _ in BLOCK.findall(TEXT)) == sorted(GENERATED)
    assert len(docs(DocsSettings()).text.splitlines()) <= 440


def test_docs_prints_the_page_without_markers_and_links() -> None:
    done = t5tune_in_fork("docs")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith("# For coding assistants\n\nThis page")
    assert "<!--" not in done.stdout
    left = [line for line in TEXT.splitlines() if line and not line.startswith("<!--")]
    printed = [line for line in done.stdout.splitlines() if line]
    assert len(printed) == len(left)
    assert {line for line in left if "](" not in line} == {line for line in printed if "(docs/" not in line}
    assert "](" not in done.stdout
    assert "More: all settings (docs/commands.md), file formats (docs/formats.md)" in done.stdout
    assert t5tune_in_fork("docs", "--json").json == {"text": done.stdout}


def test_the_page_is_installed_where_docs_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    installed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]["docs/for-agents.md"]
    assert installed.startswith(f"{PACKAGE.name}/")
    (tmp_path / PACKAGE.name).mkdir()
    (tmp_path / installed).write_text("installed", encoding="utf-8")
    monkeypatch.setattr("t5tune.commands.docs.PACKAGE", tmp_path / PACKAGE.name)
    assert docs(DocsSettings()).text == "installed"


def test_every_flag_on_the_page_exists() -> None:
    flags = {f"--{name.replace('_', '-')}" for model in COMMANDS for name in model.model_fields}
    flags |= {flag.replace("--", "--no-", 1) for flag in flags} | {"--config", "--json", "--quiet", "--debug", "--help"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT))
    assert named - flags - OTHER_FLAGS == {"--help-all", "--lora_r"}


def test_every_example_of_a_record_is_read(tmp_path: Path) -> None:
    for suffix in ("json", "csv"):
        (block,) = re.findall(rf"^```{suffix}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
        (tmp_path / f"data.{suffix}").write_text(block, encoding="utf-8")
    columns = {"source_column": "question", "target_column": "answer"}
    for name, more, count in (("data.json", {}, 6), ("data.csv", columns, 1)):
        data = {"data_path": str(tmp_path / name), "output_dir": tmp_path / "cache" / name, **more}
        result = prepare(PrepareSettings(model_name_or_path="pocket", **data))
        assert (result.conversations, result.rejected) == (count, 0)


@pytest.mark.slow
def test_the_first_example_in_python_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    output, log = tmp_path / "output", tmp_path / "log"
    for file in (output, log):
        file.touch()
    assert get_fork_server().start(["-c", code], output, log, os.environ).wait(500) == 0, log.read_text()
    losses, _, score = output.read_text().rpartition(" ")
    assert len(json.loads(losses)) >= 1
    assert 0 <= float(score) <= 100


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the data that the recipes name."""
    pairs = [(f"Order {number}", f"Answer {number}") for number in range(12)]
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).write_text("\n".join(["question,answer", *map(",".join, pairs)]), encoding="utf-8")
    for name, records in {
        "chats.jsonl": [
            {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in pairs
        ],
        "extraction.jsonl": [{"prompt": source, "completion": ORDER} for source, _ in pairs],
    }.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=[pytest.mark.long] if number else []) for number, (name, _) in enumerate(RECIPES)],
)
def test_the_commands_of_a_recipe_work(recipe: str, data: Path, on_ranks: Callable[..., CommandResult]) -> None:
    """On the built-in model, for two steps, and on two processes in place of four GPUs."""
    section = data / "recipe.md"
    section.write_text(dict(RECIPES)[recipe], encoding="utf-8")
    writes_text = "--objective classify" not in section.read_text("utf-8")
    more = {
        **dict.fromkeys(("prepare", "plan"), ["--model-name-or-path", "pocket"]),
        "train": ["--model-name-or-path", "pocket", "--max-steps", "2", "--report-samples", "0"],
        **dict.fromkeys(("evaluate", "chat"), ["--max-new-tokens", "4"] if writes_text else []),
    }
    for command, *words in find_commands(section):
        ranks = 1
        if "--num-gpus" in words:
            ranks, place = 2, words.index("--num-gpus")
            del words[place : place + 2]
        done = on_ranks(ranks, command, *words, *more.get(command, []), calls=[f"os:chdir({str(data)!r})"])
        assert done.code == 0, f"{command}: {done.stderr}"
    outputs = [words[words.index("--output-dir") + 1] for words in find_commands(section) if "--output-dir" in words]
    assert [name for name in outputs if not any((data / name).iterdir())] == []
