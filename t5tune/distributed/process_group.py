"""The group that the ranks of a run are in."""

import io
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

from t5tune.distributed.collectives import meeting
from t5tune.distributed.deepspeed_build import leave_out_shared_memory, release_dead_locks
from t5tune.distributed.world import World
from t5tune.errors import Stopped
from t5tune.model.device import choose_device, keep_freed_memory, nvidia_driver
from t5tune.progress import Note, Report
from t5tune.settings import TrainSettings
from t5tune.training.validate import DOCTOR


@contextmanager
def process_group(world: World, settings: TrainSettings, report: Report) -> Iterator[Any]:
    """Choose the device and, where there are several processes or DeepSpeed, be in their group for a while."""
    device = choose_device(settings.use_cpu or settings.num_processes is not None, world.local_rank)
    if device.type == "cpu":
        keep_freed_memory()
        if not settings.use_cpu and settings.num_processes is None and (driver := nvidia_driver()):
            report(
                Note(f"torch can't use the NVIDIA driver ({driver}): this trains on the CPU; {DOCTOR}", warning=True)
            )
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=settings.process_group_timeout)
    environment = dict(os.environ)
    import torch.distributed as dist

    failed = True
    try:
        if world.launched:
            os.environ.update(world.environment())
        if settings.deepspeed is not None:
            if not world.launched:
                _meet_oneself()
            for lock in release_dead_locks():
                report(Note(f"{lock}: left by a compilation that was cut off; removed"))
            # it announces ops on stdout
            with redirect_stdout(io.StringIO()):
                import deepspeed

                if device.type == "cpu":
                    leave_out_shared_memory()
                with meeting():
                    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        elif world.size > 1:
            with meeting():
                dist.init_process_group(backend, timeout=timeout)
        try:
            yield device
        except Stopped:  # all ranks leave together
            failed = False
            raise
        failed = False
    finally:
        # Left in order, or torchrun restarts a job that has finished. But a rank that failed among others goes
        # at once: they may be waiting in a collective, and would hold it here.
        if dist.is_available() and dist.is_initialized() and not (failed and world.size > 1):
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)


def _meet_oneself() -> None:
    """DeepSpeed wants a rendezvous even for a process that is alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | address)
