"""prepare several datasets: the folder is replaced as a whole, caches that are up to date are kept."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.data.caches.prepared import list_caches
from t5tune.errors import DataError, SettingsError
from t5tune.io.atomic import hash_file, write_json
from t5tune.preparing.cache_files import write_cache
from t5tune.settings import PrepareSettings, TrainSettings
from tests.support.caches import prepare_for_run

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
def test_the_folder_is_complete_at_any_moment(
    is_new: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So other processes can train on it: they find the old datasets or the new ones."""
    cache = tmp_path / "cache"
    if not is_new:
        prepare(make_settings(data, cache, "abc", model_max_length=64))
    before = bytes_of(cache)
    num_checks = 0

    def check(*arguments: Any, **values: Any) -> Any:
        nonlocal num_checks
        result = write_cache(*arguments, **values)
        assert bytes_of(cache) == before
        num_checks += 1
        return result

    monkeypatch.setattr("t5tune.preparing.datasets.write_cache", check)
    prepare(make_settings(data, cache))
    assert num_checks == 2
    assert [path.name for path in list_caches(cache).values()] == ["a", "b"]
    assert sorted(path.name for path in cache.iterdir()) == [
        "a", "b", "mixture.json", "template.yaml", "training_data.json",
    ]  # fmt: skip


def test_datasets_that_are_up_to_date_are_not_written_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    prepare(make_settings(data, tmp_path / "one", "abc"))
    prepare(make_settings(data, cache, "ab"))
    files = {path: path.stat().st_ino for path in (cache / "a").rglob("*") if path.is_file()}
    written: list[str] = []

    def note(staged: Path, *arguments: Any) -> Any:
        written.append(staged.name)
        return write_cache(staged, *arguments)

    monkeypatch.setattr("t5tune.preparing.datasets.write_cache", note)
    assert not prepare(make_settings(data, cache, "abc")).up_to_date
    assert written == ["c"]
    assert {path: path.stat().st_ino for path in files} == files  # not copied, either
    assert bytes_of(cache) == bytes_of(tmp_path / "one")
    assert prepare(make_settings(data, cache, "abc")).up_to_date


@pytest.mark.parametrize("name", ["parts", "parts of a dataset that is new"])
def test_several_datasets_in_parts_have_the_bytes_of_one_process(name: str, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    if name != "parts":
        prepare(make_settings(data, cache, "a"))
    prepare(make_settings(data, tmp_path / "one"))
    results = [prepare(make_settings(data, cache, shard=f"{index}/2")) for index in range(2)]
    assert [result.joined for result in results] == [False, True]
    assert results[1].datasets == {"a": 20, "b": 20}
    assert bytes_of(cache) == bytes_of(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data", "one"]


def test_a_broken_mixture_file_is_written_again(data: Path, tmp_path: Path) -> None:
    prepare(make_settings(data, tmp_path / "cache"))
    before = bytes_of(tmp_path / "cache")
    (tmp_path / "cache" / "mixture.json").write_text('{"format": 9}')
    assert not prepare(make_settings(data, tmp_path / "cache")).up_to_date
    assert bytes_of(tmp_path / "cache") == before


@pytest.mark.parametrize("values", [{}, {"model_max_length": 64}])
def test_a_process_that_is_interrupted_leaves_the_old_datasets(
    values: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(make_settings(data, tmp_path / "cache", "abc"))
    prepare(make_settings(data, tmp_path / "one", **values))
    before = bytes_of(tmp_path / "cache")
    settings = make_settings(data, tmp_path / "cache", **values)

    def stop(path: Path, *arguments: Any) -> None:
        if path.name == "mixture.json":
            raise KeyboardInterrupt
        write_json(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("t5tune.preparing.datasets.write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings)
    assert bytes_of(tmp_path / "cache") == before
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


def test_raw_text_too_short_to_hold_out_is_called_text(data: Path, tmp_path: Path) -> None:
    (data / "book.txt").write_text("word " * 500)
    datasets = [{"path": str(data / "book.txt"), "objective": "span-corruption"}, {"path": str(data / "a.jsonl")}]
    settings = make_settings(data, tmp_path / "cache").replace(data=datasets, eval_fraction=0.1)
    with pytest.raises(DataError, match="eval_fraction: 0.1 of 1 text leaves no texts to train on; give more texts"):
        prepare(settings)


def test_a_token_cache_that_is_a_dataset_is_never_replaced(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepare(make_settings(data, cache))
    before = bytes_of(cache)
    for paths in ([cache / "a", data / "c.jsonl"], [data / "c.jsonl", cache / "b"]):
        settings = make_settings(data, cache).replace(data=[{"path": str(path)} for path in paths])
        with pytest.raises(DataError, match=r"data: .*: one of the datasets, but also in the output folder, which is"):
            prepare(settings)
        assert bytes_of(cache) == before


def test_a_folder_of_one_dataset_is_one_of_several(data: Path, tmp_path: Path) -> None:
    prepare(make_settings(data, tmp_path / "single", "a"))
    prepare(make_settings(data, tmp_path / "several", "bc"))
    datasets = [{"path": str(tmp_path / "single")}, {"path": str(data / "b.jsonl")}]
    result = prepare(make_settings(data, tmp_path / "cache").replace(data=datasets))
    assert result.datasets == {"single": 20, "b": 20}
    assert list_caches(tmp_path / "cache")["single"] == tmp_path / "single" / "a"
    datasets[0]["path"] = str(tmp_path / "several")
    with pytest.raises(
        DataError, match=r"several: a token cache of several datasets can't be combined .*; give the cac"
    ):
        prepare(make_settings(data, tmp_path / "cache").replace(data=datasets))


def test_datasets_are_replaced_only_once_all_of_them_are_ready(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepare(make_settings(data, cache, "a"))
    before = bytes_of(cache)
    (data / "bad.jsonl").write_text("no JSON\n" * 3)
    settings = make_settings(data, cache).replace(
        data=[{"path": str(data / name)} for name in ("b.jsonl", "bad.jsonl")]
    )
    with pytest.raises(DataError):
        prepare(settings)
    assert bytes_of(cache) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "cache.rejected.jsonl", "data"]


@pytest.mark.parametrize("name", [".gitattributes", "backup"])
def test_nothing_else_in_the_folder_is_deleted(name: str, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepare(make_settings(data, cache))
    if name == "backup":
        shutil.copytree(cache / "a", cache / name)
    else:
        (cache / name).touch()
    with pytest.raises(DataError, match=f"cache: contains {name} in addition to a token cache; move these files away"):
        prepare(make_settings(data, cache, model_max_length=64))
    assert (cache / name).exists()


@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_run_finds_its_datasets_in_their_order(is_reversed: bool, data: Path, tmp_path: Path) -> None:
    prepare(make_settings(data, tmp_path / "given", "a"))
    datasets = [{"path": str(tmp_path / "given")}, {"path": str(data / "b.jsonl")}]
    settings = make_settings(data, tmp_path / "cache").replace(data=datasets)
    prepare(settings)
    if is_reversed:
        with pytest.raises(SettingsError, match="the datasets were given, b before, and are b, given now"):
            prepare_for_run(settings.replace(data=datasets[::-1]), checkpoint=tmp_path / "run/checkpoint-1")
    else:
        assert prepare_for_run(settings, checkpoint=tmp_path / "run/checkpoint-1")["up_to_date"]


def test_an_older_versions_run_keeps_its_data(data: Path, tmp_path: Path) -> None:
    settings = make_settings(data, tmp_path / "cache", "a")
    prepare(settings.replace(output_dir=tmp_path / "one"))
    (tmp_path / "one" / "a").rename(tmp_path / "cache")
    before = bytes_of(tmp_path / "cache")
    with pytest.raises(DataError, match="cache: prepared by an older version of t5tune, without mixture.json; resume"):
        prepare_for_run(settings, checkpoint=tmp_path / "run/checkpoint-1")
    assert bytes_of(tmp_path / "cache") == before


def test_each_file_is_hashed_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def note(path: Path) -> str:
        hashed.append("/".join(path.parts[-2:]))
        return hash_file(path)

    monkeypatch.setattr("t5tune.data.caches.cache.hash_file", note)
    prepare(make_settings(data, tmp_path / "cache"))
    prepare(make_settings(data, tmp_path / "cache", "abc"))
    assert Counter(name for name in hashed if name.endswith("tokens.bin")) == {
        "a/tokens.bin": 2, "b/tokens.bin": 2, "c/tokens.bin": 1,
    }  # fmt: skip


def test_a_run_never_deletes_a_folder_of_caches(data: Path, tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match="caches: exists and isn't a token cache; choose another"):
        train(settings)
    assert bytes_of(caches) == before
