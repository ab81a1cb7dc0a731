"""The oldest release of each dependency that t5tune works with, as pyproject.toml declares it.

    check_versions("torch", "transformers")     raises DependencyError if an older release is installed

`make floors` runs the tests with these releases.
"""

import importlib.metadata
import re
import sys

from t5tune.errors import DependencyError


def _read_bounds() -> dict[str, tuple[str, str]]:
    """Map each package to its oldest release on this platform, and to its upper bound, such as `,<5.25`, or nothing."""
    try:
        requirements = importlib.metadata.requires("t5tune") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source checkout that isn't installed
        requirements = []
    bounds = {}
    for line in requirements:
        requirement, _, marker = line.partition(";")
        # in the metadata, the parts of a requirement are in alphabetical order
        match = re.fullmatch(r"([A-Za-z0-9._-]+)(<[\d.]+,)?>=([\d.]+)", requirement.replace(" ", ""))
        if match and _matches_marker(marker):
            bounds[match[1]] = (match[3], f",{match[2].rstrip(',')}" if match[2] else "")
    return bounds


def read_oldest_releases() -> dict[str, str]:
    """Map each package to its oldest supported release on this platform, from t5tune's package metadata."""
    return {package: oldest for package, (oldest, _) in _read_bounds().items()}


def is_older(version: str, oldest: str) -> bool:
    """Compare the numbers of two releases: 2, 13, 0 for `2.13.0+cpu`."""
    found, needed = ([int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3]] for text in (version, oldest))
    return found < needed


def make_install_command(package: str) -> str:
    """Make the command that installs the newest release of a package that t5tune works with."""
    oldest, bound = _read_bounds().get(package, ("0", ""))
    return f"pip install --upgrade '{package}>={oldest}{bound}'"


def check_versions(*packages: str) -> None:
    """Check that no installed package is older than the oldest release that t5tune works with.

    A missing package is not reported here; the import that needs it fails.

    Raises:
        DependencyError: a package is too old.
    """
    oldest = read_oldest_releases()
    for package in packages:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if package in oldest and is_older(version, oldest[package]):
            raise DependencyError(
                f"{package}: version {version} is installed; t5tune needs {oldest[package]} or newer",
                hint=make_install_command(package),
            )


def _matches_marker(marker: str) -> bool:
    """Whether a dependency's environment marker matches. Knows only the forms used in pyproject.toml."""
    if "extra" in marker:
        return False
    if match := re.search(r"python_version\s*<\s*['\"]3\.(\d+)['\"]", marker):
        return sys.version_info[1] < int(match[1])
    if match := re.search(r"sys_platform\s*(==|!=)\s*['\"](\w+)['\"]", marker):
        return (sys.platform == match[2]) is (match[1] == "==")
    return True
