"""`t5tune doctor`: check what works on this machine, and suggest how to fix what doesn't.

    result = doctor(DoctorSettings())
    [finding.check for finding in result.findings if finding.state == "broken"]

Each check that loads a library runs in its own process (see diagnosis/probes.py), so that a library that is missing,
fails, crashes or hangs becomes one finding and doesn't stop the other probes.
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

from t5tune.diagnosis import Finding, machine
from t5tune.distributed.deepspeed_build import remove_stale_locks
from t5tune.formatting import shorten
from t5tune.io.processes import make_module_command
from t5tune.progress import Report, silent, track
from t5tune.settings import DoctorSettings
from t5tune.version import __version__

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
NUM_PARALLEL_PROBES = 2
TIMED_PROBE = "kernels"  # it runs alone, because it measures times on a shared GPU
REQUIRED_CHECKS = {"python", "torch", "training"}


@dataclass(frozen=True)
class Diagnosis:
    """All findings. `ok`: the checks that training needs aren't broken."""

    ok: bool
    version: str
    platform: str
    findings: list[Finding]


def doctor(settings: DoctorSettings, report: Report = silent) -> Diagnosis:
    """Inspect the machine and the package versions, then probe the libraries, most of them in parallel."""
    findings = [*machine.inspect_machine(), *machine.compare_versions()]

    def run(name: str) -> Finding:
        return _run_probe(name, settings.timeout)

    with ThreadPoolExecutor(NUM_PARALLEL_PROBES) as pool:
        others = pool.map(run, (name for name in PROBE_HINTS if name != TIMED_PROBE))
        probed = chain(others, map(run, [TIMED_PROBE]))  # the timed probe begins after the other probes
        found = {each.check: each for each in track(probed, "checking", report, len(PROBE_HINTS), "checks")}
    findings += (found[name] for name in PROBE_HINTS)
    broken = {finding.check for finding in findings if finding.state == "broken"}
    return Diagnosis(not broken & REQUIRED_CHECKS, __version__, platform.platform(), findings)


def _run_probe(name: str, timeout: float) -> Finding:
    try:
        process = subprocess.Popen(
            make_module_command("t5tune.diagnosis.probes", name),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # its own process group, so that killpg also ends the processes it started
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
    except OSError as error:
        return Finding(name, "broken", f"can't be started: {error}", PROBE_HINTS[name])
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        longer = f"t5tune doctor --timeout {5 * timeout:g}: this machine may be busy, or compiling for the first time"
        return Finding(name, "warning", f"no result within {timeout:g} s", longer)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        remove_stale_locks()  # a killed DeepSpeed build leaves its lock file, which would block later builds
    try:
        return Finding(**json.loads(output))
    except ValueError:
        failure = _describe_failure(process.returncode, errors.decode(errors="replace"))
        return Finding(name, "broken", failure, PROBE_HINTS[name])


def _describe_failure(code: int, errors: str) -> str:
    """Return the signal's name or the traceback's last line: `ModuleNotFoundError: No module named 'deepspeed'`."""
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return shorten(lines[-1], 300) if lines else f"exited with code {code} and no output"
