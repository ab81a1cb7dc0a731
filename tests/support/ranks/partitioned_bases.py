"""What one of two ranks finds when it loads bases that ZeRO-3 partitions, and the same bases whole.

    describe(tied, untied, large, adapters)      # prints a JSON object
    describe_errors(differing, truncated)       # prints the errors, which only rank 0 finds, as a JSON list

Rank 0 alone may read weights: on the other rank, reading a tensor for a partitioned base fails.
"""

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors import safe_open

from t5tune.compat.deepspeed_patches import import_deepspeed
from t5tune.errors import T5TuneError
from t5tune.families.t5 import T5
from t5tune.inference.generation import Decoding, generate
from t5tune.inference.loading import load_for_inference
from t5tune.model import load
from t5tune.model.device import return_freed_memory
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.model.zero3 import Zero3Partitioner, gather_decoder
from t5tune.progress import Advanced, Event, silent
from t5tune.settings import EvaluateSettings, TrainSettings
from tests.support.models.label_models import TASKS

CPU, DTYPE = torch.device("cpu"), torch.float32
ZERO3 = {"zero_optimization": {"stage": 3}}
TOKEN_ROWS = [1500, 1501, 1507]
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "modules_to_save": {"modules_to_save": ["final_layer_norm", "relative_attention_bias"]},
    "nf4": {"q_lora": True},
    "nf4, dora": {"q_lora": True, "use_dora": True},
    "loftq": {"q_lora": True, "init_lora_weights": "loftq"},
    "labels": {"objective": "tag", "q_lora": True},
}


def describe(tied: Path, untied: Path, large: Path, adapters: list[Path]) -> None:
    dist.init_process_group("gloo")
    import_deepspeed(on_cpu=True).init_distributed(verbose=False)
    partitioner = Zero3Partitioner(ZERO3, DTYPE)
    problems = [f"{name}: {what}" for name in VARIANTS for what in find_differences(name, untied, partitioner)]
    problems += [f"{base.name}: {what}" for base in (tied, untied) for what in compare_with_file(base, partitioner)]
    problems += [f"{path.name}: {what}" for path in adapters for what in find_other_replies(untied, path)]
    print(json.dumps({"problems": problems, **measure_loading(large, partitioner)}))


def describe_errors(differing: Path, truncated: Path) -> None:
    """Load a base whose copies of the embedding differ, and one whose file is truncated once it is opened."""
    dist.init_process_group("gloo")
    import_deepspeed(on_cpu=True).init_distributed(verbose=False)
    partitioner = Zero3Partitioner(ZERO3, DTYPE)

    def truncate(event: Event) -> None:
        if event == Advanced("load", 3) and partitioner.is_rank_0:
            os.truncate(truncated / "model.safetensors", 10_000)

    errors = []
    for base, report in ((differing, silent), (truncated, truncate)):
        try:
            load_base(base, DTYPE, CPU, report=report, partitioner=partitioner)
        except T5TuneError as error:
            errors.append(str(error))
    print(json.dumps(errors))


def find_differences(name: str, base: Path, partitioner: Zero3Partitioner) -> Iterator[str]:
    """Compare a model to train with the same model that is loaded whole."""
    needed = {"model_name_or_path": "base", "data_path": ["-"], "output_dir": Path("run"), "bf16": False}
    settings = TrainSettings(**needed | VARIANTS[name])
    whole, subtracted, number = build(base, settings, None)
    found, found_subtracted, found_number = build(base, settings, partitioner)
    if number != found_number:
        yield "other random numbers follow"
    if subtracted.keys() != found_subtracted.keys():
        yield "other matrices are subtracted"
    expected = dict(whole.named_parameters())
    for key, parameter in found.named_parameters():
        other = expected.pop(key)
        if not hasattr(parameter, "ds_id") or parameter.numel() or parameter.requires_grad != other.requires_grad:
            yield f"{key}: not partitioned as it should be"
        with partitioner.gather([parameter]):
            if not are_same(parameter, other):
                yield f"{key}: differs"
        if (state := getattr(other, "quant_state", None)) is not None:
            scales = [(each.quant_state.absmax, each.quant_state.state2.absmax) for each in (other, parameter)]
            if state is parameter.quant_state or not all(map(are_same, *scales)):
                yield f"{key}: the scales differ"
    yield from (f"{key}: missing" for key in expected)


def build(base: Path, settings: TrainSettings, partitioner: Zero3Partitioner | None) -> tuple[Any, Any, torch.Tensor]:
    torch.manual_seed(5)
    with nullcontext() if partitioner is None or partitioner.is_rank_0 else patch.object(load, "to_torch", None):
        task = TASKS["tag"] if settings.kind == "labels" else None
        model = load_base(base, DTYPE, CPU, settings, partitioner=partitioner, task=task)
        rows = TOKEN_ROWS if task is None else []
        model, subtracted = add_lora(model, base, settings, rows, DTYPE, partitioner)
    if partitioner is not None:
        partitioner.partition_model(model)
    return model, subtracted, torch.rand(1)


def compare_with_file(base: Path, partitioner: Zero3Partitioner) -> Iterator[str]:
    """Compare the gathered parameters with the tensors of the file."""
    model = load_base(base, DTYPE, CPU, partitioner=partitioner)
    with safe_open(base / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for key, parameter in model.named_parameters(remove_duplicate=False):
            name = key if key in names else T5.tied_to
            with partitioner.gather([parameter]):
                if not are_same(parameter, file.get_tensor(name)):
                    yield f"{key} isn't {name} of the file"


def find_other_replies(base: Path, adapter: Path) -> Iterator[str]:
    """Compare what the partitioned model generates, with and without holding the decoder, with the whole model's."""
    settings = EvaluateSettings(model_name_or_path=str(base), adapter=adapter, data_path=["-"], use_cpu=True)
    whole, found = load_for_inference(settings), load_for_inference(settings, zero3=ZERO3)
    sources, decoding = [[5, 9, 700, 1], [800, 31, 1]], Decoding(1, 0, 8)
    expected = generate(whole.model, sources, decoding)
    if generate(found.model, sources, decoding, synced_gpus=True) != expected:
        yield "other replies"
    decoder = {name for name, _ in whole.model.named_parameters() if ".encoder." not in name}
    with gather_decoder(found.model):
        before = list_gathered(found.model)
        if generate(found.model, sources, decoding, synced_gpus=True) != expected:
            yield "other replies while the decoder is gathered"
        if before != decoder or list_gathered(found.model) != decoder:
            yield "not exactly the decoder is gathered"
    if left := list_gathered(found.model):
        yield f"{left} stay gathered"


def list_gathered(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.numel()}


def measure_loading(base: Path, partitioner: Zero3Partitioner) -> dict[str, int]:
    """Measure by how many bytes the peak memory grows while a large base is loaded."""
    return_freed_memory()
    before = read_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    model = load_base(base, torch.bfloat16, CPU, partitioner=partitioner)
    sizes = [2 * parameter.ds_numel for parameter in model.parameters()]
    return {"increase": read_memory("VmHWM") - before, "whole": sum(sizes), "largest": max(sizes)}


def read_memory(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def are_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have the same bits."""
    first, second = first.detach().contiguous(), second.detach().contiguous()
    return first.shape == second.shape and torch.equal(first.view(torch.uint8), second.view(torch.uint8))
