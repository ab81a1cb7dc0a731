"""YAML as a user means it: 1e-4 is a number, `no` is a word, and a key given twice is an error."""

import re
from pathlib import Path
from typing import Any

import yaml

from t5tune.errors import SettingsError

MAX_BYTES = 1 << 18


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few of aliases can stand for more than any memory holds
            alias = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {alias.start_mark.line + 1}: *{alias.anchor}: aliases aren't read; repeat it")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+.0123456789"),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if key in seen:
            raise yaml.YAMLError(f"line {line}: {key} stands twice (first in line {seen[key]})")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        SettingsError: it can't be read, isn't YAML, or isn't a mapping of names to values.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise OSError(f"{size} bytes; {MAX_BYTES} is the most that is read")
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: can't be read: {error}") from error
    except RecursionError:
        raise SettingsError(f"{path}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # dates that never were, numbers too long, lists for keys
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise SettingsError(f"{path}: expected lines of the form `name: value`")
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number: a folder named 1e3 must stay a name."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def to_yaml(value: dict[str, Any]) -> str:
    """YAML that `read_yaml` reads back to the same value, keys in their order."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
