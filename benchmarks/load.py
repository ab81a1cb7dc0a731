"""Compare the memory of a base: loaded in 4 bits, with transformers; on ranks under ZeRO-3, with one process.

    python benchmarks/load.py                       # the shape of Flan-T5-large, random weights, 4 bits, on the CPU
    python benchmarks/load.py --shape xl --dtype float32
    python benchmarks/load.py --ranks 2 4           # in bf16, partitioned among 2 and among 4 ranks
    python benchmarks/load.py --ranks 2 4 --shape xxl-wide
    python benchmarks/load.py --ranks 2 4 --train lora nf4 full     # training steps after loading

Writes the weights tensor by tensor to a temporary folder, loads them each way in its own process, and prints one JSON
line: seconds, bytes of the parameters, and the increase of the peak resident memory (VmHWM) over the resident memory
after the imports. Under ZeRO-3 each rank has its own, and `over_share` is its memory without its share of the base,
as a multiple of the largest tensor. With `--train`, the command `train` runs instead, and the result is the peak of
each rank's private memory (in MB, libraries included) and the median of tokens per second, without the first two
steps, when DeepSpeed records the order of the modules.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from sides import read_process_memory, run_self

from t5tune.checkpoints.pocket import pocket_folder
from t5tune.checkpoints.tensor_files.safetensors import build_header
from t5tune.distributed.launcher import find_free_port
from t5tune.runs.metrics_log import read_metrics

SHAPES: dict[str, dict[str, int]] = {  # of Flan-T5
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "xxl-wide": {"d_model": 4096, "d_ff": 10240, "num_layers": 2, "num_heads": 64},  # XXL has 24 such layers
}
WAYS: dict[str, list[str]] = {"lora": [], "nf4": ["--q-lora"], "full": ["--train-mode", "full"]}
STEPS, WARMUP_STEPS, SAMPLE_SECONDS = 5, 2, 0.02
STORED = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}


def write_base(folder: Path, shape: str, dtype: str) -> int:
    """Write a random checkpoint of that shape, with one tensor in memory at a time; return its size in bytes."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        **SHAPES[shape],
        d_kv=64,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    name, size = STORED[dtype]
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()} | {
        "lm_head.weight": tuple(model.shared.weight.shape)
    }
    entries = {key: (name, shapes[key]) for key in sorted(shapes)}
    rng = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(build_header(entries, {"format": "pt"}))
        for _, (_, dimensions) in entries.items():
            values = rng.standard_normal(dimensions, np.float32) * np.float32(dimensions[-1] ** -0.5)
            file.write((values if size == 4 else (values.view(np.uint32) >> 16).astype(np.uint16)).tobytes())
        return file.tell()


def load_partition(folder: Path) -> dict[str, Any]:
    """Load this rank's partition of the base and measure; runs in its own process. Without ranks, load all of it."""
    import torch

    from t5tune.compat.deepspeed_patches import import_deepspeed
    from t5tune.model.device import return_freed_memory
    from t5tune.model.load import load_base
    from t5tune.model.zero3 import Zero3Partitioner

    return_freed_memory()  # as train does on CPUs
    partitioner = None
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        import_deepspeed(on_cpu=True).init_distributed(verbose=False)
        partitioner = Zero3Partitioner({"zero_optimization": {"stage": 3}}, torch.bfloat16)
    load_base(pocket_folder(), torch.bfloat16, torch.device("cpu"))  # imports what loading needs
    imported = read_process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    model = load_base(folder, torch.bfloat16, torch.device("cpu"), partitioner=partitioner)
    seconds = time.perf_counter() - started
    parameters = list(model.parameters())
    return {
        "seconds": round(seconds, 1),
        "parameter_bytes": sum(2 * getattr(value, "ds_numel", value.numel()) for value in parameters),
        "largest_bytes": max(2 * getattr(value, "ds_numel", value.numel()) for value in parameters),
        "peak_bytes": read_process_memory("VmHWM") - imported,
    }


def load_on_ranks(folder: Path, count: int) -> dict[str, Any]:
    """Load the base partitioned among ranks, each in its own process; return the largest of their values."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(find_free_port())}
    command = [sys.executable, sys.argv[0], "--way", "partition", "--folder", str(folder)]
    ranks = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(count)
    ]
    found = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
    largest, whole = found[0]["largest_bytes"], found[0]["parameter_bytes"]
    return {
        "seconds": max(each["seconds"] for each in found),
        "peak_bytes": [each["peak_bytes"] for each in found],
        "over_share": [round((each["peak_bytes"] - whole / count) / largest, 2) for each in found],
    }


def train_on_ranks(base: Path, count: int, way: str, deepspeed: str) -> dict[str, Any]:
    """Train a few steps, with one short example per step and rank, and sample the private memory of each rank."""
    for file in pocket_folder().glob("tokenizer*"):
        shutil.copy(file, base)
    turns = [{"from": "human", "value": "six coffees and six teas, please"}, {"from": "gpt", "value": "six of each"}]
    data, run = base.parent / "data.json", base.parent / "run"
    data.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(count * STEPS)]))
    options = [*WAYS[way], "--bf16", "--max-steps", STEPS, "--per-device-train-batch-size", 1, "--logging-steps", 1]
    options += ["--save-strategy", "no", "--report-samples", 0]
    options += ["--num-processes", count, "--deepspeed", deepspeed] if count > 1 else []
    paths = ["--model-name-or-path", base, "--data-path", data, "--output-dir", run, "--fresh"]
    command = [sys.executable, "-m", "t5tune", "train", *paths, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(base.parent / "log", "w+b") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
        peaks: dict[int, int] = {}
        while process.poll() is None:
            for pid in (process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))):
                peaks[pid] = max(peaks.get(pid, 0), read_private_memory(pid))
            time.sleep(SAMPLE_SECONDS)
        if process.returncode:
            sys.exit((base.parent / "log").read_text())
    speeds = [line["tokens_per_second"] for line in read_metrics(run) if "tokens_per_second" in line]
    return {
        "peak_mb": sorted((peak // 10**6 for peak in peaks.values()), reverse=True)[:count],
        "tokens_per_second": median(speeds[WARMUP_STEPS:STEPS]),
    }


def read_private_memory(pid: int) -> int:
    """Return the bytes that only this process uses; 0 if it has ended."""
    try:
        return psutil.Process(pid).memory_full_info().uss
    except psutil.Error:
        return 0


def load(way: str, folder: Path) -> dict[str, Any]:
    """Load the base and measure; runs in its own process."""
    import bitsandbytes  # noqa: F401
    import torch
    from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig, T5ForConditionalGeneration  # noqa: F401

    from t5tune.model.load import load_base
    from t5tune.settings import QuantizationSettings

    imported = read_process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, whose value so far comes from the imports
    started = time.perf_counter()
    if way == "t5tune":
        model = load_base(folder, torch.bfloat16, torch.device("cpu"), QuantizationSettings(q_lora=True))
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options = {"quantization_config": quantization, "dtype": torch.bfloat16, "device_map": "cpu"}
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, **options)
    seconds = time.perf_counter() - started
    parameters = {value.data_ptr(): value.numel() * value.element_size() for value in model.parameters()}
    kinds = {type(value).__name__ for name, value in model.named_parameters() if name.endswith(".wo.weight")}
    return {
        "seconds": round(seconds, 1),
        "parameter_bytes": sum(parameters.values()),
        "peak_bytes": read_process_memory("VmHWM") - imported,
        "wo_in_4_bits": kinds == {"Params4bit"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="large")
    parser.add_argument("--dtype", choices=list(STORED), default="bfloat16", help="dtype of the file")
    parser.add_argument("--ranks", type=int, nargs="+", help="measure ZeRO-3 on these numbers of ranks")
    parser.add_argument("--train", choices=list(WAYS), nargs="+", help="train some steps in these ways")
    parser.add_argument("--deepspeed", default="zero3", help="DeepSpeed config for --train")
    parser.add_argument("--way", choices=["t5tune", "transformers", "partition"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        partition = options.way == "partition"
        print(json.dumps(load_partition(options.folder) if partition else load(options.way, options.folder)))
        return
    results: dict[str, Any] = {"shape": options.shape, "file_dtype": options.dtype}
    with tempfile.TemporaryDirectory(prefix="t5tune-load-") as temporary:
        folder = Path(temporary) / "base"
        folder.mkdir()
        results["file_bytes"] = write_base(folder, options.shape, options.dtype)
        if options.train:
            for way in options.train:
                for count in options.ranks or [1]:
                    results[f"{way}, {count} ranks"] = train_on_ranks(folder, count, way, options.deepspeed)
            print(json.dumps(results))
            return
        if options.ranks:
            results["one process"] = run_self("--way", "partition", "--folder", folder)
            for count in options.ranks:
                results[f"{count} ranks"] = load_on_ranks(folder, count)
            print(json.dumps(results))
            return
        for way in ("t5tune", "transformers"):
            results[way] = run_self("--way", way, "--folder", folder)
    results["peak_over_parameters"] = round(results["t5tune"]["peak_bytes"] / results["t5tune"]["parameter_bytes"], 2)
    results["peak_of_transformers"] = round(results["transformers"]["peak_bytes"] / results["t5tune"]["peak_bytes"], 2)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
