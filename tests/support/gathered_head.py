"""Record when ZeRO-3 has gathered the head's weight."""

import json
import os
from pathlib import Path
from typing import Any

from t5tune.model.loss import TargetLoss
from t5tune.training.trainer import T5Trainer


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
    from t5tune.training.trainer import T5Trainer

    run_micro_step = T5Trainer.training_step

    def record(self: T5Trainer, *arguments: Any, **options: Any) -> Any:
        if self.is_world_process_zero():
            hooked = [name for name, module in self.model.named_modules() if module._forward_pre_hooks]
            Path(file).write_text(json.dumps(hooked))
        return run_micro_step(self, *arguments, **options)

    T5Trainer.training_step = record  # type: ignore[method-assign]
