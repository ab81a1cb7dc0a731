"""Helpers that the benchmarks share: run each side in its own process, measure time and memory, make random bases."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TINY_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TURN = "turn "  # a waiting process prints this and its progress

MEASURED = """
import resource, sys
*arguments, results_file = sys.argv[1:]
{body}
used = resource.getrusage(resource.RUSAGE_SELF)
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
open(results_file, "w").write(f"{{used.ru_utime + used.ru_stime}} {{peak}}")
"""


def select_one_gpu() -> dict[str, str]:
    """Return CUDA_VISIBLE_DEVICES for one GPU: the first that this process sees.

    A single process with several visible GPUs isn't comparable: TrainingArguments counts them all and multiplies the
    batch size by their number.
    """
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def run_script(body: str, arguments: list[Path], results_file: Path, **environment: str) -> dict[str, float]:
    """Run Python code, which finds `arguments` as a list.

    Returns:
        Wall and CPU seconds, start-up included, and peak memory (MB).
    """
    started = time.perf_counter()
    command = [sys.executable, "-c", MEASURED.format(body=body), *map(str, arguments), str(results_file)]
    env = {**os.environ, **select_one_gpu(), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    wall = time.perf_counter() - started
    if done.returncode or not results_file.is_file():
        sys.exit(done.stderr or done.stdout)
    cpu, peak = results_file.read_text().split()
    return {"wall": round(wall, 3), "cpu": round(float(cpu), 3), "peak_mb": round(int(peak) / 1024)}


def run_self(*arguments: Any, **environment: str) -> dict[str, Any]:
    """Run this benchmark again in a new process with these arguments; return the JSON object of its last line."""
    return _run_json([sys.executable, sys.argv[0], *map(str, arguments)], environment)


def run_in_turns(
    arguments: dict[str, list[Any]], environment: dict[str, str], between: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Run this benchmark again in several processes that take turns: the process with the least progress works.

    Each calls `wait_for_turn` before it works, and after each of its steps.

    Args:
        arguments: name -> its process's arguments.
        between: called before each turn, while no process works.

    Returns:
        Name -> the JSON object of its process's last line.
    """
    env = {**os.environ, **select_one_gpu(), **environment}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes, progress, last = dict[str, subprocess.Popen[str]](), dict[str, float](), dict[str, str]()
    try:
        for name, own in arguments.items():
            processes[name] = subprocess.Popen([sys.executable, sys.argv[0], *map(str, own)], env=env, **pipes)
        for name, process in processes.items():
            progress[name], last[name] = _read_until_turn(process)
        while (name := min(progress, key=progress.__getitem__)) and progress[name] < math.inf:
            between()
            print("go", file=processes[name].stdin, flush=True)
            progress[name], last[name] = _read_until_turn(processes[name])
    finally:
        for process in processes.values():
            process.kill()
    return {name: json.loads(line) for name, line in last.items()}


def _read_until_turn(process: "subprocess.Popen[str]") -> tuple[float, str]:
    """Read a process's output until it waits for its turn, or until it has ended.

    Returns:
        Its progress, infinite at its end, and the last line that it printed.
    """
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        if line.startswith(TURN):
            return float(line.removeprefix(TURN)), ""
        last = line
    if process.wait():
        sys.exit(f"{process.args}: exit code {process.returncode}")
    return math.inf, last


def wait_for_turn(progress: float) -> None:
    """Wait until `run_in_turns` says that it is this process's turn.

    Args:
        progress: the share of its work that is done.
    """
    print(f"{TURN}{progress}", flush=True)
    if not sys.stdin.readline():
        sys.exit("the parent process has ended")


def t5tune(*arguments: Any) -> dict[str, Any]:
    """Run a t5tune command and return its JSON result."""
    return _run_json([sys.executable, "-m", "t5tune", *map(str, arguments), "--json", "--quiet"], {})


def read_process_memory(name: str) -> int:
    """Return the resident memory of this process in bytes: VmRSS now, VmHWM at its peak.

    getrusage isn't used, because its peak starts at the size of the parent process.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux's /proc/self/status")


def write_base(folder: Path, config: dict[str, Any], dtype: str = "float32", device: str = "cpu") -> Path:
    """Write a random checkpoint for a config of t5tune.planning.known_configs, with the built-in tokenizer.

    T5's head is untied, T5Gemma 2's is tied, and its vision tower is a tiny one.

    Args:
        device: where its weights are drawn, which takes a large model minutes on a CPU.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    from t5tune.checkpoints.pocket import pocket_folder

    is_tied = config["model_type"] == "t5gemma2"
    values = {**config, "tie_word_embeddings": is_tied, "decoder_start_token_id": 0}
    if is_tied:
        values["encoder"] = {**config["encoder"], "vision_config": TINY_VISION, "mm_tokens_per_image": 4}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=getattr(torch, dtype))
    if not is_tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * config.d_model**-0.5)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": is_tied}))
    for file in pocket_folder().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def _run_json(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    env = {**os.environ, **select_one_gpu(), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
