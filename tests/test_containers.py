"""The container files: checked by hadolint, with all that the package is built from. No image is built here."""

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

FILES = ("Dockerfile", "Dockerfile.cpu")


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name: str) -> None:
    command = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if command is None:
        pytest.skip("hadolint isn't installed")
    done = subprocess.run([command, "--no-color", REPOSITORY / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", FILES)
def test_the_last_user_is_not_root(name: str) -> None:
    users = re.findall(r"^USER (\S+)$", (REPOSITORY / name).read_text(), re.MULTILINE)
    assert users
    assert users[-1] not in ("root", "0")


def test_the_context_has_only_the_files_of_the_build() -> None:
    """An image must not contain a developer's runs, caches or .git."""
    lines = (REPOSITORY / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert [name for name in kept if not (REPOSITORY / name).exists()] == []
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    needed = [
        *project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"],
        *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"],
        project["project"]["readme"],
        *project["project"]["license-files"],
        "pyproject.toml",
    ]
    assert [name for name in needed if not any(fnmatch.fnmatch(f"{name}/", f"{each}/*") for each in kept)] == []
