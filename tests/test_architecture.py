"""Imports: each package imports only from lower layers, no module is in a cycle, and scripts import what exists.

And the sizes of files.
"""

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from t5tune.settings import COMMANDS
from tests.support.paths import REPOSITORY

PACKAGE = REPOSITORY / "t5tune"
# from the lowest layer to the highest; packages of one layer may import each other, but not in a circle
LAYERS = [
    {
        "errors",
        "file_names",
        "formatting",
        "progress",
        "progress_bar",
        "metrics",
        "custom_metrics",
        "label_metrics",
        "io",
        "version",
    },
    {"compat", "families", "hub", "settings"},
    {"data", "checkpoints"},
    {"model", "constraints"},
    {"diagnosis", "distributed", "inference"},
    {"merging", "preparing", "serving"},
    {"converting", "evaluation"},
    {"runs"},
    {"planning", "reports"},
    {"training"},
    {"commands"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(path: Path, modules: set[str]) -> Iterator[str]:
    """The modules that one imports anywhere: at its top, in functions, and for type checking alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "t5tune":
            base = node.module.partition(".")[2]
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                yield full if full in modules else base or "__init__"
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("t5tune."))


def graph() -> dict[str, set[str]]:
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    return {name: set(imports_of(path, set(paths))) - {name} for name, path in paths.items()}


def test_scripts_import_what_the_package_has() -> None:
    """Benchmarks and examples also import in functions, and in code that they give to other processes as a text."""
    scripts = [path for folder in ("benchmarks", "examples") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    imported = [
        (path.name, module, name.split()[0])
        for path in scripts
        for module, several, one in re.findall(
            r"from (t5tune[\w.]*) import (?:\(([^)]*)\)|([\w, ]+))", path.read_text(encoding="utf-8")
        )
        for name in (several or one).split(",")
        if name.strip()
    ]
    assert len(imported) > 50
    assert [each for each in imported if not has_name(each[1], each[2])] == []


def has_name(module: str, name: str) -> bool:
    """Whether a module has a name, or a package a module of this name."""
    found = importlib.import_module(module)
    is_package = hasattr(found, "__path__")
    return hasattr(found, name) or (is_package and importlib.util.find_spec(f"{module}.{name}") is not None)


def test_packages_import_only_from_those_below() -> None:
    level = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    upward = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in sorted(others)
        if level[other.partition(".")[0]] > level[name.partition(".")[0]]
    ]
    assert not upward


def test_no_settings_of_a_command_are_below_the_commands() -> None:
    names = {model.__name__ for model in COMMANDS}
    found = [
        f"{module_name(path)} imports {alias.name}"
        for path in PACKAGE.rglob("*.py")
        if module_name(path).partition(".")[0] not in {"cli", "commands", "settings"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in names or (node.module or "").startswith("t5tune.settings.commands")
    ]
    assert not found


def test_no_file_is_too_long_to_read() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    tracked = listed.stdout.splitlines()  # without __init__.pyi, which is generated
    assert len(tracked) > 500
    files = [name for name in tracked if len((REPOSITORY / name).read_text(encoding="utf-8").splitlines()) > 800]
    assert files == []


def test_no_tracked_file_is_larger_than_pockets_weights() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    sizes = {name: (REPOSITORY / name).stat().st_size for name in listed.stdout.split("\0") if name}
    assert max(sizes, key=sizes.__getitem__) == "t5tune/pocket/model.safetensors"


def test_no_module_is_in_a_cycle_of_imports() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(f"imported in a circle: {' → '.join(error.args[1])}") from None


def test_no_package_is_in_a_cycle_of_imports() -> None:
    packages: dict[str, set[str]] = {}
    for name, others in graph().items():
        package = name.partition(".")[0]
        packages.setdefault(package, set()).update(other.partition(".")[0] for other in others)
    try:
        TopologicalSorter({name: others - {name} for name, others in packages.items()}).prepare()
    except CycleError as error:
        raise AssertionError(f"imported in a circle: {' → '.join(error.args[1])}") from None
