"""A run on a token cache: its examples and tokenizer stay the same, whatever happens to the cache."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import prepare
from t5tune.commands.train import set_up_run_folder, train
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.data.caches.prepared import open_examples
from t5tune.errors import DataError, SettingsError
from t5tune.io.atomic import hash_file
from t5tune.progress import Event, Measured
from t5tune.runs.data import open_data
from t5tune.runs.folder import RunFolder
from t5tune.settings import PrepareSettings, TrainSettings, load_settings
from tests.support.caches import find_cache, open_only
from tests.support.train_runs import make_settings


@pytest.mark.slow
def test_a_run_resumes_only_with_the_same_cached_examples(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    """prepare's seed only decides which examples are held out; here, no examples are held out."""
    values = {"model_name_or_path": str(untied_base), "data_path": str(conversations), "output_dir": tmp_path / "cache"}
    prepare(PrepareSettings(**values, seed=7))
    prepare(PrepareSettings(**{**values, "output_dir": tmp_path / "parted"}, eval_fraction=0.25, split_seed=3))
    prepare(PrepareSettings(**{**values, "output_dir": tmp_path / "fewer"}, num_data=20))
    run = tmp_path / "run"
    train(make_settings(untied_base, conversations, run))
    uninterrupted = (run / "adapter_model.safetensors").read_bytes()
    prepared = sorted((run / "data").rglob("*"))
    for cache in (run / "data", tmp_path / "cache"):
        shutil.rmtree(run / "checkpoint-6")
        (run / "result.json").unlink()
        with pytest.raises(SettingsError, match="data: not the examples that the run was trained on"):
            train(make_settings(untied_base, tmp_path / "fewer", run))
        assert sorted((run / "data").rglob("*")) == prepared
        result = train(make_settings(untied_base, cache, run))
        assert result.resumed_from == run / "checkpoint-3"
        assert (run / "adapter_model.safetensors").read_bytes() == uninterrupted
    (run / "result.json").unlink()
    with pytest.raises(SettingsError, match="data: "):
        train(make_settings(untied_base, tmp_path / "parted", run))


@pytest.mark.slow
def test_a_cache_replaced_before_it_is_opened_is_refused(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(conversations.read_text().splitlines(keepends=True)[:8]))
    shared = {"preprocessed_path": tmp_path / "cache", "max_steps": 1}
    first, second = (
        make_settings(untied_base, data, tmp_path / data.stem, **shared) for data in (conversations, other)
    )
    with ExitStack() as stack:
        for settings in (first, second):
            prepared = set_up_run_folder(settings, stack).read_record()["prepared"]
            plan = make_run_plan(settings)
            assert open_data(plan, prepared)
    plan = make_run_plan(first)
    prepared = RunFolder(first.output_dir).read_record()["prepared"]
    with pytest.raises(DataError, match="cache: another process has replaced this data since"):
        open_data(plan, prepared)
    assert train(first).steps == 1  # it is prepared again


def test_a_run_hashes_a_given_cache_once_unless_it_changes(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"model_name_or_path": str(untied_base), "data_path": str(conversations), "output_dir": tmp_path / "cache"}
    prepare(PrepareSettings(**values))
    settings = make_settings(untied_base, tmp_path / "cache", tmp_path / "run")
    hashed: list[Path] = []
    monkeypatch.setattr("t5tune.data.caches.cache.hash_file", lambda path: hashed.append(path) or hash_file(path))
    with ExitStack() as stack:
        set_up_run_folder(settings, stack)
    open_data(make_run_plan(settings), None)
    assert sorted(hashed) == sorted(set(hashed))
    file = find_cache(tmp_path / "cache") / "tokens.bin"
    assert file in hashed
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(DataError, match=r"tokens\.bin: differs from what prepare wrote"):
        open_data(make_run_plan(settings), None)


@pytest.mark.slow
@pytest.mark.parametrize("is_deleted", [False, True], ids=["replaced", "deleted"])
@pytest.mark.parametrize("train_mode", ["lora", "full"])
def test_checkpoints_keep_the_tokenizer_of_the_first_cache(
    train_mode: str, is_deleted: bool, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    given = PrepareSettings(model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=cache)
    prepare(given)
    names = ("tokenizer/tokenizer.json", "template.yaml", "training_data.json")
    before = {Path(name).name: (find_cache(cache) / name).read_bytes() for name in names}

    def replace_cache(event: Event) -> None:
        if not isinstance(event, Measured) or event.step != 2:
            return
        if is_deleted:
            shutil.rmtree(cache)
            return
        prepare(given.model_copy(update={"add_tokens": ["<A>"], "conversation_template": "plain"}))

    settings = make_settings(untied_base, cache, run, max_steps=4, save_steps=1, logging_steps=1, train_mode=train_mode)
    train(settings, replace_cache)
    assert is_deleted or (cache / "template.yaml").read_bytes() != before["template.yaml"]
    for folder in (run / "checkpoint-1", run / "checkpoint-4", run):
        assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_held_out_conversations_are_never_trained_on(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    values = {"model_name_or_path": str(untied_base), "data_path": str(conversations), "output_dir": cache}
    prepare(PrepareSettings(**values, eval_fraction=0.25, split_seed=3))
    training, held_out = open_examples(cache).split_as_prepared()
    assert held_out is not None
    changes: dict[str, Any] = {"max_steps": 1}
    for name, more in {
        "as prepared": {},
        "the same": {"eval_fraction": 0.25, "split_seed": 3},
        "other data": {"eval_data_path": [str(conversations)]},
        "the first ones": {"num_data": 10},
        "two caches": {"data_path": [f"{cache}:1", f"{shutil.copytree(cache, tmp_path / 'other')}:1"], "num_data": 10},
    }.items():
        result = train(make_settings(untied_base, cache, tmp_path / name, **{**changes, **more}))
        expected = 10 * len(more.get("data_path", [cache])) if "num_data" in more else len(training)
        assert result.examples == expected < len(open_only(cache))
    chosen, still_held_out = open_examples(cache).limit_training(10).split_as_prepared()
    assert still_held_out is not None
    for part, whole in ((chosen, training.take(10)), (still_held_out, held_out)):
        assert part.identify() == whole.identify()
    with pytest.raises(SettingsError, match="eval_fraction: 0.1 with split_seed 3, but prepare held out 0.25 of"):
        train(make_settings(untied_base, cache, tmp_path / "run", **changes, eval_fraction=0.1, split_seed=3))


def test_settings_that_contradict_the_caches_examples_are_refused(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    made = {"model_name_or_path": str(untied_base), "data_path": str(conversations), "output_dir": cache}
    prepare(PrepareSettings(**made, model_max_length=64, conversation_template="plain", train_on="last"))
    asked = {"model_max_length": 32, "add_tokens": "none", "conversation_template": "turns"}
    with pytest.raises(SettingsError) as caught:
        train(make_settings(untied_base, cache, run, **asked))
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "add_tokens",
        "model_max_length",
        "conversation_template",
    ]
    assert f"model_max_length: 32 here, 64 in the cache {cache}" in caught.value.message
    assert not run.exists()
    agreed = {"model_max_length": 64, "conversation_template": "plain"}
    train(make_settings(untied_base, cache, run, max_steps=1, **agreed))
    saved, _ = load_settings(TrainSettings, str(run / "settings.yaml"))
    assert (saved.model_max_length, saved.train_on, saved.add_tokens) == (64, "last", ["auto"])
    assert train(saved).steps == 1  # the run is finished, and the settings are the same
