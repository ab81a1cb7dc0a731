"""The base class of every settings model, and the types that their fields share.

A setting is declared once: its name is the flag (`--lora-r`), the YAML key (`lora_r`), the environment
variable (`T5TUNE_LORA_R`) and the attribute (`settings.lora_r`); its description is the help text.
"""

import inspect
import math
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticUndefined

from t5tune.errors import SettingsError
from t5tune.settings.messages import describe_python_errors, describe_unknown_names, shorten_value
from t5tune.settings.other_names import find_meant_setting
from t5tune.settings.records_in_memory import CallerError, is_in_memory, store_records

NUMBER_TYPES = {int, float, int | None, float | None}
PATH_TYPES = {Path, Path | None}
SIZE_SUFFIXES = {"B": 1}
SIZE_SUFFIXES |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
SIZE_SUFFIXES |= {f"{prefix}{end}": 1024**power for power, prefix in enumerate("KMGT", 1) for end in ("", "IB")}
MIN_GPU_MEMORY = 1 << 20
UNSET_IN_SCHEMA = ["none", "None", -1]
Group = TypeVar("Group", bound="Settings")


class _Signature:
    """The settings with their input types and defaults, as a notebook shows them: first the most used.

    pydantic's signature is missing until the model is built, and is full of validators afterwards.
    """

    def __get__(self, instance: object, model: "type[Settings]") -> inspect.Signature:
        names = dict.fromkeys([*model.list_required(), *model.essential, *model.list_suggestions()])
        parameters = []
        for name in names:
            field = model.model_fields[name]
            default = inspect.Parameter.empty if field.is_required() else field.default
            kind = _find_input_type(field.annotation, field.metadata)
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
        return inspect.Signature(parameters)


def _find_input_type(kind: Any, metadata: Iterable[Any] = ()) -> Any:
    """Find the type that a setting's validator reads, or the setting's type without `Annotated`."""
    if typing.get_origin(kind) is Annotated:
        kind, *metadata = typing.get_args(kind)
        return _find_input_type(kind, metadata)
    read = [item.json_schema_input_type for item in metadata if isinstance(item, BeforeValidator)]
    if declared := [read_type for read_type in read if read_type is not PydanticUndefined]:
        return declared[0]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return reduce(or_, map(_find_input_type, typing.get_args(kind)))
    return str | Path if kind is Path else kind


def get_extra(field: FieldInfo, key: str) -> Any:
    """Return a value of a field's `json_schema_extra`, such as `metavar`, or None."""
    return field.json_schema_extra.get(key) if isinstance(field.json_schema_extra, dict) else None


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
    """The settings that most people use, besides required settings: `--help` lists these, `--help-all` all."""
    also_positional: ClassVar[str | None] = None
    """The setting, or `config`, that a word without a flag fills: `t5tune chat run`. It also has a flag."""
    unused_quietly: ClassVar[frozenset[str]] = frozenset()
    """Settings of a different command whose config files this command reads too: ignored without a note."""
    notes_on_implied: ClassVar[Mapping[str, str]] = {}
    """Setting -> note for the user, for settings that other settings turn on."""

    __signature__: ClassVar[Any] = _Signature()

    if not TYPE_CHECKING:  # type checkers derive the parameters from the fields

        def __init__(self, **values: Any) -> None:
            self._refuse_unknown_names(values, required=self.list_required())  # before records are written to a file
            try:
                super().__init__(**values)
            except CallerError as error:
                raise (error.__cause__ or error) from None
            except ValidationError as error:
                raise SettingsError(*describe_python_errors(error, self.list_secrets())) from None

        # model_validate, which load_settings calls, raises pydantic's error
        __init__.__pydantic_base_init__ = True

        def __setattr__(self, name: str, value: Any) -> None:
            self._refuse_unknown_names([name])
            shown = shorten_value(value)
            raise SettingsError(f"{name}: settings can't be changed; use settings.replace({name}={shown})")

    def _imply(self, **values: Any) -> None:
        """Give unset settings a value that follows from other settings; they remain unset."""
        for name, value in values.items():
            if name not in self.model_fields_set:
                object.__setattr__(self, name, value)  # pydantic's setattr is refused, and would set it

    def replace(self, **changes: Any) -> Self:
        """Return validated settings with different values; unset settings remain unset."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with different values, which only `replace` validates."""
        self._refuse_unknown_names(update or {})
        return super().model_copy(update=update, deep=deep)

    def select_part(self, group: type[Group]) -> Group:
        """Return the settings of one of this command's groups."""
        values = {name: getattr(self, name) for name in group.model_fields}
        return group.model_construct(self.model_fields_set & group.model_fields.keys(), **values)

    @classmethod
    def __pydantic_on_complete__(cls) -> None:
        del cls.__signature__  # pydantic's, which hides ours

    @field_validator("*", mode="before")
    @classmethod
    def _check_value(cls, value: Any, field: ValidationInfo) -> Any:
        """Reject values that pydantic would misread: "" as the current folder, and `lora_r: true` as 1.

        Otherwise return the value, with a path's `~` expanded.
        """
        kind = cls.model_fields[field.field_name or ""].annotation
        if isinstance(value, bool) and kind in NUMBER_TYPES:
            raise ValueError("expected a number, not true or false")
        texts = value if isinstance(value, list | tuple) else [value]
        if any("\0" in text for text in texts if isinstance(text, str)):
            raise ValueError("contains a NUL character, which no path or name can contain")
        is_required = kind in (Path, list[Path]) or field.field_name == "output_dir"
        if is_required and any(isinstance(text, str) and not text for text in texts):
            raise ValueError("the path is empty; use `.` for the current folder")
        return read_path(value) if kind in PATH_TYPES else value

    @classmethod
    def _refuse_unknown_names(cls, given: Iterable[str], required: Collection[str] = ()) -> None:
        """Refuse unknown settings, and then also name missing settings that no unknown name means."""
        given = list(given)
        unknown = [name for name in given if name not in cls.model_fields]
        if not unknown:
            return
        own = cls.list_suggestions()
        commands = {model.command: model.list_suggestions() for model in _list_commands()}
        present = {*given, *(find_meant_setting(name, own) for name in unknown)}
        missing = [f"{name}: missing" for name in required if name not in present]
        raise SettingsError(*describe_unknown_names(unknown, own, commands), *missing)

    @classmethod
    def list_required(cls) -> list[str]:
        """List the settings without a default, first `also_positional`."""
        required = [name for name, field in cls.model_fields.items() if field.is_required()]
        return sorted(required, key=lambda name: name != cls.also_positional)

    @classmethod
    def list_secrets(cls) -> list[str]:
        """List the settings whose values are never shown: those without a repr."""
        return [name for name, field in cls.model_fields.items() if not field.repr]

    @classmethod
    def list_suggestions(cls) -> list[str]:
        """List the settings without the hidden ones."""
        return [name for name, field in cls.model_fields.items() if not get_extra(field, "hidden")]

    @classmethod
    def format_option(cls, name: str) -> str:
        """Return how a field is written on the command line: `--lora-r`, or `CACHE` for a positional argument."""
        field = cls.model_fields.get(name)
        if field is not None and get_extra(field, "positional"):
            return str(get_extra(field, "argument") or name.upper())
        return f"--{name.replace('_', '-')}"

    @classmethod
    def find_panel(cls, name: str) -> str:
        """Return the panel of the mixin that declares a field."""
        for base in reversed(cls.__mro__):
            if issubclass(base, Settings) and name in base.__annotations__:
                return base.panel
        raise KeyError(name)


def _list_commands(model: type[Settings] = Settings) -> Iterator[type[Settings]]:
    """Yield the settings models of all commands that are imported."""
    if model.command:
        yield model
    for subclass in model.__subclasses__():
        yield from _list_commands(subclass)


class _UnsetReader(BeforeValidator):
    """Also allows in the JSON schema the values that read as None."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler(schema)
        return {**described, "anyOf": [*described["anyOf"], {"enum": UNSET_IN_SCHEMA}]}


def parse_unset(value: Any) -> Any:
    """Read the values that mean "not set" as None."""
    return None if isinstance(value, str | int) and str(value).lower() in {"", "none", "null", "-1"} else value


def _split_items(value: Any) -> Any:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        # each item of a list may again be several words: `--weights 0.7,0.3`
        return [word for item in value for word in (re.findall(r"[^,\s]+", item) if isinstance(item, str) else [item])]
    return value


def _split_tokens(value: Any) -> Any:
    """Split items as `_split_items` does; one without words is a token, such as a newline."""
    if not isinstance(value, list | tuple):
        return _split_items(value)
    return [word for item in value for word in (_split_items([item]) or [item]) if word != ""]


def _split_numbers(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return _split_items([value] if is_number else value)


def read_path(value: Any) -> Any:
    """Read a path as text, with the home folder in place of `~`, which no shell expands in a file."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    is_at_home = isinstance(path, str) and (path == "~" or path.startswith("~/"))
    return os.path.expanduser(path) if is_at_home else path


def read_paths(value: Any) -> Any:
    """Read a path, or a list of paths, as a list of texts."""
    if is_in_memory(value):
        raise ValueError("expected text or a path, or a list of them")
    if value in ("", [""]):  # `--metric=`
        return []
    if isinstance(value, str | os.PathLike):
        value = [value]
    return value and [read_path(item) for item in value]


def read_data(value: Any) -> Any:
    """Read data as a list of paths; records in memory are stored in a file (settings/records_in_memory.py)."""
    return [str(store_records(value))] if is_in_memory(value) else read_paths(value)


def exists(path: str) -> bool:
    """Whether there is a file or folder of this name; a text that is too long for a path isn't one."""
    with suppress(OSError):
        return Path(read_path(path)).exists()
    return False


def parse_gpu_memory(text: str) -> int:
    """Parse a GPU's memory to bytes; a number without a unit is in GiB."""
    size = _parse_size(text, default_unit="GIB", example="24GiB")
    if size < MIN_GPU_MEMORY:
        raise ValueError("too small for a GPU's memory; expected a size such as 24GiB")
    return size


def _parse_size(text: str, default_unit: str, example: str) -> int:
    """Parse a size to bytes: `5GB` (powers of 1000), `5GiB` or `5G` (powers of 1024), in upper or lower case."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Z]*)", text.strip().upper())
    if match is None or (unit := match[2] or default_unit) not in SIZE_SUFFIXES:
        raise ValueError(f"expected a size such as {example}")
    size = float(match[1]) * SIZE_SUFFIXES[unit]
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


NoneIfUnset = _UnsetReader(parse_unset)
"""Reads `none`, `null`, an empty string and -1, which FastChat and Hugging Face use for "not set", as None."""

OptionalPath = Annotated[Path | None, NoneIfUnset]
OptionalText = Annotated[str | None, NoneIfUnset]

PathAsText = BeforeValidator(read_path)
"""Reads a path object as text, where a setting is a path or a name."""

OptionalCount = Annotated[int | None, Field(gt=0, lt=1 << 63), NoneIfUnset]
"""A positive whole number, or None: not set."""

WordList = Annotated[list[str], BeforeValidator(_split_items, json_schema_input_type=list[str] | str)]
"""A list that can be written as `q v`, `q,v` or a YAML list."""

TokenList = Annotated[list[str], BeforeValidator(_split_tokens, json_schema_input_type=list[str] | str)]
"""A list of words; an item of only white space or commas is a word, too."""

NumberList = Annotated[list[float], BeforeValidator(_split_numbers, json_schema_input_type=list[float] | float | str)]
"""A list of numbers that can be written as `0.7`, `0.7 0.3`, `0.7,0.3` or a YAML list."""

ByteSize = Annotated[int, BeforeValidator(_read_byte_size, json_schema_input_type=int | str)]
"""A number of bytes that can be written with a unit: `5GB`, `500MiB`."""

GpuMemory = Annotated[str, BeforeValidator(_check_gpu_memory, json_schema_input_type=int | float | str)]
"""The memory of a GPU as text (see `parse_gpu_memory`): `24GiB`, `24GB`, or `24`, which is in GiB."""

FolderList = Annotated[list[Path], BeforeValidator(read_paths, json_schema_input_type=list[str] | str)]
"""A folder, or a list of folders."""

PathList = Annotated[list[str], BeforeValidator(read_paths, json_schema_input_type=list[str] | str)]
"""A path, or a list of paths, which aren't split, since they may contain commas and spaces."""

DataList = Annotated[list[str], BeforeValidator(read_data, json_schema_input_type=list[str] | str)]
"""A path, a list of paths, or records in memory, which settings/records_in_memory.py stores in a file."""
