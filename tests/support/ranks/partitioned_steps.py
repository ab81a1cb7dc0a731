"""The bits and the memory of training steps under ZeRO-3, with and without gathered weights that torch saves.

describe_steps(base, ["lora", "nf4"])   # some of WAYS: prints a JSON list of differences
describe_peak(name, large, released)   # prints a JSON object with bytes
"""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from t5tune.compat.deepspeed_patches import import_deepspeed
from t5tune.model import zero3
from t5tune.model.attention.packing import use_packing
from t5tune.model.attention.segments import Segments
from t5tune.model.device import return_freed_memory
from t5tune.model.kernels.fused import use_fused_layers
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.model.zero3 import Zero3Partitioner
from t5tune.settings import TrainSettings
from tests.support.models.label_models import TASKS, sum_losses
from tests.support.ranks.partitioned_bases import CPU, are_same, read_memory

CONFIG: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 1_000_000,
        "reduce_bucket_size": 1_000_000,
        "memory_efficient_linear": True,
    },
    "bf16": {"enabled": True},
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
}
STEPS = 4  # DeepSpeed records the order of the modules in the second one, and prefetches from the third one on
WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, padded": {"packing": "off"},
    "nf4": {"q_lora": True},
    "dora": {"use_dora": True},
    "full": {"train_mode": "full"},
    "checkpointing": {"gradient_checkpointing": True},
    "labels": {"objective": "classify"},
    "labels, full": {"objective": "tag", "train_mode": "full"},
}


def start(base: Path, name: str, is_released: bool) -> Any:
    """Start DeepSpeed's engine for a model to train."""
    import deepspeed

    needed = {"model_name_or_path": str(base), "data_path": ["-"], "output_dir": Path("run"), "bf16": True}
    settings = TrainSettings(**needed | WAYS[name])
    torch.manual_seed(3)
    partitioner = Zero3Partitioner(CONFIG, torch.bfloat16)
    task = TASKS[settings.objective] if settings.kind == "labels" else None
    model = load_base(base, torch.bfloat16, CPU, settings, partitioner=partitioner, task=task)
    if settings.train_mode == "full":
        model.requires_grad_(True)
    else:
        rows = [1500, 1501] if task is None else []
        model, _ = add_lora(model, base, settings, rows, torch.bfloat16, partitioner)
    if settings.packing != "off":
        use_packing(model)
    use_fused_layers(model)
    model.enable_input_require_grads()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with nullcontext() if is_released else patch.object(zero3, "_release_gathered_weights"):
        partitioner.partition_model(model)
    optimizer = torch.optim.SGD((each for each in model.parameters() if each.requires_grad), lr=0.1)
    return deepspeed.initialize(model=model.train(), optimizer=optimizer, config=CONFIG)[0]


def run_step(engine: Any, is_packed: bool) -> float:
    """Train on two examples, different ones on each rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    source, target = torch.randint(5, 1500, (1, 24), generator=generator), torch.randint(5, 1500, (1, 10))
    inputs = {"input_ids": source, "decoder_input_ids": target, "labels": target, "use_cache": False}
    if is_packed:
        inputs["packing"] = Segments(sources=(15, 9), targets=(4, 6))
    if engine.module.label_task is None:
        loss = engine(**inputs, reduction="sum")
    else:
        logits = engine(input_ids=source, packing=Segments((15, 9), ()))
        loss = sum_losses(engine.module.label_task, logits, torch.ones(logits.shape[:-1]))
    engine.backward(loss)
    engine.step()
    return float(loss)


def train(base: Path, name: str, is_released: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of some steps, and the weights after them."""
    import deepspeed

    engine = start(base, name, is_released)
    torch.manual_seed(4)  # of dropout
    losses = [run_step(engine, WAYS[name].get("packing") != "off") for _ in range(STEPS)]
    weights = {}
    for key, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            weights[key] = parameter.detach().clone()
    engine.destroy()
    return losses, weights


def describe_steps(base: Path, ways: list[str]) -> None:
    linear = torch.nn.functional.linear
    set_up()
    differences = [f"{name}: {what}" for name in ways for what in find_differences(base, name)]
    print(json.dumps([*differences, *find_unfinished_reads(base)]))
    assert torch.nn.functional.linear is linear


def find_differences(base: Path, name: str) -> Iterator[str]:
    losses, weights = train(base, name, is_released=False)
    found_losses, found = train(base, name, is_released=True)
    if losses != found_losses or len(set(losses)) < STEPS:
        yield f"losses {found_losses}, not {losses}"
    yield from (f"{key} differs" for key, value in weights.items() if not are_same(value, found[key]))
    if not weights or weights.keys() != found.keys():
        yield "other weights"


def find_unfinished_reads(base: Path) -> Iterator[str]:
    """Read a saved weight that is partitioned, and one that DeepSpeed has begun to gather."""
    import deepspeed

    model = start(base, "lora", is_released=True).module
    for name in ("encoder.block.0.layer.0.SelfAttention.k.weight", "decoder.block.1.layer.1.EncDecAttention.o.weight"):
        weight = model.get_parameter(f"base_model.model.{name}")
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=None):
            saved = zero3._save_without_weights(weight.t())
            expected = weight.t().detach().clone()
        if name.startswith("decoder"):
            model.ds_inflight_param_registry[weight] = weight.all_gather_coalesced([weight])
        if not are_same(zero3._read_saved(model, saved), expected):
            yield f"{name}: read before it was gathered"


def describe_peak(name: str, base: Path) -> None:
    """Measure by how many bytes the memory grows in a step, at its peak, and the bytes of the weights of the blocks."""
    set_up()
    return_freed_memory()
    engine = start(base, name, is_released=True)
    run_step(engine, is_packed=True)  # in the first step, libraries allocate buffers
    before = read_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(STEPS - 1):
        run_step(engine, is_packed=True)
    blocks = [module for module in engine.module.modules() if type(module).__name__ == "T5Block"]
    sizes = [sum(parameter.ds_numel * parameter.element_size() for parameter in block.parameters()) for block in blocks]
    increase = read_memory("VmHWM") - before
    print(json.dumps({"increase": increase, "blocks": sum(sizes), "largest_block": max(sizes)}))


def set_up() -> None:
    dist.init_process_group("gloo")
    import_deepspeed(on_cpu=True).init_distributed(verbose=False)
