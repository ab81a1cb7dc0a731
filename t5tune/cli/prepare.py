"""`t5tune prepare`: show the token cache, unless only a part of it was prepared, whose missing parts a note names."""

from t5tune.cli.next_steps import list_next_steps
from t5tune.cli.output import Output
from t5tune.commands.prepare import prepare
from t5tune.settings import PrepareSettings


def run(settings: PrepareSettings, output: Output) -> None:
    """Prepare data and show the result."""
    result = prepare(settings, output.report)
    if output.json or result.joined is not False:
        output.show(result, next_steps=list_next_steps(settings, result))
