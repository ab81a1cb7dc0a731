"""The base class of every settings model, and the types that their fields share.

A setting is declared once: its name is the flag (`--lora-r`), the YAML key (`lora_r`), the environment
variable (`T5TUNE_LORA_R`) and the attribute (`settings.lora_r`); its description is the help text.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

NUMBER_TYPES = {int, float, int | None, float | None}
SIZE_UNITS = {"B": 1}
SIZE_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
SIZE_UNITS |= {f"{prefix}{end}": 1024**power for power, prefix in enumerate("KMGT", 1) for end in ("", "IB")}
MIN_GPU_MEMORY = 1 << 20


class Settings(BaseModel):
    """Frozen model that rejects unknown keys. A subclass is a mixin with a `panel`, or a command that joins mixins."""

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
    essential: ClassVar[tuple[str, ...]] = ()
    """The settings that most people use, besides the required ones: `--help` lists these, `--help-all` all of them."""
    also_positional: ClassVar[str | None] = None
    """The setting, or `config`, that a word without a flag fills: `t5tune chat run`. Its flag does the same."""
    notes_on_implied: ClassVar[Mapping[str, str]] = {}
    """Setting -> note for the user, for settings that validation turns on because of others."""

    @field_validator("*", mode="before")
    @classmethod
    def _reject_unintended_value(cls, value: Any, field: ValidationInfo) -> Any:
        """Reject what pydantic would accept in another sense: "" as the current folder, and `lora_r: true` as 1."""
        kind = cls.model_fields[field.field_name or ""].annotation
        if isinstance(value, bool) and kind in NUMBER_TYPES:
            raise ValueError("expected a number, not true or false")
        if "\0" in str(value):
            raise ValueError("contains a NUL character, which no path or name can contain")
        if (kind is Path and value == "") or (
            kind == list[Path] and "" in (value if isinstance(value, list) else [value])
        ):
            raise ValueError("the path is empty; use `.` for the current folder")
        return value

    @classmethod
    def format_option(cls, name: str) -> str:
        """Return how a field is written on the command line: `--lora-r`, or `CACHE` for a positional argument."""
        extra = cls.model_fields[name].json_schema_extra if name in cls.model_fields else None
        is_positional = isinstance(extra, dict) and extra.get("positional")
        return name.upper() if is_positional else f"--{name.replace('_', '-')}"

    @classmethod
    def find_panel(cls, name: str) -> str:
        """Find the title of the group that a field belongs to: the panel of the mixin that declares it."""
        for base in reversed(cls.__mro__):
            if issubclass(base, Settings) and name in base.__annotations__:
                return base.panel
        raise KeyError(name)


def _parse_unset(value: Any) -> Any:
    return None if isinstance(value, str | int) and str(value).lower() in {"", "none", "null", "-1"} else value


def _split_items(value: Any) -> Any:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        # each item of a list may again be several words: `--weights 0.7,0.3`
        return [word for item in value for word in (re.findall(r"[^,\s]+", item) if isinstance(item, str) else [item])]
    return value


def _wrap_in_list(value: Any) -> Any:
    if value in ("", [""]):  # `--metric=`
        return []
    return [value] if isinstance(value, str | Path) else value


def parse_gpu_memory(text: str) -> int:
    """Parse a GPU's memory to bytes; a number without a unit is in GiB.

    Raises:
        ValueError: the text isn't such a size, or it is less than 1 MiB.
    """
    size = _parse_size(text, default_unit="GIB", example="24GiB")
    if size < MIN_GPU_MEMORY:
        raise ValueError("too small for a GPU's memory; expected a size such as 24GiB")
    return size


def _parse_size(text: str, default_unit: str, example: str) -> int:
    """Parse a size to bytes: `5GB` (powers of 1000), `5GiB` or `5G` (powers of 1024), in upper or lower case."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Z]*)", text.strip().upper())
    if match is None or (unit := match[2] or default_unit) not in SIZE_UNITS:
        raise ValueError(f"expected a size such as {example}")
    size = float(match[1]) * SIZE_UNITS[unit]
    if not math.isfinite(size):
        raise ValueError("the size is too large")
    return int(size)


def _read_byte_size(value: Any) -> Any:
    # pydantic would read true as 1
    return _parse_size(str(value), default_unit="B", example="5GB") if isinstance(value, str | bool) else value


def _check_gpu_memory(value: Any) -> Any:
    """Check the size, and return it as text: a number of bytes would be read back from settings.yaml as GiB."""
    if isinstance(value, bool | int | float | str):
        parse_gpu_memory(str(value))
        return str(value)
    return value


NoneIfUnset = BeforeValidator(_parse_unset)
"""Reads `none`, `null`, an empty string and -1, which FastChat and Hugging Face use for "not set", as None."""

OptionalCount = Annotated[int | None, Field(gt=0), NoneIfUnset]
"""A positive whole number, or None if it isn't set."""

WordList = Annotated[list[str], BeforeValidator(_split_items, json_schema_input_type=list[str] | str)]
"""A list that can be written as `q v`, `q,v` or a YAML list."""

NumberList = Annotated[list[float], BeforeValidator(_split_items, json_schema_input_type=list[float] | float | str)]
"""A list of numbers that can be written as `0.7 0.3`, `0.7,0.3` or a YAML list."""

ByteSize = Annotated[int, BeforeValidator(_read_byte_size, json_schema_input_type=int | str)]
"""A number of bytes that can be written with a unit: `5GB`, `500MiB`."""

GpuMemory = Annotated[str, BeforeValidator(_check_gpu_memory, json_schema_input_type=int | float | str)]
"""The memory of a GPU as text (see `parse_gpu_memory`): `24GiB`, `24GB`, or `24`, which is in GiB."""

FolderList = Annotated[list[Path], BeforeValidator(_wrap_in_list, json_schema_input_type=list[str] | str)]
"""A list of folders; a single one needs no list."""

PathList = Annotated[list[str], BeforeValidator(_wrap_in_list, json_schema_input_type=list[str] | str)]
"""A list of paths; a single one needs no list. Paths may contain commas and spaces, so they aren't split."""
