"""Gradient checkpointing of a transformers model."""

from typing import Any


def enable_checkpointing(model: Any, reentrant: bool) -> None:
    new = hasattr(model, "activation_checkpointing_enable")  # the method's name since transformers 5.23
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)(
        {"use_reentrant": reentrant}
    )
