"""A folder of a different kind than expected is described."""

from collections.abc import Callable
from pathlib import Path

import pytest

from t5tune.checkpoints.adapter_config import read_adapter_config
from t5tune.checkpoints.base import find_base
from t5tune.data.caches.cache import open_cache
from t5tune.errors import T5TuneError
from t5tune.settings.groups.base import BaseModelSettings


def open_base(folder: Path) -> Path:
    return find_base(BaseModelSettings(model_name_or_path=str(folder)))


@pytest.mark.parametrize(
    ("file", "opened", "problem"),
    [
        ("config.json", open_cache, "a whole model, not a token cache"),
        ("adapter_config.json", open_cache, "an adapter, not a token cache"),
        ("other", open_cache, "contains no manifest.json, so it isn't a token cache"),
        ("mixture.json", open_base, "a token cache, not a model"),
        ("manifest.json", open_base, "a token cache, not a model"),
        ("other", open_base, "contains no config.json"),
        ("manifest.json", read_adapter_config, "a token cache, not an adapter"),
        ("config.json", read_adapter_config, "a whole model without an adapter, so there is nothing to merge or load"),
    ],
)
def test_a_folder_of_a_different_kind_is_described(
    file: str, opened: Callable[[Path], object], problem: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(T5TuneError) as caught:
        opened(tmp_path)
    assert caught.value.message.endswith(f"{tmp_path}: {problem}")


def test_a_file_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "page.html").touch()
    with pytest.raises(T5TuneError, match="page.html: a file, not the folder of a model"):
        open_base(tmp_path / "page.html")
