"""Process group of the ranks that train or evaluate together."""

import io
import os
import threading
import time
from collections.abc import Iterator
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
from t5tune.distributed.collectives import RENDEZVOUS_HINT, is_distributed, report_rendezvous_errors, wait_until
from t5tune.distributed.deepspeed_build import remove_stale_locks
from t5tune.distributed.launcher import find_free_port
from t5tune.distributed.signals import StopRequest, write_stderr
from t5tune.distributed.world import World
from t5tune.errors import RankLost, SettingsError, Stopped
from t5tune.model.device import DOCTOR_HINT, choose_device, read_nvidia_driver
from t5tune.progress import Note, Report, silent
from t5tune.settings.groups.processes import PartitionSettings, ProcessSettings, RankSettings

SECONDS_FOR_WATCH = 60  # more than the rank watch takes to name a rank, after the timeout
SECONDS_BEFORE_NOTE = 20.0  # of waiting
SECONDS_BETWEEN_POLLS = 0.5  # for a signal, while a thread connects to rank 0
SECONDS_FOR_OUTCOME = 5.0  # for all ranks to read the outcome before rank 0, which has the store, may exit
# keys in the store: the number of ranks that arrived, whether they start, and the number of ranks that know it
HERE, OUTCOME, TOLD = "t5tune/here", "t5tune/outcome", "t5tune/told"
STARTED, STOPPED = "started", "stopped"


class Waiting:
    """A rank's wait until all ranks have arrived. The first signal ends it, since there is nothing to save yet.

    Args:
        timeout: in seconds.
        report: rank 0's. All ranks but rank 0 report to stderr, since they may be waiting for rank 0.
        stop: the caller's request to stop; None: the caller lets signals interrupt the wait.
    """

    def __init__(self, world: World, timeout: float, report: Report = silent, stop: StopRequest | None = None) -> None:
        self.world = world
        self.timeout = timeout
        self.report = report
        self.stop = stop or StopRequest()
        self._since = time.monotonic()
        self._is_noted = False

    def make_error(self) -> Stopped:
        return self.stop.make_error("before all ranks had started")

    def measure(self) -> float:
        """Return the seconds of waiting so far, and report a long wait once."""
        seconds = time.monotonic() - self._since
        if seconds > SECONDS_BEFORE_NOTE and not self._is_noted:
            self._is_noted = True
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            line = f"rank {self.world.rank}: waiting for the other ranks at {place}"
            if self.world.rank == 0:
                self.report(Note(line))
            else:
                write_stderr(line)
        return seconds


@contextmanager
def join_process_group(
    world: World,
    processes: ProcessSettings | PartitionSettings,
    chosen: str | None,
    report: Report,
    stop: StopRequest | None = None,
) -> Iterator[torch.device]:
    """Choose the device, and join a process group for this block if there are several ranks or DeepSpeed.

    Args:
        chosen: the device that the user chose; None: a GPU, if there is any.
        stop: see `Waiting`.

    Yields:
        The torch device to compute on.

    Raises:
        RankLost: a rank can't be reached, or hasn't started in time.
        Stopped: a signal arrived before all ranks had joined.
    """
    device = _choose_device(world, processes, chosen, report)
    # the rank watch must name a lost rank before NCCL's watchdog aborts the ranks that wait for it
    extra = SECONDS_FOR_WATCH if device.type == "cuda" else 0
    timeout = timedelta(seconds=processes.process_group_timeout + extra)
    failed = True
    with restore_environment(), use_default_timeout(timeout):
        try:
            waiting = Waiting(world, timeout.total_seconds(), report, stop)
            _join(world, device, timeout, processes.deepspeed is not None, waiting)
            yield device
            failed = False
        except Stopped:  # all ranks agreed to stop or haven't joined, so no rank waits in a collective
            failed = False
            raise
        finally:
            # Without an orderly exit, torchrun would restart a finished job. But a rank that fails must exit at once:
            # destroying the group would wait for ranks that wait in a collective.
            if is_distributed() and not (failed and world.size > 1):
                dist.destroy_process_group()


def _choose_device(world: World, processes: RankSettings, chosen: str | None, report: Report) -> torch.device:
    """Choose the device of this rank, and warn if the CPU is used despite an NVIDIA driver."""
    on_cpu = processes.num_processes is not None
    device: torch.device = choose_device(on_cpu, world.local_rank, chosen)
    if device.type == "cpu" and not on_cpu and chosen is None and (driver := read_nvidia_driver()):
        problem = f"torch can't use the NVIDIA driver ({driver})"
        report(Note(f"{problem}: computing on the CPU; {DOCTOR_HINT}", warning=True))
    return device


def choose_backend(device_type: str) -> str:
    """Choose the backends of the process group.

    On GPUs, CPU tensors get gloo: then objects, barriers and the stop flag don't wait for the GPU, and a lost rank
    raises an error.
    """
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def _join(world: World, device: Any, timeout: timedelta, deepspeed: bool, waiting: Waiting) -> None:
    if world.launched:
        os.environ.update(world.to_environment())
    elif deepspeed:  # needs a rendezvous even for a single process
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update({**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": str(find_free_port())})
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        # accelerate and DeepSpeed use it as the GPU's index, which is 0 if each process sees only one GPU
        os.environ["LOCAL_RANK"] = str(device.index)
    if deepspeed:
        for lock in remove_stale_locks():
            waiting.report(Note(f"{lock}: removed the lock of an interrupted build"))
    if world.size > 1 or deepspeed:
        with report_rendezvous_errors():
            _init_process_group(world, device, timeout, waiting)
    if deepspeed:
        library = import_deepspeed(on_cpu=device.type == "cpu")
        with redirect_stdout(io.StringIO()):  # stdout is for results only
            library.init_distributed(timeout=timeout, verbose=False)  # takes the process group that exists


def _init_process_group(world: World, device: Any, timeout: timedelta, waiting: Waiting) -> None:
    store, rank, size = _find_store(timeout, waiting)
    store.set_timeout(timeout)
    # separate keys: under torchrun a later run of the same processes gets the same store, with gloo's old addresses
    store = PrefixStore(f"t5tune/{store.add(f't5tune/joins/{rank}', 1)}", store)
    wait_for_all_ranks(store, size, waiting)
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


def _find_store(timeout: timedelta, waiting: Waiting) -> tuple[Store, int, int]:
    """Connect to the rendezvous store. Return (store, rank of this process, number of ranks)."""
    found: list[tuple[Store, int, int] | Exception] = []

    def connect() -> None:
        try:
            found.append(next(rendezvous("env://", timeout=timeout)))
        except Exception as error:
            found.append(error)

    # in a thread: C++ code waits for rank 0, and on rank 0 for all ranks, which would keep Python from handling signals
    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    while True:
        connecting.join(SECONDS_BETWEEN_POLLS)
        if not connecting.is_alive():
            break
        if waiting.stop.is_set:
            raise waiting.make_error()
        waiting.measure()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def wait_for_all_ranks(store: Store, size: int, waiting: Waiting) -> None:
    """Wait until all ranks have arrived, or a signal asks a rank to stop. Every rank calls this.

    The first rank that finds all ranks here, or a signal, decides for all ranks: otherwise a rank could continue to a
    collective and wait there for a stopped rank.

    Raises:
        RankLost: some ranks haven't arrived in time.
        Stopped: a signal asked a rank to stop; every rank that has arrived raises it.
    """
    store.add(HERE, 1)

    def is_over() -> bool:
        number = store.add(HERE, 0)
        if waiting.stop.is_set:
            store.compare_set(OUTCOME, "", STOPPED)
        elif number == size:
            store.compare_set(OUTCOME, "", STARTED)
        elif waiting.measure() > waiting.timeout:
            problem = f"rank {waiting.world.rank}: only {number} of {size} ranks have started"
            raise RankLost(problem, hint=RENDEZVOUS_HINT)
        return bool(store.check([OUTCOME]))

    try:
        wait_until(is_over)
        is_started = store.get(OUTCOME).decode() == STARTED
        store.add(TOLD, 1)
        if waiting.world.rank == 0:  # the store ends with rank 0, perhaps at once: all ranks must have read it
            end = time.monotonic() + SECONDS_FOR_OUTCOME
            wait_until(lambda: store.add(TOLD, 0) >= store.add(HERE, 0) or time.monotonic() > end)
    except RuntimeError:  # rank 0 may have stopped already
        if not waiting.stop.is_set:
            raise
        is_started = False
    if not is_started:
        raise waiting.make_error()


def refuse_shared_gpus(store: Store, rank: int, size: int, gpu: str) -> None:
    """Check that no two ranks share a GPU (`gpu` is a UUID): NCCL would fail later, without a reason.

    Every rank calls this, and raises the same SettingsError.
    """
    store.set(f"t5tune/gpus/{rank}", gpu)
    gpus = [store.get(f"t5tune/gpus/{other}").decode() for other in range(size)]
    for second, used in enumerate(gpus):
        if (first := gpus.index(used)) != second:
            raise SettingsError(
                f"ranks {first} and {second} have the same GPU, {used}",
                hint="start at most one process per GPU on a machine, and show each process all GPUs "
                "(CUDA_VISIBLE_DEVICES; srun --gpus-per-node) or a separate GPU (srun --gpus-per-task=1)",
            )
