"""A broken YAML file on the command line: one line with the file, the line, the problem and the next step."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5tune import cli
from t5tune.errors import SettingsError
from t5tune.io.yaml_file import read_yaml

BROKEN: dict[str, tuple[str | bytes, int, str]] = {
    "open bracket": ("learning_rate: [1\nlora_r: 8\n", 1, "the [ in column 16 is not closed; close it with ]"),
    "open bracket to the end": ("seed: 1\ndata_path: [a,\n  b,\nlora_r\n", 2, "the [ in column 12 is not closed"),
    "open brace": ("training_args: {a: 0.9\nlora_r: 8\n", 1, "the { in column 16 is not closed; close it with }"),
    "missing comma": ('{"lora_r": 8, "seed" 1}\n', 1, "a comma or } is missing before column 22"),
    "stray bracket": ("seed: ]\n", 1, "] in column 7, where a value is expected"),
    "open double quote": ('seed: 1\noutput_dir: "run\nlora_r: 8\n', 2, 'the quote " in column 13 is not closed'),
    "open single quote": ("output_dir: 'run\n", 1, "the quote ' in column 13 is not closed; close it with '"),
    "text after a quote": ('output_dir: "run" folder\n', 1, "text after a closing quote"),
    "unknown escape": (
        'output_dir: "C:\\my run"\n', 1, "\\m is not a valid escape in double quotes; use single quotes",
    ),
    "escape without digits": ('output_dir: "C:\\Users"\n', 1, "\\U is not a valid escape in double quotes"),
    "escape beyond Unicode": ('seed: 1\noutput_dir: "\\U00110000"\n', 2, "not valid YAML; put the value in single"),
    "tab as indentation": ("training_args:\n\ta: 0.9\n", 2, "a tab at the start of the line; indent with spaces"),
    "tab after the colon": ("lora_r:\t8\n", 1, "a tab in column 8; use a space"),
    "no space after the first colon": ("lora_r:8\nseed: 1\n", 1, "no space after the colon; write `lora_r: 8`"),
    "bracket before the end": ("lora_r: [\n", 2, "the file ends inside brackets; close them with ] or }"),
    "no space after a later colon": ("seed: 1\nlora_r:8\nbf16: true\n", 2, "no space after the colon; write `lora_"),
    "no colon": ("lora_r: 8\nlora_alpha 16\nseed: 1\n", 2, "no colon after the name; write `name: value`"),
    "second colon": ("output_dir: a: b\n", 1, "a second `: ` in one line; put a value with a colon in quotes"),
    "more indentation": ("lora_r: 8\n\n  seed: 1\n", 3, "indented more than the line before"),
    "more indentation after a comment": ("lora_r: 8\n# x\n  seed: 1\n", 3, "the indentation matches no line above"),
    "tag of another value": ("seed: !!int\nlora_r: 8\n", 1, "an empty value is not a valid int"),
    "less indentation": ("training_args:\n    a: 1\n  b: 2\n", 3, "the indentation matches no line above"),
    "list among settings": ("lora_r: 8\n- b\n", 2, "a list item (-) between settings"),
    "list in the same line": ("data_path: - a\n", 1, "a list item (-) must start on its own line"),
    "alias": ("lora_r: &rank 8\nseed: *rank\n", 2, "*rank: aliases aren't supported; repeat the value, or"),
    "pattern of files": ("data_path: *.jsonl\n", 1, "a value can't begin with *; put the value in quotes"),
    "anchor without a name": ("output_dir: &\n", 1, "a value can't begin with &"),
    "percent": ("output_dir: %HOME%\n", 1, "a name or value can't begin with %; put it in quotes"),
    "tag": ("lora_r: !int 8\n", 1, "the tag !int isn't supported; remove it, or put the value in quotes"),
    "tag of Python": ("seed: 1\nlora_r: !!python/name:os.system\n", 2, "the tag !!python/name:os.system isn't"),
    "merge key": ("<<: 3\n", 1, "merge keys (<<) aren't supported"),
    "control character": ("lora_r: 8\noutput_dir: a\x07b\n", 2, "the character U+0007, which YAML doesn't allow"),
    "two documents": ("lora_r: 8\n---\nlora_r: 9\n", 2, "a second document begins here (---); keep one document"),
    "no such date": (
        "seed: 1\noutput_dir: 2024-13-45\n", 2, "2024-13-45 is not a valid date or time; put it in quotes",
    ),
    "long number": ("seed: " + "9" * 5000, 1, "9… is too long for a number"),
    "list as a key": ("? [a, b]\n: 1\n", 1, "a list or a mapping where a name is expected; write `name: value`"),
    "directive": ("%YAML 3.0\n---\nlora_r: 8\n", 1, "not valid YAML in column 1; quote values with special characters"),
    "duplicate key": ("lora_r: 8\nseed: 1\nlora_r: 9\n", 3, "duplicate key lora_r (first defined on line 1)"),
    "Latin-1": (b"seed: 1\noutput_dir: caf\xe9\n", 2, "the byte 0xE9 is not valid UTF-8; save the file as UTF-8"),
    "UTF-16": ("lora_r: 8\n".encode("utf-16"), 1, "the byte 0xFF is not valid UTF-8"),
}  # fmt: skip
PARSER_WORDS = re.compile(r"unicode string|while (?:scanning|parsing)|column \d+:|\^|<block|codec|constructor|token")


@pytest.mark.slow
@pytest.mark.parametrize(("text", "line", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_described_in_one_plain_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str | bytes, line: int, said: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cli.run(["train", "--config", str(file)]) == 2
    (shown,) = capfd.readouterr().err.splitlines()
    assert shown.startswith(f"error: {file}:{line}: ")
    assert said in shown
    assert not PARSER_WORDS.search(shown.removeprefix(f"error: {file}"))


def test_an_unreadable_file_is_named_without_an_error_number(tmp_path: Path) -> None:
    folder = tmp_path / "run.yaml"
    folder.mkdir()
    with pytest.raises(SettingsError) as caught:
        read_yaml(folder)
    assert caught.value.message == f"{folder}: can't be read: Is a directory"


@pytest.mark.slow
@settings(deadline=None, max_examples=400, database=None, derandomize=True)
@given(
    text=st.lists(
        st.sampled_from(
            [*"[]{}:,-?*&!|>'\"%@`#\t \n\\", "\n  ", "a: ", "- ", "---", "!!int ", "\\u", "x", "1", "\x07", "é", "<<: "]
        ),
        max_size=14,
    ).map("".join)
)
def test_any_text_is_read_or_described_without_the_parsers_message(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    file.write_bytes(text.encode())
    message = read_message(file)
    assert not PARSER_WORDS.search(message)
    found = re.match(r":(\d+): ", message)
    assert found is None or 1 <= int(found[1]) <= len(text.splitlines()) + 1


def read_message(file: Path) -> str:
    """The error message for a file, without its path; an empty string if the file can be read."""
    try:
        read_yaml(file)
    except SettingsError as error:
        return error.message.removeprefix(str(file))
    return ""
