"""plan and inspect suggest trim if unused embedding rows take more than half of the memory."""

import json
import re
import shutil
from pathlib import Path

import pytest

from t5tune.checkpoints.pocket import pocket_folder
from t5tune.commands.inspect import inspect
from t5tune.commands.plan import plan
from t5tune.commands.prepare import prepare
from t5tune.planning.known_configs import KNOWN_CONFIGS
from t5tune.settings import InspectSettings, PlanSettings, PrepareSettings, TrainSettings, write_settings
from tests.support.caches import open_only
from tests.support.notes import Notes

SUGGESTION = re.compile(
    r"the data uses (\d+) of 250,112 embedding rows, and the rest take ([\d.]+) GiB of ([\d.]+) GiB; "
    r"t5tune trim removes them"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, conversations: Path) -> Path:
    """A run folder with a token cache and settings, whose base has mT5's shape and pocket's tokenizer."""
    folder = tmp_path_factory.mktemp("unused")
    base = folder / "base"
    base.mkdir()
    for file in pocket_folder().glob("tokenizer*"):
        shutil.copy(file, base)
    (base / "config.json").write_text(json.dumps(KNOWN_CONFIGS["google/mt5-small"]))
    values = {"model_name_or_path": str(base), "data_path": str(conversations)}
    prepare(PrepareSettings(**values, output_dir=folder / "run" / "data"))
    write_settings(folder / "run", TrainSettings(**values, output_dir=folder / "run"))
    return folder / "run"


def find_suggestions(notes: Notes) -> list[list[float]]:
    return [[*map(float, found.groups())] for note in notes if (found := SUGGESTION.fullmatch(note))]


@pytest.mark.slow
def test_plan_suggests_trim_with_the_numbers(run: Path) -> None:
    # of a GPU: on a CPU, the total counts the memory of the process, here of whatever ran before
    values = {"model_name_or_path": str(run.parent / "base"), "gpu_memory": "24GiB", "time_run": False}
    values |= {"per_device_train_batch_size": 1, "train_mode": "full"}
    notes = Notes()
    found = plan(PlanSettings(**values, data_path=str(run / "data")), notes)
    ((used, rest, total),) = find_suggestions(notes)
    cache = open_only(run / "data")
    ids = {index for each in cache for index in (*each.source_S.tolist(), *each.target_T.tolist())}
    assert used == len(ids - {*cache.special_ids.source_end})
    # weights, gradients and Adam's moments, of embedding and head
    assert rest == pytest.approx((250_112 - used) * 2 * 512 * 16 / 2**30, rel=0.01)
    assert total == round(found.stages[0].total / 2**30, 2)


@pytest.mark.slow
def test_nothing_is_suggested_without_the_data_or_for_few_rows(run: Path) -> None:
    values = {"use_cpu": True, "time_run": False, "per_device_train_batch_size": 1}
    for model, more in (("pocket", {"data_path": str(run / "data")}), (str(run.parent / "base"), {})):
        notes = Notes()
        plan(PlanSettings(model_name_or_path=model, **values, **more), notes)
        assert not any("trim" in note for note in notes)


def test_inspect_suggests_trim_for_a_run(run: Path) -> None:
    notes = Notes()
    inspect(InspectSettings(cache=run, stats=True), notes)
    ((used, rest, total),) = find_suggestions(notes)
    assert rest == pytest.approx((250_112 - used) * 2 * 512 * 4 / 2**30, rel=0.01)
    assert total == pytest.approx(300_176_768 * 4 / 2**30, rel=0.01)
    notes = Notes()
    inspect(InspectSettings(cache=run / "data", stats=True), notes)
    assert find_suggestions(notes) == []
