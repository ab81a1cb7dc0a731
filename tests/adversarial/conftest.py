"""A limit of memory for tests that read crafted files."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = 384 << 20


@pytest.fixture
def bounded() -> Iterator[None]:
    """Limit this process's address space to its current size plus MEMORY."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
