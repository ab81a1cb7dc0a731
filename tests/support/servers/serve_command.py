"""A `t5tune serve` that runs as a process."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.processes.forks import ForkedProcess, get_fork_server

PATIENCE = 120.0


class Started:
    """A `t5tune serve` that runs, and the files of its output."""

    def __init__(self, process: ForkedProcess, out: Path, log: Path) -> None:
        self.process = process
        self.out, self.log = out, log
        self.wait_for(out)
        self.address = json.loads(out.read_text())
        self.url = self.address["url"]

    def wait_for(self, file: Path, text: str = "\n") -> None:
        until = time.monotonic() + PATIENCE
        while text not in file.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)

    def read_log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextmanager
def start(folder: Path, *arguments: Any, port: int = 0) -> Iterator[Started]:
    folder.mkdir(exist_ok=True)
    out, log = folder / "out.txt", folder / "log.txt"
    out.touch()
    log.touch()
    command = ["-m", "t5tune", "serve", *map(str, arguments), "--port", str(port), "--use-cpu", "--json"]
    process = get_fork_server().start(command, out, log, {**os.environ, "XDG_CACHE_HOME": str(folder)})
    try:
        yield Started(process, out, log)
    finally:
        process.kill()
        process.wait()
