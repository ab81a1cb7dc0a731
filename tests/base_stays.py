"""A worker for test_train.py: trains, then compares every frozen weight of the live model with the base's file.

torchrun … tests/base_stays.py SETTINGS_YAML RESULT_JSON
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from t5tune.settings import TrainSettings, load_settings
from t5tune.train import train
from t5tune.training.trainer import T5Trainer

ALIASES = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}


def compare(trainer: T5Trainer, file: dict[str, torch.Tensor], when: str) -> dict[str, list[str]]:
    """Names of the weights that equal the file's, and of those that differ; 4-bit ones are left out."""
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


def main() -> None:
    settings, _ = load_settings(TrainSettings, file=sys.argv[1])
    file = load_file(Path(settings.model_name_or_path) / "model.safetensors")
    results: list[dict[str, list[str]]] = []
    run = T5Trainer.train

    def watched(self: T5Trainer, *arguments: Any, **options: Any) -> Any:
        results.append(compare(self, file, "before"))
        output = run(self, *arguments, **options)
        results.append(compare(self, file, "after"))
        return output

    T5Trainer.train = watched
    train(settings)
    if int(sys.argv[3]) == 0 or results[0]["different"]:
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    import os

    sys.argv.append(os.environ.get("RANK", "0"))
    main()
