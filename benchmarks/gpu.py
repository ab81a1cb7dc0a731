"""Measure on one GPU: speed and memory of training, correctness and speed of the kernels, resuming, quantized bases.

    python benchmarks/gpu.py --output-dir results            # in ten minutes, the most important first
    python benchmarks/gpu.py --output-dir results --only 'train flan-t5-xl *' resuming
    python benchmarks/gpu.py --list                          # the names

Writes results/gpu.json and results/gpu.md after each measurement, and prints one JSON line at the end: the goals that
are met, and the measurements that were skipped or failed. Each measurement runs in a separate process, with a time
limit; without a package or enough time, it is skipped, with the reason. The training runs are train.py's, with a
dropout of 0.1, in bf16. Needs torch, transformers, PEFT, accelerate and the small dependencies of pyproject.toml;
t5tune itself needn't be installed. Uses the first GPU of CUDA_VISIBLE_DEVICES. Without a GPU, prints an error and exits
with code 2.
"""

import argparse
import fnmatch
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import tomllib
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_report import format_tables, summarize
from gpu_runner import Measurement, Outcome, run_all, run_in_process, to_dict, write_json, write_text
from sides import select_one_gpu

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "numpy", "tokenizers")
MATRIX_SIZE = 8192
PACKED, TRAINER = "packed", "trainer"
# longest example: tokens of a packed batch, and examples of a padded batch with about the same tokens
BATCHES = {512: {"tokens": 16384, "batch_size": 32}, 2048: {"tokens": 32768, "batch_size": 32}}
STEPS = {512: 13, 2048: 9}  # with 3 for warm-up


def list_measurements() -> list[Measurement]:
    """List all measurements, the most important first."""
    # imports torch, and this checkout of t5tune
    import gpu_training

    def train(size: str, longest: int, way: str, seconds: float) -> Measurement:
        values = {"size": f"google/{size}", "longest": longest, "steps": STEPS[longest], **BATCHES[longest]}
        measure = partial(gpu_training.measure_training, way=way, **values)
        return Measurement(f"train {size} {longest} {way}", seconds, measure)

    xl, large, base, xxl = (f"flan-t5-{size}" for size in ("xl", "large", "base", "xxl"))
    return [
        Measurement("environment", 15, measure_environment),
        Measurement("train t5gemma-2 512 packed", 1, gpu_training.check_t5gemma2),
        *list_kernel_checks(),
        train(xl, 512, PACKED, 40),
        train(xl, 512, TRAINER, 30),
        train(large, 512, PACKED, 30),
        train(large, 512, TRAINER, 20),
        train(xl, 2048, PACKED, 30),
        train(xl, 2048, TRAINER, 40),
        train(base, 512, PACKED, 30),
        train(base, 512, TRAINER, 15),
        *list_resuming(),
        train(xl, 512, "packed, no attention dropout", 30),
        train(xl, 512, "packed, loop", 30),
        train(large, 2048, PACKED, 20),
        train(large, 2048, TRAINER, 20),
        train(base, 2048, PACKED, 15),
        train(base, 2048, TRAINER, 15),
        *list_variants(),
        train(large, 512, "packed, no attention dropout", 20),
        train(large, 512, "packed, loop", 25),
        train(large, 512, "packed, compiled", 40),
        Measurement("doctor", 90, measure_doctor),
        train(xl, 512, "packed, compiled", 40),
        train(xxl, 512, PACKED, 90),
        train(xxl, 512, TRAINER, 90),
    ]


def list_kernel_checks() -> list[Measurement]:
    """List the measurements of single kernels, with the shapes of Flan-T5-xl."""
    import gpu_kernels
    import torch

    from t5tune.model.kernels.flex_check import TIMED_SEGMENTS, AttentionShape

    shape, device = AttentionShape(num_heads=32, head_width=64, max_distance=128, dropout=0.1), "cuda"
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    timed = (TIMED_SEGMENTS, TIMED_SEGMENTS)

    def check(name: str, seconds: float, function: Any, *arguments: Any) -> Measurement:
        return Measurement(name, seconds, partial(ignore_folder, partial(function, *arguments, **options)))

    return [
        check("kernels: attention", 60, gpu_kernels.check_attention, shape, gpu_kernels.CHECKED_LENGTHS),
        check("kernels: attention, time", 40, gpu_kernels.time_attention, shape, timed),
        check("kernels: layers", 15, gpu_kernels.check_layers, "google/flan-t5-xl", 16384),
        check("kernels: loss", 10, gpu_kernels.check_loss, "google/flan-t5-xl", 4096),
        check("kernels: compilations", 30, gpu_kernels.count_compilations, shape, 20, 512),
        check("kernels: cuDNN attention", 20, gpu_kernels.time_cudnn, shape, 2, 512),
    ]


def list_resuming() -> list[Measurement]:
    """List the comparisons of resumed runs with uninterrupted ones."""
    import gpu_training

    values = {"size": "google/flan-t5-base", "longest": 512, "steps": 6, "tokens": 8192}
    resume = partial(gpu_training.measure_resuming, **values)
    deterministic = {"training_args": {"full_determinism": True}}
    paged = {"optim": "paged_adamw_32bit"}
    return [
        Measurement("resuming", 30, partial(resume, changes={})),
        Measurement("resuming, full determinism", 30, partial(resume, changes=deterministic)),
        Measurement("resuming, paged_adamw_32bit", 30, partial(resume, changes=paged, package="bitsandbytes")),
    ]


def list_variants() -> list[Measurement]:
    """List short runs with quantized bases and the like, and the memory of evaluation."""
    import gpu_training

    values = {"size": "google/flan-t5-large", "steps": 6}
    variant = partial(gpu_training.measure_variant, **values, longest=512, **BATCHES[512])
    evaluation = partial(gpu_training.measure_evaluation, **values, longest=2048, **BATCHES[2048])
    nf4, int8 = {"q_lora": True}, {"q_lora": True, "quant_type": "int8"}
    return [
        Measurement("evaluation", 30, evaluation),
        Measurement("DoRA", 20, partial(variant, changes={"use_dora": True})),
        Measurement("NF4", 20, partial(variant, changes=nf4, package="bitsandbytes")),
        Measurement("int8", 20, partial(variant, changes=int8, package="bitsandbytes")),
        Measurement("int8, DoRA", 20, partial(variant, changes=int8 | {"use_dora": True}, package="bitsandbytes")),
        Measurement("DeepSpeed, ZeRO-2", 30, partial(variant, changes={"deepspeed": "zero2"}, package="deepspeed")),
    ]


def ignore_folder(measure: Any, _folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = measure()
    return result


def measure_environment(_folder: Path, device: str = "cuda", size: int = MATRIX_SIZE) -> dict[str, Any]:
    """Measure the peak of matrix products and of copies, and list the releases."""
    import torch
    from gpu_kernels import measure_milliseconds

    from t5tune.model.device import read_nvidia_driver

    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product = measure_milliseconds(lambda: a @ b, device)
    copy = measure_milliseconds(lambda: b.copy_(a), device)
    result = {
        "gpu": "none",
        "driver": read_nvidia_driver(),
        "bf16 TFLOP/s of a matrix product": float(f"{2 * size**3 / product / 1e9:.4g}"),
        "GB/s of a copy": round(2 * 2 * size**2 / copy / 1e6, 1),
        "python": platform.python_version(),
        "CUDA": torch.version.cuda,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {"gpu": properties.name, "memory, MB": properties.total_memory // 10**6}
    return result | read_releases()


def read_releases() -> dict[str, str]:
    """Return the releases of the packages, and say which are older than pyproject.toml asks for."""
    from t5tune.compat.requirements import is_older

    lines = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    oldest = dict(line.partition(";")[0].strip().split(">=") for line in lines)
    releases = {}
    for package in PACKAGES:
        try:
            release = version(package)
        except PackageNotFoundError:
            releases[package] = "not installed"
            continue
        is_old = package in oldest and is_older(release, oldest[package])
        releases[package] = f"{release} (t5tune needs {oldest[package]})" if is_old else release
    return releases


def measure_doctor(_folder: Path) -> dict[str, Any]:
    """Run `t5tune doctor`."""
    command = [sys.executable, "-m", "t5tune", "doctor", "--json"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False
    )  # it exits with 1 if training can't work
    diagnosis = json.loads(done.stdout)
    findings = {finding.pop("check"): finding for finding in diagnosis["findings"]}
    return {"ok": diagnosis["ok"], **findings}


def find_gpu(_folder: Path) -> dict[str, Any]:
    """Return the name of the GPU, or None. The process that starts the measurements must not ask for it itself."""
    import torch

    return {"gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None}


def sees_gpu(folder: Path) -> bool:
    """Whether a fork of this process sees a GPU."""
    found = run_in_process(Measurement("GPU", 0, find_gpu), 120, folder).result or {}
    return found.get("gpu") is not None


def import_libraries() -> None:
    """Import what most measurements need, so that their processes, which are forks, needn't."""
    import peft  # noqa: F401
    from transformers import AutoModelForSeq2SeqLM, Trainer  # noqa: F401

    import t5tune.training.run  # noqa: F401


def select(measurements: list[Measurement], patterns: list[str]) -> list[Measurement]:
    """Select the measurements that a pattern matches, such as `train flan-t5-xl *`."""
    for pattern in patterns:
        if not fnmatch.filter([measurement.name for measurement in measurements], pattern):
            sys.exit(f"gpu.py: --only: {pattern}: no such measurement; --list shows the names")
    return [one for one in measurements if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in patterns)]


def save(output: Path, outcomes: list[Outcome]) -> None:
    """Write the outcomes so far."""
    summary = summarize(outcomes)
    write_json(output / "gpu.json", {"summary": summary, "measurements": [to_dict(outcome) for outcome in outcomes]})
    write_text(output / "gpu.md", format_tables(outcomes, summary))


def prepare_environment() -> None:
    """Make the processes see one GPU and this checkout, and use memory as `t5tune` does. Before torch is imported."""
    sys.path.insert(0, str(REPOSITORY))
    from t5tune.model.device import let_gpu_memory_grow

    os.environ |= select_one_gpu()
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    let_gpu_memory_grow()
    # a measurement's processes end with this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def build_parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("gpu-results"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="names, or patterns such as 'train *'")
    parser.add_argument("--minutes", type=float, default=10, help="what doesn't fit in this time is skipped")
    parser.add_argument("--list", action="store_true", help="show the names of all measurements")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    prepare_environment()
    if options.list:
        print("\n".join(measurement.name for measurement in list_measurements()))
        return
    with tempfile.TemporaryDirectory(prefix="t5tune-gpu-") as name:
        folder = Path(name)
        if not sees_gpu(folder):
            print(
                "gpu.py: this machine has no GPU that torch can use; benchmarks/train.py runs on CPUs", file=sys.stderr
            )
            sys.exit(2)
        import_libraries()
        measurements = select(list_measurements(), options.only)
        # a fork sees no GPU if a library that was imported has used it, as bitsandbytes does
        method = "fork" if sees_gpu(folder) else "spawn"
        options.output_dir.mkdir(parents=True, exist_ok=True)
        outcomes = run_all(measurements, options.minutes, folder, partial(save, options.output_dir), method)
    summary = summarize(outcomes)
    print(json.dumps({name: summary[name] for name in ("gpu", "goals", "skipped", "failed")}))


if __name__ == "__main__":
    main()
