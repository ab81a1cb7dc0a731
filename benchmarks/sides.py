"""What the benchmarks share: sides in processes of their own, their time and memory, and random bases to run on."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MEASURED = """
import resource, sys
*arguments, figures = sys.argv[1:]
{body}
used = resource.getrusage(resource.RUSAGE_SELF)
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
open(figures, "w").write(f"{{used.ru_utime + used.ru_stime}} {{peak}}")
"""


def one_gpu() -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for one GPU: the first of those that this process sees.

    A single process with several visible GPUs isn't a fair side: TrainingArguments counts them all, and multiplies the
    batch by their number.
    """
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def run_script(body: str, arguments: list[Path], figures: Path, **environment: str) -> dict[str, float]:
    """Run Python that finds its `arguments`; wall and CPU seconds, start-up included, and peak memory (MB)."""
    started = time.perf_counter()
    command = [sys.executable, "-c", MEASURED.format(body=body), *map(str, arguments), str(figures)]
    everything = {**os.environ, **one_gpu(), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=everything, check=False)
    wall = time.perf_counter() - started
    if done.returncode or not figures.is_file():
        sys.exit(done.stderr or done.stdout)
    cpu, peak = figures.read_text().split()
    return {"wall": round(wall, 3), "cpu": round(float(cpu), 3), "peak_mb": round(int(peak) / 1024)}


def run_self(*arguments: Any, **environment: str) -> dict[str, Any]:
    """Run this benchmark once more with these arguments; the JSON object of its last line."""
    return _json_of([sys.executable, sys.argv[0], *map(str, arguments)], environment)


def t5tune(*arguments: Any) -> dict[str, Any]:
    """Run a command of t5tune; its result."""
    return _json_of([sys.executable, "-m", "t5tune", *map(str, arguments), "--json", "--quiet"], {})


def memory_of_process(name: str) -> int:
    """Bytes of this process: VmRSS what it holds, VmHWM its peak. getrusage's begins at its parent's size."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux's /proc/self/status")


def write_base(folder: Path, config: dict[str, Any]) -> Path:
    """A random checkpoint of a shape of t5tune.model.known_configs, its head untied, with the built-in tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    from t5tune.checkpoints.pocket import pocket_folder

    values = {**config, "tie_word_embeddings": False, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * config.d_model**-0.5)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": False}))
    for file in pocket_folder().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def _json_of(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    everything = {**os.environ, **one_gpu(), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=everything, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
