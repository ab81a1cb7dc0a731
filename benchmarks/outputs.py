"""Hash everything that short runs of all commands write, to compare two versions of the code bit by bit.

    python benchmarks/outputs.py record before.json           # with the code of this checkout
    python benchmarks/outputs.py record after.json --code ../other-checkout
    python benchmarks/outputs.py compare before.json after.json

A change that isn't meant to change any result must leave all hashes as they are. All commands run twice, and values
that differ between the two (times, memory, paths of temporary files) are left out; `--times 1` is enough for the second
file. Hashes depend on the processor and the versions of the libraries, so compare them on one machine.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
TRAINING = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "learning_rate": 0.01, "lora_dropout": 0.1,
            "per_device_train_batch_size": 4, "model_max_length": 96, "num_data": 120, "use_cpu": True}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"eval_fraction": 0.1, "eval_steps": 3, "eval_generate": 4, "report_samples": 2},
    "padded": {"packing": "off", "group_by_length": True, "label_smoothing_factor": 0.1},
    "budget": {"tokens_per_batch": 400, "gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True, "bf16": True},
    "qlora": {"q_lora": True},
    "dora": {"use_dora": True, "lora_target_modules": ["q", "v", "wo"]},
    "pissa": {"init_lora_weights": "pissa", "add_tokens": ["none"]},
    "loraplus": {"loraplus_lr_ratio": 4.0},
    "full": {"train_mode": "full", "learning_rate": 0.001},
    "early": {"eval_fraction": 0.1, "eval_steps": 2, "early_stopping_patience": 1, "max_steps": 12, "save_steps": 2},
    "zero0": {"deepspeed": "zero0"},
    "zero2": {"deepspeed": "zero2", "bf16": True},
    "zero3": {"deepspeed": "zero3", "eval_fraction": 0.1, "eval_steps": 3, "eval_generate": 4},
    "two-ranks": {"num_processes": 2, "eval_fraction": 0.1, "eval_steps": 3, "eval_generate": 4},
    "zero3-two-ranks": {"num_processes": 2, "deepspeed": "zero3", "bf16": True, "use_dora": True},
    "zero2-two-ranks-full": {"num_processes": 2, "deepspeed": "zero2", "train_mode": "full", "learning_rate": 0.001},
}
EXPORTS = {
    "default": ["zero3-two-ranks"],
    "full": ["zero3-two-ranks", "--non-lora-state", "full"],
    "bin": ["zero2", "--format", "bin", "--dtype", "float16"],
    "stage3": ["zero3", "--non-lora-state", "trained"],
}
MERGES = {
    "plain": ["lora"],
    "rounded": ["lora", "--dtype", "bfloat16", "--max-shard-size", "100KB"],
    "nf4": ["qlora", "--onto", "nf4"],
    "dora": ["dora"],
    "two": ["lora", "loraplus", "--weights", "0.5", "0.25"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record", help="run everything and write the hashes")
    recording.add_argument("hashes", type=Path)
    recording.add_argument("--times", type=int, default=2, help="keep values that are equal in all N runs; default 2")
    recording.add_argument("--code", type=Path, default=REPOSITORY, help="checkout whose package is run")
    recording.set_defaults(run=lambda given: record(given.hashes, given.code.resolve(), given.times))
    comparing = commands.add_parser("compare", help="list what differs between two files of hashes")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.set_defaults(run=lambda given: compare(given.before, given.after))
    given = parser.parse_args()
    given.run(given)


def record(hashes: Path, code: Path, times: int) -> None:
    """Write the hashes of the files and results that don't differ between executions."""
    folder = Path(tempfile.gettempdir(), "t5tune-outputs")  # always the same path: some files contain it
    found = []
    for _ in range(times):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        found.append(run_all(folder, code))
    shutil.rmtree(folder)
    same = {name: value for name, value in found[0].items() if all(other.get(name) == value for other in found)}
    hashes.write_text(json.dumps(same, indent=1, sort_keys=True) + "\n")
    print(json.dumps({"recorded": len(same), "differing": sorted(found[0].keys() - same.keys())}))


def compare(before: Path, after: Path) -> None:
    """Print the names whose hashes differ or that only one file has, and exit with 1 if there are any."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    different = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    result = {"same": len(old.keys() & new.keys()) - len(different), "different": different,
              "missing": sorted(old.keys() - new.keys()), "new": sorted(new.keys() - old.keys())}  # fmt: skip
    print(json.dumps(result, indent=1))
    sys.exit(bool(different or result["missing"]))


def run_all(folder: Path, code: Path) -> dict[str, str]:
    """Run all commands in `folder`, two at a time, and hash their outputs."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.support.models.bases import make_base

    make_base(folder / "base", tied=False, d_model=64, num_layers=3)
    lines = (REPOSITORY / "examples" / "quickstart" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "data.jsonl").write_text("".join(lines[:150]) + "broken\n")
    (folder / "heldout.jsonl").write_text("".join(lines[150:180]))
    found: dict[str, str] = {}

    def run(name: str, *arguments: Any) -> None:
        found[f"{name}: result"] = describe_result(t5tune(folder, code, *arguments, "--json", "--quiet"))

    def train(name: str) -> None:
        flags = make_flags({**TRAINING, **RUNS[name]})
        command = ["train", "--model-name-or-path", "base", "--data-path", "data.jsonl", "--max-rejected-fraction", "1",
                   "--output-dir", name, *flags]  # fmt: skip
        run(name, *command)
        # a second process continues a copy of the run from the middle
        resumed = folder / f"{name}-resumed"
        shutil.copytree(folder / name, resumed, ignore=shutil.ignore_patterns("checkpoint-*", "result.json"))
        first = min((folder / name).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        shutil.copytree(first, resumed / first.name)
        run(f"{name}-resumed", *command[: -len(flags) - 1], resumed.name, *flags)

    def export(name: str) -> None:
        checkpoint, *flags = EXPORTS[name]
        run(f"export-{name}", "export", checkpoint, "--output-dir", f"export-{name}", *flags)

    def merge(name: str) -> None:
        adapters = [word for word in MERGES[name] if word in RUNS]
        flags = MERGES[name][len(adapters) :]
        base = ["--model-name-or-path", "base", "--adapter", *adapters]
        run(f"merge-{name}", "merge", *base, "--output-dir", f"merge-{name}", *flags)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, RUNS))
        list(pool.map(export, EXPORTS))
        list(pool.map(merge, MERGES))
    run("prepare", "prepare", "--data-path", "data.jsonl", "--model-name-or-path", "base", "--output-dir", "cache",
        "--max-rejected-fraction", "1", "--eval-fraction", "0.1")  # fmt: skip
    run("chat", "chat", "--model-name-or-path", "base", "--adapter", "lora", "--prompt", "Hello", "--max-new-tokens", 8)
    run("evaluate", "evaluate", "--model-name-or-path", "base", "--adapter", "lora", "--data-path", "heldout.jsonl",
        "--output-dir", "evaluation", "--num-data", 20, "--max-new-tokens", 8)  # fmt: skip
    run("inspect", "inspect", "cache", "--example", "1")
    run("plan", "plan", "--model-name-or-path", "base", "--data-path", "cache", "--use-cpu")
    run("dry-run", "train", "--config", "lora/settings.yaml", "--dry-run")
    return found | hash_files(folder)


def t5tune(folder: Path, code: Path, *arguments: Any) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "t5tune", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def make_flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        flags.append(f"--{name.replace('_', '-')}")
        if value is not True:
            flags += map(str, value if isinstance(value, list) else [value])
    return flags


def describe_result(result: dict[str, Any]) -> str:
    """Return the keys of a result, and its values that aren't measured."""
    measured = {"seconds", "tokens_per_second", "bytes_per_second", "stages", "suggestion"}
    measured |= {"peak_memory_bytes", "peak_reserved_bytes"}
    return json.dumps({name: None if name in measured else value for name, value in result.items()}, sort_keys=True)


def hash_files(folder: Path) -> dict[str, str]:
    """Hash each file; of metrics.jsonl and manifests of checkpoints only what isn't measured."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name, data = str(path.relative_to(folder)), path.read_bytes()
            if path.name == "metrics.jsonl":
                data = json.dumps([drop_measured(json.loads(line)) for line in data.splitlines()]).encode()
            elif path.name == "t5tune_manifest.json":
                data = json.dumps({**json.loads(data), "files": None, "sha256": None}).encode()
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def drop_measured(line: dict[str, Any]) -> dict[str, Any]:
    measured = ("time", "tokens_per_second", "peak_memory_bytes", "peak_reserved_bytes", "_runtime", "_per_second")
    return {name: value for name, value in line.items() if not name.endswith(measured)}


if __name__ == "__main__":
    main()
