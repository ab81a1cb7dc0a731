"""prepare several datasets in several processes: one mixture, the bytes of one process, in any order of their steps."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import PrepareResult, prepare
from t5tune.commands.train import train
from t5tune.data.caches.cache import is_cache
from t5tune.data.caches.examples import read_mixture_manifest
from t5tune.errors import DataError
from t5tune.io.atomic import write_json
from t5tune.preparing.dataset import prepare_dataset
from t5tune.preparing.datasets import _remove_cache, _remove_old_caches
from t5tune.progress import Report
from t5tune.settings import PrepareSettings, TrainSettings

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize("is_new", [True, False])
def test_a_mixture_is_complete_if_two_processes_join_one_dataset_each(
    is_new: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one prepares its parts of both, and joins a, while the first one is between a and b."""
    if not is_new:
        prepare(make_settings(data, tmp_path / "cache", model_max_length=64))
    prepare(make_settings(data, tmp_path / "one"))
    first, second = (make_settings(data, tmp_path / "cache", shard=f"{index}/2") for index in range(2))
    others: list[PrepareResult] = []

    def prepare_next(settings: PrepareSettings, *arguments: Any) -> Any:
        if (settings.output_dir.name, settings.shard) == ("b", "0/2"):
            assert (tmp_path / "cache" / "mixture.json").exists() != is_new  # the old one, while nothing is joined
            others.append(prepare(second))
            assert not (tmp_path / "cache" / "mixture.json").exists()
        return prepare_dataset(settings, *arguments)

    monkeypatch.setattr("t5tune.preparing.datasets.prepare_dataset", prepare_next)
    result = prepare(first)
    assert [other.joined for other in others] == [False]
    assert (result.joined, result.datasets) == (True, {"a": 20, "b": 20})
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")


@pytest.mark.parametrize("shard", [None, "0/2", "1/2"])
def test_a_mixture_that_is_up_to_date_is_complete_at_any_moment(
    shard: str | None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So other processes can prepare it at the same time, or train on it."""
    prepare(make_settings(data, tmp_path / "cache"))
    before = bytes_of(tmp_path / "cache")
    num_checks = 0

    def check(settings: PrepareSettings, *arguments: Any) -> Any:
        nonlocal num_checks
        result = prepare_dataset(settings, *arguments)
        assert bytes_of(tmp_path / "cache") == before
        num_checks += 1
        return result

    monkeypatch.setattr("t5tune.preparing.datasets.prepare_dataset", check)
    assert prepare(make_settings(data, tmp_path / "cache", shard=shard)).up_to_date
    assert (bytes_of(tmp_path / "cache"), num_checks) == (before, 2)


def test_a_mixture_of_which_another_process_replaces_a_cache_is_prepared(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes mixture.json after this process has found that there is one."""
    prepare(make_settings(data, tmp_path / "cache"))
    before = bytes_of(tmp_path / "cache")

    def read_removed(folder: Path) -> dict[str, Any]:
        (folder / "mixture.json").unlink(missing_ok=True)
        return read_mixture_manifest(folder)

    monkeypatch.setattr("t5tune.preparing.datasets.read_mixture_manifest", read_removed)
    assert prepare(make_settings(data, tmp_path / "cache", shard="0/2")).joined
    assert bytes_of(tmp_path / "cache") == before


def test_a_broken_mixture_file_is_written_again(data: Path, tmp_path: Path) -> None:
    prepare(make_settings(data, tmp_path / "cache"))
    before = bytes_of(tmp_path / "cache")
    (tmp_path / "cache" / "mixture.json").write_text('{"format": 9}')
    assert not prepare(make_settings(data, tmp_path / "cache")).up_to_date
    assert bytes_of(tmp_path / "cache") == before


def test_the_cache_of_an_old_dataset_is_removed_by_a_process_that_starts_when_others_are_replaced(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(make_settings(data, tmp_path / "cache", "abc"))
    prepare(make_settings(data, tmp_path / "one", model_max_length=64))
    changed = make_settings(data, tmp_path / "cache", model_max_length=64)

    def stop_before_b(settings: PrepareSettings, *arguments: Any) -> Any:
        if settings.output_dir.name == "b":
            raise KeyboardInterrupt
        return prepare_dataset(settings, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("t5tune.preparing.datasets.prepare_dataset", stop_before_b)
        with pytest.raises(KeyboardInterrupt):
            prepare(changed.replace(shard="0/2"))
    assert not prepare(changed.replace(shard="1/2")).joined  # only a is joined
    assert not (tmp_path / "cache" / "mixture.json").exists()
    assert prepare(changed.replace(shard="0/2")).joined
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")


def test_two_processes_that_remove_the_same_cache_leave_one_mixture(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(make_settings(data, tmp_path / "cache", "abc"))
    prepare(make_settings(data, tmp_path / "one"))
    others: list[PrepareResult] = []

    def remove(folder: Path, caches: Sequence[Path], report: Report) -> None:
        monkeypatch.undo()
        others.append(prepare(make_settings(data, tmp_path / "cache", shard="1/2")))
        assert [cache.name for cache in caches] == ["c"]
        _remove_old_caches(folder, caches, report)

    monkeypatch.setattr("t5tune.preparing.datasets._remove_old_caches", remove)
    assert prepare(make_settings(data, tmp_path / "cache", shard="0/2")).joined
    assert [other.joined for other in others] == [True]
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "function"), [("t5tune.preparing.datasets.write_json", write_json), ("shutil.rmtree", shutil.rmtree)]
)
@pytest.mark.parametrize("values", [{}, {"model_max_length": 64}])
def test_what_a_killed_process_leaves_of_an_old_dataset_is_removed_by_the_next(
    values: dict[str, Any],
    name: str,
    function: Callable[..., None],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(make_settings(data, tmp_path / "cache", "abc"))
    prepare(make_settings(data, tmp_path / "one", **values))
    settings = make_settings(data, tmp_path / "cache", **values)

    def stop(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == "mixture.json" or path.name.startswith(".c.old-"):
            raise KeyboardInterrupt
        function(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(name, stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings)
    assert bytes_of(tmp_path / "cache") != bytes_of(tmp_path / "one")
    prepare(settings)
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "one")


def test_token_caches_alone_are_mixed_by_each_part(data: Path, tmp_path: Path) -> None:
    prepare(make_settings(data, tmp_path / "made"))
    datasets = [{"path": str(tmp_path / "made" / name)} for name in "ab"]
    settings = make_settings(data, tmp_path / "cache").replace(data=datasets)
    results = [prepare(settings.replace(shard=f"{index}/2")) for index in range(2)]
    assert [(result.shard, result.joined, result.datasets) for result in results] == [
        ("0/2", True, {"a": 20, "b": 20}), ("1/2", True, {"a": 20, "b": 20}),
    ]  # fmt: skip


def test_raw_text_of_which_nothing_can_be_held_out_is_called_a_text(data: Path, tmp_path: Path) -> None:
    (data / "book.txt").write_text("word " * 500)
    datasets = [{"path": str(data / "book.txt"), "objective": "span-corruption"}, {"path": str(data / "a.jsonl")}]
    settings = make_settings(data, tmp_path / "cache").replace(data=datasets, eval_fraction=0.1)
    with pytest.raises(DataError, match="eval_fraction: 0.1 of 1 text leaves none to train on; give more texts, or"):
        prepare(settings)


def test_a_cache_of_the_old_mixture_that_is_given_by_another_path_is_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(make_settings(data, tmp_path / "cache"))
    before = bytes_of(tmp_path / "cache" / "b")
    datasets = [{"path": str(data / "a.jsonl")}, {"path": "cache/b", "name": "given"}]
    result = prepare(make_settings(data, tmp_path / "cache").replace(data=datasets))
    assert result.datasets == {"a": 20, "given": 20}
    assert bytes_of(tmp_path / "cache" / "b") == before


def test_two_processes_replace_one_cache_by_a_mixture(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find the old cache when a dataset is ready, and remove it."""
    cache = tmp_path / "cache"
    prepare(make_settings(data, tmp_path / "one"))
    prepare(PrepareSettings(model_name_or_path="pocket", data_path=str(data / "a.jsonl"), output_dir=cache))
    first, second = (make_settings(data, cache, shard=f"{index}/2") for index in range(2))
    assert not prepare(first).joined
    assert is_cache(cache)

    def find_cache_and_remove_it_first(folder: Path) -> bool:
        monkeypatch.undo()
        _remove_cache(folder)
        return True

    monkeypatch.setattr("t5tune.preparing.datasets.is_cache", find_cache_and_remove_it_first)
    monkeypatch.setattr("t5tune.preparing.datasets._check_folder", lambda *_: None)  # is_cache's other callers
    monkeypatch.setattr("t5tune.preparing.datasets.find_given_cache", lambda _: None)
    assert prepare(second).joined
    assert bytes_of(cache) == bytes_of(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data", "one"]


def test_a_token_cache_that_is_a_dataset_is_never_replaced(data: Path, tmp_path: Path) -> None:
    mixture, single = tmp_path / "mixture", tmp_path / "single"
    prepare(make_settings(data, mixture))
    prepare(PrepareSettings(model_name_or_path="pocket", data_path=str(data / "a.jsonl"), output_dir=single))
    other = tmp_path / "other" / "a.jsonl"
    other.parent.mkdir()
    other.write_text("".join((data / "a.jsonl").read_text().splitlines(keepends=True)[:5]))
    for folder, paths, place in (
        (single, [single, data / "b.jsonl"], "the output folder"),
        (mixture, [other, mixture / "a"], "where dataset a is written"),
    ):
        before = bytes_of(folder)
        settings = make_settings(data, folder).replace(data=[{"path": str(path)} for path in paths])
        with pytest.raises(DataError, match=f"data: .*: one of the datasets, but also {place}; choose another output"):
            prepare(settings)
        assert bytes_of(folder) == before


def test_a_cache_is_replaced_by_a_mixture_only_once_a_dataset_is_ready(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepare(PrepareSettings(model_name_or_path="pocket", data_path=str(data / "a.jsonl"), output_dir=cache))
    before = bytes_of(cache)
    (data / "bad.jsonl").write_text("no JSON\n")
    settings = make_settings(data, cache).replace(
        data=[{"path": str(data / name)} for name in ("bad.jsonl", "b.jsonl")]
    )
    with pytest.raises(DataError):
        prepare(settings)
    assert bytes_of(cache) == before
    prepare(make_settings(data, cache))
    prepare(make_settings(data, tmp_path / "one"))
    assert bytes_of(cache) == bytes_of(tmp_path / "one")


def test_a_folder_of_token_caches_is_never_deleted_for_a_run(data: Path, tmp_path: Path) -> None:
    caches = tmp_path / "caches"
    for name in ("a", "b"):
        single = PrepareSettings(
            model_name_or_path="pocket", data_path=str(data / f"{name}.jsonl"), output_dir=caches / name
        )
        prepare(single)
    before = bytes_of(caches)
    settings = TrainSettings(
        model_name_or_path="pocket",
        data_path=str(data / "a.jsonl"),
        preprocessed_path=caches,
        output_dir=tmp_path / "run",
    )
    with pytest.raises(DataError, match="caches: contains several token caches, and isn't one; choose another"):
        train(settings)
    assert bytes_of(caches) == before
