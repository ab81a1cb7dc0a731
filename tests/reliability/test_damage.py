"""Each file of the newest checkpoint, deleted, cut or with one byte changed, is found; the one before is taken."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from t5tune.commands.train import train
from t5tune.errors import CheckpointError
from t5tune.training.checkpoint import newest
from tests.support.runs import LONG, STEPS, adapter, settings


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {"delete": Path.unlink, "truncate": truncate, "flip": flip}


@pytest.fixture(scope="module")
def one_process_run(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("damaged") / "run"
    train(settings(untied_base, conversations, run))
    return run


CASES = [("one_process_run", damage) for damage in DAMAGES] + [("zero3_run", "flip")]
if LONG:
    CASES += [("zero3_run", "delete"), ("zero3_run", "truncate")]


@pytest.mark.parametrize(("kind", "damage"), CASES)
def test_each_damaged_file_is_named_and_its_checkpoint_passed_over(
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
        found, damaged = newest(run)
        assert found == before
        assert str(path) in damaged[0]
        path.write_bytes(content)
    assert newest(run) == (last, [])


def test_a_run_goes_on_from_the_checkpoint_before_and_not_from_none(
    one_process_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(one_process_run, run)
    (run / "result.json").unlink()
    flip(run / f"checkpoint-{STEPS}" / "optimizer.pt")
    chosen = settings(untied_base, conversations, run)
    assert train(chosen).resumed_from == run / f"checkpoint-{STEPS - 6}"
    assert adapter(run) == adapter(one_process_run)
    (run / "result.json").unlink()
    for path in run.glob("checkpoint-*/scheduler.pt"):
        flip(path)
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        train(chosen)
