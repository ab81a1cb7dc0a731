"""Several datasets that prepare writes, and token caches that are mixed."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from t5tune.checkpoints.training_data import read_training_data
from t5tune.commands.inspect import inspect
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.data.caches.prepared import open_examples
from t5tune.errors import DataError, SettingsError
from t5tune.inference.loading import read_model_files
from t5tune.inference.prompts import make_prompts
from t5tune.progress import Event, Note
from t5tune.runs.result import TrainResult
from t5tune.settings import InspectSettings
from tests.training.mixtures.datasets import SIZES, list_datasets, make_prepare_settings, make_settings


@pytest.mark.slow
def test_prepare_writes_a_mixture_that_train_reads(untied_base: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixture"
    made = prepare(make_prepare_settings(untied_base, data, folder, eval_fraction=0.25, split_seed=3))
    assert made.datasets == SIZES
    assert made.examples == sum(SIZES.values())
    result = train(make_settings(untied_base, data, tmp_path / "run", data_path=[folder], max_steps=2))
    assert {name: facts["share"] for name, facts in result.datasets.items()} == dict(sums=0.5, notes=0.25, chats=0.25)
    assert all("loss" in facts for facts in result.datasets.values())
    mixture = json.loads((folder / "mixture.json").read_text())  # without the held-out examples
    names = ("share", "examples_per_epoch", "examples")
    assert [[each[name] for name in names] for each in mixture["datasets"]] == [
        [facts[name] for name in names] for facts in result.datasets.values()
    ]
    assert mixture["examples"] == sum(SIZES.values()) - made.held_out == result.examples
    assert mixture["held_out_examples"] == made.held_out > 0
    again = make_settings(untied_base, data, tmp_path / "run-2", data_path=[folder], max_steps=2, mixing="concatenate")
    result = train(again)
    assert all(facts["examples_per_epoch"] == facts["examples"] for facts in result.datasets.values())
    with pytest.raises(SettingsError, match="mixing: concatenate: there is only one dataset; list several under data"):
        train(again.replace(data_path=[folder / "sums"], output_dir=tmp_path / "run-3"))


@pytest.mark.slow
def test_inspect_names_the_caches_of_a_mixture(
    trained: tuple[TrainResult, list[Event]], data: Path, tmp_path: Path
) -> None:
    run = trained[0].run
    with pytest.raises(DataError, match="data: a token cache of several datasets") as refused:
        inspect(InspectSettings(cache=run))
    assert str(run / "data" / "notes") in str(refused.value.hint)
    (example,) = inspect(InspectSettings(cache=run / "data" / "notes", example=3)).examples
    assert example.source_text == "summarize: the value is 3"


def test_token_caches_of_the_same_tokenizer_can_be_mixed(untied_base: Path, data: Path, tmp_path: Path) -> None:
    for name, tokens in (("sums", "auto"), ("talk", "auto"), ("none", "none")):
        file = data / ("talk.json" if name == "talk" else "sums.jsonl")
        single = make_prepare_settings(untied_base, data, tmp_path / name, data_path=[file])
        prepare(single.replace(add_tokens=[tokens]))
    paths = [f"{tmp_path / 'sums'}:1", f"{tmp_path / 'talk'}:3"]
    settings = make_settings(untied_base, data, tmp_path / "run", data_path=paths, max_steps=2)
    result = train(settings)
    assert {name: facts["examples_per_epoch"] for name, facts in result.datasets.items()} == {"sums": 14, "talk": 42}
    other = settings.replace(data=[f"{tmp_path / 'none'}:1", paths[1]])
    with pytest.raises(DataError, match="talk and .*none.* were prepared with different tokenizers"):
        train(other.replace(output_dir=tmp_path / "other"))


@pytest.mark.slow
def test_settings_of_examples_apply_to_token_caches_or_are_refused(
    untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, length in (("sums", 64), ("talk", 128)):
        file = data / ("talk.json" if name == "talk" else "sums.jsonl")
        single = make_prepare_settings(untied_base, data, tmp_path / name, data_path=[file], add_tokens="none")
        prepare(single.replace(model_max_length=length))
    caches = ["sums:1", "talk:1"]
    mixed = make_prepare_settings(untied_base, data, tmp_path / "mixed", data_path=caches, num_data=4)
    made = prepare(mixed)
    assert (made.examples, made.datasets) == (8, {"sums": 4, "talk": 4})
    assert prepare(mixed).up_to_date
    prepare(mixed.replace(output_dir=tmp_path / "seeded", seed=7))  # it determines nothing of these caches
    for paths, num_data, counts in (
        (["mixed"], None, [4, 4]),
        (["mixed"], 3, [3, 3]),
        (caches, 3, [3, 3]),
        ([*caches, f"{data / 'sums.jsonl'}:1"], 3, [3, 3, 3]),
    ):
        settings = make_settings(untied_base, data, tmp_path / "run", data_path=paths, max_steps=1, num_data=num_data)
        result = train(settings.replace(fresh=True))
        assert [facts["examples"] for facts in result.datasets.values()] == counts
    given = {"model_max_length": 64, "train_on": "last", "conversation_template": "fastchat-t5"}
    run = tmp_path / "a"
    trained = [make_settings(untied_base, data, run, data_path=paths, **given) for paths in (caches, ["mixed"])]
    prepared = make_prepare_settings(untied_base, data, tmp_path / "b", data_path=caches, **given)
    for command in (*(partial(train, each) for each in trained), partial(prepare, prepared)):
        with pytest.raises(SettingsError) as refused:
            command()
        assert {problem.rpartition(";")[0].replace(f"{tmp_path}/", "") for problem in refused.value.problems} == {
            "train_on: 'last' here, 'all' in the cache sums/sums",
            "conversation_template: fastchat-t5: the cache sums/sums uses a different template",
            "model_max_length: 64 here, 128 in the cache talk/talk",
        }


@pytest.mark.parametrize(
    ("made", "seed"), [({"eval_fraction": 0.25}, "split_seed"), ({"objective": "span-corruption"}, "seed")], ids=str
)
def test_a_seed_that_differs_from_the_token_cache_is_refused(
    made: dict[str, Any], seed: str, untied_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(f"Day {day}: the ship sails on." for day in range(24)))
    (tmp_path / "pairs.csv").write_text("source,target\n" + "".join(f"{day},day {day}\n" for day in range(24)))
    file = tmp_path / ("book.txt" if "objective" in made else "pairs.csv")
    cache = make_prepare_settings(untied_base, tmp_path, tmp_path / "cache", data_path=[file], **made)
    prepare(cache)
    mixed = make_prepare_settings(untied_base, tmp_path, tmp_path / "mixed", data_path=[f"{tmp_path / 'cache'}:1"])
    with pytest.raises(SettingsError, match=f"^{seed}: 7 here, 42 in the cache .*; leave it out, or give"):
        prepare(mixed.replace(**{seed: 7}))
    other = "seed" if seed == "split_seed" else "split_seed"
    assert prepare(mixed.replace(**{seed: 42, other: 7})).examples >= 1


def test_caches_of_other_tokenizers_are_no_mixture(untied_base: Path, data: Path, tmp_path: Path) -> None:
    prepare(make_prepare_settings(untied_base, data, tmp_path / "mixture"))
    single = make_prepare_settings(untied_base, data, tmp_path / "other", data_path=[data / "sums.jsonl"])
    prepare(single.replace(add_tokens=["none"]))
    shutil.rmtree(tmp_path / "mixture" / "notes")
    (tmp_path / "other" / "sums").rename(tmp_path / "mixture" / "notes")
    with pytest.raises(DataError, match="notes and .*sums.* were prepared with different tokenizers"):
        open_examples(tmp_path / "mixture")


def test_nothing_of_the_user_is_removed_with_an_old_dataset(untied_base: Path, data: Path, tmp_path: Path) -> None:
    settings = make_prepare_settings(untied_base, data, tmp_path / "mixture")
    prepare(settings)
    other = settings.replace(data=list_datasets(data, None)[:1])
    for name in ("chats/mine.txt", "mine.txt"):
        (tmp_path / "mixture" / name).write_text("text")
        with pytest.raises(DataError, match=f"mixture: contains {name} in addition to a token cache; move these files"):
            prepare(other)
        (tmp_path / "mixture" / name).unlink()
    assert prepare(other).examples == SIZES["sums"]


def test_raw_text_first_leaves_the_template_to_the_next_dataset(untied_base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Some words of a book. " * 50)
    book = {"path": str(tmp_path / "book.txt"), "objective": "span-corruption"}
    prepare(make_prepare_settings(untied_base, data, tmp_path / "mixture", data=[book, *list_datasets(data, None)[2:]]))
    made = read_training_data(tmp_path / "mixture")
    assert [dataset.name for dataset in made.datasets] == ["book", "chats"]
    assert "A chat between" in (tmp_path / "mixture" / "template.yaml").read_text()
    assert made.has_earlier_turns
    notes: list[Event] = []
    make_prompts(replace(read_model_files(untied_base, None), training_data=made), None, None, 2048, notes.append)
    texts = [note.text for note in notes if isinstance(note, Note)]
    assert not [text for text in texts if "prompts follow" in text]  # the book has no prompts
