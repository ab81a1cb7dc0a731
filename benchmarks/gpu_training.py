"""Measure training runs on a GPU: speed, memory, kernel launches and idle time.

Bases and token caches are made by the first measurement that needs them.
"""

import argparse
import gc
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_runner import Skipped
from operations import add_share_of_peak
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sides import write_base
from train import STOCK_WAYS, build_parser, make_config, make_settings, run_ours, run_stock, write_conversations

from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.data.caches.prepared import open_examples
from t5tune.errors import OutOfMemory
from t5tune.model.device import choose_device, get_peak_memory, get_reserved_memory
from t5tune.progress import Event, Note, Started
from t5tune.settings import PrepareSettings

SHARPNESS = 2.0  # factor of the queries
NUM_EQUAL = 8  # examples of equal lengths
# of checks without a GPU, and of the tests; the vocabulary has the built-in tokenizer's tokens
TINY = {
    "size": "google/flan-t5-small", "num_layers": 1, "longest": 64, "tokens": 512, "batch_size": 4,
    "num_conversations": 120,
    "shape": {"vocab_size": 1504, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128},
}  # fmt: skip
TINY_STACK = {
    "vocab_size": 1504, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 16, "intermediate_size": 96, "sliding_window": 32,
}  # fmt: skip
TINY_T5GEMMA2 = {**TINY, "size": "google/t5gemma-2-270m-270m", "num_layers": None}
TINY_T5GEMMA2["shape"] = {"encoder": {"text_config": TINY_STACK}, "decoder": TINY_STACK}
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


def measure_quantized_memory(folder: Path, source: int, target: int, **values: Any) -> dict[str, Any]:
    """Measure the peak memory of QLoRA with one example of `source` and `target` tokens per step, in MB."""
    check_package("bitsandbytes")
    options = set_up(folder, lengths=(source, target), **values)
    sources, targets = open_examples(options.folder / "cache").read_lengths()
    assert (set(sources), set(targets)) == ({source}, {target}), "the examples have other lengths"
    changes = {"q_lora": True, "tokens_per_batch": None, "per_device_train_batch_size": 1}
    result = train(make_settings(options, make_run_folder(options), "on", **changes))
    return {
        "tokens": f"{source} + {target}",
        "memory_mb": result.peak_memory_bytes // 10**6,
        **get_memory(options),
    }


def check_package(package: str) -> None:
    """Skip a measurement whose package isn't installed."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise Skipped(f"{package} isn't installed")


def set_up(
    folder: Path, lengths: tuple[int, int] | None = None, num_words: int | None = None, **values: Any
) -> argparse.Namespace:
    """Make the options of train.py, the base and the token cache, unless an earlier measurement has made them.

    Args:
        lengths: of each source and target, in tokens; None: long-tailed, up to `longest`.
        num_words: number of different words in the examples: with a few, training changes the losses.
    """
    options = build_parser(" ").parse_args([])
    defaults = {"dtype": "bfloat16", "dropout": 0.1, "warm_up": 3, "on_gpu": True, "num_conversations": 2000}
    vars(options).update({**defaults, **values})
    name = f"{options.size.rpartition('/')[2]}-{options.dtype}-{options.dropout}"
    data_name = f"{options.longest}-{num_words or 'all'}" if lengths is None else "{}-{}".format(*lengths)
    options.folder = folder / f"{name}-{data_name}"
    base, data = folder / name, folder / f"data-{data_name}.jsonl"
    make_once(base, lambda path: write_random_base(path, options))
    options.data = data
    make_once(data, lambda path: write_data(path, options, lengths, num_words))
    # links, because the largest bases take tens of gigabytes
    make_once(options.folder / "base", lambda path: shutil.copytree(base, path, copy_function=os.link))
    make_once(options.folder / "cache", lambda path: write_cache(path, base, data, options.longest))
    return options


def write_random_base(path: Path, options: argparse.Namespace) -> None:
    """Write a random base with sharp attention and a large position bias, so that their mistakes change its losses."""
    write_base(path, make_config(options), options.dtype, "cuda" if options.on_gpu else "cpu")
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("ttention.q.weight"):
            tensor *= SHARPNESS
        elif name.endswith("relative_attention_bias.weight"):
            tensor.copy_(torch.randn(tensor.shape))
    save_file(tensors, file, {"format": "pt"})


def write_data(path: Path, options: argparse.Namespace, lengths: tuple[int, int] | None, num_words: int | None) -> None:
    if lengths is None:
        write_conversations(path, options.num_conversations, options.longest, num_words)
    else:  # sources are truncated to the longest; a target gets two more tokens
        texts = ("the " * count for count in (options.longest, lengths[1] - 2))
        turns = [{"from": who, "value": text.strip()} for who, text in zip(("human", "gpt"), texts, strict=True)]
        path.write_text(f"{json.dumps({'conversations': turns})}\n" * NUM_EQUAL)


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
        forget_peak_memory(options)
    return run(SIZE_DIVISORS[-1])


def forget_peak_memory(options: argparse.Namespace) -> None:
    """Free the memory of earlier runs, and measure the peak from here on."""
    gc.collect()
    if options.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def get_memory(options: argparse.Namespace) -> dict[str, int]:
    """Return the peak of what torch reserved on the GPU, in MB."""
    size = get_reserved_memory(choose_device(not options.on_gpu)).get("peak_reserved_bytes")
    return {} if size is None else {"reserved_memory_mb": size // 10**6}


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
