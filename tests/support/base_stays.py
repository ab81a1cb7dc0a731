"""Called in each rank of a run: compare every frozen weight of the live model with the base's file.

Also check that torch's linear function is still its own.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from t5tune.training.trainer import T5Trainer

LINEAR = torch.nn.functional.linear
ALIASES = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}


def compare(trainer: T5Trainer, file: dict[str, torch.Tensor], when: str) -> dict[str, list[str]]:
    """Return the names of the weights that equal those of the file, and of those that differ, without 4-bit ones."""
    import deepspeed

    equal, different = [], []
    for name, parameter in trainer.model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or getattr(parameter, "quant_state", None) is not None:
            continue
        own = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".token_adapter", "")
        own = ALIASES.get(own, own)
        expected = file.get(own, file["shared.weight"])
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            same = torch.equal(parameter.detach().cpu(), expected.to(parameter.dtype))
        (equal if same else different).append(f"{when} {own}")
    return {"equal": equal, "different": different}


def record_base_weights(base: str, output: str) -> None:
    """From here on, write the results of `compare` before and after training to `output`.

    They are those of rank 0, or of a rank whose weights differ.
    """
    file = load_file(Path(base) / "model.safetensors")
    results: list[dict[str, list[str]]] = []
    run = T5Trainer.train

    def train_and_compare(self: T5Trainer, *arguments: Any, **options: Any) -> Any:
        results.append(compare(self, file, "before"))
        done = run(self, *arguments, **options)
        results.append(compare(self, file, "after"))
        if torch.nn.functional.linear is not LINEAR:
            results[-1]["different"].append("torch.nn.functional.linear")
        if int(os.environ.get("RANK", "0")) == 0 or any(result["different"] for result in results):
            Path(output).write_text(json.dumps(results))
        return done

    T5Trainer.train = train_and_compare
