"""The measurements of gpu.py's two commands, with their shapes and the seconds that each is expected to take."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_checks
import gpu_inference
import gpu_kernels
import gpu_training
import torch
from gpu_report import MEMORY
from gpu_runner import Measurement

from t5tune.model.kernels.flex_check import TIMED_SEGMENTS, AttentionShape

PACKED, TRAINER = "packed", "trainer"
# longest example: tokens of a packed batch, and examples of a padded batch with about the same tokens
BATCHES = {512: {"tokens": 16384, "batch_size": 32}, 2048: {"tokens": 32768, "batch_size": 32}}
STEPS = {512: 13, 2048: 9}  # with 3 for warm-up
XL_SHAPE = AttentionShape(num_heads=32, head_width=64, max_distance=128, dropout=0.1)
XL_LAYERS = ("google/flan-t5-xl", 16384, 4096)  # tokens of the layers, and of the loss
SHAPES = {width: {"num_heads": 2048 // width, "head_width": width} for width in (64, 128, 256)}
T5GEMMA2 = "t5gemma-2-1b-1b"


def list_checks(on_gpu: bool, is_tiny: bool) -> list[Measurement]:
    """List the checks of correctness."""
    values: dict[str, Any] = {"size": "google/flan-t5-small", "longest": 512, "tokens": 8192, "on_gpu": on_gpu}
    values |= gpu_training.TINY if is_tiny else {}
    return [*list_kernel_checks(on_gpu, is_tiny), *list_training_checks(values), *list_inference_checks(values)]


def list_kernel_checks(on_gpu: bool, is_tiny: bool) -> list[Measurement]:
    """List the checks of single kernels in bf16."""
    options: dict[str, Any] = {"device": "cuda" if on_gpu else "cpu", "dtype": torch.bfloat16}

    layers = ("google/flan-t5-small", 64, 64) if is_tiny else XL_LAYERS

    def check(
        name: str, seconds: float, function: Callable[..., dict[str, Any]], *arguments: Any, needs_gpu: bool = True
    ) -> Measurement:
        return Measurement(
            f"kernels: {name}", seconds, ignoring_folder(function, *arguments, **options), needs_gpu=needs_gpu
        )

    return [
        *(
            check(f"attention, width {width}", 35, gpu_kernels.check_attention, XL_SHAPE._replace(**shape))
            for width, shape in SHAPES.items()
        ),
        check("layers and loss", 10, gpu_kernels.check_layers, *layers, needs_gpu=False),
        check("no recompilation in 20 batches", 30, gpu_kernels.check_compilations, XL_SHAPE, 20, 512),
    ]


def list_training_checks(values: dict[str, Any]) -> list[Measurement]:
    """List the comparisons of short runs."""
    long = {**values, "steps": 5 if "shape" in values else gpu_checks.REFERENCE_STEPS}  # tiny: 5
    short = {**values, "steps": 5}
    resume = partial(gpu_checks.check_resuming, **{**short, "steps": 6})
    base = partial(gpu_checks.check_quantized_base, **short)

    def compare(
        name: str,
        seconds: float,
        changes: dict[str, Any],
        bounds: gpu_checks.Bounds,
        needs_gpu: bool = False,
        **others: Any,
    ) -> Measurement:
        check = partial(gpu_checks.check_steps, changes=changes, bounds=bounds, **{**short, **others})
        return Measurement(f"training: {name}", seconds, check, needs_gpu)

    nf4, int8, dora = {"q_lora": True}, {"q_lora": True, "quant_type": "int8"}, {"uses_dora": True}
    loftq = {**nf4, "init_lora_weights": "loftq"}
    determined, paged = {"training_args": {"full_determinism": True}}, {"optim": "paged_adamw_32bit"}
    bits, zero = {"package": "bitsandbytes"}, {"package": "deepspeed"}
    return [
        compare("20 steps with the kernel", 40, {"packed_attention": "flex"}, gpu_checks.BF16, True, **long),
        compare("20 steps with the loop", 15, {"packed_attention": "loop"}, gpu_checks.BF16, **long),
        Measurement("resuming", 15, partial(resume, changes={}, is_exact=False)),
        Measurement("resuming, full determinism", 15, partial(resume, changes=determined, is_exact=True)),
        Measurement("loading NF4", 6, partial(base, quant_type="nf4")),
        Measurement("loading int8", 6, partial(base, quant_type="int8")),
        Measurement("loading LoftQ", 8, partial(gpu_checks.check_loftq, **short)),
        compare("NF4", 8, nf4, gpu_checks.NF4, **bits),
        compare("int8", 8, int8, gpu_checks.INT8, **bits),
        compare("DoRA", 12, {}, gpu_checks.BF16, **dora),
        compare("NF4, DoRA", 8, nf4, gpu_checks.NF4, **bits, **dora),
        compare("int8, DoRA", 8, int8, gpu_checks.INT8, **bits, **dora),
        compare("LoftQ", 10, loftq, gpu_checks.LOFTQ, **bits),
        compare("paged AdamW", 8, paged, gpu_checks.BF16, True, **bits),
        Measurement(
            "resuming, paged AdamW", 15, partial(resume, changes=paged, is_exact=False, **bits), needs_gpu=True
        ),
        compare("ZeRO-2 with offload", 45, {"deepspeed": "zero2-offload"}, gpu_checks.BF16, **zero),
        compare("ZeRO-3", 20, {"deepspeed": "zero3"}, gpu_checks.BF16, **zero),
    ]


def list_inference_checks(values: dict[str, Any]) -> list[Measurement]:
    """List the checks of evaluation, generation, serving and too little memory."""
    checks: dict[str, tuple[float, Callable[..., dict[str, Any]]]] = {
        "evaluation, and out of memory": (20, gpu_inference.check_evaluation),
        "training, out of memory": (12, gpu_inference.check_memory_in_training),
        "generation": (15, gpu_inference.check_generation),
        "serving, out of memory": (20, gpu_inference.check_memory_in_serving),
        "serving with both engines": (35, gpu_inference.check_serving),
    }
    return [Measurement(name, seconds, partial(check, **values, steps=4)) for name, (seconds, check) in checks.items()]


def list_speeds(on_gpu: bool, is_tiny: bool) -> list[Measurement]:
    """List the measurements of speed and memory."""

    def train(size: str, longest: int, way: str, seconds: float) -> Measurement:
        values = {"size": f"google/{size}", "longest": longest, "steps": STEPS[longest], **BATCHES[longest]}
        if is_tiny:
            values |= {**(gpu_training.TINY_T5GEMMA2 if size == T5GEMMA2 else gpu_training.TINY), "steps": 5}
        measure = partial(gpu_training.measure_training, way=way, **values, on_gpu=on_gpu)
        return Measurement(f"train {size} {longest} {way}", seconds, measure)

    xl, large, base, xxl = (f"flan-t5-{size}" for size in ("xl", "large", "base", "xxl"))
    in_xxl = {"size": f"google/{xxl}", "longest": 512, "steps": 4} | (
        {**gpu_training.TINY, "longest": 512} if is_tiny else {}
    )
    memory = partial(gpu_training.measure_quantized_memory, source=512, target=128, **in_xxl, on_gpu=on_gpu)
    return [
        train(xl, 512, PACKED, 60),
        train(xl, 512, TRAINER, 40),
        train(large, 512, PACKED, 35),
        train(large, 512, TRAINER, 20),
        train(base, 512, PACKED, 30),
        train(base, 512, TRAINER, 15),
        train(T5GEMMA2, 512, PACKED, 40),
        train(T5GEMMA2, 512, TRAINER, 40),
        Measurement(MEMORY, 120, memory),
        train(xl, 2048, PACKED, 35),
        train(xl, 2048, TRAINER, 45),
        train(large, 2048, PACKED, 25),
        train(large, 2048, TRAINER, 25),
        train(base, 2048, PACKED, 20),
        train(base, 2048, TRAINER, 20),
        train(T5GEMMA2, 2048, PACKED, 40),
        train(T5GEMMA2, 2048, TRAINER, 40),
        *list_kernel_times(on_gpu),
        Measurement(
            "memory of evaluation", 30, partial(gpu_training.measure_evaluation, **make_large(on_gpu, is_tiny))
        ),
        train(xl, 512, "packed, no attention dropout", 40),
        train(xl, 512, "packed, loop", 40),
        train(large, 512, "packed, compiled", 40),
        train(xl, 512, "packed, compiled", 50),
        train(xxl, 512, PACKED, 120),
        train(xxl, 512, TRAINER, 120),
    ]


def list_kernel_times(on_gpu: bool) -> list[Measurement]:
    """List the measurements of single kernels' times, with the shapes of Flan-T5-xl."""
    options: dict[str, Any] = {"device": "cuda" if on_gpu else "cpu", "dtype": torch.bfloat16}
    timed = (TIMED_SEGMENTS, TIMED_SEGMENTS)

    def measure(name: str, seconds: float, function: Callable[..., dict[str, Any]], *arguments: Any) -> Measurement:
        return Measurement(f"time of {name}", seconds, ignoring_folder(function, *arguments, **options), needs_gpu=True)

    return [
        measure("attention", 40, gpu_kernels.time_attention, XL_SHAPE, timed),
        measure("layers and loss", 15, gpu_kernels.time_layers, *XL_LAYERS),
        measure("cuDNN's attention", 20, gpu_kernels.time_cudnn, XL_SHAPE, 2, 512),
    ]


def make_large(on_gpu: bool, is_tiny: bool) -> dict[str, Any]:
    values = {"size": "google/flan-t5-large", "longest": 2048, "steps": 6, **BATCHES[2048], "on_gpu": on_gpu}
    return values | (gpu_training.TINY if is_tiny else {})


def ignoring_folder(function: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> Any:
    """Make a measurement's function from one that needs no folder."""
    return partial(_ignore_folder, partial(function, *arguments, **options))


def _ignore_folder(measure: Callable[[], dict[str, Any]], _folder: Path) -> dict[str, Any]:
    return measure()
