"""Ask a fork server (fork_server.py) to run t5tune, as the command `t5tune` in its `bin` folder does.

    python fork_client.py SOCKET arguments...

Imports only a little of the standard library, so that it starts at once.
"""

import json
import os
import socket
import sys
from typing import Any


def ask(address: str, request: dict[str, Any]) -> list[int]:
    """Send a request to the server, and return the exit codes of its ranks."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        server.sendall(json.dumps(request).encode() + b"\n")
        with server.makefile() as answer:
            return list(json.loads(answer.readline()))


def main(address: str, *arguments: str) -> int:
    (code,) = ask(
        address,
        {
            "arguments": arguments,
            "ranks": 1,
            "calls": [],
            "streams": [f"/proc/{os.getpid()}/fd/{number}" for number in range(3)],
            "environment": dict(os.environ),
            "cwd": os.getcwd(),
        },
    )
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
