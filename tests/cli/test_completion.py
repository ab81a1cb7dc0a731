"""What a shell gets from Typer when it completes words, in the format for each shell."""

import re

import pytest

from t5tune.cli import run


@pytest.fixture
def complete(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Return the completions of a line as a shell gets them."""

    def complete(shell: str, line: str) -> list[str]:
        words = line.split(" ")
        variables = {
            "COLUMNS": "80",
            "_T5TUNE_COMPLETE": f"complete_{shell}",
            "_TYPER_COMPLETE_ARGS": line,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "COMP_WORDS": "\n".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as exit_:
            run([])
        assert exit_.value.code == 0
        return capsys.readouterr().out.splitlines()

    return complete


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("t5tune tr", ["train", "trim"]),
        ("t5tune train --train-mode ", ["lora", "full"]),
        ("t5tune train --lora_r 8 --train-mode f", ["full"]),
        ("t5tune train --q-lora ", ["true", "false"]),
        ("t5tune train --conv", ["--conversation-template"]),
        ("t5tune train --no-q", ["--no-q-lora", "--no-quantize-wo"]),
        ("t5tune train --lora-r 8 --lora-r", []),  # is given already
        ("t5tune templates ", ["list", "show", "copy"]),
        ("t5tune templates copy ", []),  # files, by the shell
        ("t5tune train ru", []),
    ],
)
def test_words_are_completed_in_every_shell(line: str, completions: list[str], complete) -> None:
    assert [word for word in complete("bash", line) if word] == completions
    fish = [word for word in complete("fish", line) if word]
    assert [word.partition("\t")[0] for word in fish] == completions
    zsh = "\n".join(complete("zsh", line))
    assert re.findall(r'^(?:_arguments .*\(\()?"([^"]*)"', zsh, re.MULTILINE) == completions
    assert completions or zsh == "_files"


def test_every_option_is_completed_on_one_line_with_its_description(complete) -> None:
    lines = complete("fish", "t5tune train --")
    assert len(lines) > 100
    for line in lines:
        flag, _, description = line.partition("\t")
        assert flag.startswith("--")
        assert description
    assert "--model-name-or-path\tBase model: a folder, owner/name[@revision] on the Hugging Face Hub, or `pocket`" in (
        line[: line.find(" (built in)")] for line in lines
    )
