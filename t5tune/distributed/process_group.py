"""Process group of the ranks that train or evaluate together."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from t5tune.compat.deepspeed_patches import import_deepspeed
from t5tune.compat.python_patches import restore_environment
from t5tune.compat.torch_patches import use_default_timeout
from t5tune.distributed.collectives import is_distributed, report_rendezvous_errors
from t5tune.distributed.deepspeed_build import remove_stale_locks
from t5tune.distributed.launcher import find_free_port
from t5tune.distributed.world import World
from t5tune.errors import SettingsError, Stopped
from t5tune.model.device import DOCTOR_HINT, choose_device, read_nvidia_driver
from t5tune.progress import Note, Report
from t5tune.settings import EvaluateSettings, TrainSettings

SECONDS_FOR_WATCH = 60  # more than the rank watch takes to name a rank, after the timeout


@contextmanager
def join_process_group(
    world: World, settings: TrainSettings | EvaluateSettings, report: Report
) -> Iterator[torch.device]:
    """Choose the device, and join a process group for this block if there are several ranks or DeepSpeed.

    Yields:
        The torch device to compute on.
    """
    device = _choose_device(world, settings, report)
    # NCCL's watchdog aborts a rank that waits for a lost one; the rank watch is to name the lost one before that
    extra = SECONDS_FOR_WATCH if device.type == "cuda" else 0
    timeout = timedelta(seconds=settings.process_group_timeout + extra)
    failed = True
    with restore_environment(), use_default_timeout(timeout):
        try:
            _join(world, device, timeout, settings.deepspeed is not None, report)
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


def _choose_device(world: World, settings: TrainSettings | EvaluateSettings, report: Report) -> torch.device:
    """Choose the device of this rank, and warn if that is the CPU although there is an NVIDIA driver."""
    name = settings.device if isinstance(settings, EvaluateSettings) else None
    chooses_cpu = settings.use_cpu or settings.num_processes is not None or name is not None
    device: torch.device = choose_device(settings.use_cpu or settings.num_processes is not None, world.local_rank, name)
    if device.type == "cpu" and not chooses_cpu and (driver := read_nvidia_driver()):
        what = "training" if isinstance(settings, TrainSettings) else "evaluating"
        problem = f"torch can't use the NVIDIA driver ({driver})"
        report(Note(f"{problem}: {what} on the CPU; {DOCTOR_HINT}", warning=True))
    return device


def choose_backend(device_type: str) -> str:
    """Choose the backends of the process group.

    On GPUs, tensors of the CPU have a backend of their own: objects, barriers and the stop flag then don't wait for the
    GPU, and a lost rank raises an error there.
    """
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def _join(world: World, device: Any, timeout: timedelta, deepspeed: bool, report: Report) -> None:
    if world.launched:
        os.environ.update(world.to_environment())
    elif deepspeed:  # needs a rendezvous even for a single process
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update({**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": str(find_free_port())})
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        # accelerate and DeepSpeed take it as the index of the GPU; if each process sees only one GPU, that is 0
        os.environ["LOCAL_RANK"] = str(device.index)
    if deepspeed:
        for lock in remove_stale_locks():
            report(Note(f"{lock}: removed the lock of an interrupted build"))
    if world.size > 1 or deepspeed:
        with report_rendezvous_errors():
            _init_process_group(world, device, timeout)
    if deepspeed:
        library = import_deepspeed(on_cpu=device.type == "cpu")
        with redirect_stdout(io.StringIO()):  # stdout is for results only
            library.init_distributed(timeout=timeout, verbose=False)  # takes the process group that exists


def _init_process_group(world: World, device: Any, timeout: timedelta) -> None:
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    # keys of its own: under torchrun a later run of the same processes gets the same store, with gloo's old addresses
    store = PrefixStore(f"t5tune/{store.add(f't5tune/joins/{rank}', 1)}", store)
    uses_gpus = device.type == "cuda" and world.size > 1
    if uses_gpus:
        refuse_shared_gpus(store, rank, size, str(torch.cuda.get_device_properties(device).uuid))
    dist.init_process_group(
        choose_backend(device.type),
        timeout=timeout,
        store=store,
        rank=rank,
        world_size=size,
        device_id=device if uses_gpus else None,
    )


def refuse_shared_gpus(store: Store, rank: int, size: int, gpu: str) -> None:
    """Check that each rank has a GPU of its own: NCCL would fail later, without saying why. Every rank calls this.

    Args:
        gpu: the UUID of this rank's GPU.

    Raises:
        SettingsError: two ranks have the same GPU; every rank raises it.
    """
    store.set(f"t5tune/gpus/{rank}", gpu)
    gpus = [store.get(f"t5tune/gpus/{other}").decode() for other in range(size)]
    if (shared := find_shared_gpu(gpus)) is not None:
        raise SettingsError(
            f"ranks {shared[0]} and {shared[1]} have the same GPU, {gpus[shared[0]]}",
            hint="start at most as many processes on a machine as it has GPUs, and show each process all of them "
            "(CUDA_VISIBLE_DEVICES; srun --gpus-per-node) or one of its own (srun --gpus-per-task=1)",
        )


def find_shared_gpu(gpus: Sequence[str]) -> tuple[int, int] | None:
    """Find two ranks with the same GPU, from the UUID of each rank's: ["a", "b", "a"] -> (0, 2)."""
    for rank, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) != rank:
            return first, rank
    return None
