"""`t5tune schema` on the terminal: the JSON schema, indented."""

import json

from t5tune.cli.output import Output
from t5tune.commands.schema import schema
from t5tune.settings import SchemaSettings


def run(settings: SchemaSettings, output: Output) -> int:
    """Print the JSON schema of a command's YAML."""
    output.print(json.dumps(schema(settings.of), indent=2, ensure_ascii=False))
    return 0
