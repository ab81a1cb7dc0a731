"""The libraries' messages are hidden in a block, and shown again after it."""

import logging
import os
import warnings

import pytest

from t5tune.compat.quiet import LEVELS, VARIABLES, quiet_libraries


def read_state() -> list[object]:
    variables = {name: os.environ.get(name) for name in VARIABLES}
    levels = {name: logging.getLogger(name).getEffectiveLevel() for name in LEVELS}
    return [variables, levels, list(warnings.filters)]


def test_overlapping_blocks_hide_messages_until_the_last_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads enter and leave in any order."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with quiet_libraries():
        pass  # transformers may be imported only now
    before = read_state()
    first, second = quiet_libraries(), quiet_libraries()
    first.__enter__()
    second.__enter__()
    hidden = read_state()
    first.__exit__(None, None, None)
    assert read_state() == hidden != before
    with pytest.warns(UserWarning, match="shown"):
        warnings.warn("shown", stacklevel=1)  # pytest's own block shows all
    warnings.warn("an error in these tests unless it is hidden", stacklevel=1)
    second.__exit__(None, None, None)
    assert read_state() == before


def test_a_block_hides_messages_that_a_library_enabled() -> None:
    with quiet_libraries():
        warnings.simplefilter("error")  # as a library does when it is imported
        with quiet_libraries():
            warnings.warn("hidden", stacklevel=1)


def test_debug_shows_the_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")
    before = read_state()
    with quiet_libraries():
        assert read_state() == before
