"""What the help shows: short, complete with --help-all, and with commands that work as they are shown."""

import re
import shlex
from pathlib import Path

import pytest

from t5tune.cli import run
from t5tune.cli.summaries import EXAMPLES, FIRST_STEPS, SUMMARIES
from t5tune.settings import COMMANDS, Settings, load_settings
from tests.support.processes.command_line import parse_words, t5tune_in_fork

EXAMPLE_LINES = [line for lines in EXAMPLES.values() for line in lines]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Return what `t5tune WORDS` prints on a terminal of `width` columns."""

    def show(*words: str, width: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        assert run(list(words)) == 0
        return capsys.readouterr().out

    return show


def test_the_argument_of_merge_is_first_among_its_required_options(show) -> None:
    for text in show("merge", "--help"), show("merge", "--help-all"):
        assert 0 < text.index("ADAPTER, --adapter") < text.index("--output-dir")


@pytest.mark.parametrize("command", SUMMARIES)
def test_the_help_of_a_command_fits_on_a_screen(command: str, show) -> None:
    lines = [line.strip() for line in show(command, "--help").splitlines() if line.strip()]
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"Usage: t5tune {command} ")
    assert lines[1] == SUMMARIES[command]
    if "--debug" in "\n".join(lines):  # a command with few options shows all of them
        assert lines[-1].endswith(EXAMPLES[command][1])
    else:
        assert f"t5tune {command} --help-all lists the other " in lines[-1]


@pytest.mark.parametrize("model", COMMANDS, ids=lambda model: model.command)
def test_help_all_lists_every_flag_that_is_accepted(model: type[Settings], show) -> None:
    hidden = {"fp16", "training_args", "data", "eval_data"}
    for text in show(model.command, "--help-all"), show(model.command, "--help-all", width=200):
        words = {*text.split()}
        for name in model.model_fields:
            assert (model.format_option(name) in words) == (name not in hidden), name
        assert words >= {"--config", "--debug", "--help-all"}
    assert "--fp16" not in show(model.command, "--help")


def test_options_are_shown_with_readable_types_and_required_ones_first(show) -> None:
    for text in show("train", "--help"), show("train", "--help-all"):
        assert "--bf16 / --no-bf16 " in text
        assert "--lora-r INT " in text
        assert "--learning-rate NUMBER " in text
        assert "--train-mode [lora|full] " in text
        assert "owner/name[@revision] on" in text  # not markup
        assert "--data-path PATH… " in text
        assert "--output-dir PATH " in text
        first = ["--model-name-or-path", "--data-path", "--output-dir", "--source-column"]
        places = [text.index(f"{flag} ") for flag in first]
        assert places == sorted(places)
    text = show("train", "--help-all")
    assert "--lora-target-modules NAME… " in text
    assert "--data-format NAME " in text
    assert "auto, sharegpt, openai" in " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("train", "train [CONFIG] [OPTIONS]"),
        ("chat", "chat MODEL [OPTIONS]"),
        ("merge", "merge ADAPTER [OPTIONS]"),
        ("inspect", "inspect [CACHE] [OPTIONS]"),
        ("migrate", "migrate FILE [OPTIONS]"),
        ("templates", "templates [ACTION] [NAME] [TO] [OPTIONS]"),
    ],
)
def test_the_usage_shows_what_needs_no_flag(command: str, usage: str, show) -> None:
    assert show(command, "--help").split("\n")[1].strip() == f"Usage: t5tune {usage}"


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("", "--help"),
        ("-h", "--help"),
        ("help", "--help"),
        ("help train", "train --help"),
        ("--help-all", "--help"),
        ("train -h", "train --help"),
        ("-h train", "train --help"),
        ("chat run -h --temperature 1", "chat --help"),
        ("train --help --lora-r", "train --help"),
        ("train --lora-r 8 -h --help-all", "train --help-all"),
    ],
)
def test_help_is_shown_wherever_it_is_asked_for(words: str, same: str, show) -> None:
    assert show(*words.split()) == show(*same.split())


def test_t5tune_alone_lists_commands_and_first_steps(show) -> None:
    text = show()
    assert len(text.splitlines()) <= 45
    assert text.index("─ Commands ─") < text.index("│ prepare ") < text.index("Start here:")
    typed = re.sub(r"\\ *\n", " ", text.partition("Start here:")[2])
    lines = [line.split() for line in typed.splitlines() if "t5tune" in line.split()[:1]]
    assert lines == [shlex.split(line) for line in FIRST_STEPS.values()]
    assert [line[1] for line in lines] == ["train", "chat", "train"]


def test_the_help_is_shown_on_the_narrowest_terminal(show) -> None:
    for width in 1, 20, 40:
        assert "Examples:" in "".join(show("train", "--help", width=width).split("\n"))


@pytest.mark.parametrize("line", [*FIRST_STEPS.values(), *EXAMPLE_LINES])
def test_the_commands_in_the_help_are_valid(line: str) -> None:
    _, command, *arguments = shlex.split(line.partition(" > ")[0])
    model = next(model for model in COMMANDS if model.command == command)
    parsed = parse_words(arguments, model)
    load_settings(model, parsed.config, {}, parsed.values, parsed.problems)


LABELS = ("report  ", "next    ", "        t5tune ")
DEV_DATA = "--data-path dev.csv --source-column question --target-column answer"
NEXT_STEPS = {
    "t5tune prepare --model-name-or-path pocket --data-path pocket --output-dir cache": [
        "next    t5tune inspect cache",
        "        t5tune train --config pocket --data-path cache --output-dir run",
    ],
    "t5tune train --config pocket --output-dir run": [
        "report  run/report.html",
        "next    t5tune chat run",
        "        t5tune evaluate run --data-path HELD_OUT.jsonl",
        "        t5tune merge run --output-dir merged",
    ],
    "t5tune export run --output-dir adapter": [
        "next    t5tune chat adapter",
        "        t5tune merge adapter --output-dir merged",
    ],
    "t5tune merge run --output-dir merged": [
        "next    t5tune chat merged",
        "        t5tune evaluate merged --data-path HELD_OUT.jsonl",
    ],
    "t5tune trim merged --data-path pocket --output-dir trimmed": [
        "next    t5tune chat trimmed",
    ],
    "t5tune merge run --dtype bfloat16 --output-dir merged-bf16": [
        "next    t5tune chat merged-bf16",
        "        t5tune evaluate merged-bf16 --data-path HELD_OUT.jsonl",
    ],
    "t5tune export run --output-dir adapter --dtype bfloat16 --overwrite": [
        "next    t5tune chat adapter",
        "        t5tune merge adapter --output-dir merged",
    ],
    "t5tune evaluate run --data-path pocket --num-data 100": [
        "next    t5tune chat run",
        "        t5tune evaluate run --data-path pocket --num-data 100 --max-new-tokens 4 --compare-base",
        "        t5tune merge run --output-dir merged.1",
    ],
    f"t5tune evaluate run {DEV_DATA}": [
        "next    t5tune chat run",
        "        t5tune evaluate run --source-column question --target-column answer --data-path dev.csv "
        "--max-new-tokens 4 --compare-base",
        "        t5tune merge run --output-dir merged.1",
    ],
}


@pytest.mark.long
@pytest.mark.slow
def test_examples_in_the_help_work_in_order(tmp_path: Path) -> None:
    """All but doctor's, serve's and those that need the Hub or a sweep, in an empty folder; variables make it fast."""
    (tmp_path / "dev.csv").write_text("question,answer\nHello?,Hi.\n", encoding="utf-8")
    (tmp_path / "qlora.yml").write_text("base_model: t5-small\n", encoding="utf-8")
    (tmp_path / "llama3_lora_sft.yaml").write_text("stage: sft\n", encoding="utf-8")
    short = {"MAX_STEPS": "2", "MAX_NEW_TOKENS": "4", "REPORT_SAMPLES": "0", "VERIFY": "no"}
    environment = {f"T5TUNE_{name}": value for name, value in short.items()}
    next_steps = {}
    for line in EXAMPLE_LINES:
        if any(part in line for part in ("google/", "owner/name", "sweep/", "t5tune doctor", "t5tune serve")):
            continue
        done = t5tune_in_fork(*shlex.split(line.partition(" > ")[0])[1:], cwd=tmp_path, env=environment)
        assert (done.code, done.errors) == (0, []), line
        next_steps[line] = [step for step in done.stderr.splitlines() if step.startswith(LABELS)]
    assert (tmp_path / "run/report.html").is_file()
    assert {line: steps for line, steps in next_steps.items() if steps} == NEXT_STEPS
