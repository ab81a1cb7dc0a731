"""Run each example's script at a small size (the built-in model, a few steps), and its data generator."""

import filecmp
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from t5tune.commands.prepare import prepare
from t5tune.settings import PrepareSettings
from tests.support.paths import REPOSITORY
from tests.support.processes.forks import get_fork_server

pytestmark = pytest.mark.slow

EXAMPLES = REPOSITORY / "examples"
GENERATE = EXAMPLES / "pocket" / "generate.py"
SMALL = {"MODEL": "pocket", "T5TUNE_MAX_STEPS": "2", "T5TUNE_VERIFY": "false", "T5TUNE_REPORT_SAMPLES": "2"}
SHORT_REPLIES = {"T5TUNE_MAX_NEW_TOKENS": "4"}
# quickstart.py starts `sys.executable -m t5tune`
IN_FORKS = """
import runpy, sys
sys.executable = sys.argv[1]
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script: str, output: Path, *flags: str, **variables: str) -> str:
    """Run an example, and return what it printed on stdout."""
    path = f"{get_fork_server().scripts}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [EXAMPLES / script / "run.sh", *flags],
        env={**os.environ, **SMALL, "PATH": path, "OUTPUT": str(output), **variables},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("name", ["summarize", "extract", "tag"])
def test_an_example_trains_evaluates_and_merges(name: str, tmp_path: Path) -> None:
    # tag's model predicts labels, and writes no text
    run(name, tmp_path, **({} if name == "tag" else SHORT_REPLIES))
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert len((tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()) == 60


@pytest.mark.parametrize(("name", "kind"), [("summarize", "csv"), ("extract", "jsonl"), ("tag", "jsonl")])
def test_the_data_of_an_example_is_what_its_generator_writes(name: str, kind: str, tmp_path: Path) -> None:
    for seed, num, split in (("0", "300", "train"), ("1", "60", "heldout")):
        output = tmp_path / f"{split}.{kind}"
        command = [sys.executable, EXAMPLES / name / "generate.py", "--seed", seed, "--num", num, "--output", output]
        subprocess.run(command, check=True)
        assert output.read_bytes() == (EXAMPLES / name / output.name).read_bytes()


def test_the_fastchat_example_runs_on_the_data_of_fastchat(tmp_path: Path, shared: Callable[[str], Path]) -> None:
    data = shared("data/conversations/fastchat_dummy_conversation.json")
    run(
        "fastchat",
        tmp_path,
        "--no-bf16",
        "--model-max-length",
        "128",
        "--gradient-accumulation-steps",
        "1",
        DATA=str(data),
    )
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.long
def test_the_xxl_example_trains_in_four_bits_and_exports(tmp_path: Path, conversations: Path) -> None:
    run("flan-t5-xxl-24gb", tmp_path, "--gradient-accumulation-steps", "1", DATA=str(conversations))
    assert "q_lora: true" in (tmp_path / "run" / "settings.yaml").read_text()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.distributed
@pytest.mark.long
def test_the_zero3_example_runs_on_two_processes(tmp_path: Path, conversations: Path) -> None:
    flags = ("--no-bf16", "--gradient-accumulation-steps", "1")
    run("zero3", tmp_path, *flags, DATA=str(conversations), PROCESSES="--num-processes 2")
    assert "deepspeed: zero3" in (tmp_path / "run" / "settings.yaml").read_text()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


# stand-ins: a job array whose tasks run one after the other, and a step with two tasks
SBATCH = """#!/bin/sh
range=${1#--array=}
shift
export SLURM_ARRAY_TASK_MIN=${range%-*} SLURM_ARRAY_TASK_MAX=${range#*-} SLURM_ARRAY_TASK_STEP=1 SLURM_CPUS_PER_TASK=1
export SLURM_ARRAY_TASK_COUNT=$((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1))
for SLURM_ARRAY_TASK_ID in $(seq "$SLURM_ARRAY_TASK_MIN" "$SLURM_ARRAY_TASK_MAX"); do
    SLURM_ARRAY_TASK_ID=$SLURM_ARRAY_TASK_ID bash "$@" || exit
done
"""
SRUN = """#!/bin/sh
while [ "$1" != t5tune ]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_LOCALID=0
SLURM_PROCID=0 "$@" && SLURM_PROCID=1 "$@"
"""
MANY_NODES = EXAMPLES / "prepare-many-nodes"


def prepare_in_parts(tmp_path: Path, data: Path, *command: object) -> str:
    """Start the parts, check that the cache equals the cache of one process, and return what was printed on stderr."""
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join(map(str, (tmp_path, get_fork_server().scripts, Path(sys.executable).parent)))
    flags = ["--model-name-or-path=pocket", f"--data-path={data}", "--num-workers=1", "--dedupe=exact"]
    done = subprocess.run(
        [*map(str, command), *flags, f"--output-dir={tmp_path / 'cache'}"],
        env={**os.environ, "HOME": str(tmp_path), "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    values = {"model_name_or_path": "pocket", "data_path": str(data), "num_workers": 1, "dedupe": "exact"}
    prepare(PrepareSettings(**values, output_dir=tmp_path / "one"))
    names = [file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file()]
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "cache", names, shallow=False)[0] == names
    assert not list(tmp_path.glob("*.parts"))
    return done.stderr


def test_a_job_array_prepares_data_in_parts(tmp_path: Path, conversations: Path) -> None:
    log = prepare_in_parts(tmp_path, conversations, "sbatch", "--array=3-5", MANY_NODES / "array.sbatch")
    assert "part 0/3 is complete" in log
    assert "part 1/3 is complete" in log


def test_srun_prepares_data_in_parts(tmp_path: Path, conversations: Path) -> None:
    log = prepare_in_parts(tmp_path, conversations, "srun", "--nodes=2", "t5tune", "prepare", "--shard=auto")
    assert "part 0/2 is complete" in log


@pytest.mark.distributed
def test_torchrun_prepares_data_in_parts(tmp_path: Path, conversations: Path) -> None:
    log = prepare_in_parts(tmp_path, conversations, "env", "PROCESSES_PER_NODE=2", MANY_NODES / "torchrun.sh")
    # the first process says that its part is complete; if both end together, both join, and say which part they had
    assert re.search("(part|shard) +[01]/2", log)


KILL_ONCE = """
import os, signal, sys
if "1/3" in sys.orig_argv:
    try:
        os.mkdir({killed!r})
        os.kill(os.getpid(), signal.SIGKILL)
    except FileExistsError:
        pass
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray isn't installed: pip install 't5tune[ray]'")
def test_ray_prepares_parts_and_repeats_a_killed_part(
    tmp_path: Path, conversations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"
    (tmp_path / "sitecustomize.py").write_text(KILL_ONCE.format(killed=str(killed)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    prepare_in_parts(tmp_path, conversations, sys.executable, MANY_NODES / "ray_tasks.py", "3")
    assert killed.is_dir()


def test_quickstart_runs_all_commands_and_shows_their_results(tmp_path: Path) -> None:
    script = REPOSITORY / "examples" / "quickstart" / "quickstart.py"
    half_made = tmp_path / "quickstart" / "before" / "predictions.jsonl"
    half_made.parent.mkdir(parents=True)
    half_made.write_text("")
    done = subprocess.run(
        [
            *(sys.executable, "-c", IN_FORKS, get_fork_server().scripts / "python", script),
            *("--output-dir", tmp_path / "quickstart", "--max-steps", "3"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "T5TUNE_MAX_NEW_TOKENS": "4", "T5TUNE_NUM_DATA": "20", "T5TUNE_REPORT_SAMPLES": "2"},
    )
    assert done.returncode == 0, done.stderr
    assert f"resuming the interrupted quickstart in {tmp_path / 'quickstart'}" in done.stderr
    for word in ("token cache", "run", "adapter", "merged model", "exact match", "before", "after", "you:", "model:"):
        assert word in done.stdout
    assert f"next          t5tune chat {tmp_path / 'quickstart' / 'merged'}\n" in done.stdout
    assert f"report        {tmp_path / 'quickstart' / 'run' / 'report.html'}\n" in done.stdout
    assert (tmp_path / "quickstart" / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(("split", "num"), [("train", 400), ("heldout", 200)])
def test_quickstart_data_is_what_its_generator_writes(split: str, num: int, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    subprocess.run([sys.executable, GENERATE, "--split", split, "--num", str(num), "--output", output], check=True)
    assert output.read_bytes() == (REPOSITORY / "examples" / "quickstart" / f"{split}.jsonl").read_bytes()


def test_quickstart_splits_share_no_conversation() -> None:
    train, held_out = (
        {json.dumps(json.loads(line)["conversations"]) for line in path.read_text().splitlines()}
        for path in (REPOSITORY / "examples" / "quickstart" / f"{name}.jsonl" for name in ("train", "heldout"))
    )
    assert len(train) == 400
    assert len(held_out) == 200
    assert not train & held_out
