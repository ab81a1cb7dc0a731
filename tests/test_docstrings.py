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


def find_imports(tree: ast.Module, module: str) -> dict[str, str]:
    """Return name -> the line that imports it, for all that a module defines or imports at its top level."""
    lines = {}
    for node in tree.body:
        match node:
            case ast.Import() | ast.ImportFrom():
                for alias in node.names:
                    line = ast.unparse(ast.Import([alias]) if isinstance(node, ast.Import) else _import(node, alias))
                    lines[(alias.asname or alias.name).partition(".")[0]] = line
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                lines[name] = f"from {module} import {name}"
            case ast.Assign():
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                lines |= {name: f"from {module} import {name}" for name in names}
    return lines


def _import(node: ast.ImportFrom, alias: ast.alias) -> ast.ImportFrom:
    return ast.ImportFrom(node.module, [alias], node.level)


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
        node.name: f"from {name_module(path)} import {node.name}"
        for path, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    yield "from typing import Any"
    for number, (path, tree) in enumerate(trees.items()):
        if not (code := read_example(tree)):
            continue
        code = re.sub(r"\b([A-Z]\w+)\(\.\.\.\)", r"some_\1", code)  # Pipeline(...) leaves its arguments out
        lines, names = homes | find_imports(tree, name_module(path)), list_unbound(code)
        imports = [lines[name] for name in names if name in lines]
        opened = [name for name in names if name not in lines]
        yield f"# {path.relative_to(REPOSITORY)}"
        yield f"async def example_{number}({', '.join(f'{name}: Any' for name in opened)}) -> None:"
        yield textwrap.indent("\n".join([*imports, code]), "    ")


@pytest.mark.slow
def test_the_examples_in_module_docstrings_fit_the_signatures(tmp_path: Path) -> None:
    text = "\n".join(write_functions()) + "\n"
    assert text.count("async def ") > 60
    file = tmp_path / "docstring_examples.py"  # whose settings in pyproject.toml are laxer
    file.write_text(text, encoding="utf-8")
    # with the options of `make types`, mypy takes the modules from its cache
    command = [sys.executable, "-m", "mypy", file]
    checked = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=600)
    places = {number: line for number, line in enumerate(text.splitlines(), start=1) if line.startswith("# t5tune/")}
    found = re.findall(r"^\S+docstring_examples\.py:(\d+): error: (.*)$", checked.stdout, re.MULTILINE)
    problems = [f"{places[max(line for line in places if line < int(at))]}: {problem}" for at, problem in found]
    assert not problems, "\n".join(problems)
    assert checked.returncode == 0, checked.stdout + checked.stderr
