"""Apply a learning rate, weight decay or schedule that was changed since the checkpoint that a run resumes from."""

from typing import Any

from torch.optim.lr_scheduler import LambdaLR


def apply_rates(
    args: Any,
    optimizer: Any,
    lr_scheduler: Any,
    engine: Any,
    before: tuple[float | None, float | None],
    weight_decays: list[float] | None,
) -> None:
    """Apply the Trainer's arguments to the states of its optimizer and schedule, which were just loaded.

    Args:
        engine: DeepSpeed's; None without DeepSpeed.
        before: learning rate and weight decay of the checkpoint.
        weight_decays: of the optimizer's groups; None: DeepSpeed's config has it.
    """
    # the state of ZeRO-1 and 2 also contains max_grad_norm
    if engine is not None and hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()
    groups, (peak, decay) = optimizer.param_groups, before
    schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps DeepSpeed's
    if peak not in (None, args.learning_rate):
        factor = args.learning_rate / peak  # LoRA+ has two rates
        for name in ("base_lrs", "_init_lrs", "_last_lr"):  # schedules by metric have no first one
            if hasattr(schedule, name):
                setattr(schedule, name, [rate * factor for rate in getattr(schedule, name)])
        for group in groups:
            group |= {name: group[name] * factor for name in ("lr", "initial_lr") if name in group}
    if isinstance(schedule, LambdaLR):  # the states have the rate of the previous schedule for the next step
        schedule._last_lr = [
            rate * compute_factor(schedule.last_epoch)
            for rate, compute_factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(groups, schedule._last_lr, strict=True):
            group["lr"] = rate
    if decay not in (None, args.weight_decay):
        groups = groups if engine is not None else [group for group in groups if group["params"]]
        decays = weight_decays or [args.weight_decay] * len(groups)
        for group, value in zip(groups, decays, strict=True):
            group["weight_decay"] = value
