"""Import everything once, then fork the processes of a run for each request on a Unix socket (see forks.py).

    python -m tests.support.processes.fork_server SOCKET

It ends when its standard input does.
"""

import ast
import fcntl
import gc
import importlib
import json
import os
import select
import socket
import sys
import tempfile
import termios
from contextlib import suppress
from typing import Any, NoReturn

IMPORTED = (
    "deepspeed",
    "transformers.trainer",
    "t5tune.commands.train",
    "t5tune.training.build_model",
    "t5tune.training.trainer",
)


def serve(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)  # requests wait until everything is imported
        os.dup2(2, 1)  # libraries print while they are imported
        gc.disable()  # looking for garbage takes a third of the time of importing everything
        for name in IMPORTED:
            importlib.import_module(name)
        # transformers compiles a thousand patterns when a process first needs one, and keeps them
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("t5")
        gc.freeze()  # the forks look for garbage only in what they make themselves
        while select.select([listener, sys.stdin], [], [])[0] == [listener]:
            client, _ = listener.accept()
            with client, client.makefile("rw") as stream:
                request = json.loads(stream.readline())
                if "command" in request:
                    start(request, client)
                else:
                    stream.write(json.dumps(run_ranks(request)) + "\n")
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def run_ranks(request: dict[str, Any]) -> list[int]:
    """Fork the ranks of a run, and wait for them. Return their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    reader, writer = os.pipe()
    ranks = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            _run(request, rank, port, writer)
        ranks.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    os.close(writer)
    with os.fdopen(reader) as names:
        for name in names.read().split():
            with suppress(Exception):  # some names can't be imported by themselves
                importlib.import_module(name)
    gc.freeze()
    return codes


def start(request: dict[str, Any], client: socket.socket) -> None:
    """Fork a process. Its parent, another fork, sends its id to the client, and its exit code when it has ended."""
    if os.fork() > 0:
        return
    try:
        _open_streams(request)  # before the client learns the id, since it may close them then
        pid = os.fork()
        if pid == 0:
            client.close()
            _run_command(request)
        for number in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        client.sendall(b"%d\n" % pid)
        client.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    finally:
        os._exit(0)


def _run_command(request: dict[str, Any]) -> NoReturn:
    """Do what `python -m t5tune …` or `python -c …` does."""
    code = 70
    try:
        if request["terminal"]:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            sys.stdout.reconfigure(line_buffering=True)
        _set_up(request)
        gc.enable()
        kind, text, *arguments = request["command"]
        try:
            if kind == "-m":
                from t5tune.cli import run

                code = run(arguments)
            else:
                exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
                code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:
            code = 1
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _open_streams(request: dict[str, Any]) -> None:
    for number, path in enumerate(request["streams"]):
        opened = os.open(path, os.O_NOCTTY | (os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY))
        os.dup2(opened, number)
        os.close(opened)


def _set_up(request: dict[str, Any]) -> None:
    """Set the environment and the current folder."""
    if request["environment"] is not None:
        os.environ.clear()
        os.environ |= request["environment"]
        tempfile.tempdir = None
        sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        import huggingface_hub.constants

        importlib.reload(huggingface_hub.constants)  # it reads HF_ENDPOINT and the others when it is imported
    if request["cwd"] is not None:
        os.chdir(request["cwd"])


def _run(request: dict[str, Any], rank: int, port: int, writer: int) -> NoReturn:
    code = 70
    try:
        _open_streams(request)
        _set_up(request)
        count = request["ranks"]
        if count > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        for call in request["calls"]:
            module, _, function = call.partition(":")
            name, _, arguments = function.partition("(")
            getattr(importlib.import_module(module), name)(*ast.literal_eval(f"[{arguments.rstrip(')')}]"))
        from t5tune.cli import run

        gc.enable()
        before = set(sys.modules)
        code = run(request["arguments"])
        if rank == 0:
            # the server imports what this run had to import, so that later runs don't have to
            os.write(writer, " ".join(sorted(set(sys.modules) - before))[: 60 << 10].encode())
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
