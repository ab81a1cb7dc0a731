"""After any failed file operation there is an error message, complete checkpoints are kept, and the run can resume."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from t5tune.io.atomic import hash_file
from t5tune.runs.metrics_log import read_metrics
from tests.support.caches import open_only
from tests.support.processes.forks import FROM_THEN_ON, ONCE, SHORT, FileOperation, ForkServer
from tests.support.processes.runs import LONG, list_complete_steps, make_arguments

pytestmark = pytest.mark.slow

KINDS = {
    "one process": (1, ()),
    "zero3": (2, ("--deepspeed=zero3", "--process-group-timeout=60", "--report-samples=0")),
}
NO_FAULTS = "injecting faults needs Linux and a C compiler"
SHORT_RUN = ("--max-steps=4", "--save-steps=2", "--logging-steps=1")
SAMPLE = {"once": 1, "from then on": 3, "short": 2}  # number of faults for each way in `make test`
WAYS = {"once": (ONCE, errno.EIO), "from then on": (FROM_THEN_ON, errno.ENOSPC), "short": (SHORT, 0)}


@pytest.fixture(scope="module")
def few_conversations(conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six conversations."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("\n".join(conversations.read_text().splitlines()[:6]) + "\n")
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS if LONG else ["one process"])
@pytest.mark.timeout(14400)
@pytest.mark.variants("one process-short")
def test_a_run_survives_any_failed_file_operation(
    kind: str, way: str, fork_server: ForkServer, untied_base: Path, few_conversations: Path, tmp_path: Path
) -> None:
    if not fork_server.can_inject_faults:
        pytest.skip(NO_FAULTS)
    ranks, more = KINDS[kind]
    run = tmp_path / "run"
    command = make_arguments(untied_base, few_conversations, run, *SHORT_RUN, *more)
    undisturbed = fork_server.run(command, ranks, folder=run)
    assert undisturbed.codes == [0] * ranks, undisturbed.log
    expected, operations = hash_results(run), undisturbed.operations
    assert [operation.kind for operation in operations].count("fsync") > 30
    for at in choose_operations(operations, way):
        check_survival(fork_server, command, ranks, run, at, way, expected)


def check_survival(
    fork_server: ForkServer, command: list[str], ranks: int, run: Path, at: int, way: str, expected: dict[str, str]
) -> None:
    """Start over, fail at the `at`th operation, check the files and messages, and resume to the expected results."""
    shutil.rmtree(run)
    mode, error = WAYS[way]
    done = fork_server.run(command, ranks, folder=run, operation_number=at, mode=mode, error=error)
    if len(done.operations) < at:  # texts with times in them take a write more or less, so nothing has failed
        assert (done.codes, hash_results(run)) == ([0] * ranks, expected), done.log
        return
    failed = done.operations[at - 1]
    where = f"{at}: {failed}\n{done.codes}\n{done.log}"
    assert set(find_published_steps(done.operations[: at - 1], run)) <= set(list_complete_steps(run)), where
    assert "Traceback" not in done.log, where
    if way == "short":
        assert done.codes == [0] * ranks, where
    elif way == "once" and failed.path == str(run / "metrics.jsonl"):
        assert done.codes == [0] * ranks, where
        assert f"warning: {run / 'metrics.jsonl'}: {os.strerror(error)}" in done.log, where
        assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4], where
    elif done.codes == [0] * ranks:
        # the failed operation was harmless: a folder existed already, or a copy was repeated (torch.save isn't a copy)
        is_copied = failed.kind == "write" and not failed.path.endswith(".pt")
        assert failed.kind == "mkdir" or (is_copied and way == "once"), where
    else:
        errors = [line for line in done.log.splitlines() if line.startswith("error: ")]
        assert 1 in done.codes, where
        assert all(code in (0, 1) for code in done.codes), where
        assert 1 <= len(errors) <= ranks, where
        assert any(os.strerror(error) in line and str(run) in line for line in errors), where
        done = fork_server.run(command, ranks, folder=run)
        assert done.codes == [0] * ranks, f"{where}\nthen\n{done.log}"
    assert hash_results(run) == expected, where
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == [], where


def test_prepare_survives_any_failed_file_operation(
    fork_server: ForkServer, few_conversations: Path, conversations: Path, tmp_path: Path
) -> None:
    if not fork_server.can_inject_faults:
        pytest.skip(NO_FAULTS)
    place = tmp_path / "place"

    def command(data: Path) -> list[str]:
        return ["prepare", "--model-name-or-path=pocket", f"--data-path={data}", f"--output-dir={place / 'cache'}"]

    assert fork_server.run(command(few_conversations)).codes == [0]
    shutil.copytree(place, tmp_path / "before")
    undisturbed = fork_server.run(command(conversations), folder=place)
    for way in WAYS:
        mode, error = WAYS[way]
        for at in choose_operations(undisturbed.operations, way):
            shutil.rmtree(place)
            shutil.copytree(tmp_path / "before", place)
            done = fork_server.run(command(conversations), folder=place, operation_number=at, mode=mode, error=error)
            where = f"{way}, {at} of {len(undisturbed.operations)}: {done.operations[at - 1]}\n{done.codes}\n{done.log}"
            if way == "short":
                assert done.codes == [0], where
            elif done.codes == [0]:
                # the folder exists already, or folders that can't be exchanged were renamed one after the other
                harmless = [FileOperation("mkdir", str(place)), FileOperation("rename", str(place / "cache"))]
                assert done.operations[at - 1] in harmless, where
            else:
                assert done.codes == [1], where
                (message,) = [line for line in done.log.splitlines() if line.startswith("error: ")]
                assert str(place) in message, where
                assert os.strerror(error) in message, where
            assert "Traceback" not in done.log, where
            assert open_only(place / "cache").manifest["inputs"]["data"][0]["file"] in (
                few_conversations.name,
                conversations.name,
            )
            assert fork_server.run(command(conversations)).codes == [0], where
            assert [path.name for path in place.iterdir()] == ["cache"], where


def hash_results(run: Path) -> dict[str, str]:
    """Hash the files of a finished run's adapter."""
    assert (run / "result.json").is_file()
    names = ("adapter_", "tokenizer", "template")
    return {path.name: hash_file(path) for path in run.iterdir() if path.name.startswith(names)}


def choose_operations(operations: list[FileOperation], way: str) -> list[int]:
    """Choose the numbers of the operations that fail: all of them, or a sample with some of each kind."""
    numbers = [number for number, operation in enumerate(operations, 1) if way != "short" or operation.kind == "write"]
    if LONG:
        return numbers
    last = {operation.kind: number for number, operation in enumerate(operations, 1)} if way == "once" else {}
    saves = [
        n
        for n, operation in enumerate(operations, 1)
        if operation.kind == "write" and operation.path.endswith("optimizer.pt")
    ]
    inside = saves[len(saves) // 2 :][:1] if way == "once" else []
    return sorted({*numbers[len(way) :: -(-len(numbers) // SAMPLE[way])], *last.values(), *inside})


def find_published_steps(operations: list[FileOperation], run: Path) -> list[int]:
    """Find the steps of the checkpoints that were renamed into place."""
    names = [re.fullmatch(rf"{re.escape(str(run))}/checkpoint-(\d+)", operation.path) for operation in operations]
    return [
        int(name[1]) for name, operation in zip(names, operations, strict=True) if name and operation.kind == "rename"
    ]
