"""The command line as a process: help, exit codes, one line per error, and one object on stdout with --json."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5tune.cli import run
from t5tune.cli.summaries import SUMMARIES
from t5tune.settings import COMMANDS
from tests.support.command_line import CommandResult, get_command, t5tune, t5tune_in_fork

PREPARE_RESULT_KEYS = [
    "cache", "conversations", "rejected", "examples", "source_tokens", "target_tokens", "truncated_sources",
    "truncated_targets", "unknown_tokens", "added_tokens", "up_to_date", "seconds", "shard", "joined", "datasets",
]  # fmt: skip


def assert_refused(done: "CommandResult", *names: str) -> None:
    """Assert exit code 2, `error: …` lines that contain `names`, no traceback, and nothing on stdout."""
    assert done.code == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.errors
    said = "\n".join(done.errors)
    for name in names:
        assert name in said


def test_every_setting_has_a_flag_or_is_yaml_only() -> None:
    for model in COMMANDS:
        missing = set(model.model_fields) - {param.name for param in get_command(model.command).params}
        extras = {name: field.json_schema_extra for name, field in model.model_fields.items()}
        assert missing == {name for name, extra in extras.items() if isinstance(extra, dict) and extra.get("yaml_only")}
        assert missing <= {"training_args", "data", "eval_data"}


def test_without_arguments_the_commands_are_listed_without_an_error() -> None:
    done = t5tune()
    assert (done.code, done.stderr) == (0, "")
    for model in COMMANDS:
        assert model.command in done.stdout
        assert SUMMARIES[model.command] in done.stdout


def test_the_version_is_printed() -> None:
    from t5tune.version import __version__

    done = t5tune("--version")
    assert (done.code, done.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [(["--help"], {"pydantic"}), (["trian"], {"pydantic", "typer.rich_utils"})]
    + [
        (words, set()) for words in (["train", "--help-all"], ["train", "--lora-rr", "8"], ["schema", "--lora-rr", "8"])
    ],
)
def test_the_help_and_a_refusal_import_little(arguments: list[str], unneeded: set[str]) -> None:
    code = "import sys; from t5tune.cli import run; run(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    unneeded = unneeded | {"torch", "transformers", "peft", "deepspeed", "numpy", "tokenizers"}
    assert set(done.stdout.splitlines()[-1].split()) & unneeded == set()


def test_each_wrong_setting_is_reported_on_its_own_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora_rr: 8\nlora_dropout: much\n")
    done = t5tune_in_fork(
        "train", "--config", file, "--lora-alfa", "8", "--save-steps", "soon", env={"T5TUNE_SEEED": "1"}
    )
    assert_refused(done, "--lora-alfa", f"{file}: lora_rr", "T5TUNE_SEEED", "lora_dropout: 'much'", "'soon'")
    assert done.stderr.splitlines() == done.errors
    assert len(done.errors) == 8  # the five above, and the missing model_name_or_path, data_path and output_dir


def test_an_unknown_command_is_refused_with_the_closest_one() -> None:
    assert_refused(t5tune_in_fork("trian"), "trian", "did you mean train?")


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("eval", "did you mean evaluate?"),
        ("predict", "did you mean evaluate?"),
        ("generate", "did you mean chat?"),
        ("fine-tune", "did you mean train?"),
        ("sft", "did you mean train?"),
        ("tokenize", "did you mean prepare?"),
        ("version", "run t5tune --version"),
        ("server", "did you mean serve?"),
    ],
)
def test_the_command_of_another_tool_is_refused_with_ours(
    word: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([word]) == 2
    assert capsys.readouterr().err == f"error: {word}: no such command; {advice}\n"


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (
            "--install-completion bsh",
            "--install-completion bsh: the option takes no value and detects the current shell",
        ),
        ("--show-completion fish", "--show-completion fish: the option takes no value and detects the current shell"),
        ("--lora-r train", "No such option: --lora-r; run t5tune --help to list the commands"),
        ("--json", "No such option: --json; run t5tune --help to list the commands"),
    ],
)
def test_what_precedes_a_command_is_refused(words: str, refusal: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {refusal}")


def test_a_path_that_isnt_utf_8_reaches_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "t5tune", "inspect", os.fsencode(tmp_path) + b"/caf\xe9"], capture_output=True, text=True
    )
    assert (done.returncode, "caf\\udce9: no such folder" in done.stderr) == (2, True), done.stderr


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    for words, same in [(["help"], ["--help"]), (["help", "train"], ["train", "--help"])]:
        assert run(words) == run(same) == 0
        shown = capsys.readouterr().out
        assert shown[: len(shown) // 2] == shown[len(shown) // 2 :]
    assert run(["help", "trian"]) == 2


def test_an_unexpected_argument_is_refused() -> None:
    done = t5tune_in_fork("prepare", "stray")
    assert_refused(done, "stray: unexpected argument", "model_name_or_path: missing")
    assert_refused(t5tune_in_fork("inspect", "one", "two"), "two: unexpected argument")


def test_train_takes_a_config_as_its_first_word(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora_rr: 8\n")
    assert_refused(t5tune_in_fork("train", file), f"{file}: lora_rr: unknown setting; did you mean lora_r?")
    # without the config, the model would be missing
    done = t5tune_in_fork("train", "pocket", "data_path=no.jsonl", f"output_dir={tmp_path}/run")
    assert_refused(done, "data_path: no.jsonl: no such file or folder; check the path's spelling")
    assert_refused(
        t5tune_in_fork("train", "pockt"), "config: pockt: no file or template of that name; did you mean pocket?"
    )
    (tmp_path / "settings.yaml").write_text("lora_r: 8\n")
    assert_refused(
        t5tune_in_fork("train", tmp_path), f"config: {tmp_path}: expected a .yaml file; give {tmp_path}/settings.yaml"
    )


def test_errors_name_positional_arguments_without_dashes() -> None:
    assert_refused(t5tune_in_fork("inspect"), "cache: missing; give t5tune inspect CACHE or set it in a --config file")
    assert_refused(t5tune_in_fork("templates", "foo"), "action: 'foo' (ACTION): ")


def test_a_missing_config_is_refused() -> None:
    assert_refused(t5tune_in_fork("train", "--config", "nowhere.yaml"), "nowhere.yaml", "pocket")


def test_a_missing_data_file_is_refused(tmp_path: Path) -> None:
    arguments = ["--model-name-or-path", "pocket", "--output-dir", tmp_path / "cache"]
    done = t5tune_in_fork("prepare", *arguments, "--data-path", "nowhere.jsonl")
    assert_refused(done, "data_path: nowhere.jsonl", "check the path's spelling")
    hint = "; only a shell expands variables, so use --data-path or T5TUNE_DATA_PATH"
    for name in ("$DATA/chats.jsonl", "$DATA/*.jsonl"):
        done = t5tune_in_fork("prepare", *arguments, "--data-path", name)
        assert_refused(done, f"data_path: {name}: ", hint)
    done = t5tune_in_fork("prepare", *arguments, "--data-path", "tatsu-lab/alpaca")
    said = "no such file or folder, HF_HUB_OFFLINE disables downloads, and the dataset isn't all in the local cache"
    assert_refused(done, f"data_path: tatsu-lab/alpaca: {said}; unset HF_HUB_OFFLINE, or give a file or a folder")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_base_is_refused(tmp_path: Path) -> None:
    arguments = ["--model-name-or-path", tmp_path, "--output-dir", tmp_path / "cache", "--data-path", "pocket"]
    assert_refused(t5tune_in_fork("prepare", *arguments), f"model_name_or_path: {tmp_path}", "config.json")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    done = t5tune_in_fork("export", tmp_path, "--output-dir", tmp_path / "out")
    assert_refused(done, f"checkpoint: {tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    arguments = ["--model-name-or-path", "pocket", "--output-dir", tmp_path / "out"]
    assert_refused(t5tune_in_fork("merge", *arguments, "--adapter", tmp_path), f"adapter: {tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_axolotls_kind_of_adapter_is_refused_with_our_setting(tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        done = t5tune_in_fork("train", "pocket", "adapter=qlora", "--output-dir", tmp_path / "run", *more)
        assert_refused(done, "adapter: qlora: no such folder; to train QLoRA, leave it out and set q_lora: true")
        assert list(tmp_path.iterdir()) == []


def test_an_unknown_conversation_template_is_refused_before_the_run_folder_exists(tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        name = ["--conversation-template", "llama3"]
        done = t5tune_in_fork("train", "pocket", *name, "--output-dir", tmp_path / "run", *more)
        assert_refused(done, "conversation_template: llama3: no file or template of that name")
        assert list(tmp_path.iterdir()) == []


def test_with_json_a_wrong_setting_is_an_object_on_stdout() -> None:
    done = t5tune_in_fork("export", "--json", "--format", "zip")
    assert done.code == 2
    assert set(done.json) == {"error"}
    assert set(done.json["error"]) == {"kind", "message", "hint"}
    assert done.json["error"]["kind"] == "SettingsError"
    assert "format: 'zip' (--format)" in done.json["error"]["message"]
    assert len(done.errors) == 3  # the format, and the missing checkpoint and output_dir


def test_with_json_an_error_of_a_command_is_an_object_on_stdout(tmp_path: Path) -> None:
    done = t5tune_in_fork("export", tmp_path, "--output-dir", tmp_path / "out", "--json")
    assert done.code == 2
    error = done.json["error"]
    assert set(error) == {"kind", "message", "hint"}
    assert error["kind"] == "CheckpointError"
    assert str(tmp_path) in error["message"]
    assert error["hint"]


def test_with_json_a_parser_error_is_an_object_on_stdout() -> None:
    done = t5tune_in_fork("trian", "--json")
    assert done.code == 2
    assert done.json["error"]["kind"] == "SettingsError"
    assert "trian" in done.json["error"]["message"]


def test_with_json_an_error_stays_the_same_if_it_cannot_be_written_to_stdout() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONUNBUFFERED": ""}  # what is buffered would be written again at the end
    for command, code in (["trian", "--json"], 2), (["train", "--fp16", "--json"], 2), (["schema"], 1):
        done = subprocess.run(
            [sys.executable, "-m", "t5tune", *command], stdout=writer, stderr=subprocess.PIPE, text=True, env=env
        )
        lines = done.stderr.splitlines()
        assert (done.returncode, [line for line in lines if not line.startswith("error: ")]) == (code, [])
        assert bool(lines) == (code == 2)  # schema's reader is gone, so there is no one to report to
    os.close(writer)


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("flag", ["--local_rank=0", "--local-rank=0"])
def test_the_launchers_local_rank_is_accepted_on_either_side_of_the_verb(before: bool, flag: str) -> None:
    done = t5tune_in_fork(*([flag, "train"] if before else ["train", flag]), "--fp16")
    # the only problems are the missing settings and fp16
    assert done.code == 2
    keys = [line.removeprefix("error: ").split(":")[0] for line in done.errors]
    assert keys == ["model_name_or_path", "data_path", "fp16", "output_dir"]
    assert "local" not in "\n".join(done.errors)


@pytest.mark.slow
def test_prepare_prints_one_object_and_on_the_next_run_reports_that_it_is_up_to_date(
    tmp_path: Path, conversations: Path
) -> None:
    arguments = ["--model-name-or-path", "pocket", "--data-path", conversations, "--output-dir", tmp_path / "cache"]
    done = t5tune_in_fork("prepare", *arguments, "--json")
    assert done.code == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert list(done.json) == PREPARE_RESULT_KEYS
    assert done.json["cache"] == str(tmp_path / "cache")
    assert done.json["conversations"] == 24
    assert done.json["up_to_date"] is False
    again = t5tune_in_fork("prepare", *arguments, "--json", "--quiet")
    assert again.code == 0
    assert again.stderr == ""
    assert again.json | {"seconds": 0, "up_to_date": False} == done.json | {"seconds": 0}
    assert again.json["up_to_date"] is True
    assert isinstance(again.json["seconds"], float)


def test_prepare_prints_the_path_of_the_cache(tmp_path: Path, conversations: Path) -> None:
    arguments = ["--model-name-or-path", "pocket", "--data-path", conversations, "--output-dir", tmp_path / "cache"]
    done = t5tune_in_fork("prepare", *arguments)
    assert done.code == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'cache'}\n"
