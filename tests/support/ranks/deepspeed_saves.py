"""Called in each rank for commands/export/test_deepspeed.py: plain PEFT, trained and saved by DeepSpeed itself.

Next to each case's checkpoint it writes the fp32 weights of the live engine: masters.safetensors.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from t5tune.compat.deepspeed_patches import import_deepspeed

STEPS = 2
ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}

# name: (stage, tied, exclude_frozen_parameters, more of DeepSpeed's config)
CASES: dict[str, tuple[int, bool, bool, dict[str, Any]]] = {
    "zero0": (0, False, False, {}),
    "zero1": (1, True, False, {}),
    "zero1-bf16-optimizer": (1, False, True, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "zero2-bf16-frozen": (2, False, False, BF16),
    "zero2-fp16": (2, True, True, FP16),
    "zero2-aligned": (2, False, True, {**BF16, "zero_optimization": {"parameter_alignment": True, "stage": 2}}),
    "zero3": (3, True, True, {}),
    "zero3-bf16-frozen": (3, False, False, BF16),
    "zero3-small-groups": (3, False, True, {"zero_optimization": {"stage": 3, "sub_group_size": 700}}),
}

EXTRA_PARAMETER = "base_model.model.encoder.final_layer_norm.weight"
"""Also trained in the case zero1, without PEFT's config saying so."""


def save(base: Path, folder: Path, stage: int, without_frozen: bool, more: dict[str, Any]) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(3)
    model = T5ForConditionalGeneration.from_pretrained(base)
    # a LoRA rank that isn't divisible by the world size: ZeRO-3 pads every parameter
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM")
    config.base_model_name_or_path = str(base)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.get_parameter(EXTRA_PARAMETER).requires_grad = folder.name == "zero1"
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    groups = [
        {"params": [value for name, value in trained if "lora_A" in name], "weight_decay": 0.1},
        {"params": [value for name, value in trained if "lora_A" not in name], "weight_decay": 0.0, "lr": 3e-2},
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": ADAM,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **more,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=settings)
    rank = int(os.environ["RANK"])
    for step in range(STEPS):
        ids = torch.randint(0, 1000, (2, 7), generator=torch.Generator().manual_seed(10 * step + rank))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(folder, exclude_frozen_parameters=without_frozen)
    masters = {}
    for name, value in engine.module.named_parameters():
        if value.requires_grad:
            whole = safe_get_full_fp32_param(value) if stage else value.detach()
            masters[name.replace(".default", "")] = whole.reshape(getattr(value, "ds_shape", value.shape)).clone()
    if rank == 0:
        save_file(
            {EXTRA_PARAMETER: masters.pop(EXTRA_PARAMETER)} if EXTRA_PARAMETER in masters else {},
            folder / "extra.safetensors",
        )
        save_file(masters, folder / "masters.safetensors")
        config.inference_mode = True
        config.save_pretrained(folder)
    engine.destroy()


def save_all(tied_base: str, untied_base: str, output: str) -> None:
    """Save the checkpoints of all cases, one folder per case."""
    deepspeed = import_deepspeed(on_cpu=True)  # don't compile an all-reduce, which takes a minute or two
    tied, untied, out = map(Path, (tied_base, untied_base, output))
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    done, skipped = [], {}
    for name, (stage, is_tied, without_frozen, more) in CASES.items():
        try:
            save(tied if is_tied else untied, out / name, stage, without_frozen, more)
            done.append(name)
        except (ValueError, RuntimeError, AssertionError) as error:
            if "fp16" not in more:  # some CPUs don't support fp16
                raise
            skipped[name] = str(error)
    torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        (out / "done.json").write_text(json.dumps({"done": done, "skipped": skipped}))
    torch.distributed.destroy_process_group()
