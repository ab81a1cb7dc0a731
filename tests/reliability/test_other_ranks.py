"""A run resumes with another number of processes: the same examples in each step, and nearly the same weights."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.support.forks import ForkServer
from tests.support.recording import read_recorded
from tests.support.runs import LONG, STEPS, make_arguments

pytestmark = pytest.mark.slow

BATCH = 4  # examples of a step
CHANGES = [(2, 1), (2, 4), (4, 2)] if LONG else [(2, 1)]
STOPPED = 9


@pytest.fixture(scope="module")
def base_without_dropout(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without dropout, whose random numbers would depend on which rank computes what."""
    base = tmp_path_factory.mktemp("calm") / "base"
    shutil.copytree(untied_base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.0}))
    return base


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_resuming_on_other_ranks_keeps_the_examples_and_nearly_the_weights(
    before: int, after: int, fork_server: ForkServer, base_without_dropout: Path, conversations: Path, tmp_path: Path
) -> None:
    def run(name: str, ranks: int, *calls: str) -> list[int]:
        more = ("--lora-dropout=0", "--packing=off", "--save-steps=1000", "--report-samples=0")
        more += ("--per-device-train-batch-size=1", f"--gradient-accumulation-steps={BATCH // ranks}")
        record = f"tests.support.recording:record_to({str(tmp_path / f'{name}-steps')!r})"
        (tmp_path / f"{name}-steps").mkdir(exist_ok=True)
        done = fork_server.run(
            make_arguments(base_without_dropout, conversations, tmp_path / name, *more), ranks, [record, *calls]
        )
        assert "Traceback" not in done.log, done.log
        return done.codes

    assert run("uninterrupted", before) == [0] * before
    stop = f"tests.support.stop_in_step:stop_in_step({STOPPED})"
    assert run("changed", before, stop) == [143] * before
    assert [path.name for path in (tmp_path / "changed").glob("checkpoint-*")] == [f"checkpoint-{STOPPED}"]
    assert run("changed", after) == [0] * after
    steps = read_recorded(tmp_path / "changed-steps")
    assert list(steps) == list(range(1, STEPS + 1))
    assert steps == read_recorded(tmp_path / "uninterrupted-steps")
    uninterrupted, changed = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("uninterrupted", "changed")
    )
    assert max(abs(uninterrupted[name] - changed[name]).max() for name in uninterrupted) < 2e-3
    assert max(abs(values).max() for name, values in uninterrupted.items() if "lora_B" in name) > 2e-2
