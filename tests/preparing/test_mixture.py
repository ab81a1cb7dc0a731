"""prepare several datasets in several processes: one mixture, the bytes of one process, in any order of their steps."""

import json
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import PrepareResult, prepare
from t5tune.preparing.dataset import prepare_dataset
from t5tune.settings import PrepareSettings

NAMES = ("a", "b", "c")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder of three datasets."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in NAMES:
        lines = [json.dumps({"source": f"{name} {number}", "target": f"t {number}"}) for number in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def make_settings(data: Path, folder: Path, names: str = "ab", **values: Any) -> PrepareSettings:
    datasets = [{"path": str(data / f"{name}.jsonl")} for name in names]
    return PrepareSettings(model_name_or_path="pocket", data=datasets, output_dir=folder, num_workers=1, **values)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_mixture_is_complete_if_two_processes_join_one_dataset_each(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one prepares its parts of both, and joins a, while the first one is between a and b."""
    prepare(make_settings(data, tmp_path / "one"))
    first, second = (make_settings(data, tmp_path / "cache", shard=f"{index}/2") for index in range(2))
    others: list[PrepareResult] = []

    def prepare_next(settings: PrepareSettings, *arguments: Any) -> Any:
        if (settings.output_dir.name, settings.shard) == ("b", "0/2"):
            others.append(prepare(second))
        return prepare_dataset(settings, *arguments)

    monkeypatch.setattr("t5tune.preparing.mixture.prepare_dataset", prepare_next)
    result = prepare(first)
    assert [other.joined for other in others] == [False]
    assert (result.joined, result.datasets) == (True, {"a": 20, "b": 20})
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")
