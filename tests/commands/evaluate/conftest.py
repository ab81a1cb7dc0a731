"""A token cache, and a run on it, that tests of evaluate share."""

from pathlib import Path

import pytest

from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.settings import PrepareSettings
from tests.commands.evaluate.outputs import make_short_settings


@pytest.fixture(scope="module")
def cache(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "cache"
    prepare(PrepareSettings(model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=folder))
    return folder


@pytest.fixture(scope="module")
def run(untied_base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    train(make_short_settings(untied_base, cache, folder))
    return folder
