"""Called in each rank of a run: record its examples, its base, and the weights that ZeRO-3 gathers."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from t5tune.model.loss import IGNORED_LABEL, TargetLoss
from t5tune.training.trainer import T5Trainer
from tests.support.ranks.faults import call_before_steps, get_rank

LINEAR = torch.nn.functional.linear
ALIASES = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}


def record_to(folder: str) -> None:
    """From here on, each rank writes the targets of its micro-batches to a file in the folder."""
    path = Path(folder, f"rank-{get_rank()}.jsonl")

    def record(trainer: T5Trainer, inputs: dict[str, Any]) -> None:
        rows = [[token for token in row if token != IGNORED_LABEL] for row in inputs["labels"].tolist()]
        with open(path, "a") as file:
            file.write(json.dumps([trainer.state.global_step + 1, [row for row in rows if row]]) + "\n")

    call_before_steps(record)


def read_recorded(folder: Path) -> dict[int, list[list[int]]]:
    """Read the records of `record_to`: step -> sorted targets of its examples, over all ranks and micro-batches."""
    steps = defaultdict(list)
    for path in folder.iterdir():
        for step, rows in map(json.loads, path.read_text().splitlines()):
            steps[step] += rows
    return {step: sorted(rows) for step, rows in sorted(steps.items())}


def record_head_status(output: str) -> None:
    """From here on, append (place, status and shape of the head's weight) to a file of this rank, as JSON lines.

    Args:
        output: path of the file, to which the rank is appended.
    """
    path = Path(f"{output}{os.environ['RANK']}")
    compute, step = TargetLoss.forward, T5Trainer.training_step

    def record(place: str, weight: Any) -> None:
        with path.open("a", encoding="utf-8") as file:
            print(json.dumps([place, weight.ds_status.name, list(weight.shape)]), file=file)

    def compute_and_record(self: TargetLoss, hidden: Any, labels: Any, head: Any, *arguments: Any) -> Any:
        record("loss", head.weight)
        return compute(self, hidden, labels, head, *arguments)

    def step_and_record(self: T5Trainer, model: Any, *arguments: Any, **options: Any) -> Any:
        base = self.model.base_model.model
        weight = base.lm_head.weight  # read here: within a forward, reading it would gather it
        hooks = [
            base.encoder.block[0].register_forward_hook(lambda *_: record("encoder", weight)),
            base.decoder.final_layer_norm.register_forward_hook(lambda *_: record("decoder", weight)),
        ]
        loss = step(self, model, *arguments, **options)
        record("after", weight)
        for hook in hooks:
            hook.remove()
        return loss

    TargetLoss.forward = compute_and_record  # type: ignore[method-assign]
    T5Trainer.training_step = step_and_record  # type: ignore[method-assign]


def record_hooks(file: str) -> None:
    """From here on, let rank 0 write the names of modules with hooks of ZeRO-3, once a step has begun, to this file."""

    def record(trainer: T5Trainer, _: object) -> None:
        if trainer.is_world_process_zero():
            hooked = [name for name, module in trainer.model.named_modules() if module._forward_pre_hooks]
            Path(file).write_text(json.dumps(hooked))

    call_before_steps(record)


def compare(trainer: T5Trainer, file: dict[str, torch.Tensor], when: str) -> dict[str, list[str]]:
    """Return the names of the live weights that equal the file's, and of those that differ, without 4-bit ones."""
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

    They come from rank 0, or from a rank whose weights differ. torch's linear function must also be unchanged.
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
        if get_rank() == 0 or any(result["different"] for result in results):
            Path(output).write_text(json.dumps(results))
        return done

    T5Trainer.train = train_and_compare
