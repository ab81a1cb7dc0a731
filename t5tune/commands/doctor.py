"""`t5tune doctor`: check what works on this machine, and suggest how to fix what doesn't.

    result = doctor(DoctorSettings())
    [finding.check for finding in result.findings if finding.state == "broken"]

Each check that loads a library runs in its own process (see diagnosis/probe_runner.py), so that a library that is
missing, fails, crashes or hangs becomes a finding.
"""

import json
import os
import platform
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from tempfile import TemporaryFile

from t5tune.diagnosis import Finding, machine, probe_runner
from t5tune.diagnosis.probe_runner import PROBE_HINTS, describe_failure
from t5tune.distributed.deepspeed_build import remove_stale_locks
from t5tune.io.processes import make_module_command
from t5tune.progress import Report, silent, track
from t5tune.settings import DoctorSettings
from t5tune.version import __version__

REQUIRED_CHECKS = {"python", "torch", "training"}


@dataclass(frozen=True)
class Diagnosis:
    """All findings. `ok`: the checks that training needs aren't broken."""

    ok: bool
    version: str
    platform: str
    findings: list[Finding]


def doctor(settings: DoctorSettings, report: Report = silent) -> Diagnosis:
    """Inspect the machine and the package versions, then probe the libraries."""
    findings = [*machine.inspect_machine(), *machine.compare_versions()]
    probed = _run_probes([*PROBE_HINTS], settings.timeout)
    found = {each.check: each for each in track(probed, "checking", report, len(PROBE_HINTS), "checks")}
    findings += (found[name] for name in PROBE_HINTS)
    broken = {finding.check for finding in findings if finding.state == "broken"}
    return Diagnosis(not broken & REQUIRED_CHECKS, __version__, platform.platform(), findings)


def _run_probes(missing: list[str], timeout: float) -> Iterator[Finding]:
    with TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                make_module_command(probe_runner.__name__, str(timeout), *missing),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # its own process group, so that killpg also ends the processes it started
                env={**os.environ, "PYTHONWARNINGS": "ignore"},
            )
        except OSError as error:
            yield from (Finding(name, "broken", f"can't be started: {error}", PROBE_HINTS[name]) for name in missing)
            return
        try:
            for line in process.stdout or ():
                finding = Finding(**json.loads(line))
                if finding.check in missing:  # else the probe has crashed after its finding
                    missing.remove(finding.check)
                    yield finding
            process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            remove_stale_locks()  # a killed DeepSpeed build leaves its lock file, which would block later builds
        yield from (describe_failure(name, process.returncode, errors, timeout) for name in missing)
