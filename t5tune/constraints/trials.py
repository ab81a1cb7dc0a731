"""Try constraints in processes that the kernel kills at a limit: llguidance compiles some for minutes, or crashes.

    trials = Trials()
    await trials.passes(constraint)
    trials.close()

`python -m t5tune.constraints.trials` forks a child for each trial. It has a single thread, so that this is safe, and it
compiles for the 256 bytes as a vocabulary, since compiling takes as long for each vocabulary.
"""

import asyncio
import os
import pickle
import resource
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import lru_cache
from importlib.util import find_spec

from t5tune.constraints import Constraint
from t5tune.constraints.grammars import GrammarCompiler
from t5tune.constraints.spelling import Spellings
from t5tune.errors import SettingsError, T5TuneError
from t5tune.io.processes import die_with_parent, make_module_command, make_module_environment

SECONDS = 5  # of a CPU, for a trial
BYTES = 512 << 20  # of memory, for a trial
STACK_BYTES = 1 << 20  # the server compiles the constraint next, in a thread with at least 2 MiB
MAX_RUNNING = 8
MAX_REMEMBERED = 256
BEGUN, ENDED = b"0", b"1"  # a child's answers
NICENESS = 10  # replies are computed first
TOO_COMPLEX = f"too complex to compile within {SECONDS} seconds and {BYTES >> 20} MiB of memory; simplify it"


class Trials:
    """The trials of one event loop. Their process starts with the first trial, and ends when this process does."""

    def __init__(self) -> None:
        self._running = asyncio.Semaphore(MAX_RUNNING)
        self._process: subprocess.Popen[bytes] | None = None
        self._begin = lru_cache(MAX_REMEMBERED)(lambda constraint: asyncio.ensure_future(self._try(constraint)))

    async def passes(self, constraint: Constraint) -> bool:
        """Return whether a constraint is compiled, or refused, within the limits.

        Raises:
            OSError: the process that tries constraints was killed, or can't be started.
        """
        if constraint.kind == "choices" or find_spec("llguidance") is None:  # nothing to compile, or no compiler
            return True
        trial = self._begin(constraint)
        return await asyncio.shield(trial)  # which other requests may wait for

    async def _try(self, constraint: Constraint) -> bool:
        loop, answer = asyncio.get_running_loop(), b""
        async with self._running:
            try:
                server, child = socket.socketpair()
                with server:
                    server.setblocking(False)
                    with child:
                        socket.send_fds(self._find_process(), [b"\0"], [child.fileno()])
                    await loop.sock_sendall(server, pickle.dumps(constraint))
                    while len(answer) < 2 and (part := await loop.sock_recv(server, 2)):
                        answer += part
                if not answer:
                    raise ChildProcessError("the process that tries constraints was killed")
            except OSError:
                self._begin.cache_clear()
                raise
        return answer == BEGUN + ENDED

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
        SettingsError: it isn't compiled, or refused, within the limits.
        T5TuneError: the process that tries it was killed, or can't be started.
    """

    async def passes() -> bool:
        with closing(Trials()) as trials:
            return await trials.passes(constraint)

    with ThreadPoolExecutor(1) as thread:  # a notebook's thread has an event loop already
        try:
            has_passed = thread.submit(asyncio.run, passes()).result()
        except OSError as error:
            raise T5TuneError(f"{constraint.place}: can't be compiled now: {error}", hint="try again") from error
    if not has_passed:
        raise SettingsError(f"{constraint.place}: {TOO_COMPLEX}")


def _fork_trials(control: socket.socket) -> None:
    """Fork a child for each socket that arrives, until the server ends."""
    later: list[bytes | None] = [*(bytes([byte]) for byte in range(256)), None]
    first = [b"" if text == b" " else text for text in later]  # as with SentencePiece, which doubles the time
    compiler = GrammarCompiler(Spellings(later, first), [256])
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
    """Read a constraint and compile it. If this isn't possible, the kernel ends the process."""
    die_with_parent()
    os.nice(NICENESS)
    limits = {"RLIMIT_CPU": SECONDS, "RLIMIT_DATA": BYTES, "RLIMIT_STACK": STACK_BYTES, "RLIMIT_CORE": 0}
    for name, limit in limits.items():
        with suppress(ValueError, OSError):  # the limit is lower already
            resource.setrlimit(getattr(resource, name), (limit, limit))
    server.send(BEGUN)
    with server.makefile("rb") as request:
        constraint = pickle.load(request)
    with suppress(T5TuneError, RecursionError, UnicodeError):  # which the server finds, too
        compiler.compile(constraint)
    server.send(ENDED)


if __name__ == "__main__":
    _fork_trials(socket.socket(fileno=0))
