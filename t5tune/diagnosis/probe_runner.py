"""Run probes in turn, each in a fork of this process: `python -m t5tune.diagnosis.probe_runner SECONDS NAME…`.

It prints a Finding as JSON for each probe, such as {"check": "torch", "state": "good", …}. This process imports the
libraries that most probes use. If one fails, crashes or hangs, this process ends, and no later probe can work.
"""

import importlib
import json
import os
import signal
import sys
from dataclasses import asdict
from tempfile import TemporaryFile
from typing import IO

from t5tune.compat.lazy_imports import import_lazily
from t5tune.compat.python_patches import pause_garbage_collection
from t5tune.diagnosis import Finding
from t5tune.formatting import shorten
from t5tune.io.processes import ForkedProcess
from t5tune.model.device import limit_openmp_spinning

# probe name -> how to fix a probe that crashes or can't start; findings are shown in this order
PROBE_HINTS = {
    "torch": "pip install --upgrade --force-reinstall torch",
    "bf16": "pip install --upgrade --force-reinstall torch",
    "kernels": "training uses slower operations; see the result for torch",
    "bitsandbytes": "pip install --upgrade bitsandbytes, or uninstall it if you don't use --q-lora",
    "processes": "see the result for torch; training in one process doesn't need this",
    "deepspeed": "pip install --upgrade deepspeed ninja, or uninstall it if you don't use --deepspeed",
    "training": "fix the problems above first; t5tune train --config pocket --debug shows the traceback",
}
PROBES = "t5tune.diagnosis.probes"


def main(timeout: float, names: list[str]) -> None:
    """Run the probes, and limit each and the imports to `timeout` seconds."""
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    import_lazily(uses_only_t5=True)
    limit_openmp_spinning()
    for name in names:
        if sys.platform == "linux":  # Apple's libraries don't work in a fork
            signal.setitimer(signal.ITIMER_REAL, timeout)  # ends this process with SIGALRM
            with pause_garbage_collection():
                # neither uses the GPU, so that a fork can; bitsandbytes and DeepSpeed use it on import
                importlib.import_module(PROBES if name in ("torch", "bf16", "kernels") else "t5tune.training.run")
            signal.setitimer(signal.ITIMER_REAL, 0)
        with TemporaryFile() as log:
            process = ForkedProcess(target=_probe, args=(name, stdout, log))
            process.start()
            process.join(timeout)
            if (code := process.exitcode) != 0:
                process.kill()  # the processes that it started end with it, or with doctor
                _show(describe_failure(name, code, log, timeout), stdout)


def _probe(name: str, stdout: IO[str], log: IO[bytes]) -> None:
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    _show(Finding(name, *importlib.import_module(PROBES).PROBES[name]()), stdout)


def _show(finding: Finding, stdout: IO[str]) -> None:
    print(json.dumps(asdict(finding)), file=stdout, flush=True)


def describe_failure(name: str, code: int | None, errors: IO[bytes], timeout: float) -> Finding:
    """Describe a process that ended without a result by its signal or the last line that it printed: an exception."""
    if code in (None, -signal.SIGALRM):
        longer = f"t5tune doctor --timeout {5 * timeout:g}: this machine may be busy, or compiling for the first time"
        return Finding(name, "warning", f"no result within {timeout:g} s", longer)
    errors.seek(0)
    lines = errors.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exited with code {code} and no output")
    failure = f"crashed with {signal.Signals(-code).name}" if code < 0 else shorten(last.removeprefix("error: "), 300)
    return Finding(name, "broken", failure, PROBE_HINTS[name])


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
