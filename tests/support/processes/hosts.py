"""Two "hosts" on one machine: network namespaces that are connected by a cable (a veth pair), which can be cut.

    with Hosts() as hosts:
        done = fork_server.run(arguments, 2, [hosts.enter_call, hosts.make_cut_call(step, file)])   # a rank on each
        hosts.connect()

It needs root and iproute2's `ip`.
"""

import ctypes
import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

from tests.support.ranks.faults import call_before_steps

INTERFACE = "cable"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CLONE_NEWNET = 0x40000000  # of sched.h


class Hosts:
    """Two connected hosts, which exist until `close`.

    Attributes:
        names: the names of their network namespaces.
        environment: the variables of ranks on them, in addition to RANK and WORLD_SIZE.

    Raises:
        OSError: they can't be made here; says why.
    """

    def __init__(self) -> None:
        if shutil.which("ip") is None:
            raise OSError("there is no `ip` to make network namespaces")
        if os.geteuid() != 0:
            raise OSError("network namespaces need root")
        unique = uuid.uuid4().hex[:8]
        self.names = [f"t5tune-{unique}-{number}" for number in range(2)]
        self.environment = {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": INTERFACE}
        self.environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        try:
            for name in self.names:
                run_ip("netns", "add", name)
            a, b = self.names
            run_ip("link", "add", INTERFACE, "netns", a, "type", "veth", "peer", "name", INTERFACE, "netns", b)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                run_ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                run_ip("-n", name, "link", "set", INTERFACE, "up")
                run_ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    @property
    def enter_call(self) -> str:
        """The call that moves a rank of the fork server to its host."""
        return f"tests.support.processes.hosts:enter({self.names}, {self.environment})"

    def make_cut_call(self, step: int, file: Path) -> str:
        """Make the call with which rank 0 cuts the cable in the middle of a step, and writes the time to a file."""
        return f"tests.support.processes.hosts:cut_in_step({step}, {self.names[1]!r}, {str(file)!r})"

    def cut(self) -> None:
        cut_cable(self.names[1])

    def connect(self) -> None:
        """Connect the hosts again."""
        run_ip("-n", self.names[1], "link", "set", INTERFACE, "up")

    def close(self) -> None:
        for name in self.names:
            if Path("/run/netns", name).exists():
                run_ip("netns", "delete", name)  # its end of the cable goes with it

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut_cable(host: str) -> None:
    """Cut the cable of a host: packets get lost, and no connection is closed."""
    run_ip("-n", host, "link", "set", INTERFACE, "down")


def enter(hosts: list[str], environment: dict[str, str]) -> None:
    """Move this rank to its host."""
    os.environ |= environment
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{hosts[int(os.environ['RANK'])]}") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def cut_in_step(step: int, host: str, file: str) -> None:
    """From here on, rank 0 cuts the cable of a host in the middle of this step."""

    def cut(trainer: Any, _: object) -> None:
        if trainer.state.global_step == step - 1 and os.environ["RANK"] == "0":
            cut_cable(host)
            Path(file).write_text(str(time.monotonic()))

    call_before_steps(cut)


def run_ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
