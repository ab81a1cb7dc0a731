"""Patches of DeepSpeed, which last for the process."""

import io
from contextlib import redirect_stdout
from typing import Any


def import_deepspeed(on_cpu: bool) -> Any:
    """Import DeepSpeed without its output and, on CPUs, without its shared-memory all-reduce.

    On import DeepSpeed 0.19 prints the ops that it found to stdout, which is for results only. When a process group
    with gloo is made, it compiles an all-reduce (`build_shm_op`), which takes a minute and needs a compiler. Only
    inference calls it (deepspeed.comm.inference_all_reduce); training on CPUs uses gloo in any case.
    https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/comm/torch.py#L47
    """
    with redirect_stdout(io.StringIO()):
        import deepspeed

        if on_cpu:
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
