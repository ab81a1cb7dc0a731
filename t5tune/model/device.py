"""Where to compute."""

import os
from typing import Any


def choose_device(use_cpu: bool, local_rank: int = 0) -> Any:
    """The GPU of this rank, or the CPU."""
    import torch

    if use_cpu or not torch.cuda.is_available():
        # DeepSpeed, which transformers imports, else looks for an accelerator and complains that there is none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
