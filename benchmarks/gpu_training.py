"""Measure training runs on a GPU: speed and memory, variants, resuming, and the memory of evaluation.

Bases and token caches are made by the first measurement that needs them.
"""

import argparse
import gc
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from gpu_runner import Skipped
from safetensors import safe_open
from safetensors.torch import load_file
from sides import write_base
from train import (
    STOCK_WAYS,
    add_share_of_peak,
    build_parser,
    make_config,
    make_settings,
    run_ours,
    run_stock,
    write_conversations,
)

from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.errors import OutOfMemory, Stopped
from t5tune.file_names import ADAPTER_WEIGHTS_FILE
from t5tune.model.device import choose_device, get_peak_memory, get_reserved_memory
from t5tune.progress import Advanced, Event, Note, Started
from t5tune.settings import PrepareSettings

NUM_CONVERSATIONS = 2000
SIZE_DIVISORS = (1, 2, 4, 8)  # of a batch that doesn't fit in memory
OUR_SETTINGS: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed, no attention dropout": {"attention_dropout": False},
    "packed, loop": {"packed_attention": "loop"},
    "packed, compiled": {"torch_compile": True},
}
COPIES = ("Memcpy", "Memset")  # work of a GPU other than kernels


def measure_training(folder: Path, way: str, **values: Any) -> dict[str, Any]:
    """Measure the speed and memory of one of OUR_SETTINGS or of STOCK_WAYS.

    Args:
        values: options of train.py.
    """
    options = set_up(folder, **values)
    is_ours = way in OUR_SETTINGS

    def run(divisor: int) -> dict[str, Any]:
        options.on_end = profiler = StepProfiler(options.on_gpu)
        run_folder = make_run_folder(options)
        if is_ours:
            changed = argparse.Namespace(**{**vars(options), "tokens": options.tokens // divisor})
            measured = run_ours(changed, run_folder, "on", **OUR_SETTINGS[way])
            batch = f"{changed.tokens:,} tokens"
        else:
            changed = argparse.Namespace(**{**vars(options), "batch_size": options.batch_size // divisor})
            measured = run_stock(changed, STOCK_WAYS[way], run_folder)
            batch = f"{changed.batch_size} examples"
        parameters = count_parameters(options.folder / "base")
        measured = add_share_of_peak(measured, options)
        return {"batch": batch, **measured, **get_memory(options), **profiler.result, "parameters": parameters}

    return fit_in_memory(run, options)


def measure_variant(folder: Path, changes: dict[str, Any], package: str | None = None, **values: Any) -> dict[str, Any]:
    """Measure a few packed steps with other settings, such as a quantized base.

    Args:
        package: the package that they need.
    """
    if package is not None:
        check_package(package)
    options = set_up(folder, **values)
    measured = run_ours(options, make_run_folder(options), "on", **changes)
    return {**add_share_of_peak(measured, options), **get_memory(options)}


def measure_resuming(
    folder: Path, changes: dict[str, Any], package: str | None = None, **values: Any
) -> dict[str, Any]:
    """Compare a resumed run's adapter with an uninterrupted run's, and with a repeated run's."""
    if package is not None:
        check_package(package)
    options = set_up(folder, **values)
    folders = [make_run_folder(options) for _ in range(3)]
    whole, repeated, resumed = (make_settings(options, run, "on", **changes) for run in folders)
    for settings in (whole, repeated):
        train(settings)

    def stop_in_the_middle(event: Event) -> None:
        if isinstance(event, Advanced) and event.task == "train" and event.done == options.steps // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with suppress(Stopped):
        train(resumed, stop_in_the_middle)
    result = train(resumed)
    assert result.resumed_from is not None, "the run was not stopped"
    tensors = [load_file(run / ADAPTER_WEIGHTS_FILE) for run in folders]
    return {
        "steps": options.steps,
        "resumed from": result.resumed_from.name,
        "resumed": compare_tensors(tensors[0], tensors[2]),
        "repeated": compare_tensors(tensors[0], tensors[1]),
    }


def measure_evaluation(folder: Path, **values: Any) -> dict[str, Any]:
    """Measure the peak memory of training and of the evaluation that follows, in MB."""
    options = set_up(folder, **values)
    device = choose_device(not options.on_gpu)
    peaks, notes = dict[str, int](), list[str]()

    def report(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        if isinstance(event, Started) and event.task.startswith("evaluate") and "training" not in peaks:
            peaks["training"] = get_peak_memory(device) // 10**6
            forget_peak_memory(options)

    settings = make_settings(options, make_run_folder(options), "on", eval_fraction=0.02, eval_strategy="epoch")
    result = train(settings, report)
    peaks["evaluation"] = get_peak_memory(device) // 10**6
    return {
        **peaks,
        "eval_batch_size": settings.per_device_eval_batch_size,
        "loss": result.eval["loss"],
        "notes": notes,
    }


def check_t5gemma2(folder: Path) -> dict[str, Any]:
    """Skip T5Gemma 2: none of its shapes is in the list of gpu.py yet."""
    raise Skipped("T5Gemma 2 has no shape in the list of gpu.py yet")


def check_package(package: str) -> None:
    """Skip a measurement whose package isn't installed."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise Skipped(f"{package} isn't installed")


def set_up(folder: Path, **values: Any) -> argparse.Namespace:
    """Make the options of train.py, the base and the token cache, unless an earlier measurement has made them."""
    options = build_parser(" ").parse_args([])
    defaults = {"dtype": "bfloat16", "dropout": 0.1, "warm_up": 3, "on_gpu": True}
    vars(options).update({**defaults, **values})
    name = options.size.rpartition("/")[2]
    options.folder = folder / f"{name}-{options.longest}"
    base, data = folder / name, folder / f"data-{options.longest}.jsonl"
    place = "cuda" if options.on_gpu else "cpu"
    make_once(base, lambda path: write_base(path, make_config(options), options.dtype, place))
    make_once(data, lambda path: write_conversations(path, NUM_CONVERSATIONS, options.longest))
    # links, because the largest bases take tens of gigabytes
    make_once(options.folder / "base", lambda path: shutil.copytree(base, path, copy_function=os.link))
    make_once(options.folder / "cache", lambda path: write_cache(path, base, data, options.longest))
    return options


def write_cache(cache: Path, base: Path, data: Path, longest: int) -> None:
    settings = {"model_name_or_path": str(base), "data_path": [str(data)], "model_max_length": longest}
    prepare(PrepareSettings(**settings, output_dir=cache))


def make_once(path: Path, make: Callable[[Path], Any]) -> None:
    """Make a file or folder that doesn't exist yet. It is complete whenever it exists."""
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    make(partial)
    partial.rename(path)


def make_run_folder(options: argparse.Namespace) -> Path:
    """Return where a new run can be."""
    return Path(tempfile.mkdtemp(dir=options.folder)) / "run"


def count_parameters(base: Path) -> int:
    """Count the parameters of a checkpoint."""
    (file,) = base.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def fit_in_memory(run: Callable[[int], dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Call `run` with 1, 2, 4, …, the divisor of its batch, until the batch fits in the GPU's memory."""
    for divisor in SIZE_DIVISORS[:-1]:
        try:
            return run(divisor)
        except (torch.OutOfMemoryError, OutOfMemory):
            pass
        # not in the block above, where the error keeps the tensors of all frames
        gc.collect()
        forget_peak_memory(options)
    return run(SIZE_DIVISORS[-1])


def forget_peak_memory(options: argparse.Namespace) -> None:
    if options.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def get_memory(options: argparse.Namespace) -> dict[str, int]:
    """Return the peak of what torch reserved on the GPU, in MB."""
    size = get_reserved_memory(choose_device(not options.on_gpu)).get("peak_reserved_bytes")
    return {} if size is None else {"reserved_memory_mb": size // 10**6}


def compare_tensors(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Compare adapters: the largest difference of a tensor, relative to its norm, and whether all bits are equal."""
    assert expected.keys() == found.keys()
    differences = [
        float((found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30))
        for name, value in expected.items()
    ]
    is_equal = all(torch.equal(found[name], value) for name, value in expected.items())
    return {"largest difference": float(f"{max(differences):.2e}"), "bits are equal": is_equal}


class StepProfiler:
    """Counts the kernels of the step between its first and its second call, and the GPU's idle time in it."""

    def __init__(self, on_gpu: bool) -> None:
        activity = torch.profiler.ProfilerActivity
        self.on_gpu = on_gpu
        self.profile = torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU], acc_events=True)
        self.is_started = False
        self.result: dict[str, Any] = {}

    def __call__(self) -> None:
        try:
            self._start_or_stop()
        except Exception as error:  # the speed has been measured already, and must not be lost
            self.result = {"profiler": f"{type(error).__name__}: {' '.join(str(error).split())}"}

    def _start_or_stop(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        if self.is_started:
            self.profile.stop()
            device = torch.autograd.DeviceType.CUDA if self.on_gpu else torch.autograd.DeviceType.CPU
            events = [event for event in self.profile.events() if event.device_type == device]
            self.result = summarize_events(events)
        else:
            self.profile.start()
            self.is_started = True


def summarize_events(events: list[Any]) -> dict[str, Any]:
    """Count the kernels, and compute the share of idle time between the first and the last event."""
    work = [event for event in events if not event.is_user_annotation]
    kernels = [event for event in work if not event.name.startswith(COPIES)]
    if not work:
        return {"launches": 0}
    times = sorted((event.time_range.start, event.time_range.end) for event in work)
    busy, first, last = 0.0, times[0][0], times[0][0]
    for start, end in times:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return {"launches": len(kernels), "idle_share": round(1 - busy / max(last - first, 1e-9), 3)}
