"""docs/support.md: it has a cell for everything, and the tests that it names exist."""

import subprocess
import sys

import pytest

from t5tune.families import CONVERTERS, FAMILIES
from tests.support.paths import REPOSITORY
from tools.support_matrix import COLUMNS, build_matrix, find_state, list_all_tests, list_tests


def test_the_matrix_is_complete_and_every_yes_has_a_test() -> None:
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in build_matrix()]
    commands = ["prepare", "LoRA", "QLoRA", "full", "labels", "packed", "ZeRO-3", "merge", "trim"]
    assert head[1:] == [*commands, *CONVERTERS, "serve"]
    assert [row[0] for row in rows] == [family.name for family in FAMILIES.values()]
    assert {len(row) for row in rows} == {len(head)}
    for name in COLUMNS:
        for key, family in FAMILIES.items():
            assert bool(list_tests(name, key)) == (find_state(name, key) == "yes"), (name, key)
            cannot = {*CONVERTERS} - {*family.converters} | ({"trim"} if key == "byt5" else set())
            cannot |= {"labels"} if key in ("longt5", "t5gemma2") else set()
            assert (find_state(name, key) == "no") == (name in cannot)


@pytest.mark.slow
def test_the_tests_that_the_page_names_exist(request: pytest.FixtureRequest) -> None:
    files = sorted({test.partition("::")[0] for test in list_all_tests()})
    collected = {item.nodeid for item in request.session.items}  # of all files, if the whole suite runs
    if not {*files} <= {test.partition("::")[0] for test in collected}:
        options = ["--collect-only", "-o", "addopts=", "-p", "no:cacheprovider", "-q"]
        command = [sys.executable, "-m", "pytest", *options, *files]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        collected = set(done.stdout.splitlines())
    functions = {test.partition("[")[0] for test in collected}
    # a test that is named without its parameters means all of them
    assert [test for test in list_all_tests() if test not in collected and test not in functions] == []
