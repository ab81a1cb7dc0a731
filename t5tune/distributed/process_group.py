"""Process group of a training run's ranks."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from t5tune.compat.deepspeed_patches import import_deepspeed
from t5tune.compat.python_patches import restore_environment
from t5tune.compat.torch_patches import use_default_timeout
from t5tune.distributed.collectives import is_distributed, report_rendezvous_errors
from t5tune.distributed.deepspeed_build import remove_stale_locks
from t5tune.distributed.launcher import find_free_port
from t5tune.distributed.world import World
from t5tune.errors import Stopped
from t5tune.model.device import DOCTOR_HINT, choose_device, keep_freed_memory, read_nvidia_driver
from t5tune.progress import Note, Report
from t5tune.settings import TrainSettings


@contextmanager
def join_process_group(world: World, settings: TrainSettings, report: Report) -> Iterator[Any]:
    """Choose the device, and join a process group for this block if there are several ranks or DeepSpeed.

    Yields:
        The torch device to train on.
    """
    device = choose_device(settings.use_cpu or settings.num_processes is not None, world.local_rank)
    if device.type == "cpu":
        keep_freed_memory()
        if not settings.use_cpu and settings.num_processes is None and (driver := read_nvidia_driver()):
            problem = f"torch can't use the NVIDIA driver ({driver})"
            report(Note(f"{problem}: training on the CPU; {DOCTOR_HINT}", warning=True))
    timeout = timedelta(seconds=settings.process_group_timeout)
    failed = True
    with restore_environment(), use_default_timeout(timeout):
        try:
            _join(world, "nccl" if device.type == "cuda" else "gloo", timeout, settings.deepspeed is not None, report)
            yield device
            failed = False
        except Stopped:  # all ranks agreed to stop, so none is waiting in a collective
            failed = False
            raise
        finally:
            # Without an orderly exit torchrun would restart a job that has finished. But a rank that fails must exit
            # at once: the others may be waiting in a collective, and destroying the group would wait for them.
            if is_distributed() and not (failed and world.size > 1):
                dist.destroy_process_group()


def _join(world: World, backend: str, timeout: timedelta, deepspeed: bool, report: Report) -> None:
    if world.launched:
        os.environ.update(world.to_environment())
    elif deepspeed:  # needs a rendezvous even for a single process
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update({**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": str(find_free_port())})
    if deepspeed:
        for lock in remove_stale_locks():
            report(Note(f"{lock}: removed the lock of an interrupted build"))
        library = import_deepspeed(on_cpu=backend == "gloo")
        with redirect_stdout(io.StringIO()), report_rendezvous_errors():  # stdout is for results only
            library.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    elif world.size > 1:
        with report_rendezvous_errors():
            dist.init_process_group(backend, timeout=timeout)
