"""Triton for tests: torch's CPU builds come without it, and other processes would import it for nothing."""

import importlib.util
import os

from tests.support.paths import REPOSITORY

TRITON_FOLDER = REPOSITORY / "build" / "triton"  # `make test` installs it there


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None or (TRITON_FOLDER / "triton").is_dir()


def make_environment(**variables: str) -> dict[str, str]:
    """Make the environment of a process that uses Triton, if this machine has it."""
    environment = {**os.environ, **variables}
    if importlib.util.find_spec("triton") is None:
        paths = [str(REPOSITORY), str(TRITON_FOLDER), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment
