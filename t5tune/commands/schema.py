"""The JSON schema of a command's YAML, for editors: completion, descriptions, and what is wrong underlined.

# yaml-language-server: $schema=train.schema.json
"""

from typing import Any

from t5tune.errors import SettingsError
from t5tune.settings import COMMANDS

FOR_FLAGS = ("positional", "has_unit", "yaml_only")  # what a field says of itself for the command line
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema(command: str) -> dict[str, Any]:
    """The schema of what `t5tune <command> --config` reads. No key is required: flags may give it.

    Raises:
        SettingsError: no such command.
    """
    models = {model.command: model for model in COMMANDS}
    if command not in models:
        raise SettingsError(f"of: {command}: no such command", hint=f"the commands are {', '.join(models)}")
    described = models[command].model_json_schema()
    described.pop("required", None)
    described.pop("description", None)
    for setting in described["properties"].values():
        for name in FOR_FLAGS:
            setting.pop(name, None)
    return {"$schema": DRAFT, **described, "title": f"Settings of t5tune {command}"}
