"""Read YAML the way a user means it: 1e-4 and 010 are numbers, `no` is a word, and a duplicate key is an error."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from t5tune.errors import SettingsError
from t5tune.formatting import shorten
from t5tune.io.yaml_errors import InvalidYAML, describe_yaml_error

MAX_YAML_BYTES = 1 << 18
MAX_SETTINGS_BYTES = 16 << 20  # the settings of a run list all of its files
MAX_SHOWN_CHARACTERS = 40  # of a value in a message


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases. Only true and false are booleans, 1e-4 is a number, and 010 is 10."""

    # PyYAML follows YAML 1.1: it reads `no` as false, `1e-4` as text, `010` as 8 and `1:40` as 100. The resolvers added
    # below replace these three.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # nested aliases can expand to more than fits in memory
            alias = self.peek_event()  # type: ignore[no-untyped-call]
            hint = "repeat the value, or put it in quotes"
            raise InvalidYAML(alias.start_mark.line + 1, f"*{alias.anchor}: aliases aren't supported", hint)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # PyYAML doesn't catch these
            raise _make_value_error(node) from None


def _make_value_error(node: yaml.Node) -> InvalidYAML:
    kind = node.tag.rpartition(":")[2]
    shown = (node.value or "an empty value") if isinstance(node, yaml.ScalarNode) else "the value"
    what = "is not a valid date or time" if kind == "timestamp" else f"is not a valid {kind}"
    if len(shown) > MAX_SHOWN_CHARACTERS:
        shown = shorten(shown, MAX_SHOWN_CHARACTERS)
        what = "is too long for a number" if kind == "int" else what
    return InvalidYAML(node.start_mark.line + 1, f"{shown} {what}", "put it in quotes if it is text")


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"),
    list("-+0123456789"),
)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = str(loader.construct_scalar(node)).replace("_", "")
    return int(digits, 0 if digits.lstrip("+-").startswith(("0x", "0b")) else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise InvalidYAML(line, "a list or a mapping where a name is expected", "write `name: value`")
        if key in seen:
            what = f"duplicate key {key} (first defined on line {seen[key]})"
            raise InvalidYAML(line, what, "remove one of them")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def read_yaml(path: Path, max_bytes: int = MAX_YAML_BYTES) -> dict[str, Any]:
    """Read a YAML file that contains a mapping of names to values.

    Raises:
        SettingsError: the file can't be read, isn't valid YAML, or has other contents.
    """
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise SettingsError(f"{path}: can't be read: it has {size} bytes; the limit is {max_bytes} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: can't be read: {error.strerror or error}") from error
    try:
        value = _parse(data)
    except RecursionError:
        raise SettingsError(f"{path}: not valid YAML: nested too deeply") from None
    except InvalidYAML as error:
        raise SettingsError(f"{path}:{error.line}: {error}", hint=error.hint) from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise SettingsError(f"{path}: expected lines of the form `name: value`")
    return value


def _parse(data: bytes) -> Any:
    try:
        text = data.decode()
        loader = _Loader(text)
        return loader.get_single_data()
    except UnicodeDecodeError as error:
        line, what = data.count(b"\n", 0, error.start) + 1, f"the byte 0x{data[error.start]:02X} is not valid UTF-8"
        raise InvalidYAML(line, what, "save the file as UTF-8") from None
    except yaml.YAMLError as error:
        raise describe_yaml_error(error, text) from error
    except ValueError:  # an escape beyond the last Unicode code point
        raise InvalidYAML(loader.line + 1, "not valid YAML", "put the value in single quotes") from None


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a number: a folder named 1e3 must stay a name."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def to_yaml(value: dict[str, Any]) -> str:
    """Write the value as YAML that `read_yaml` reads back to an equal value, with the keys in the same order."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
