"""A deleted, truncated or changed file of the newest checkpoint is detected, and the previous checkpoint is used."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from t5tune.commands.train import train
from t5tune.errors import CheckpointError
from t5tune.runs.checkpoints import find_newest
from tests.support.processes.runs import LONG, STEPS, make_settings, read_adapter

pytestmark = pytest.mark.slow


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {"delete": Path.unlink, "truncate": truncate, "flip": flip}


@pytest.fixture(scope="module")
def one_process_run(inputs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("damaged") / "run"
    train(make_settings(*inputs, run))
    return run


CASES = [("one_process_run", damage) for damage in DAMAGES] + [("zero3_run", "flip")]
if LONG:
    CASES += [("zero3_run", "delete"), ("zero3_run", "truncate")]


@pytest.mark.parametrize(("kind", "damage"), CASES)
@pytest.mark.variants("one_process_run-delete", "one_process_run-flip", "one_process_run-truncate")
def test_each_damaged_file_is_named_and_its_checkpoint_is_skipped(
    kind: str, damage: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(kind), run)
    last, before = run / f"checkpoint-{STEPS}", run / f"checkpoint-{STEPS - 6}"
    files = sorted(path for path in last.rglob("*") if path.is_file())
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        if not content:
            continue
        DAMAGES[damage](path)
        found, damaged = find_newest(run)
        assert found == before
        assert str(path) in damaged[0]
        path.write_bytes(content)
    assert find_newest(run) == (last, [])


def test_a_run_resumes_from_the_last_complete_checkpoint(
    one_process_run: Path, inputs: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(one_process_run, run)
    (run / "result.json").unlink()
    flip(run / f"checkpoint-{STEPS}" / "optimizer.pt")
    settings = make_settings(*inputs, run)
    assert train(settings).resumed_from == run / f"checkpoint-{STEPS - 6}"
    assert read_adapter(run) == read_adapter(one_process_run)
    (run / "result.json").unlink()
    for path in run.glob("checkpoint-*/scheduler.pt"):
        flip(path)
    with pytest.raises(CheckpointError, match="all of its checkpoints are damaged"):
        train(settings)
