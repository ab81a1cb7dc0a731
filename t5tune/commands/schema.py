"""`t5tune schema`: the JSON schema of a command's YAML settings, for completion, descriptions and checks in editors.

An editor finds the schema by the first line of the YAML file:

    # yaml-language-server: $schema=train.schema.json
"""

from typing import Any

from t5tune.errors import SettingsError
from t5tune.progress import Report, silent
from t5tune.settings import COMMANDS, SchemaSettings

# metadata of fields that only the command line uses
FLAG_METADATA = ("positional", "argument", "metavar", "yaml_only", "hidden")
SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(settings: SchemaSettings, report: Report = silent) -> dict[str, Any]:
    """Return the schema of the YAML that `t5tune COMMAND --config` reads, where COMMAND is `settings.of`.

    No key is required, because flags may set it.

    Raises:
        SettingsError: there is no such command.
    """
    command, models = settings.of, {model.command: model for model in COMMANDS}
    if command not in models:
        raise SettingsError(f"of: {command}: no such command", hint=f"the commands are {', '.join(models)}")
    json_schema = models[command].model_json_schema()
    json_schema.pop("required", None)
    json_schema.pop("description", None)
    for setting in json_schema["properties"].values():
        for name in FLAG_METADATA:
            setting.pop(name, None)
    return {"$schema": SCHEMA_DIALECT, **json_schema, "title": f"Settings of t5tune {command}"}
