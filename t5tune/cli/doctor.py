"""`t5tune doctor` on the terminal: one line per check, and below a failed check how to fix it."""

from typing import TextIO

from rich.console import Console
from rich.text import Text

from t5tune.commands.doctor import Diagnosis

STYLES = {"good": "green", "warning": "yellow", "broken": "bold red"}


def print_diagnosis(diagnosis: Diagnosis, stream: TextIO) -> None:
    """Print the findings as unwrapped plain lines, which a user can paste into an issue report."""
    console = Console(file=stream, highlight=False, soft_wrap=True, emoji=False)
    console.print(f"t5tune {diagnosis.version} on {diagnosis.platform}", markup=False)
    width = max(len(finding.check) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        state = Text(f"{finding.state:<8}", STYLES[finding.state])
        console.print(Text.assemble(state, f"{finding.check:<{width}}  ", finding.found))
        if finding.mend:
            console.print(Text.assemble(" " * (width + 10), ("fix: ", "bold"), finding.mend))
    verdict = "training can run here" if diagnosis.ok else "training can't run here: fix what is broken"
    console.print(Text(verdict, "green" if diagnosis.ok else "bold red"))
