"""DeepSpeed's own view of the optimizer in one of its checkpoints: its conversion to a universal checkpoint."""

import argparse
from pathlib import Path
from typing import Any

import torch


def read_optimizer(folder: Path, output: Path) -> dict[str, Any]:
    """Read the weights and moments by parameter, as vectors, the step counts, and each group's hyperparameters.

    Args:
        folder: a folder global_stepN.
        output: a folder for the universal checkpoint, which doesn't exist yet.
    """
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    paths = {"input_folder": str(folder), "output_folder": str(output)}
    ds_to_universal.main(argparse.Namespace(**options, **paths, inject_missing_state=True))
    state = torch.load(output / "zero" / "optimizer_state.pt", weights_only=False)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    steps = {float(group["step"]) for group in state.get("optimizer_state_dict", {}).get("state", {}).values()}
    values = {}
    # a weight with a second name has its fp32 values under both
    for parameter in (path.parent for path in (output / "zero").glob("*/exp_avg.pt")):
        for path in parameter.glob("*.pt"):
            value = torch.load(path, weights_only=False)
            if path.stem == "step":
                steps.add(float(value))
            else:
                vector = (value["param"] if isinstance(value, dict) else value).reshape(-1)
                values[f"{parameter.name} {path.stem}"] = vector.tolist()
    return {"groups": groups, "steps": steps, "values": values}
