"""`t5tune doctor`: what on this machine works, and how to mend what doesn't.

    result = doctor(DoctorSettings())
    [finding.check for finding in result.findings if finding.state == "broken"]

What loads a library runs in a process of its own (see diagnosis/probes.py): one that is missing, fails, crashes or
hangs makes a line, and nothing else.
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from t5tune import __version__
from t5tune.diagnosis import machine
from t5tune.diagnosis.finding import Finding
from t5tune.distributed.deepspeed_build import release_dead_locks
from t5tune.io.processes import python_module
from t5tune.progress import Report, silent, track
from t5tune.settings import DoctorSettings

# name -> what breaks with it, and how to mend a library that doesn't answer; the probes' order is the page's
PROBES = {
    "torch": "pip install --upgrade --force-reinstall torch",
    "bf16": "pip install --upgrade --force-reinstall torch",
    "bitsandbytes": "pip install --upgrade bitsandbytes, or uninstall it where nobody needs --q-lora",
    "processes": "look at the line of torch; one process needs none of this",
    "deepspeed": "pip install --upgrade deepspeed ninja, or uninstall it where nobody needs --deepspeed",
    "training": "mend the lines above first; t5tune train --config pocket --debug shows the rest",
}
AT_A_TIME = 2
MAIN_JOB = {"python", "torch", "training"}


@dataclass(frozen=True)
class Diagnosis:
    """All findings. `ok`: the main job, training, can run here."""

    ok: bool
    version: str
    platform: str
    findings: list[Finding]


def doctor(settings: DoctorSettings, report: Report = silent) -> Diagnosis:
    """Look at the machine, then try the libraries, a few at a time."""
    findings = [*machine.look(), *machine.compare_versions()]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        tried = pool.map(lambda name: _probe(name, settings.timeout), PROBES)
        findings += track(tried, "try", report, total=len(PROBES), unit="checks")
    broken = {finding.check for finding in findings if finding.state == "broken"}
    return Diagnosis(not broken & MAIN_JOB, __version__, platform.platform(), findings)


def _probe(name: str, timeout: float) -> Finding:
    """Run one probe and read its answer, or how it ended."""
    command = python_module("t5tune.diagnosis.probes", name)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that its own processes end with it
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
    except OSError as error:
        return Finding(name, "broken", f"can't be started: {error}", PROBES[name])
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        longer = f"t5tune doctor --timeout {5 * timeout:g}: this machine may be busy, or compile for the first time"
        return Finding(name, "warning", f"no answer in {timeout:g} s", longer)
    finally:
        _end(process)  # and what it may have left behind
        release_dead_locks()
    try:
        return Finding(check=name, **json.loads(output))
    except ValueError:
        return Finding(name, "broken", _ending(process.returncode, errors.decode(errors="replace")), PROBES[name])


def _end(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _ending(code: int, errors: str) -> str:
    """The last line of a traceback, or the signal: `ModuleNotFoundError: No module named 'deepspeed'`."""
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"ended with {code} and said nothing"
