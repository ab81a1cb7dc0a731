"""Settings of several datasets: YAML's `data`, and weights in `data_path`."""

from pathlib import Path
from typing import Any

import pytest

from t5tune.settings import DatasetSettings, TrainSettings, dump_settings, load_settings
from t5tune.settings.dataset_list import name_datasets, split_weight
from t5tune.settings.flags import list_flags, list_without_flags

NEEDED: dict[str, Any] = {"model_name_or_path": "pocket", "output_dir": "run"}


def load(text: str, tmp_path: Path) -> TrainSettings:
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: pocket\noutput_dir: run\n{text}\n")
    return load_settings(TrainSettings, str(file))[0]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.jsonl:2", ("a.jsonl", "2")),
        ("a.jsonl:.5", ("a.jsonl", ".5")),
        ("hf://datasets/owner/name:1e-3", ("hf://datasets/owner/name", "1e-3")),
        ("https://host:8080/a.csv:3", ("https://host:8080/a.csv", "3")),
        ("a:b.jsonl", ("a:b.jsonl", None)),
        ("a.jsonl", ("a.jsonl", None)),
        ("https://host:8080", ("https://host:8080", None)),
        (":2", (":2", None)),
        ("a.jsonl:-2", ("a.jsonl:-2", None)),
    ],
)
def test_a_number_after_the_last_colon_is_a_weight(path: str, expected: tuple[str, str | None]) -> None:
    assert split_weight(path) == expected


def test_a_path_that_exists_with_its_colon_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a:2").touch()
    assert split_weight(f"{tmp_path}/a:2") == (f"{tmp_path}/a:2", None)
    assert split_weight(f"{tmp_path}/a:2:3") == (f"{tmp_path}/a:2", "3")


def test_weights_make_datasets_and_paths_without_them_dont() -> None:
    settings = TrainSettings(**NEEDED, data_path=["a.jsonl:2", "b.csv"])
    assert settings.data == [DatasetSettings(path="a.jsonl", weight=2), DatasetSettings(path="b.csv", weight=1)]
    assert settings.data_path == ["a.jsonl", "b.csv"]
    assert TrainSettings(**NEEDED, data_path=["a.jsonl", "b.csv"]).data is None


def test_saved_settings_and_flags_read_back_as_the_same(tmp_path: Path) -> None:
    text = "data: [a.jsonl:2, {path: [b, c], source_prefix: 'x: '}]\neval_data: [{path: d, name: b}]\nsource_column: q"
    settings = load(text, tmp_path)
    (tmp_path / "saved.yaml").write_text(dump_settings(settings))
    again, notes = load_settings(TrainSettings, str(tmp_path / "saved.yaml"))
    assert again == settings
    assert not notes
    assert again.data is not None
    assert again.data[1].list_given() == {"source_prefix": "x: "}  # no source_column: the command's applies
    assert settings.replace(seed=3).data == settings.data
    assert list(list_without_flags(settings)) == ["data", "eval_data"]
    plain = TrainSettings(**NEEDED, data_path=["a.jsonl:2", "b.csv:0.5"])
    assert list(list_flags(plain, ["data_path", "data"])) == [["--data-path", "a.jsonl:2", "b.csv:0.5"]]
    assert list_without_flags(plain) == {}


def test_datasets_are_named_after_their_files() -> None:
    paths = [
        "data/chats.jsonl.gz", "hf://datasets/owner/chats@main", "owner/name", "https://host/b.CSV?key=1", "dir/*.json",
        "ünï.json", "pocket", "/", "https://me:secret@host/c.csv#key",
    ]  # fmt: skip
    names = name_datasets([DatasetSettings(path=path) for path in paths] + [DatasetSettings(path="x", name="chats-2")])
    assert names == ["chats", "chats-3", "name", "b", "dir", "n", "pocket", "data", "c", "chats-2"]


def test_records_in_memory_can_be_one_of_several_datasets() -> None:
    records = [{"source": "a", "target": "b"}]
    settings = TrainSettings(**NEEDED, data=[{"path": records, "name": "own", "weight": 3}, "b.jsonl"])
    assert settings.data is not None
    (path,) = settings.data[0].path
    assert Path(path).read_text() == '{"source": "a", "target": "b"}\n'
    assert settings.data_path == [path, "b.jsonl"]


def test_data_from_a_flag_replaces_data_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: pocket\noutput_dir: run\ndata: [a:2, b]\neval_data: [c]\n")
    settings, _ = load_settings(TrainSettings, str(file), flags={"data_path": ["d.jsonl"]})
    assert (settings.data, settings.data_path) == (None, ["d.jsonl"])
    assert settings.eval_data_path == ["c"]


def test_a_dataset_path_may_have_a_weight() -> None:
    settings = TrainSettings(**NEEDED, data=[{"path": "a.jsonl:3", "source_prefix": "x: "}, "b"])
    assert settings.data is not None
    assert (settings.data[0].path, settings.data[0].weight) == (["a.jsonl"], 3)


def test_datasets_without_weights_give_flags_without_weights() -> None:
    settings = TrainSettings(**NEEDED, data=["a", "b"])
    assert list(list_without_flags(settings)) == ["data"]
    exact = TrainSettings(**NEEDED, data_path=["a:0.123456789", "b:1e-7"])
    assert list(list_flags(exact, ["data_path"])) == [["--data-path", "a:0.123456789", "b:1e-07"]]
