"""plan: examples, steps, padding and the largest batch, compared with those of training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5tune.commands.plan import plan, to_plan_settings
from t5tune.commands.prepare import prepare
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.data.caches.batching import epoch_order
from t5tune.progress import Note
from t5tune.settings import PlanSettings, PrepareSettings, TrainSettings, load_settings
from t5tune.settings.loading import dump_settings
from tests.planning.plans import NO_SUGGESTION, make_plan
from tests.support.caches import open_only

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "cache"
    prepare(PrepareSettings(model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=folder))
    return folder


def test_a_cache_determines_steps_padding_and_the_largest_batch(untied_base: Path, cache: Path, tmp_path: Path) -> None:
    from t5tune.commands.train import train

    run = TrainSettings(
        model_name_or_path=str(untied_base), data_path=str(cache), output_dir=tmp_path / "run", use_cpu=True,
        num_train_epochs=1.2, gradient_accumulation_steps=2, per_device_train_batch_size=4, report_samples=0,
    )  # fmt: skip
    result = make_plan(
        untied_base, data_path=str(cache), **NO_SUGGESTION, num_train_epochs=1.2, gradient_accumulation_steps=2,
        per_device_train_batch_size=4, packing="off",
    )  # fmt: skip
    trained = train(run)
    assert result.steps == trained.steps
    assert (result.trainable_parameters, result.total_parameters) == (
        trained.trainable_parameters, trained.total_parameters
    )  # fmt: skip
    sources, targets = open_only(cache).read_lengths()
    assert result.examples == len(sources)
    assert (result.source_length, result.target_length) <= (sources.max(), targets.max())
    assert result.padding is not None
    assert 0 < result.padding < 0.5


@pytest.fixture(scope="module")
def data_of_runs(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache, a cache with half of its examples held out, and a mixture of a smaller and a larger dataset."""
    folder = tmp_path_factory.mktemp("data")
    common: dict[str, Any] = {"model_name_or_path": str(untied_base)}
    lines = conversations.read_text().splitlines()
    (folder / "some.jsonl").write_text("\n".join(lines[:8]))
    datasets = [{"path": str(folder / "some.jsonl")}, {"path": str(conversations)}]
    for name, changes in (
        ("cache", {"data_path": str(conversations)}),
        ("halved", {"data_path": str(conversations), "eval_fraction": 0.5}),
        ("mixture", {"data": datasets}),
    ):
        prepare(PrepareSettings(**common, **changes, output_dir=folder / name))
    return {name: folder / name for name in ("cache", "halved", "mixture")}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("halved", {"num_data": 10}),
        ("cache", {"eval_fraction": 0.5}),
        ("cache", {"eval_fraction": 0.5, "eval_data_path": "halved"}),
        ("mixture", {"mixing": "proportional", "mixing_cap": 6, "num_data": 9, "eval_fraction": 0.25}),
    ],
)
@pytest.mark.variants("cache-changes1", "mixture-changes3")
def test_a_runs_plan_uses_its_training_examples(
    name: str, changes: dict[str, Any], untied_base: Path, data_of_runs: dict[str, Path], tmp_path: Path
) -> None:
    from t5tune.commands.train import train

    if "eval_data_path" in changes:  # then nothing is held out of the training data
        changes = changes | {"eval_data_path": str(data_of_runs[changes["eval_data_path"]])}
    settings = TrainSettings(
        model_name_or_path=str(untied_base), data_path=str(data_of_runs[name]), output_dir=tmp_path / "run",
        use_cpu=True, num_train_epochs=1, per_device_train_batch_size=1, report_samples=0, eval_strategy="no",
        **changes,
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(dump_settings(settings))
    read, _ = load_settings(PlanSettings, str(tmp_path / "run.yaml"))
    trained = train(settings)
    for converted in (to_plan_settings(make_run_plan(settings)), read):
        planned = plan(converted.model_copy(update=NO_SUGGESTION))
        assert (planned.examples, planned.steps) == (trained.examples, trained.steps)


def test_a_mixture_is_planned_as_it_is_mixed(untied_base: Path, data_of_runs: dict[str, Path]) -> None:
    """With a cap of 1, half of an epoch's examples are from the smaller dataset."""
    from t5tune.data.caches.mixing import Mixing
    from t5tune.data.caches.prepared import open_examples

    mixture = open_examples(data_of_runs["mixture"]).mix(Mixing("proportional", cap=1))
    drawn, _ = mixture.draw_epoch(42, 0)
    sources, targets = (lengths[drawn] for lengths in mixture.read_lengths())
    result = make_plan(
        untied_base, data_path=str(data_of_runs["mixture"]), mixing_cap=1, **NO_SUGGESTION,
        packing="off", per_device_train_batch_size=len(drawn),
    )  # fmt: skip
    padded = len(drawn) * (sources.max() + targets.max())
    assert result.padding == round(1 - (sources.sum() + targets.sum()) / padded, 4)


@pytest.mark.parametrize("weights", [[":1"], [":1", ":3"], [""]])
@pytest.mark.variants("weights1")
def test_data_without_a_cache_is_planned_as_it_is_trained(
    weights: list[str], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    from t5tune.commands.train import train

    paths = []
    for number, weight in enumerate(weights):
        paths.append(f"{tmp_path / f'{number}.jsonl'}{weight}")
        (tmp_path / f"{number}.jsonl").write_text(conversations.read_text())
    settings = TrainSettings(
        model_name_or_path=str(untied_base), data_path=paths, output_dir=tmp_path / "run", use_cpu=True,
        eval_fraction=0.2, num_train_epochs=1, per_device_train_batch_size=2, report_samples=0, eval_strategy="no",
        packing="off",
    )  # fmt: skip
    planned = plan(to_plan_settings(make_run_plan(settings)).model_copy(update=NO_SUGGESTION))
    trained = train(settings)
    assert (planned.examples, planned.steps) == (trained.examples, trained.steps)


def test_the_size_of_large_data_is_estimated_from_a_sample(tmp_path: Path) -> None:
    for name, separator, header in (("a.tsv", "\t", "source\ttarget\n"), ("b.csv", ",", "source,target\n")):
        rows = (f"count to {number}{separator}one two {number}\n" for number in range(10_000, 13_000))
        (tmp_path / name).write_text(header + "".join(rows))
        notes: list[Any] = []
        settings = PlanSettings(
            model_name_or_path="pocket", data_path=[str(tmp_path / name)], max_steps=None, packing="on"
        )
        planned = plan(settings.model_copy(update=NO_SUGGESTION), notes.append)
        assert Note("the lengths are from the first 1,000 examples, about 33.3% of the data by its size") in notes
        assert planned.examples == pytest.approx(3000, rel=0.01)
        assert planned.steps == pytest.approx(3 * 375, rel=0.01)


def test_lengths_are_assumed_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"source": "a", "target": "b"}\n')
    notes: list[Any] = []
    settings = PlanSettings(model_name_or_path="google/flan-t5-small", data_path=[str(tmp_path / "data.jsonl")])
    planned = plan(settings.model_copy(update=NO_SUGGESTION), notes.append)
    assert (planned.examples, planned.source_length) == (None, 512)
    (note,) = [note.text for note in notes if isinstance(note, Note) and "tokenizer" in note.text]
    assert note.endswith("; without a tokenizer, the plan assumes examples of 512 + 128 tokens")


@pytest.fixture(scope="module")
def uneven_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the order of seed 42: one long example and 17 short ones, then 18 of medium length."""
    folder = tmp_path_factory.mktemp("uneven")
    words = np.zeros(36, np.int64)
    words[epoch_order(words, 18, seed=42, epoch=0)] = [300, *[10] * 17, *[80] * 18]
    records = ({"source": "cat " * count, "target": "dog " * (1 + count // 8)} for count in words.tolist())
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    prepare(
        PrepareSettings(
            model_name_or_path="pocket", data_path=str(folder / "data.jsonl"), output_dir=folder / "cache",
            model_max_length=2048, add_tokens="none",
        )
    )  # fmt: skip
    return folder / "cache"


def measure_costs(cache: Path, batches: list[list[int]], packed: bool) -> list[int]:
    """Count the tokens of each micro-batch, padding included."""

    sources, targets = open_only(cache).read_lengths()
    if packed:
        return [int((sources + targets)[batch].sum()) for batch in batches]
    return [len(batch) * int(sources[batch].max() + targets[batch].max()) for batch in batches]


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize(
    "batching",
    [{"group_by_length": True}, {"group_by_length": False}, {"tokens_per_batch": 1024}],
    ids=["grouped", "random", "budget"],
)
@pytest.mark.variants("grouped-auto")
def test_a_plan_has_the_trainers_batches(batching: dict[str, Any], packing: str, uneven_cache: Path) -> None:
    from t5tune.training.steps import EpochDraws, StepSampler, make_budget_sampler, make_count_sampler

    sources, targets = open_only(uneven_cache).read_lengths()
    packed, tokens = packing != "off", batching.get("tokens_per_batch")
    sampler: StepSampler
    if tokens is None:  # 36 examples: two steps of 16, and one with 4 examples for 8 micro-batches
        sampler = make_count_sampler(EpochDraws(sources, targets, 5), 2, 8, batching["group_by_length"])
    else:
        sampler = make_budget_sampler(EpochDraws(sources, targets, 5), tokens, packed, 8)
    with_fillers = [[draw.example for draw in batch if not draw.is_filler] for batch in sampler]
    batches = [batch for batch in with_fillers if batch]
    result = make_plan(
        "pocket", data_path=str(uneven_cache), **NO_SUGGESTION, gradient_accumulation_steps=8, seed=5,
        per_device_train_batch_size=2, num_train_epochs=1, packing=packing, **batching,
    )  # fmt: skip
    assert result.steps == len(with_fillers) // 8
    padded = sum(measure_costs(uneven_cache, batches, packed))
    assert result.padding == round(1 - int((sources + targets).sum()) / padded, 4)
    largest = batches[int(np.argmax(measure_costs(uneven_cache, batches, packed)))]
    assert result.batch_size == len(largest)
    assert (result.source_length, result.target_length) == (sources[largest].max(), targets[largest].max())


@pytest.mark.long
def test_the_largest_packed_batch_has_the_most_tokens(uneven_cache: Path) -> None:
    common: dict[str, Any] = {"data_path": str(uneven_cache), **NO_SUGGESTION}
    common |= {"per_device_train_batch_size": 18, "group_by_length": False}
    packed, padded = (make_plan("pocket", packing=packing, **common) for packing in ("auto", "off"))
    assert packed.source_length < padded.source_length
