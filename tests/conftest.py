"""Fixtures with real, tiny inputs: bases with a tied and an untied head, the pocket tokenizer, the command line."""

# ruff: noqa: E402
import gc

gc.disable()  # until all tests are collected: looking for garbage takes a third of the time of importing everything

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.models.bases import make_base
from tests.support.paths import REPOSITORY, SHARED
from tests.support.processes.command_line import CommandResult
from tests.support.processes.forks import ForkServer, get_fork_server
from tests.support.processes.runs import LONG

# Tests that are started in the background or with nohup ignore these signals, and so would every child process.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# pytest runs one process per core; with several threads each, the processes would wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def num_threads() -> int:
    """The number of torch's threads. xdist's first process, which runs no tests, needn't import torch."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return torch.get_num_threads()


@pytest.fixture(autouse=True)
def keep_number_of_threads(num_threads: int) -> Iterator[None]:
    """Fail a test that changes torch's number of threads: the bits of later tests depend on it."""
    yield
    assert sys.modules["torch"].get_num_threads() == num_threads


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than there are cores, at most four: many slow tests wait for processes that they start."""
    return min(4, (os.cpu_count() or 1) + (config.option.markexpr != "not slow"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the files with slow tests first, so that no worker is left with a long file when the others are done."""
    if not LONG:
        skip_long_tests(items, config.args_source is pytest.Config.ArgsSource.TESTPATHS)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Look for garbage again, but never in what has been imported."""
    gc.freeze()
    gc.enable()


def skip_long_tests(items: list[pytest.Item], is_whole_suite: bool) -> None:
    """Skip the tests marked `long`, and all variants of a test but those that its mark `variants` names.

    Raises:
        pytest.UsageError: a variant that is named doesn't exist.
    """
    seen = Counter[tuple[Path, str]]()
    missing: set[tuple[Path, str, str]] = set()
    found: set[tuple[Path, str, str]] = set()
    for item in items:
        name, _, variant = item.name.removesuffix("]").partition("[")
        marker = item.get_closest_marker("variants")
        wanted = marker.args if marker is not None else ()
        number = seen[item.path, name]
        seen[item.path, name] += 1
        if isinstance(wanted[0] if wanted else None, int):
            is_left_out = number >= wanted[0]
        else:
            missing |= {(item.path, name, each) for each in wanted}
            found.add((item.path, name, variant))
            is_left_out = bool(wanted) and variant not in wanted
        if is_left_out or item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="LONG_TESTS=1 (make reliability) runs it"))
    if is_whole_suite and (unknown := sorted(missing - found)):
        raise pytest.UsageError(f"{unknown[0][0]}: {unknown[0][1]} has no variant {unknown[0][2]}")


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Create temporary files inside pytest's own folder, which pytest cleans up even after a killed process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr("tempfile.tempdir", None)
        yield


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the folders of custom metrics off `sys.path` after each test, where they would hide a later test's."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="session")
def fork_server() -> ForkServer:
    """A server process from which runs are forked."""
    return get_fork_server()


@pytest.fixture(scope="session")
def on_ranks(fork_server: ForkServer) -> Callable[..., CommandResult]:
    """Run the command line in several processes, as a launcher would start them: `on_ranks(2, "train", …)`.

    The processes are forked, because importing everything in each rank would take longer than training.
    """

    def run(ranks: int, *arguments: Any, calls: Sequence[str] = ()) -> CommandResult:
        done = fork_server.run([*map(str, arguments)], ranks, calls)
        return CommandResult(max(done.codes, key=abs), done.stdout, done.log)

    return run


@pytest.fixture(scope="session")
def untied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "untied", tied=False)


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "tied", tied=True)


@pytest.fixture(scope="session")
def base_without_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untied base without dropout, so that steps can be compared."""
    folder = make_base(tmp_path_factory.mktemp("bases") / "without-dropout", tied=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.0}))
    return folder


@pytest.fixture(scope="session", params=["untied", "tied"])
def base(request: pytest.FixtureRequest, untied_base: Path, tied_base: Path) -> Path:
    return untied_base if request.param == "untied" else tied_base


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 short conversations from the quickstart's data, which make about 48 examples."""
    lines = (REPOSITORY / "examples" / "quickstart" / "train.jsonl").read_text().splitlines()[:24]
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def inputs(untied_base: Path, conversations: Path) -> list[Path]:
    """A base and conversations, the first arguments of the functions that make a run's settings."""
    return [untied_base, conversations]


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Find a file of the real inputs, which some machines have next to the repository; skip the test elsewhere."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"{name}: the real inputs are not next to this checkout")
        return SHARED / name

    return find
