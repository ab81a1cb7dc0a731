"""The command line as a process: help, exit codes, one line per error, and one object on stdout with --json."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5tune.cli.summaries import SUMMARIES
from t5tune.settings import COMMANDS
from tests.support.processes.command_line import SIGNAL_WHILE_IMPORTING, t5tune, t5tune_in_fork

PREPARE_RESULT_KEYS = [
    "cache", "conversations", "rejected", "examples", "held_out", "source_tokens", "target_tokens", "truncated_sources",
    "truncated_targets", "unknown_tokens", "added_tokens", "up_to_date", "seconds", "shard", "joined", "datasets",
]  # fmt: skip


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


@pytest.mark.slow
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


@pytest.mark.parametrize("module", ["t5tune.errors", "typer", "pydantic", "t5tune.commands.trim"])
def test_ctrl_c_while_modules_are_imported_shows_no_traceback(module: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SIGNAL_WHILE_IMPORTING)
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    env = {"PYTHONPATH": paths, "SIGNAL_AT": module, "SIGNAL_NAME": "SIGINT"}
    done = t5tune("trim", "pocket", "--data-path", "pocket", "--output-dir", tmp_path / "trimmed", env=env)
    assert (done.code, done.stdout) == (130, "")
    assert done.stderr in ("", "interrupted\n")


@pytest.mark.slow
def test_a_path_that_isnt_utf_8_reaches_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "t5tune", "inspect", os.fsencode(tmp_path) + b"/caf\xe9"], capture_output=True, text=True
    )
    assert (done.returncode, "caf\\udce9: no such folder" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["export", "--format", "zip"], "SettingsError", "format: 'zip' (--format)"),
        (["export", ".", "--output-dir", "out"], "CheckpointError", ".: "),
        (["trian"], "SettingsError", "trian: no such command"),
    ],
)
def test_with_json_an_error_is_an_object_on_stdout(words: list[str], kind: str, message: str, tmp_path: Path) -> None:
    done = t5tune_in_fork(*words, "--json", cwd=tmp_path)
    assert done.code == 2
    assert set(done.json) == {"error"}
    assert set(done.json["error"]) == {"kind", "message", "hint"}
    assert done.json["error"]["kind"] == kind
    assert message in done.json["error"]["message"]


@pytest.mark.parametrize("setting", ["model_name_or_path", "data_path", "output_dir", "config"])
@pytest.mark.parametrize("command", ["trim", "prepare"])
def test_a_name_that_is_too_long_is_refused(command: str, setting: str, tmp_path: Path) -> None:
    values = {"model_name_or_path": "pocket", "data_path": "pocket", "output_dir": "out", setting: "x" * 300}
    words = [word for name, value in values.items() for word in (f"--{name}", value)]
    done = t5tune_in_fork(command, *words, cwd=tmp_path)
    assert (done.code, len(done.errors)) == (2, 1), done.stderr
    assert "name too long" in done.errors[0]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_json_errors_keep_their_exit_code_if_stdout_is_closed() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONUNBUFFERED": ""}  # buffered output would be written again at the end
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
def test_local_rank_may_precede_or_follow_the_command(before: bool, flag: str) -> None:
    done = t5tune_in_fork(*([flag, "train"] if before else ["train", flag]), "--fp16")
    # the only problems are the missing settings and fp16
    assert done.code == 2
    keys = [line.removeprefix("error: ").split(":")[0] for line in done.errors]
    assert keys == ["model_name_or_path", "data_path", "fp16", "output_dir"]
    assert "local" not in "\n".join(done.errors)


@pytest.mark.slow
def test_prepare_reports_that_a_cache_is_up_to_date(tmp_path: Path, conversations: Path) -> None:
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


def test_no_object_is_frozen_at_the_end_with_triton() -> None:
    """Triton's bindings report frozen objects as leaks, since release 3.9 (which torch 2.15 imports)."""
    script = """if True:
        import atexit, gc, sys, types
        sys.modules["triton"] = types.ModuleType("triton")
        atexit.register(lambda: print(gc.get_freeze_count()))
        from t5tune.cli import main
        main(["chat", "no-such-folder", "--prompt", "Hi"])
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.split() == ["0"]
