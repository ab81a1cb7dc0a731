"""Environments that differ from a developer's: no home folder, old locales, dumb and narrow terminals, full disks."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t5tune.commands.train import train as train_in_process
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.errors import SettingsError
from t5tune.model import device
from t5tune.progress import Note
from t5tune.runs.checks import check_machine
from t5tune.settings import TrainSettings
from t5tune.settings.packaged_templates import read_deepspeed_file
from tests.support.caches import find_cache
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.processes.forks import get_fork_server

pytestmark = pytest.mark.slow

WINDOWS_1252 = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "LC_ALL": "C"}
PREPARE = ("prepare", "--model-name-or-path", "pocket", "--data-path")
ANSWER = "Zoë → 日本, é\n{}"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "Gespräche 1.jsonl"
    good = {"conversations": [{"from": "human", "value": "Grüße"}, {"from": "gpt", "value": ANSWER}]}
    bad = {"conversations": [{"from": "human", "value": "日本"}, {"from": "human", "value": "again"}]}
    lines = (json.dumps(record, ensure_ascii=False) for record in (*[good] * 10, bad))  # a tenth may be rejected
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run(arguments: list[object], environment: dict[str, str | None]) -> tuple[int, bytes, bytes]:
    """Run the command line; a variable that is None is removed from the environment."""
    variables = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-m", "t5tune", *map(str, arguments)],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def tokens(records: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The tokens of the records, prepared in the environment of the tests."""
    cache = tmp_path_factory.mktemp("plain") / "cache"
    assert run([*PREPARE, records, "--output-dir", cache], {})[0] == 0
    return (find_cache(cache) / "tokens.bin").read_bytes()


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": None},
        {"HOME": "/proc/nowhere"},
        WINDOWS_1252,
        {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "80"},
        {"TERM": None, "COLUMNS": "20"},
        {"COLUMNS": "0"},
    ],
    ids=["no home", "a home that can't be written", "windows-1252", "dumb", "narrow", "no columns"],
)
@pytest.mark.variants("no home")
def test_an_odd_environment_gives_the_same_cache_without_a_traceback(
    environment: dict[str, str | None], records: Path, tokens: bytes, tmp_path: Path
) -> None:
    code, stdout, stderr = run([*PREPARE, records, "--output-dir", tmp_path / "cache"], environment)
    assert code == 0, stderr
    assert stdout.decode() == f"{tmp_path / 'cache'}\n"
    assert b"Traceback" not in stderr
    assert b"\x1b" not in stderr
    assert (find_cache(tmp_path / "cache") / "tokens.bin").read_bytes() == tokens
    (rejected,) = (find_cache(tmp_path / "cache") / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rejected)["record"]["conversations"][0]["value"] == "日本"

    code, stdout, stderr = run(["inspect", tmp_path / "cache", "--json", "--example", "0"], environment)
    assert code == 0, stderr
    assert "Zoë → 日本" in json.loads(stdout)["target_text"]  # the result is UTF-8 whatever the locale
    code, stdout, stderr = run(["inspect", tmp_path / "cache", "--example", "0"], environment)
    assert code == 0, stderr
    assert b"Traceback" not in stderr
    code, stdout, stderr = run(["train", "--help"], environment)
    assert (code, stderr) == (0, b"")


def test_a_non_ascii_error_is_one_line_in_any_locale() -> None:
    words: list[object] = ["prepare", "--model-name-or-path", "日本", "--data-path", "x", "--output-dir", "y"]
    code, _, stderr = run(words, WINDOWS_1252)
    assert code == 2
    assert stderr.count(b"error:") == len(stderr.splitlines())
    assert b"Traceback" not in stderr


def train(records: Path, output: Path, *flags: object) -> list[object]:
    return [
        *("train", "--model-name-or-path", "pocket", "--data-path", records, "--output-dir", output, "--use-cpu"),
        *("--max-steps", "1", "--report-samples", "0", *flags),
    ]


def write_offloading_config(folder: Path) -> Path:
    """Write a config with which DeepSpeed replaces torch's optimizer with its own."""
    config = read_deepspeed_file("zero2-offload")
    del config["zero_force_ds_cpu_optimizer"]
    (path := folder / "offload.json").write_text(json.dumps(config))
    return path


@pytest.mark.long
@pytest.mark.distributed
def test_deepspeed_compiles_extensions_only_for_its_own_optimizer(records: Path, tmp_path: Path) -> None:
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    empty = {"TORCH_EXTENSIONS_DIR": str(extensions)}
    nothing = {**empty, "PATH": str(tmp_path), "CXX": None}
    for config in ("zero3", "zero2-offload", "zero3-offload"):
        flags = train(records, tmp_path / config, "--deepspeed", config, "--num-processes", "2")
        code, _, stderr = run(flags, nothing)
        assert code == 0, stderr
        assert (tmp_path / config / "adapter_model.safetensors").is_file()
        assert list(extensions.iterdir()) == []
    config = write_offloading_config(tmp_path)
    code, _, stderr = run(train(records, tmp_path / "off", "--deepspeed", config), nothing)
    assert code == 1
    (error,) = [line for line in stderr.decode().splitlines() if line.startswith("error:")]
    assert str(config) in error
    assert "ninja" in error
    assert not (tmp_path / "off").exists()


@pytest.mark.long
def test_deepspeed_trains_where_compiled_extensions_cannot_be_saved(records: Path, tmp_path: Path) -> None:
    # it can't be created, because its parent is a file
    home = {"HOME": str(records / "home"), "XDG_CACHE_HOME": None, "TORCH_EXTENSIONS_DIR": None}
    code, _, stderr = run(train(records, tmp_path / "run", "--deepspeed", "zero3"), home)
    assert code == 0, stderr
    code, _, stderr = run(train(records, tmp_path / "off", "--deepspeed", write_offloading_config(tmp_path)), home)
    assert (code, stderr.count(b"error:")) == (1, 1), stderr
    assert b"set TORCH_EXTENSIONS_DIR" in stderr


@pytest.mark.distributed
def test_a_port_in_use_is_named_in_the_error(records: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **place}
        done = t5tune_in_fork(*train(records, tmp_path / "run"), env=rank)
    assert done.code == 1, done.stderr
    (error,) = done.errors
    assert f"MASTER_PORT: {port}: already in use by another process" in error
    assert "MASTER_PORT=" in error
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.distributed
def test_a_rank_without_a_peer_names_its_address(records: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    done = t5tune_in_fork(*train(records, tmp_path / "run", "--process-group-timeout", "2"), env=rank)
    assert done.code == 1, done.stderr
    (error,) = done.errors
    assert f"rank 1: no answer at localhost:{port}" in error
    assert "MASTER_ADDR" in error


@pytest.mark.distributed
def test_missing_gpus_are_refused_with_the_reason(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    asked = TrainSettings(model_name_or_path="pocket", data_path=str(records), output_dir=tmp_path / "run", num_gpus=4)
    with pytest.raises(SettingsError, match="num_gpus: 4: this machine has 1; use --num-processes for the CPU"):
        check_machine(make_run_plan(asked))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 2021\n")
    monkeypatch.setattr(device, "NVIDIA_DRIVER_FILE", tmp_path / "version")
    with pytest.raises(SettingsError, match=r"torch can't use the NVIDIA driver \(470.82.01\); t5tune doctor"):
        check_machine(make_run_plan(asked))


def test_an_unusable_nvidia_driver_gives_a_warning(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 2021\n")
    monkeypatch.setattr(device, "NVIDIA_DRIVER_FILE", tmp_path / "version")
    notes: list[Note] = []
    values = {"model_name_or_path": "pocket", "data_path": str(records), "output_dir": tmp_path / "run"}
    settings = TrainSettings(**values, max_steps=1, report_samples=0)
    train_in_process(settings, lambda event: notes.append(event) if isinstance(event, Note) else None)
    (told,) = [note for note in notes if "470.82.01" in note.text]
    assert told.warning
    assert "on the CPU" in told.text


def test_an_out_of_memory_error_names_the_batch_size(tmp_path: Path) -> None:
    """The attention scores of 200,000 tokens are a terabyte, an allocation that Linux refuses at once."""
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"source": "a b c d " * 50_000, "target": "e"}))
    done = t5tune_in_fork(*train(path, tmp_path / "run", "--model-max-length", "200000"))
    assert done.code == 1, done.stderr
    (error,) = done.errors
    assert "out of memory: training with per_device_train_batch_size 8 and model_max_length 200000" in error
    assert "; tried to allocate" in error
    assert "t5tune plan --config" in error
    assert "Traceback" not in done.stderr


TRAIN = [
    "train", "--model-name-or-path", "pocket", "--data-path", "pocket", "--max-steps", 4, "--logging-steps", 1,
    "--report-samples", 0, "--use-cpu",
]  # fmt: skip


@pytest.mark.parametrize("place", ["full disk", "closed pipe"])
@pytest.mark.variants("closed pipe")
def test_training_continues_when_its_progress_cannot_be_written(place: str, tmp_path: Path) -> None:
    command = ["-m", "t5tune", *map(str, TRAIN), "--output-dir", str(tmp_path / "run")]
    if place == "full disk" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    read, write = os.pipe()
    stderr = Path("/dev/full") if place == "full disk" else write
    process = get_fork_server().start(command, Path(os.devnull), stderr, os.environ)
    for end in (read, write):
        os.close(end)
    assert process.wait(120) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 4


@pytest.mark.distributed
def test_invalid_rank_variables_are_named_or_ignored(tmp_path: Path) -> None:
    done = t5tune_in_fork("chat", "--model-name-or-path", "pocket", "--prompt", "hello", env={"RANK": "8"})
    assert (done.code, bool(done.stdout.strip())) == (0, True)
    code, output, _ = run(["templates"], {"RANK": "abc", "WORLD_SIZE": "2"})
    assert (code, b"pocket" in output) == (0, True)
    for variables, said in (
        ({"RANK": "0", "WORLD_SIZE": "abc"}, "error: WORLD_SIZE: 'abc' in the environment: expected a whole number"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "error: RANK: 3: must be less than WORLD_SIZE 2, since ranks start at 0"),
    ):
        done = t5tune_in_fork(*TRAIN, "--output-dir", tmp_path / "run", env=variables)
        assert (done.code, done.stderr.startswith(said)) == (2, True), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_errors_are_printed_without_terminal_width_or_stdin() -> None:
    code, _, error = run(["templates", "show", "nothing"], {"COLUMNS": "0"})
    assert (code, b"nothing: no such template" in error) == (2, True)
    command = [sys.executable, "-m", "t5tune", "chat", "--model-name-or-path", "pocket"]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True, timeout=120)
    said = "error: standard input is closed; use --prompt to pass a message"
    assert (done.returncode, done.stderr.strip()) == (2, said)


@pytest.mark.parametrize(
    ("library", "lack"),
    [
        ("psutil", "ModuleNotFoundError(\"No module named 'psutil'\", name='psutil')"),
        ("peft", "ImportError('libsomething.so.12: cannot open shared object file')"),
    ],
)
@pytest.mark.variants(1)
def test_a_missing_or_broken_library_is_named_with_the_fix(library: str, lack: str, tmp_path: Path) -> None:
    (tmp_path / f"{library}.py").write_text(f"raise {lack}")
    code, _, error = run([*TRAIN, "--output-dir", tmp_path / "run"], {"PYTHONPATH": str(tmp_path)})
    assert code == 1
    line = error.decode().splitlines()[-1]
    assert line.startswith(f"error: {library} can't be imported: ")
    assert f"; pip install --force-reinstall {library}; t5tune doctor checks" in line


@pytest.mark.long
@pytest.mark.distributed
def test_modules_in_the_current_folder_do_not_shadow_libraries(tmp_path: Path) -> None:
    for name in ("numpy", "profile", "t5tune"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not for t5tune')")
    command = [sys.executable, "-P", "-m", "t5tune", *map(str, TRAIN), "--output-dir", "run", "--num-processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "run\n"), done.stderr


@pytest.mark.long
def test_settings_can_be_read_from_a_pipe(tmp_path: Path) -> None:
    command = [get_fork_server().scripts / "t5tune", "train", "--config", "/dev/stdin", "--dry-run"]
    settings = f"{{model_name_or_path: pocket, data_path: pocket, output_dir: '{tmp_path / 'run'}', max_steps: 77}}"
    done = subprocess.run(command, input=settings, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "max_steps: 77" in done.stdout) == (0, True), done.stderr


def test_a_foreign_lock_on_the_parent_does_not_block_prepare(records: Path, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # as `flock FOLDER t5tune ...` does
        arguments = ["prepare", "--model-name-or-path", "pocket", "--data-path", records]
        code, _, error = run([*arguments, "--output-dir", tmp_path / "cache"], {})
    finally:
        os.close(descriptor)
    assert code == 0, error


@pytest.mark.parametrize(
    "command", [["templates"], ["templates", "--json"], ["schema", "train"], ["plan", "--config", "pocket"], ["--help"]]
)
@pytest.mark.variants("command0", "command1", "command4")
def test_a_full_disk_for_standard_output_is_reported_once(command: list[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "t5tune", *command]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    told = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert (done.returncode, told) == (1, ["error: standard output: can't be written: No space left on device"])
