"""Hosts that can't reach each other: all ranks end in time and say who doesn't answer, and the run can resume."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes.forks import ForkServer
from tests.support.processes.hosts import ADDRESSES, Hosts
from tests.support.processes.runs import Running, list_complete_steps, make_arguments, read_adapter

pytestmark = pytest.mark.slow

TIMEOUT = 8  # seconds, of --process-group-timeout
SECONDS_TO_END = 5  # to ask who doesn't answer, and to exit
METHODS = {"ddp": (), "zero3": ("--deepspeed=zero3",)}


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        made = Hosts()
    except OSError as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_cut_cable_ends_both_ranks_and_the_run_resumes(
    method: str, hosts: Hosts, fork_server: ForkServer, inputs: list[Path], tmp_path: Path
) -> None:
    run, cut_at = tmp_path / "run", tmp_path / "cut-at"
    flags = (*METHODS[method], f"--process-group-timeout={TIMEOUT}", "--max-steps=6", "--save-steps=2")
    arguments = make_arguments(*inputs, run, *flags)
    done = fork_server.run(arguments, 2, [hosts.enter_call, hosts.make_cut_call(4, cut_at)])
    assert time.monotonic() - float(cut_at.read_text()) < TIMEOUT + SECONDS_TO_END
    assert done.codes == [1, 1], done.log
    for rank in range(2):
        assert f"error: rank {rank}: rank {1 - rank} doesn't answer; run the same command again" in done.log
    assert "Traceback" not in done.log
    assert list_complete_steps(run) == [2]
    hosts.connect()
    assert fork_server.run(arguments, 2, [hosts.enter_call]).codes == [0, 0]
    uninterrupted = make_arguments(*inputs, tmp_path / "uninterrupted", *flags)
    assert fork_server.run(uninterrupted, 2).codes == [0, 0]
    assert read_adapter(run) == read_adapter(tmp_path / "uninterrupted")


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_cut_cable_ends_the_ranks_of_torchrun_in_time(
    method: str, hosts: Hosts, fork_server: ForkServer, inputs: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = (*METHODS[method], f"--process-group-timeout={TIMEOUT}", "--max-steps=100", "--save-steps=10")
    arguments = make_arguments(*inputs, run, *flags)

    def start(rank: int) -> Running:
        torchrun = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1"]
        torchrun += [f"--master-addr={ADDRESSES[0]}", "--master-port=29500", "-m", "t5tune"]
        command = ["ip", "netns", "exec", hosts.names[rank], sys.executable, *torchrun, *arguments]
        return Running(command, tmp_path / f"host-{rank}", GLOO_SOCKET_IFNAME=hosts.environment["GLOO_SOCKET_IFNAME"])

    nodes = [start(rank) for rank in range(2)]
    with nodes[0], nodes[1]:
        nodes[0].wait_until(lambda: 10 in list_complete_steps(run))
        ranks = [rank for node in nodes for rank in node.find_workers()]
        hosts.cut()
        cut_at = time.monotonic()
        nodes[0].wait_until_gone(ranks)
        assert time.monotonic() - cut_at < TIMEOUT + SECONDS_TO_END
        assert len(ranks) == 2
        assert 0 not in [node.wait() for node in nodes]
    for rank, node in enumerate(nodes):
        assert f"error: rank {rank}: rank {1 - rank} doesn't answer; run the same command again" in node.log.read_text()
    assert 100 not in list_complete_steps(run)
    hosts.connect()
    nodes = [start(rank) for rank in range(2)]
    with nodes[0], nodes[1]:
        assert [node.wait() for node in nodes] == [0, 0], nodes[0].log.read_text()
    uninterrupted = make_arguments(*inputs, tmp_path / "uninterrupted", *flags)
    assert fork_server.run(uninterrupted, 2).codes == [0, 0]
    assert read_adapter(run) == read_adapter(tmp_path / "uninterrupted")
