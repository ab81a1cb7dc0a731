"""How each dataset is read: which of several values counts, and which one is refused."""

from pathlib import Path
from typing import Any

import pytest

from t5tune.checkpoints.training_data import DatasetTraining, TrainingData
from t5tune.commands.prepare import prepare
from t5tune.data.labels import LabelTask
from t5tune.errors import DataError, SettingsError
from t5tune.preparing.resolve_datasets import resolve_datasets
from t5tune.progress import Note
from t5tune.settings import DatasetSettings, PrepareSettings

MADE = {"data_format": "auto", "source_column": None, "target_column": None, "source_prefix": "", "objective": "sft"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resolved")
    (folder / "a.jsonl").write_text('{"source": "a", "target": "b"}\n' * 3)
    values = {"model_name_or_path": "pocket", "source_prefix": "x: ", "num_workers": 1}
    return prepare(PrepareSettings(**values, data_path=str(folder / "a.jsonl"), output_dir=folder / "cache")).cache


def dataset(path: Path | str = "a.jsonl", **own: Any) -> DatasetSettings:
    return DatasetSettings(path=str(path), name="a", **own)


def made(name: str = "", **changes: Any) -> dict[str, Any]:
    return {"has_earlier_turns": False, "denoisers": ["t5"], **MADE, **changes}


def test_a_token_cache_is_read_as_it_was_made(cache: Path) -> None:
    given = dataset(cache, source_prefix="x: ", num_data=2)  # the same prefix; how many are used can be chosen
    (spec,) = resolve_datasets([given], {"model_max_length": 64, "num_data": 1})
    assert spec.cache == cache / "a"
    assert (spec.source_prefix, spec.model_max_length, spec.num_data) == ("x: ", 2048, 2)


def test_settings_without_effect_on_a_token_cache_are_refused(cache: Path) -> None:
    step = "leave it out, or give the data in place of the cache"
    conflict = f"source_prefix: 'y: ' here, 'x: ' in the cache {cache / 'a'}; {step}"
    with pytest.raises(SettingsError) as refused:
        resolve_datasets([dataset(cache, source_prefix="y: ", data_split="dev")], {})
    where = f"only for a whole dataset on the Hub, but {cache / 'a'} is a token cache; leave it out"
    assert refused.value.problems == (conflict, f"data_split: dev: {where}")
    command = {"source_prefix": "y: "}
    with pytest.raises(SettingsError) as refused:
        resolve_datasets([dataset(cache)], command, must_match=command)
    assert refused.value.problems == (conflict,)
    other = DatasetSettings(path="b.jsonl", name="b")  # the command's prefix is for this dataset
    assert [each.source_prefix for each in resolve_datasets([dataset(cache), other], command, must_match=command)] == [
        "x: ", "y: ",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"data: .*cache: a token cache can't be combined with other data \(b.jsonl\)"):
        resolve_datasets([DatasetSettings(path=[str(cache), "b.jsonl"])], {})


def test_an_evaluation_dataset_is_read_like_its_namesake(cache: Path) -> None:
    command = {"source_prefix": "all: ", "model_max_length": 64}
    trained = resolve_datasets([dataset(source_column="q", num_data=3)], command)
    named, other = dataset("b.jsonl", target_column="t"), DatasetSettings(path="c.jsonl", name="c")
    found = resolve_datasets([named, other, dataset("d.jsonl").replace(name="d")], command, trained=trained)
    # the dataset's own target_column describes the whole layout
    assert [(each.source_column, each.target_column) for each in found] == [(None, "t"), (None, None), (None, None)]
    (found_alone,) = resolve_datasets([dataset("b.jsonl")], command, trained=trained)
    assert (found_alone.source_column, found_alone.source_prefix, found_alone.num_data) == ("q", "all: ", None)
    (of_cache,) = resolve_datasets([dataset("b.jsonl")], command, trained=resolve_datasets([dataset(cache)], command))
    assert (of_cache.source_prefix, of_cache.model_max_length) == ("x: ", 2048)
    with pytest.raises(SettingsError, match="^eval_data: a: objective is sft here and dpo for the run; preference"):
        resolve_datasets([dataset(objective="sft")], {"objective": "dpo"}, setting="eval_data")


def test_evaluation_data_is_read_as_in_training() -> None:
    raw = {"objective": "span-corruption", "denoisers": ["ul2"]}
    datasets = [
        DatasetTraining(name=name, share=0.5, conversation_template={}, **made(**changes))
        for name, changes in {"a": {"source_prefix": "a: "}, "texts": raw}.items()
    ]
    recorded = TrainingData(**made(source_column="q"), datasets=datasets)
    notes: list[str] = []

    def resolve(given: DatasetSettings, **command: Any) -> Any:
        report = lambda event: notes.append(event.text) if isinstance(event, Note) else None  # noqa: E731
        return resolve_datasets([given], command, recorded=recorded, report=report)[0]

    assert (found := resolve(dataset())).source_prefix == "a: "
    assert found.conversation_template == "a"
    assert resolve(dataset(), source_prefix="mine: ").source_prefix == "mine: "
    assert resolve(DatasetSettings(path="a.jsonl")).source_column == "q"  # as the main dataset
    assert resolve(DatasetSettings(path="a.jsonl"), target_column="t").source_column is None
    texts = resolve(DatasetSettings(path="b.txt", name="texts"), source_prefix="x: ")
    assert (texts.objective, texts.denoisers, texts.source_prefix) == ("span-corruption", ["ul2"], "")
    assert notes == [
        "as in training: source_prefix 'a: '", "as in training: source_column 'q'", "as in training: denoisers ul2",
    ]  # fmt: skip


def test_records_with_labels_are_read_as_in_training() -> None:
    task = LabelTask("tag", True, False, ("a", "b"), "residues")
    recorded = TrainingData(**made(source_column="protein", objective="tag"), labels=task)
    (spec,) = resolve_datasets([dataset()], {}, recorded=recorded)
    assert (spec.objective, spec.source_words, spec.source_column) == ("tag", "residues", "protein")
    with pytest.raises(SettingsError, match="objective is tag here and sft for the run; labels can't be mixed"):
        resolve_datasets([dataset()], {"objective": "sft"}, recorded=recorded)
