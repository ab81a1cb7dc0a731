"""YAML as a user means it: 1e-4 is a number, `no` is a word, and a key given twice is an error."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from t5tune.errors import SettingsError
from t5tune.io.yaml_errors import InvalidYAML, explain

MAX_BYTES = 1 << 18
LONGEST_SHOWN = 40  # characters of a value in a message


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few of aliases can stand for more than any memory holds
            alias = self.peek_event()  # type: ignore[no-untyped-call]
            hint = "repeat the value, or put it in quotes"
            raise InvalidYAML(alias.start_mark, f"*{alias.anchor}: aliases aren't read", hint)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # what PyYAML lets through
            raise _no_such_value(node) from None


def _no_such_value(node: yaml.Node) -> InvalidYAML:
    """A date that never was, a number too long, `!!int x`."""
    kind = node.tag.rpartition(":")[2]
    shown = (node.value or "an empty value") if isinstance(node, yaml.ScalarNode) else "the value"
    what = "is no date or time" if kind == "timestamp" else f"is no {kind}"
    if len(shown) > LONGEST_SHOWN:
        shown = f"{shown[: LONGEST_SHOWN - 1]}…"
        what = "is too long a number" if kind == "int" else what
    return InvalidYAML(node.start_mark, f"{shown} {what}", "put it in quotes if it is text")


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+.0123456789"),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise InvalidYAML(
                key_node.start_mark, "a list or a mapping where a name is expected", "write `name: value`"
            )
        if key in seen:
            what = f"duplicate key {key} (first defined on line {seen[key]})"
            raise InvalidYAML(key_node.start_mark, what, "remove one of them")
        seen[key] = key_node.start_mark.line + 1
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        SettingsError: it can't be read, isn't YAML, or isn't a mapping of names to values.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise SettingsError(f"{path}: can't be read: {size} bytes; {MAX_BYTES} is the most that is read")
        data = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: can't be read: {error.strerror or error}") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"the byte 0x{data[error.start]:02X} is not UTF-8 text"
        raise SettingsError(f"{path}:{line}: {what}", hint="save the file as UTF-8") from None
    value = _parsed(path, text)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise SettingsError(f"{path}: expected lines of the form `name: value`")
    return value


def _parsed(path: Path, text: str) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except RecursionError:
        raise SettingsError(f"{path}: not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        problem = explain(error, text)
        raise SettingsError(f"{path}:{problem.line}: {problem.what}", hint=problem.hint) from error
    except ValueError:  # an escape that is beyond Unicode
        line = loader.line + 1 if loader is not None else 1
        raise SettingsError(f"{path}:{line}: not valid YAML", hint="put the value in single quotes") from None


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number: a folder named 1e3 must stay a name."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def to_yaml(value: dict[str, Any]) -> str:
    """YAML that `read_yaml` reads back to the same value, keys in their order."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
