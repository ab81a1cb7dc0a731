"""Check that training on a GPU computes what it should: losses, resuming, quantized bases, LoRA's variants, DeepSpeed.

Each check returns comparisons, each of a value with a bound. Short runs in bf16 are compared with padded training in
fp32, from the same weights and with the same examples in each step, without dropout: the loss and the gradient of the
first step, where only rounding may differ, and how far all losses deviate, as a share of what training changes.
"""

import argparse
import json
import math
import os
import signal
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_runner import Comparison, make_check, write_json
from gpu_training import check_package, make_run_folder, make_settings, set_up
from safetensors.torch import load_file
from torch import Tensor, nn

from t5tune.commands.train import train
from t5tune.errors import Stopped
from t5tune.file_names import ADAPTER_WEIGHTS_FILE
from t5tune.model.load import find_quantizable_linears, load_base
from t5tune.model.lora import add_lora
from t5tune.progress import Advanced, Event
from t5tune.settings.groups.base import QuantizationSettings
from t5tune.settings.groups.lora import LoraSettings

# with a constant learning rate, a shorter run's steps are the first steps of a longer run
LEARNING = {
    "learning_rate": 3e-3, "lr_scheduler_type": "constant", "lora_target_modules": ["all-linear"], "lora_dropout": 0.0,
    "logging_steps": 1,
}  # fmt: skip
# the same examples in each step, with and without padding
SAME_EXAMPLES = {"tokens_per_batch": None, "per_device_train_batch_size": 8, "group_by_length": False}
REFERENCE_STEPS = 20
NUM_WORDS = 16  # in the examples
FP32 = {"bf16": False, "tf32": False, "packing": "off"}
LEARNED = 0.5  # of fp32's change of the losses by training
NOISE, LARGEST_NOISE = 3.0, 0.15  # of a resumed run, in relation to a repeated run's, and to the adapter
# relative errors of weights with a normal distribution
QUANTIZATION_ERRORS = {"nf4": 0.1, "int8": 0.015}
BYTES_PER_WEIGHT = {"nf4": 0.5, "int8": 1.0}
LEFT_ERROR = 0.99  # with LoftQ, at rank 8


class Bounds(NamedTuple):
    """Bounds of the relative differences between a run and padded training in fp32.

    Args:
        loss, norm: of the first step's loss and gradient norm.
        norms: of the gradient norms of all steps, on average.
        losses: of all losses, as a share of their change by training.
            None: not compared, because the base's weights or the initial adapter differ.
    """

    loss: float
    norm: float | None = None
    norms: float | None = None
    losses: float | None = None


# with the loop on a CPU: 0.00005, 0.00002, 0.001, 0.005; with queries that are a tenth too small: norms differ by 0.04
BF16 = Bounds(loss=0.001, norm=0.003, norms=0.005, losses=0.02)
INT8 = Bounds(loss=0.005, norm=0.02, norms=0.02, losses=0.05)
NF4 = Bounds(loss=0.015, norm=0.05, norms=0.1)
LOFTQ = Bounds(loss=0.015)


class Steps(NamedTuple):
    """The loss and the norm of the gradient of each step."""

    losses: list[float]
    norms: list[float]


def train_and_read(options: argparse.Namespace, packing: str = "on", **changes: Any) -> Steps:
    """Train without dropout."""
    values = {**LEARNING, **SAME_EXAMPLES, **changes}
    metrics = train(make_settings(options, make_run_folder(options), packing, **values)).metrics()
    return Steps(metrics.curve("loss")[1], metrics.curve("grad_norm")[1])


def read_or_train(options: argparse.Namespace, name: str, **changes: Any) -> Steps:
    """Return the steps of a run that all checks compare theirs with."""
    path = options.folder / f"{name}.json"
    if not path.is_file():
        longest = {"max_steps": max(REFERENCE_STEPS if options.on_gpu else 0, options.steps)}
        write_json(path, train_and_read(options, **longest, **changes)._asdict())
    steps = json.loads(path.read_text())
    return Steps(*(steps[name][: options.steps] for name in Steps._fields))


def check_steps(
    folder: Path,
    changes: dict[str, Any],
    bounds: Bounds,
    package: str | None = None,
    uses_dora: bool = False,
    **values: Any,
) -> dict[str, Any]:
    """Compare packed training in bf16, or a variant of it, with padded training in fp32, which mustn't be in vain.

    Args:
        package: the package that it needs.
        uses_dora: whether both use DoRA.
    """
    dora = {"use_dora": uses_dora}
    if package is not None:
        check_package(package)
    options = set_up(folder, dropout=0.0, num_words=NUM_WORDS, **values)
    exact = read_or_train(options, "fp32-dora" if uses_dora else "fp32", **FP32, **dora)
    untrained = read_or_train(options, "untrained", **FP32, learning_rate=0.0)
    found = train_and_read(options, **changes, **dora)
    return make_check(compare_steps(found, exact, untrained, bounds), found=found, fp32=exact, untrained=untrained)


def compare_steps(found: Steps, exact: Steps, untrained: Steps, bounds: Bounds) -> list[Comparison]:
    """Compare the first step, the number of steps, and the losses of all steps."""
    loss, norm = (abs(ours[0] - other[0]) / other[0] for ours, other in zip(found, exact, strict=True))
    norms = statistics.mean(abs(a - b) / b for a, b in zip(found.norms, exact.norms, strict=False))
    triples = [*zip(found.losses, exact.losses, untrained.losses, strict=False)]
    change = sum(before - after for _, after, before in triples)
    learned = sum(before - ours for ours, _, before in triples) / change
    losses = sum(abs(ours - other) for ours, other, _ in triples) / change
    bounded = {
        "difference of the first loss": (loss, bounds.loss),
        "difference of the first gradient norm": (norm, bounds.norm),
        "mean difference of the gradient norms": (norms, bounds.norms),
        "difference of the losses / fp32's change": (losses, bounds.losses),
    }
    return [
        *(Comparison(what, value, "<=", bound) for what, (value, bound) in bounded.items() if bound is not None),
        Comparison("steps", len(found.losses), "==", len(exact.losses)),
        Comparison("fp32's change of the losses by training", change, ">=", 0.01 * len(exact.losses)),
        Comparison("change of the losses / fp32's", learned, ">=", LEARNED),
    ]


def order(value: float) -> float:
    """Order numbers, NaN as the largest."""
    return math.inf if math.isnan(value) else value


def check_resuming(
    folder: Path, changes: dict[str, Any], is_exact: bool, package: str | None = None, **values: Any
) -> dict[str, Any]:
    """Compare a resumed run's adapter with an uninterrupted run's.

    Args:
        is_exact: whether all bits must be equal. Otherwise the difference may be a few times a repeated run's, because
            some kernels add in any order.
    """
    if package is not None:
        check_package(package)
    options = set_up(folder, **values)
    folders = [make_run_folder(options) for _ in range(3)]
    whole, repeated, resumed = (
        make_settings(options, run, "on", **{**LEARNING, "lora_dropout": options.dropout, **changes}) for run in folders
    )
    for settings in (whole, repeated):
        train(settings)

    def stop_in_the_middle(event: Event) -> None:
        if isinstance(event, Advanced) and event.task == "train" and event.done == options.steps // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with suppress(Stopped):
        train(resumed, stop_in_the_middle)
    result = train(resumed)
    tensors = [load_file(run / ADAPTER_WEIGHTS_FILE) for run in folders]
    noise, difference = (compare_tensors(tensors[0], found) for found in tensors[1:])
    comparisons = [
        Comparison("is resumed", result.resumed_from is not None, "==", True),
        Comparison("steps", result.steps, "==", options.steps),
    ]
    if is_exact:
        comparisons.append(Comparison("bits are equal", difference["bits are equal"], "==", True))
    else:
        bound = min(NOISE * noise["largest difference"] + torch.finfo(torch.float32).eps, LARGEST_NOISE)
        comparisons.append(Comparison("difference of a tensor", difference["largest difference"], "<=", bound))
    return make_check(comparisons, repeated=noise, resumed=difference)


def check_quantized_base(folder: Path, quant_type: str, **values: Any) -> dict[str, Any]:
    """Compare the weights of a quantized base, directly after loading, with the base's."""
    check_package("bitsandbytes")
    options = set_up(folder, dropout=0.0, num_words=NUM_WORDS, **values)
    base, exact = load_quantized(options, quant_type), load_quantized(options, None)
    errors, sizes, kinds = [], [], set()
    for name, expected in find_quantizable_linears(exact, QuantizationSettings()).items():
        module = base.get_submodule(name)
        errors.append(compute_error(read_weight(module), expected.weight))
        sizes.append(module.weight.nbytes / expected.weight.numel())
        kinds.add((type(module).__name__, str(module.weight.dtype), module.weight.device.type))
    kind = "Linear4bit" if quant_type == "nf4" else "Linear8bitLt"
    dtype = "torch.bfloat16" if quant_type == "nf4" else "torch.int8"  # four 4-bit weights in a number of the base's
    device = "cuda" if options.on_gpu else "cpu"
    return make_check(
        [
            Comparison("class, dtype and device of all layers", sorted(kinds), "==", [(kind, dtype, device)]),
            Comparison("largest bytes per weight", max(sizes), "<=", BYTES_PER_WEIGHT[quant_type]),
            Comparison("error of a weight", max(errors, key=order), "<=", QUANTIZATION_ERRORS[quant_type]),
        ],
        layers=len(errors),
    )


def check_loftq(folder: Path, **values: Any) -> dict[str, Any]:
    """Compare the error of NF4 with LoftQ's adapters to the error without them."""
    check_package("bitsandbytes")
    options = set_up(folder, dropout=0.0, num_words=NUM_WORDS, **values)
    exact, base = load_quantized(options, None), load_quantized(options, "nf4")
    plain = {
        name: compute_error(read_weight(base.get_submodule(name)), linear.weight)
        for name, linear in list_adapted(exact)
    }
    settings = LoraSettings(init_lora_weights="loftq", lora_dropout=0.0)
    model, _ = add_lora(base, options.folder / "base", settings, [], torch.float32)
    left = []
    for name, linear in list_adapted(exact):
        layer = model.base_model.model.get_submodule(name)
        weight = read_weight(layer.base_layer) + layer.get_delta_weight("default")
        left.append(compute_error(weight, linear.weight) / plain[name])
    return make_check(
        [Comparison("error with LoftQ / without it", max(left, key=order), "<=", LEFT_ERROR)], layers=len(left)
    )


def list_adapted(model: Any) -> list[tuple[str, nn.Linear]]:
    """List the layers that LoRA adapts by default."""
    linears = find_quantizable_linears(model, QuantizationSettings()).items()
    return [(name, linear) for name, linear in linears if name.rpartition(".")[2] in {"q", "v"}]


def load_quantized(options: argparse.Namespace, quant_type: str | None) -> Any:
    quantization = None if quant_type is None else QuantizationSettings(q_lora=True, quant_type=quant_type)
    device = torch.device("cuda" if options.on_gpu else "cpu")
    return load_base(options.folder / "base", torch.bfloat16, device, quantization)


def read_weight(module: nn.Module) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module).double()


def compute_error(found: Tensor, exact: Tensor) -> float:
    """Compute the norm of the difference, relative to the norm of the exact result."""
    exact = exact.detach().double()
    return float((found.detach().double() - exact).norm() / exact.norm())


def compare_tensors(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Compare adapters: the largest difference of a tensor, relative to its norm, and whether all bits are equal."""
    assert expected.keys() == found.keys()
    differences = [
        float((found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30))
        for name, value in expected.items()
    ]
    is_equal = all(torch.equal(found[name], value) for name, value in expected.items())
    return {"largest difference": float(f"{max(differences):.2e}"), "bits are equal": is_equal}
