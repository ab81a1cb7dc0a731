"""The examples in the modules' docstrings: mypy checks which functions and attributes exist, and their arguments."""

import ast
import builtins
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "t5tune"


def name_module(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def list_top_names(tree: ast.Module) -> set[str]:
    """List what a module defines or imports at its top level."""
    names = set[str]()
    for node in tree.body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Import() | ast.ImportFrom():
                names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            case ast.Assign():
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def read_example(tree: ast.Module) -> str:
    """Read the code in a module's docstring: all paragraphs after the first one that are Python with a call."""
    found = []
    for block in (ast.get_docstring(tree, clean=False) or "").split("\n\n")[1:]:
        code = textwrap.dedent(block.strip("\n"))
        try:
            calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        except SyntaxError:
            continue
        found += [code] if calls else []
    return "\n".join(found)


def list_unbound(code: str) -> list[str]:
    """List the names that an example uses and doesn't bind, in their order."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    bound = {*vars(builtins)}
    bound |= {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)}
    bound |= {alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names}
    loaded = [node.id for node in nodes if isinstance(node.ctx, ast.Load)]
    stored = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    arguments = {node.arg for node in ast.walk(ast.parse(code)) if isinstance(node, ast.arg)}
    return [name for name in dict.fromkeys(loaded) if name not in bound | stored | arguments]


def write_functions() -> Iterator[str]:
    """Write each module's example as a function whose parameters are what the example leaves open."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    homes = {
        node.name: name_module(path)
        for path, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    yield "from typing import Any"
    for number, (path, tree) in enumerate(trees.items()):
        if not (code := read_example(tree)):
            continue
        code = re.sub(r"\b([A-Z]\w+)\(\.\.\.\)", r"some_\1", code)  # Pipeline(...) leaves its arguments out
        own, names = list_top_names(tree), list_unbound(code)
        imports = [f"from {name_module(path)} import {name}" for name in names if name in own]
        imports += [f"from {homes[name]} import {name}" for name in names if name not in own and name in homes]
        opened = [name for name in names if name not in own | homes.keys()]
        yield f"# {path.relative_to(REPOSITORY)}"
        yield f"async def example_{number}({', '.join(f'{name}: Any' for name in opened)}) -> None:"
        yield textwrap.indent("\n".join([*imports, code]), "    ")


@pytest.mark.slow
def test_the_examples_in_module_docstrings_fit_the_signatures(tmp_path: Path) -> None:
    text = "\n".join(write_functions()) + "\n"
    assert text.count("async def ") > 60
    (tmp_path / "examples.py").write_text(text, encoding="utf-8")
    # settings accept more types than their fields have, and a name that an example leaves open may be any object's
    ignored = ["arg-type", "assignment", "has-type", "no-any-return", "no-redef", "no-untyped-def", "union-attr"]
    flags = ["--implicit-reexport", *(word for code in ignored for word in ("--disable-error-code", code))]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *flags, "--no-warn-unreachable", tmp_path / "examples.py"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    places = {number: line for number, line in enumerate(text.splitlines(), start=1) if line.startswith("# t5tune/")}
    found = re.findall(r"^\S+examples\.py:(\d+): error: (.*)$", checked.stdout, re.MULTILINE)
    problems = [f"{places[max(line for line in places if line < int(at))]}: {problem}" for at, problem in found]
    assert not problems, "\n".join(problems)
    assert checked.returncode == 0, checked.stdout + checked.stderr
