"""Compare the CPU seconds that commands take to start with the CPU seconds of their unavoidable imports.

    python benchmarks/startup.py [COMMAND …] [--runs 3]

Runs each of chat (one reply of a merged model), train (`pocket`, to the end of its first step), serve (the same model,
to its first reply), doctor and plan (`pocket`), and the imports of torch and transformers alone, in its own process;
they take turns, `runs` times. Prints one JSON line: for each the least user CPU seconds, with child processes, and the
ratio to the imports; train's imports include Trainer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from sides import t5tune

IMPORTS = "import torch; from transformers import AutoTokenizer, T5ForConditionalGeneration"
COMMAND = ("-m", "t5tune")
COMMANDS = ("chat", "train", "serve", "doctor", "plan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commands", nargs="*", choices=[*COMMANDS, []], metavar="COMMAND")
    parser.add_argument("--runs", type=int, default=3)
    chosen = parser.parse_args()
    names = chosen.commands or COMMANDS
    with tempfile.TemporaryDirectory(prefix="t5tune-startup-") as text:
        folder, model = Path(text), Path(text, "merged")
        if {"chat", "serve"} & {*names}:
            flags = ("--config", "pocket", "--num-data", "64", "--max-steps", "1", "--report-samples", "0")
            t5tune("train", *flags, "--output-dir", folder / "run")
            t5tune("merge", folder / "run", "--output-dir", model)
        best: dict[str, float] = {}
        for run in range(chosen.runs):
            commands: dict[str, tuple[list[Any], str]] = {
                "imports": (["-c", IMPORTS], ""),
                "imports with Trainer": (["-c", f"{IMPORTS}, Trainer"], ""),
                "chat": ([*COMMAND, "chat", model, "--prompt", "hello"], ""),
                "train": (
                    [*COMMAND, "train", "--config", "pocket", "--output-dir", folder / str(run)],
                    "step 1 ",
                ),
                "serve": ([*COMMAND, "serve", model, "--port", "0"], "http://"),
                "doctor": ([*COMMAND, "doctor"], ""),
                "plan": ([*COMMAND, "plan", "--config", "pocket"], ""),
            }
            for name, (arguments, awaited) in commands.items():
                if name in names or name not in COMMANDS:
                    seconds = measure(arguments, awaited)
                    best[name] = min(seconds, best.get(name, seconds))
    ratios = {name: best[name] / best["imports with Trainer" if name == "train" else "imports"] for name in names}
    print(json.dumps({"seconds": round_all(best), "ratio": round_all(ratios)}))


def measure(arguments: list[Any], awaited: str) -> float:
    """Return the user CPU seconds of a Python process and its children until it prints the awaited text, or its end.

    If the text is a URL, they are measured after the reply to a request.
    """
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    before = psutil.Process().cpu_times().children_user
    with subprocess.Popen([sys.executable, *map(str, arguments)], **output) as process:
        lines = []
        try:
            for line in process.stdout or ():
                lines.append(line)
                if awaited and awaited in line:
                    if awaited == "http://":
                        request_reply(line.split()[0])
                    used = psutil.Process(process.pid).cpu_times()
                    return used.user + used.children_user
        finally:
            if awaited:
                process.kill()
    if process.returncode or awaited:
        sys.exit("".join(lines))
    return psutil.Process().cpu_times().children_user - before


def request_reply(address: str) -> None:
    body = json.dumps({"model": "merged", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        assert json.load(reply)["choices"]


def round_all(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


if __name__ == "__main__":
    main()
