"""Prove on one GPU that t5tune computes what it should, or measure its speed and memory.

    python benchmarks/gpu.py --prove --output-dir results     # correctness alone, in nine minutes
    python benchmarks/gpu.py --speed --output-dir results     # speed and memory, the most telling first
    python benchmarks/gpu.py --speed --continue results/speed.json --output-dir results
    python benchmarks/gpu.py --speed --output-dir more --only 'train flan-t5-xl *' doctor
    python benchmarks/gpu.py --prove --list                   # the names

Writes prove.json and prove.md, or speed.json and speed.md, after each measurement. Prints the goals as a table and, at
the end, as a JSON line. Exits with code 1 and the names on stderr if a goal isn't met or a measurement failed. Each
measurement runs in a separate process, with a time limit. A check that isn't possible, because of a missing package or
no time, isn't met; a measurement of speed is skipped, and --continue makes it in a further call.

The training runs for speed are train.py's, with a dropout of 0.1, in bf16. Bases are random, with the published shapes
and the built-in tokenizer, so there is no need for a network. Needs torch, transformers, PEFT, accelerate and the small
dependencies of pyproject.toml; t5tune itself needn't be installed. Uses the first GPU of CUDA_VISIBLE_DEVICES. Without
a GPU, prints an error and exits with code 2; with --tiny, uses tiny shapes, on a CPU too, where goals that need a GPU
are neither met nor not met.
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
import time
import tomllib
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_report import ENVIRONMENT, NO_GPU, format_goals, format_tables, list_unmet, summarize_checks, summarize_speed
from gpu_runner import (
    Limits,
    Measurement,
    Outcome,
    read_outcomes,
    run_all,
    run_in_process,
    to_dict,
    write_json,
    write_text,
)
from sides import select_one_gpu

STARTED = time.monotonic()
REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "numpy", "tokenizers")
MATRIX_SIZE, SMALL_MATRIX = 8192, 512


def measure_environment(_folder: Path, device: str = "cuda", size: int = MATRIX_SIZE) -> dict[str, Any]:
    """Measure the peak of matrix products and of copies, and list the releases."""
    import torch
    from gpu_kernels import measure_milliseconds

    from t5tune.model.device import read_nvidia_driver

    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product = measure_milliseconds(lambda: a @ b, device)
    copy = measure_milliseconds(lambda: b.copy_(a), device)
    result = {
        "gpu": NO_GPU,
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


def find_gpu_in_fork(folder: Path) -> str | None:
    """Return the name of the GPU that a fork of this process sees."""
    found = run_in_process(Measurement("GPU", 0, find_gpu), 120, folder).result or {}
    return found.get("gpu")


def import_libraries() -> None:
    """Import what most measurements need, so that their processes, which are forks, needn't. As t5tune imports it."""
    from t5tune.compat.lazy_imports import import_lazily

    import_lazily(uses_only_t5=True)  # bitsandbytes would use the GPU
    import peft  # noqa: F401
    from transformers import AutoModelForSeq2SeqLM, Trainer  # noqa: F401

    import t5tune.training.run  # noqa: F401


def select(measurements: list[Measurement], patterns: list[str]) -> list[Measurement]:
    """Select the measurements that a pattern matches, such as `train flan-t5-xl *`."""
    for pattern in patterns:
        if not fnmatch.filter([measurement.name for measurement in measurements], pattern):
            sys.exit(f"gpu.py: --only: {pattern}: no such measurement; --list shows the names")
    return [one for one in measurements if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in patterns)]


def list_measurements(options: argparse.Namespace, on_gpu: bool) -> list[Measurement]:
    """List the measurements of a command, the most important first. Imports torch, and this checkout of t5tune."""
    import gpu_lists

    device = "cuda" if on_gpu else "cpu"
    size = SMALL_MATRIX if options.tiny else MATRIX_SIZE
    environment = Measurement(ENVIRONMENT, 15, partial(measure_environment, device=device, size=size))
    if options.prove:
        return [environment, *gpu_lists.list_checks(on_gpu, options.tiny)]
    doctor = Measurement("doctor", 90, measure_doctor, needs_gpu=True)
    return [environment, *gpu_lists.list_speeds(on_gpu, options.tiny), doctor]


def read_finished(path: Path | None, gpu: str | None) -> dict[str, Outcome]:
    """Read the outcomes of an earlier call, except of skipped measurements, by name."""
    if path is None:
        return {}
    outcomes = {outcome.name: outcome for outcome in read_outcomes(path) if outcome.state != "skipped"}
    before = (outcomes[ENVIRONMENT].result or {}).get("gpu") if ENVIRONMENT in outcomes else None
    if before not in (None, gpu or NO_GPU):
        sys.exit(f"gpu.py: --continue: {path}: measured on {before}, and this is {gpu or NO_GPU}")
    return outcomes


def save(output: Path, name: str, outcomes: list[Outcome], summarize: Callable[[list[Outcome]], Any]) -> None:
    """Write the outcomes so far."""
    summary = summarize(outcomes)
    results = {"summary": summary, "measurements": [to_dict(outcome) for outcome in outcomes]}
    write_json(output / f"{name}.json", results)
    write_text(output / f"{name}.md", format_tables(outcomes, summary))


def prepare_environment() -> None:
    """Make the processes see one GPU and this checkout, and use memory as `t5tune` does. Before torch is imported."""
    sys.path.insert(0, str(REPOSITORY))
    from t5tune.model.device import let_gpu_memory_grow

    os.environ |= select_one_gpu()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else CUDA wouldn't work in forks
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    let_gpu_memory_grow()
    # a measurement's processes end with this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def build_parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command = parser.add_mutually_exclusive_group(required=True)
    command.add_argument("--prove", action="store_true", help="check that results are right")
    command.add_argument("--speed", action="store_true", help="measure speed and memory")
    parser.add_argument("--output-dir", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="names, or patterns such as 'train *'")
    parser.add_argument("--minutes", type=float, default=9, help="what doesn't fit in this time is skipped")
    parser.add_argument(
        "--continue",
        dest="earlier",
        type=Path,
        metavar="FILE",
        help="the JSON of an earlier call: make what it skipped",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; runs on a CPU if there is no GPU")
    parser.add_argument("--list", action="store_true", help="show the names of all measurements")
    return parser


def run(options: argparse.Namespace) -> tuple[list[Outcome], dict[str, Any]]:
    """Make the measurements that the options select; return their outcomes, and the summary."""
    name, summarize = ("prove", summarize_checks) if options.prove else ("speed", summarize_speed)
    with tempfile.TemporaryDirectory(prefix="t5tune-gpu-") as folder_name:
        folder = Path(folder_name)
        gpu = find_gpu_in_fork(folder)
        if gpu is None and not options.tiny:
            problem = "this machine has no GPU that torch can use; --tiny tries everything on a CPU"
            print(f"gpu.py: {problem}, and benchmarks/train.py measures training there", file=sys.stderr)
            sys.exit(2)
        import_libraries()
        finished = read_finished(options.earlier, gpu)
        measurements = select(list_measurements(options, gpu is not None), options.only)
        # a fork sees no GPU if a library that was imported has used it
        method = "fork" if gpu is None or find_gpu_in_fork(folder) else "spawn"
        options.output_dir.mkdir(parents=True, exist_ok=True)

        def merge(outcomes: list[Outcome]) -> list[Outcome]:
            known = finished | {outcome.name: outcome for outcome in outcomes}
            return [known.pop(one.name) for one in measurements if one.name in known] + [*known.values()]

        rest = [measurement for measurement in measurements if measurement.name not in finished]
        limits = Limits(gpu is not None, STARTED + 60 * options.minutes, method)
        outcomes = merge(
            run_all(rest, limits, folder, lambda so_far: save(options.output_dir, name, merge(so_far), summarize))
        )
    save(options.output_dir, name, outcomes, summarize)
    return outcomes, summarize(outcomes)


def main() -> None:
    options = build_parser().parse_args()
    prepare_environment()
    if options.list:
        print("\n".join(measurement.name for measurement in list_measurements(options, on_gpu=True)))
        return
    outcomes, summary = run(options)
    print(format_goals(outcomes, summary))
    print(json.dumps({name: summary[name] for name in ("gpu", "goals", "skipped", "failed")}))
    if unmet := list_unmet(summary):
        print(f"gpu.py: not met: {'; '.join(unmet)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
