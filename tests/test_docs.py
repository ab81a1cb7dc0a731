"""The documents: links resolve, commands are valid, and generated files are up to date."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t5tune.checkpoints.model_card import TRANSFORMERS_JS
from t5tune.cli.summaries import SUMMARIES
from t5tune.errors import SettingsError
from t5tune.families import REFUSED_MODELS
from t5tune.families.t5 import T5
from t5tune.settings import COMMANDS
from t5tune.settings.loading import load_settings
from tests.support.paths import REPOSITORY
from tests.support.processes.command_line import parse_words, t5tune_in_fork
from tools import docs_site
from tools.commands_page import anchor_of
from tools.generate import FILES, find_change

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for path in REPOSITORY.glob(pattern)
)


def get_name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def find_anchors(path: Path) -> set[str]:
    """Return a document's anchors: the ones that GitHub derives from its headings, and explicit anchors."""
    text = path.read_text(encoding="utf-8")
    return {*map(anchor_of, re.findall(r"^#+ (.*)$", text, re.MULTILINE)), *re.findall(r'<a id="([^"]*)">', text)}


def find_commands(path: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `t5tune` command in a document's `sh` blocks; of a loop, with its first value."""
    for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for name, value in re.findall(r"^ *for (\w+) in (\S+)", block, re.MULTILINE):
            block = block.replace(f"${name}", value)
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["t5tune"]:
                yield words[1 : words.index(">") if ">" in words else None]


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
    """The files of zensical.toml's nav, in its order."""
    match nav:
        case str():
            yield nav
        case dict():
            yield from pages_of(list(nav.values()))
        case list():
            for entry in nav:
                yield from pages_of(entry)


@pytest.fixture(scope="module")
def navigation() -> list[str]:
    """The pages of the site, in the order of its navigation."""
    project = tomllib.loads((REPOSITORY / "zensical.toml").read_text(encoding="utf-8"))["project"]
    return list(pages_of(project["nav"]))


def test_the_navigation_has_every_page_once(navigation: list[str]) -> None:
    assert sorted(navigation) == sorted([*docs_site.list_pages().values(), *docs_site.INCLUDED.values()])


def test_the_first_page_links_to_every_page_in_order(navigation: list[str]) -> None:
    first = REPOSITORY / "docs" / "README.md"
    _, _, tables = docs_site.adapt_links(first).partition("\n## Start\n")
    expected = [page for page in navigation[1:] if page == "decisions/README.md" or not page.startswith("decisions/")]
    assert re.findall(r"^\| \[.*\]\((.*)\)", tables, re.MULTILINE) == expected


def test_links_of_the_site_lead_to_its_own_pages(tmp_path: Path) -> None:
    """The documents' links to other files of the repository, such as tests, would be dead on the site."""
    site = tmp_path / "site"
    docs_site.main(site)
    for page in site.rglob("*.md"):
        for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
            linked = (page.parent / target).resolve()
            assert linked.is_relative_to(site.resolve()), f"{page.relative_to(site)}: {target}"
            assert linked.is_file(), f"{page.relative_to(site)}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=get_name)
def test_commands_and_code_are_at_most_80_characters_wide(path: Path) -> None:
    """That is the width of the site's text and of a terminal. Other blocks, such as JSON lines, wrap on the site."""
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:sh|console|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        assert [line for line in block.splitlines() if len(line) > 80] == []


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


def test_the_tests_of_the_invariants_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (REPOSITORY / "docs" / "invariants.md").read_text()))
    tests = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert named
    assert named <= set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))


@pytest.mark.parametrize("path", DOCUMENTS, ids=get_name)
def test_commands_in_the_documents_are_valid(path: Path) -> None:
    """Each command is parsed as on the command line, but not run."""
    for command, *arguments in find_commands(path):
        assert command in SUMMARIES, command
        model = next(model for model in COMMANDS if model.command == command)
        parsed = parse_words(arguments, model)
        try:
            load_settings(model, parsed.config, {}, parsed.values, parsed.problems)
        except SettingsError as error:
            pytest.fail(f"t5tune {command} {' '.join(arguments)}: {error.message}")


@pytest.mark.parametrize("name", [name for name in FILES if name != "docs/memory.md"])  # which takes half a minute
def test_generated_files_are_up_to_date(name: str) -> None:
    assert find_change(name) == "", "run make generate"


def test_the_families_page_names_layers_and_unsupported_models() -> None:
    page = (REPOSITORY / "docs" / "families.md").read_text(encoding="utf-8")
    for name in [*T5.linear_layers, *(reason.partition(":")[0] for reason in REFUSED_MODELS.values())]:
        assert name in page


@pytest.mark.slow
def test_the_commands_of_the_getting_started_page_work(tmp_path: Path) -> None:
    """Run the commands of docs/start.md on the built-in model unchanged; variables keep them short."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    own, _, _ = (REPOSITORY / "docs" / "start.md").read_text(encoding="utf-8").partition("## 5.")
    section = tmp_path / "start.md"
    section.write_text(own, encoding="utf-8")
    short = {"T5TUNE_MAX_STEPS": "2", "T5TUNE_MAX_NEW_TOKENS": "4", "T5TUNE_NUM_DATA": "20"}
    short["T5TUNE_REPORT_SAMPLES"] = "2"
    ran = []
    for words in find_commands(section):
        done = t5tune_in_fork(*words, "--quiet", cwd=tmp_path, env=short)
        assert done.code == 0, f"{words}: {done.stderr}"
        ran.append(words[0])
    assert ran == ["train", "chat", "evaluate", "merge"]
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.long
@pytest.mark.slow
def test_the_commands_of_the_preferences_page_work(tmp_path: Path) -> None:
    """Run the commands of docs/preferences.md on the built-in model unchanged; variables keep them short."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    short = {"T5TUNE_MAX_STEPS": "2", "T5TUNE_MAX_NEW_TOKENS": "6", "T5TUNE_NUM_DATA": "24"}
    short["T5TUNE_REPORT_SAMPLES"] = "0"
    messages = "".join(f"An order for Mira: {number} teas.\n{1 + number % 2}\n" for number in range(24))
    ran = []
    for words in find_commands(REPOSITORY / "docs" / "preferences.md"):
        typed = messages.encode() if "--save-preferences" in words else b""
        done = t5tune_in_fork(*words, "--quiet", cwd=tmp_path, env=short, stdin=typed)
        assert done.code == 0, f"{words}: {done.stderr}"
        ran.append(words[0])
    assert ran == [
        "train", "chat", "evaluate", "prepare", "train", "evaluate", "evaluate", "chat", "train", "evaluate", "train",
    ]  # fmt: skip
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) > 4
    assert all(pair.keys() >= {"chosen", "rejected"} for pair in pairs)
    assert json.loads((tmp_path / "dpo" / "result.json").read_text())["eval"].keys() >= {"rewards/accuracies"}


@pytest.mark.long
@pytest.mark.slow
def test_the_commands_of_the_labels_page_work(tmp_path: Path) -> None:
    """Run the commands of docs/labels.md on the built-in model unchanged, but for the server."""
    page = REPOSITORY / "docs" / "labels.md"
    text = page.read_text("utf-8")
    script, prediction = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    made = re.findall(r"^(?:head|grep|printf) .*$", text, re.M)
    subprocess.run([sys.executable, "-c", script.replace("2000", "200")], cwd=tmp_path, check=True)
    subprocess.run(["bash", "-ec", "\n".join(made)], cwd=tmp_path, check=True)
    short = {
        "T5TUNE_MAX_STEPS": "2",
        "T5TUNE_EVAL_STEPS": "2",
        "T5TUNE_REPORT_SAMPLES": "0",
    }
    ran = []
    for command, *words in find_commands(page):
        if command != "serve":
            words = [word for word in words if word not in ("--max-steps", "120", "--eval-steps", "40")]
            limits = {} if "encoder" in words else {"T5TUNE_MAX_NEW_TOKENS": "4"}  # an encoder writes no text
            done = t5tune_in_fork(command, *words, "--quiet", cwd=tmp_path, env=short | limits)
            assert done.code == 0, f"{words}: {done.stderr}"
        ran.append(command)
    texts = ["prepare", "inspect", "train", "evaluate", "evaluate", "evaluate", "chat", "serve", "train"]
    assert ran == [*texts, "train", "evaluate", "chat", "plan", "merge"]
    done = subprocess.run([sys.executable, "-c", prediction], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip() in ("order", "question", "cancel", "complaint")
    assert json.loads((tmp_path / "chosen" / "scores.json").read_text())["ece"] > 0
    assert "recall_at_4" in json.loads((tmp_path / "ranked" / "scores.json").read_text())["recall"]
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["labels"]["all"]["confusion"].keys() == {
        "order", "question", "cancel", "complaint",
    }  # fmt: skip
    assert (tmp_path / "scores" / "report.html").is_file()


@pytest.mark.long
@pytest.mark.slow
def test_the_commands_of_the_constraints_page_work(tmp_path: Path) -> None:
    """Run the commands of docs/constraints.md on the built-in model unchanged, but for the server."""
    page = REPOSITORY / "docs" / "constraints.md"
    (tmp_path / "order.json").write_text(re.findall(r"^```json\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)[0])
    short = {"T5TUNE_MAX_STEPS": "2", "T5TUNE_MAX_NEW_TOKENS": "80", "T5TUNE_REPORT_SAMPLES": "0"}
    replies = []
    for command, *words in find_commands(page):
        if command != "serve":
            done = t5tune_in_fork(command, *words, "--json", cwd=tmp_path, env=short)
            assert done.code == 0, f"{words}: {done.stderr}"
            replies += [json.loads(done.stdout)["reply"]] if command == "chat" else []
    _, pattern, choice = replies
    assert re.fullmatch("[0-9]+ (teas|coffees)", pattern)
    assert choice in ("tea", "coffee", "cake")
    assert json.loads((tmp_path / "orders" / "training_data.json").read_text())["json_schema"]["required"] == ["name"]


def test_the_prompt_of_the_start_page_is_held_out() -> None:
    """The run learns to reply to held-out conversations, but not to names and dishes that are in no example."""
    start, heldout = (REPOSITORY / name for name in ("docs/start.md", "examples/quickstart/heldout.jsonl"))
    (asked,) = [words[words.index("--prompt") + 1] for words in find_commands(start) if "--prompt" in words]
    assert asked in {json.loads(line)["conversations"][0]["value"] for line in heldout.read_text("utf-8").splitlines()}


def test_the_page_of_small_models_has_the_pinned_transformers_js() -> None:
    text = (REPOSITORY / "docs/small.md").read_text(encoding="utf-8")
    assert re.findall(r"npm install .*@huggingface/transformers@(\S+)", text) == [TRANSFORMERS_JS]


@pytest.mark.parametrize("page", ["README.md", "docs/README.md"])
def test_the_picture_shows_the_run_of_the_command_before_it(page: str) -> None:
    makefile, text = (REPOSITORY / "Makefile").read_text(), (REPOSITORY / page).read_text()
    (made,) = re.findall(r"^picture:.*\n(?:\t.*\n)*?\t.*(t5tune train .*)\n", makefile, re.MULTILINE)
    before, _, _ = text.partition("report.png)")
    command = re.findall(r"```sh\n(.*?)```", before, re.DOTALL)[-1]
    assert shlex.split(command.replace("\\\n", " ")) == shlex.split(made)
    (picture,) = re.findall(r"--screenshot=(\S+) build/(\S+)/report.html", makefile)
    assert picture == ("docs/report.png", shlex.split(made)[shlex.split(made).index("--output-dir") + 1])
