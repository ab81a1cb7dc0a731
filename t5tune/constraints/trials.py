"""Try constraints in processes that the kernel kills at a limit: llguidance compiles some for minutes, or crashes.

    trials = Trials()
    await trials.try_constraint(constraint)
    trials.close()

A trial that takes longer than most is stopped, and starts again with more time when no more than one like it is
running, at a lower priority. So slow constraints don't delay fast ones.

`python -m t5tune.constraints.trials` forks a child for each trial. It has a single thread, so that this is safe, and it
compiles for the 256 bytes as a vocabulary, since compiling takes as long for each vocabulary.
"""

import asyncio
import json
import os
import pickle
import resource
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

from t5tune.constraints import Constraint
from t5tune.constraints.grammars import LIBRARIES, GrammarCompiler
from t5tune.constraints.spelling import Spellings
from t5tune.errors import SettingsError, T5TuneError
from t5tune.io.processes import die_with_parent, make_module_command, make_module_environment

BYTES = 512 << 20  # of memory, for a trial
STACK_BYTES = 1 << 20  # the server compiles the constraint next, in a thread with at least 2 MiB
MAX_REMEMBERED = 256
WARMUP = Constraint("json_schema", r'{"pattern": "\\W"}', "json_schema")
BEGUN = b"0"  # a child's first answer
ALLOWED = b"null"  # its second, unless the constraint is refused


@dataclass(frozen=True)
class Lane:
    """Trials with the same limits.

    Args:
        seconds: of a CPU, for a trial.
        max_running: how many run at the same time.
        niceness: replies are computed first.
    """

    seconds: float
    max_running: int
    niceness: int


QUICK = Lane(seconds=0.05, max_running=8, niceness=10)
SLOW = Lane(seconds=5, max_running=2, niceness=19)
TOO_COMPLEX = f"too complex to compile within {SLOW.seconds} seconds and {BYTES >> 20} MiB of memory; simplify it"


class Trials:
    """The trials of one event loop. Their process starts with the first trial, and ends when this process does."""

    def __init__(self) -> None:
        self._running = {lane: asyncio.Semaphore(lane.max_running) for lane in (QUICK, SLOW)}
        self._process: subprocess.Popen[bytes] | None = None
        self._begin = lru_cache(MAX_REMEMBERED)(lambda constraint: asyncio.ensure_future(self._try(constraint)))

    async def try_constraint(self, constraint: Constraint) -> bool:
        """Try a constraint, and return whether it is compiled quickly. Equal constraints are tried once.

        Raises:
            SettingsError: it is refused, or isn't compiled within the limits.
            OSError: the process that tries constraints was killed, or can't be started.
        """
        if constraint.kind == "choices" or None in map(find_spec, LIBRARIES):  # nothing to compile, or no compiler
            return True
        trial = self._begin(constraint)
        lane, problem = await asyncio.shield(trial)  # which other requests may wait for
        if problem is not None:
            raise problem
        return lane is QUICK

    async def _try(self, constraint: Constraint) -> tuple[Lane, SettingsError | None]:
        """Return the lane whose limits it needed, and why it is refused."""
        for lane in (QUICK, SLOW):
            async with self._running[lane]:
                try:
                    answer = await self._run(constraint, lane)
                except OSError:
                    self._begin.cache_clear()
                    raise
            if answer == ALLOWED:
                return lane, None
            if answer:
                return lane, SettingsError(*json.loads(answer)["problems"], hint=json.loads(answer)["hint"])
        return SLOW, SettingsError(f"{constraint.place}: {TOO_COMPLEX}")

    async def _run(self, constraint: Constraint, lane: Lane) -> bytes:
        """Run a trial and return its answer, which is empty if it was killed at a limit."""
        loop = asyncio.get_running_loop()
        server, child = socket.socketpair()
        with server:
            server.setblocking(False)
            with child:
                socket.send_fds(self._find_process(), [b"\0"], [child.fileno()])
            await loop.sock_sendall(server, pickle.dumps((constraint, lane)))
            server.shutdown(socket.SHUT_WR)
            answer = b""
            while part := await loop.sock_recv(server, 1 << 16):
                answer += part
        if not answer:
            raise ChildProcessError("the process that tries constraints was killed")
        return answer.removeprefix(BEGUN)

    def _find_process(self) -> socket.socket:
        if self._process is None or self._process.poll() is not None:
            self.close()
            control, child = socket.socketpair()
            # a separate process group, so that Ctrl-C doesn't reach it
            with child, ExitStack() as unless_started:
                unless_started.callback(control.close)
                self._process = subprocess.Popen(
                    make_module_command("t5tune.constraints.trials"),
                    stdin=child.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=make_module_environment() | {"OPENBLAS_NUM_THREADS": "1"},
                    process_group=0,
                )
                unless_started.pop_all()
            self._control = control
        return self._control

    def close(self) -> None:
        """Kill the process and its children."""
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._control.close()


@lru_cache(MAX_REMEMBERED)
def try_constraint(constraint: Constraint) -> None:
    """Try the constraint of a command.

    Raises:
        SettingsError: it is refused, or isn't compiled within the limits.
        T5TuneError: the process that tries it was killed, or can't be started.
    """

    async def run() -> None:
        with closing(Trials()) as trials:
            await trials.try_constraint(constraint)

    with ThreadPoolExecutor(1) as thread:  # a notebook's thread has an event loop already
        try:
            thread.submit(asyncio.run, run()).result()
        except OSError as error:
            raise T5TuneError(f"{constraint.place}: can't be compiled now: {error}", hint="try again") from error


def _fork_trials(control: socket.socket) -> None:
    """Fork a child for each socket that arrives, until the server ends."""
    spellings: list[bytes | None] = [*(bytes([byte]) for byte in range(256)), None]
    compiler = GrammarCompiler(Spellings(spellings, spellings), [256])
    compiler.compile(WARMUP)  # children inherit its imports and tables
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # may be sent to the server and all its processes
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave no zombies
    while descriptors := socket.recv_fds(control, 1, 1)[1]:
        with socket.socket(fileno=descriptors[0]) as server:
            if os.fork() == 0:
                try:
                    _try_in_child(compiler, server)
                finally:
                    os._exit(0)


def _try_in_child(compiler: GrammarCompiler, server: socket.socket) -> None:
    """Read a constraint, compile it, and answer. If this isn't possible, the kernel ends the process."""
    die_with_parent()
    server.send(BEGUN)
    with server.makefile("rb") as request:
        constraint, lane = pickle.load(request)
    os.nice(lane.niceness)
    limits = {"RLIMIT_DATA": BYTES, "RLIMIT_STACK": STACK_BYTES, "RLIMIT_CORE": 0}
    for name, limit in limits.items():
        with suppress(ValueError, OSError):  # the limit is lower already
            resource.setrlimit(getattr(resource, name), (limit, limit))
    signal.setitimer(signal.ITIMER_PROF, lane.seconds)  # its signal kills
    answer = ALLOWED
    try:
        compiler.compile(constraint)
    except SettingsError as error:
        answer = json.dumps({"problems": error.problems, "hint": error.hint}).encode()
    except (T5TuneError, RecursionError, UnicodeError):  # which the server finds, too
        pass
    server.sendall(answer)


if __name__ == "__main__":
    _fork_trials(socket.socket(fileno=0))
