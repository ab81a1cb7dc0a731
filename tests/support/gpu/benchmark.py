"""The modules of benchmarks/gpu.py, for tests."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.paths import REPOSITORY


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    """The benchmarks import each other from their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        yield


def load(name: str) -> Any:
    return importlib.import_module(name)
