"""The oldest release of each dependency that t5tune works with, as pyproject.toml declares it.

    check_versions("torch", "transformers")     raises DependencyError where an older one is installed

`make floors` runs the tests with exactly these releases.
"""

import importlib.metadata
import re
import sys

from t5tune.errors import DependencyError


def oldest_releases() -> dict[str, str]:
    """Package -> oldest release, for this platform, read from t5tune's own metadata."""
    try:
        requirements = importlib.metadata.requires("t5tune") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source folder without having been installed
        requirements = []
    oldest = {}
    for line in requirements:
        requirement, _, marker = line.partition(";")
        match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([\d.]+)", requirement.strip())
        if match and _applies(marker):
            oldest[match[1]] = match[2]
    return oldest


def release_numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def is_older(version: str, oldest: str) -> bool:
    return release_numbers(version) < release_numbers(oldest)


def upgrade_command(package: str, oldest: str) -> str:
    return f"pip install --upgrade '{package}>={oldest}'"


def check_versions(*packages: str) -> None:
    """Refuse packages that are installed in a release older than t5tune works with.

    A package that is missing is left to the import that needs it.

    Raises:
        DependencyError: names the first such package, the release found and the oldest one that works.
    """
    oldest = oldest_releases()
    for package in packages:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if package in oldest and is_older(version, oldest[package]):
            raise DependencyError(
                f"{package}: version {version} is installed; t5tune needs {oldest[package]} or newer",
                hint=upgrade_command(package, oldest[package]),
            )


def _applies(marker: str) -> bool:
    """Whether a dependency's marker, of the few forms in pyproject.toml, applies here."""
    if "extra" in marker:
        return False
    if match := re.search(r"python_version\s*<\s*['\"]3\.(\d+)['\"]", marker):
        return sys.version_info[1] < int(match[1])
    if match := re.search(r"sys_platform\s*(==|!=)\s*['\"](\w+)['\"]", marker):
        return (sys.platform == match[2]) is (match[1] == "==")
    return True
