"""Joining the process group: which GPU a rank takes, with which backends, and who must not share one."""

import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from t5tune.distributed import process_group
from t5tune.distributed.launcher import find_free_port
from t5tune.distributed.process_group import (
    SECONDS_FOR_WATCH,
    Waiting,
    choose_backend,
    join_process_group,
    refuse_shared_gpus,
    wait_for_all_ranks,
)
from t5tune.distributed.signals import StopRequest
from t5tune.distributed.world import World
from t5tune.errors import RankLost, SettingsError, Stopped
from t5tune.progress import silent
from t5tune.settings import TrainSettings
from tests.support.processes.runs import Running, send_signal, start_two_ranks


@pytest.fixture
def show_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[torch.device]]:
    """Pretend that this process sees some GPUs. Returns the devices that it has set as the current one."""

    def show(count: int) -> list[torch.device]:
        chosen: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return show


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 3, 3), (1, 3, 0), (4, 0, 0), (2, 3, 1)])
def test_a_rank_takes_its_gpu_among_visible_gpus(
    visible: int,
    local_rank: int,
    index: int,
    show_gpus: Callable[[int], list[torch.device]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    chosen = show_gpus(visible)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(local_rank)}.items():
        monkeypatch.setenv(name, value)
    settings = TrainSettings(model_name_or_path="pocket", data_path=["x"], output_dir=tmp_path)
    with join_process_group(World.from_environment(), settings, None, silent) as device:
        assert device == torch.device("cuda", index)
        assert chosen == [device]
        assert os.environ["LOCAL_RANK"] == str(index)  # accelerate and DeepSpeed take this GPU
    assert os.environ["LOCAL_RANK"] == str(local_rank)


def test_a_group_of_gpus_has_a_cpu_backend() -> None:
    assert choose_backend("cuda") == "cpu:gloo,cuda:nccl"
    assert choose_backend("cpu") == "gloo"


def test_nccl_gets_the_gpu_and_a_longer_timeout(
    show_gpus: Callable[[int], list[torch.device]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the GPU, NCCL would guess it from the rank. Its timeout is longer than the rank watch's."""
    show_gpus(2)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    group: dict[str, Any] = {}
    monkeypatch.setattr(process_group, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 3, 4)]))
    monkeypatch.setattr(process_group, "wait_for_all_ranks", lambda *_: None)
    monkeypatch.setattr(process_group, "refuse_shared_gpus", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: group.update(options))
    settings = TrainSettings(model_name_or_path="pocket", data_path=["x"], output_dir=tmp_path)
    with join_process_group(World.from_environment(), settings, None, silent):
        assert group["device_id"] == torch.device("cuda", 1)
        assert group["timeout"].total_seconds() == settings.process_group_timeout + SECONDS_FOR_WATCH


def join_together(gpus: list[str]) -> list[str | None]:
    """Let ranks check their GPUs together. Returns what each of them raises."""
    store = dist.HashStore()

    def check(rank: int) -> str | None:
        try:
            refuse_shared_gpus(store, rank, len(gpus), gpus[rank])
        except SettingsError as error:
            return error.message
        return None

    with ThreadPoolExecutor(len(gpus)) as pool:
        return list(pool.map(check, range(len(gpus))))


def test_every_rank_refuses_a_gpu_that_two_of_them_have() -> None:
    assert join_together(["GPU-1", "GPU-2", "GPU-3"]) == [None] * 3
    assert join_together(["GPU-1", "GPU-2", "GPU-2"]) == ["ranks 1 and 2 have the same GPU, GPU-2"] * 3
    assert join_together(list("abcba")) == ["ranks 1 and 3 have the same GPU, b"] * 5


def meet(*stops: StopRequest, store: dist.Store | None = None, size: int | None = None) -> list[str]:
    """Let ranks with these requests to stop wait for each other. Returns how each of them ended."""
    store = store or dist.HashStore()

    def wait(rank: int) -> str:
        try:
            wait_for_all_ranks(store, size or len(stops), Waiting(World(rank, size=len(stops)), 1.0, stop=stops[rank]))
        except (RankLost, Stopped) as error:
            return error.message
        return "started"

    with ThreadPoolExecutor(len(stops)) as pool:
        return list(pool.map(wait, range(len(stops))))


def make_stop(*numbers: signal.Signals) -> StopRequest:
    stop = StopRequest()
    for number in numbers:
        stop.receive(number)
    return stop


def test_all_ranks_start_or_all_of_them_stop() -> None:
    assert meet(make_stop(), make_stop(), make_stop()) == ["started"] * 3
    by_signal, by_other = (
        f"stopped by {what} before all ranks had started" for what in ("SIGTERM", "a signal to another rank")
    )
    assert meet(make_stop(), make_stop(signal.SIGTERM), size=3) == [by_other, by_signal]
    store = dist.HashStore()
    assert meet(make_stop(), make_stop(), store=store) == ["started"] * 2
    # a signal after the other ranks have started: training handles it on all ranks
    assert meet(make_stop(signal.SIGTERM), store=store) == ["started"]


def test_a_missing_rank_is_an_error_after_the_timeout() -> None:
    assert meet(make_stop(), make_stop(), size=3) == [
        f"rank {rank}: only 2 of 3 ranks have started" for rank in range(2)
    ]


JOINING = """
import sys
from t5tune.distributed import process_group
from t5tune.distributed.signals import handle_signals, write_stderr
from t5tune.distributed.world import World
from t5tune.errors import RankLost, Stopped
from t5tune.settings import TrainSettings

process_group.SECONDS_BEFORE_NOTE = 0
settings = TrainSettings(model_name_or_path="pocket", data_path="pocket", output_dir="run", use_cpu=True)
join, world = process_group.join_process_group, World.from_environment()
try:
    with handle_signals() as stop, join(world, settings, "cpu", lambda note: write_stderr(note.text), stop):
        pass
except (RankLost, Stopped) as error:
    write_stderr(error.message)
    write_stderr(error.hint or "")
    process_group.os._exit(error.exit_code)  # as the command line exits under a launcher
"""


@pytest.mark.slow
def test_a_missing_network_interface_is_an_error_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope")
    ranks = start_two_ranks(JOINING, tmp_path)
    with ranks[0], ranks[1]:
        assert [rank.wait() for rank in ranks] == [1, 1], ranks[1].log.read_text()
    for number, rank in enumerate(ranks):
        *_, message, hint = rank.log.read_text().splitlines()
        assert message.startswith(f"rank {number}: can't connect to the other ranks: ")
        assert message.endswith(" nope")
        assert hint.startswith("set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[0], [1], [1, 0]])
def test_a_waiting_rank_says_so_and_stops_at_a_signal(ranks: list[int], tmp_path: Path) -> None:
    """Rank 0 waits for all ranks, and rank 1 for rank 0. If both are there, they wait for rank 2."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(find_free_port())}
    with ExitStack() as stack:
        command, started = [sys.executable, "-c", JOINING], []
        for rank in ranks:
            variables = {**place, "WORLD_SIZE": "3", "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(stack.enter_context(Running(command, tmp_path / f"rank-{rank}", **variables)))
        notes = [f"rank {rank}: waiting for the other ranks at localhost:{place['MASTER_PORT']}" for rank in ranks]
        for running, note in zip(started, notes, strict=True):
            running.wait_until(lambda running=running, note=note: note in running.log.read_text())
        for running in started:
            send_signal(running.process.pid, signal.SIGTERM)
        for running, note in zip(started, notes, strict=True):
            assert running.wait() == 143, running.log.read_text()
            end = "stopped by SIGTERM before all ranks had started"
            assert running.log.read_text().splitlines() == [note, end, ""]
