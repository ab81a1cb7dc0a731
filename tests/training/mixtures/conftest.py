"""What tests of training share."""

import json
from pathlib import Path

import pytest

from t5tune.commands.train import train
from t5tune.progress import Event
from t5tune.runs.result import TrainResult
from tests.training.mixtures.datasets import SIZES, make_settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three datasets in different formats. Each target begins with the name of its dataset."""
    folder = tmp_path_factory.mktemp("mixture")
    sums = [{"source": f"add {number} and 1", "target": f"sums {number + 1}"} for number in range(SIZES["sums"])]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    notes = [f"the value is {number},notes {number}" for number in range(SIZES["notes"])]
    (folder / "notes.csv").write_text("\n".join(["text,summary", *notes]))
    chats = [
        [("human", f"Hi {number}"), ("gpt", f"chats hello {number}"), ("human", "Bye"), ("gpt", f"chats bye {number}")]
        for number in range(SIZES["chats"] // 2)
    ]
    turns = [{"conversations": [{"from": role, "value": text} for role, text in chat]} for chat in chats]
    (folder / "talk.json").write_text(json.dumps(turns))
    return folder


@pytest.fixture(scope="module")
def trained(untied_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, list[Event]]:
    """A run on all datasets, evaluated on a part of each, and what it reported."""
    events: list[Event] = []
    run = tmp_path_factory.mktemp("runs") / "run"
    evaluated = [
        {"path": str(data / "sums.jsonl"), "num_data": 9},
        {"path": str(data / "notes.csv"), "num_data": 7},
        {"path": str(data / "talk.json"), "name": "chats", "num_data": 5},
    ]
    settings = make_settings(untied_base, data, run, eval_data=evaluated, eval_generate=100, max_steps=6)
    return train(settings, events.append), events
