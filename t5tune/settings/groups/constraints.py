"""Constraints on replies: a JSON schema, a regular expression, a grammar, or a list of answers."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from t5tune.settings.affects import Affects
from t5tune.settings.field_types import NoneIfUnset, OptionalPath, Settings, read_path

CONSTRAINTS = ("json_schema", "json_object", "regex", "grammar", "choices", "choices_file")


def _read_schema(value: Any) -> Any:
    """Read a schema as text: a path, or the schema in JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else read_path(value)


JsonSchema = Annotated[
    str | None, BeforeValidator(_read_schema, json_schema_input_type=dict[str, Any] | str | None), NoneIfUnset
]
Answers = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""Texts, which aren't split at commas or spaces."""


class TrainedSchemaSettings(Settings):
    panel: ClassVar[str] = "Training"

    json_schema: Annotated[JsonSchema, Affects.FINAL_WEIGHTS] = Field(
        default=None,
        description="JSON schema of the targets (a file, or JSON): training counts targets that violate it, and chat, "
        "evaluate and serve make the replies follow it.",
        json_schema_extra={"metavar": "FILE"},
    )


class ConstraintSettings(Settings):
    panel: ClassVar[str] = "Constraints on replies"

    json_schema: JsonSchema = Field(
        default=None,
        description="Write JSON that follows this schema (a file, or JSON); default: training's schema; none: no "
        "constraint.",
        json_schema_extra={"metavar": "FILE"},
    )
    json_object: bool = Field(default=False, description="Write a JSON object.")
    regex: str | None = Field(
        default=None, min_length=1, description="Write text that this regular expression matches as a whole."
    )
    grammar: OptionalPath = Field(
        default=None,
        description="Write text that this grammar produces: a file in Lark's format, beginning with start.",
    )
    choices: Answers = Field(
        default=[],
        description="Write one of these answers; evaluate scores them, and predicts the likeliest.",
        json_schema_extra={"metavar": "TEXT…"},
    )
    choices_file: OptionalPath = Field(
        default=None, description="Write one of the answers in this file, a line each; 100,000 aren't too many."
    )

    @model_validator(mode="after")
    def _check_one_constraint(self) -> Self:
        given = [name for name in CONSTRAINTS if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]} conflicts with {given[1]}; give only one of them")
        return self
