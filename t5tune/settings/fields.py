"""The base of every settings model, and the types its fields share.

A setting is declared once: its name is the flag (`--lora-r`), the YAML key (`lora_r`), the environment
variable (`T5TUNE_LORA_R`) and the attribute (`settings.lora_r`); its description is the help text.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

NUMBERS = {int, float, int | None, float | None}


class Settings(BaseModel):
    """Frozen; refuses unknown keys. A subclass is a mixin with a `panel`, or a command that joins mixins."""

    # defer_build: --help needs the fields, not their validators
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
        defer_build=True,
        allow_inf_nan=False,
    )

    panel: ClassVar[str] = "Options"
    command: ClassVar[str] = ""

    @field_validator("*", mode="before")
    @classmethod
    def _is_meant(cls, value: Any, field: ValidationInfo) -> Any:
        """An empty path would be the folder that the user is in, and `lora_r: true` a 1."""
        kind = cls.model_fields[field.field_name or ""].annotation
        if isinstance(value, bool) and kind in NUMBERS:
            raise ValueError("a number is expected, not yes or no")
        if "\0" in str(value):
            raise ValueError("holds a NUL, which no path and no name can")
        if (kind is Path and value == "") or (
            kind == list[Path] and "" in (value if isinstance(value, list) else [value])
        ):
            raise ValueError("an empty path; `.` is the folder that you are in")
        return value

    @classmethod
    def as_typed(cls, name: str) -> str:
        """How a field stands on the command line: `--lora-r`, or `CACHE` where it takes its place without a flag."""
        extra = cls.model_fields[name].json_schema_extra if name in cls.model_fields else None
        is_positional = isinstance(extra, dict) and extra.get("positional")
        return name.upper() if is_positional else f"--{name.replace('_', '-')}"

    @classmethod
    def panel_of(cls, name: str) -> str:
        """The title of the group that a field belongs to: that of the mixin that declares it."""
        for base in reversed(cls.__mro__):
            if issubclass(base, Settings) and name in base.__annotations__:
                return base.panel
        raise KeyError(name)


def _unset(value: Any) -> Any:
    return None if isinstance(value, str | int) and str(value).lower() in {"", "none", "null", "-1"} else value


def _split(value: Any) -> Any:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        return [part for item in value for part in (_words(item) if isinstance(item, str) else [item])]
    return value


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]


def _paths(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


Maybe = BeforeValidator(_unset)
"""Reads `none`, an empty string and the seed's -1 as "not set"."""

Words = Annotated[list[str], BeforeValidator(_split, json_schema_input_type=list[str] | str)]
"""A list that may be written as `q v`, `q,v` or a YAML list."""

Numbers = Annotated[list[float], BeforeValidator(_split, json_schema_input_type=list[float] | float | str)]
"""A list of numbers that may be written as `0.7 0.3`, `0.7,0.3` or a YAML list."""

Folders = Annotated[list[Path], BeforeValidator(_paths, json_schema_input_type=list[str] | str)]
"""A list of folders; a single one may stand alone."""

Paths = Annotated[list[str], BeforeValidator(_paths, json_schema_input_type=list[str] | str)]
"""A list of paths; a single one may stand alone. Paths may hold commas and spaces, so they aren't split."""
