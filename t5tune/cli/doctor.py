"""`t5tune doctor` on the terminal: one line per check, and below a failed check how to fix it."""

from collections.abc import Iterator

from rich.console import Group
from rich.text import Text

from t5tune.cli.output import Output
from t5tune.commands.doctor import Diagnosis, doctor
from t5tune.settings import DoctorSettings

STYLES = {"good": "green", "warning": "yellow", "broken": "bold red"}


def run(settings: DoctorSettings, output: Output) -> int:
    """Show what works on this machine. Return 1 if training can't run."""
    diagnosis = doctor(settings, output.report)
    output.show(diagnosis, Group(*_render(diagnosis)))
    return 0 if diagnosis.ok else 1


def _render(diagnosis: Diagnosis) -> Iterator[Text]:
    """Yield the findings as unwrapped plain lines, which a user can paste into an issue report."""
    yield Text(f"t5tune {diagnosis.version} on {diagnosis.platform}")
    width = max(len(finding.check) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        state = Text(f"{finding.state:<8}", STYLES[finding.state])
        yield Text.assemble(state, f"{finding.check:<{width}}  ", finding.found)
        if finding.mend:
            yield Text.assemble(" " * (width + 10), ("fix: ", "bold"), finding.mend)
    verdict = "training can run here" if diagnosis.ok else "training can't run here: fix what is broken"
    yield Text(verdict, "green" if diagnosis.ok else "bold red")
