"""The lengths of the examples of a planned run: of its data, of a sample of them, or assumed."""

import time
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.commands.train.run_plan import resolve_training_data
from t5tune.data.caches.batching import Integers, estimate_cost, make_count_batches
from t5tune.data.caches.examples import Examples
from t5tune.data.caches.prepared import open_examples
from t5tune.data.labels import LabelTask
from t5tune.data.reading.files import find_files
from t5tune.data.reading.readers import read_records
from t5tune.errors import ModelError, SettingsError
from t5tune.evaluation.batches import Lengths
from t5tune.evaluation.scoring import MAX_TOKENS_PER_BATCH, make_loss_batches
from t5tune.file_names import JSON_SUFFIXES, REJECTED_FILE, RUN_CACHE_FOLDER, TEXT_SUFFIXES
from t5tune.planning.layer_memory import BatchLengths
from t5tune.preparing.datasets import prepare_datasets
from t5tune.preparing.plan import Origin, PreparePlan
from t5tune.progress import Note, Report, without_folder, without_notes
from t5tune.settings import PlanSettings
from t5tune.settings.dataset_spec import DatasetSpec
from t5tune.settings.groups.base import BaseModelSettings
from t5tune.settings.groups.data import SplitSettings
from t5tune.training.steps import EpochDraws, make_budget_sampler

SAMPLE_SIZE = 1000  # examples of each dataset that isn't a token cache
UNCOMPRESSED = {*JSON_SUFFIXES, *TEXT_SUFFIXES, ".csv", ".tsv"}
NUM_ADDED_TOKENS = 19  # about the number that prepare adds to T5's vocabulary, if there are unused rows


@dataclass(frozen=True)
class ExampleLengths:
    """Lengths of examples in tokens: of the data, or of one micro-batch of equally long examples.

    Args:
        share: of the data that the examples are; None: not known.
        seconds: that reading them took.
        is_real: whether they are the data's.
        task: the labels of the examples; None: their targets are texts.
        examples: all of the data; None: only a part of it was read, or nothing.
    """

    sources: Integers
    targets: Integers
    num_added_tokens: int = NUM_ADDED_TOKENS
    share: float | None = None
    seconds: float = 0.0
    is_real: bool = False
    task: LabelTask | None = None
    examples: Examples | None = None


def read_lengths(settings: PlanSettings, folder: Path, report: Report) -> ExampleLengths:
    """Read the lengths of the training examples: all of a token cache's, and a sample's of other data.

    The sample is prepared in the empty `folder`, as in a run folder.
    """
    if settings.data is None and settings.data_path is None:
        return _assume_lengths(settings)
    started = time.monotonic()
    try:
        examples, share = _prepare_sample(settings, folder, report)
    except ModelError as error:
        lengths = str(settings.source_length)
        if settings.kind != "labels":
            lengths += f" + {settings.target_length}"
        report(Note(f"{error.message}; without a tokenizer, the plan assumes examples of {lengths} tokens"))
        return _assume_lengths(settings)
    seconds = time.monotonic() - started
    indices, _ = examples.draw_epoch(settings.seed, 0)
    sources, targets = examples.read_lengths()
    if examples.has_preferences and settings.packing == "off":  # both targets are padded to the longest
        targets = 2 * examples.read_longest_targets()
    num_added = len(examples.added_tokens)
    task, whole = examples.label_task, examples if share == 1 else None
    return ExampleLengths(sources[indices], targets[indices], num_added, share, seconds, True, task, whole)


def _assume_lengths(settings: PlanSettings) -> ExampleLengths:
    task = _assume_labels(settings)
    target_length = settings.target_length if task is None else 0
    tokens = settings.source_length + target_length
    count = settings.tokens_per_batch // tokens if settings.tokens_per_batch else settings.per_device_train_batch_size
    if count == 0:
        raise SettingsError(
            f"tokens_per_batch: {settings.tokens_per_batch}: smaller than one example ({tokens} tokens)"
        )
    return ExampleLengths(np.full(count, settings.source_length), np.full(count, target_length), task=task)


def _assume_labels(settings: PlanSettings) -> LabelTask | None:
    """Assume the labels of data that isn't given: two, if the settings don't name them."""
    objective = settings.objective
    if objective not in ("classify", "regress", "tag"):
        return None
    names = () if objective == "regress" else tuple(settings.labels or ("LABEL_0", "LABEL_1"))
    return LabelTask(objective, objective == "tag", False, names, settings.source_words)


def _prepare_sample(settings: PlanSettings, folder: Path, report: Report) -> tuple[Examples, float | None]:
    """Prepare the first examples of each dataset, or open it if it is a token cache, as train does.

    Returns:
        The examples to train on, and the share of all data that was read; None: not known.
    """
    datasets, mixing = resolve_training_data(settings)
    sampled = [
        each if each.cache else each.model_copy(update={"num_data": min(each.num_data or SAMPLE_SIZE, SAMPLE_SIZE)})
        for each in datasets
    ]
    prepare_datasets(
        PreparePlan(
            sampled,
            settings.select_part(BaseModelSettings),
            folder / RUN_CACHE_FOLDER,
            settings.select_part(SplitSettings),
            settings.add_tokens,
            mixing,
            origin=Origin(rejected_file=folder / REJECTED_FILE, run=folder),
        ),
        without_folder(without_notes(report), folder),
    )
    prepared = open_examples(folder / RUN_CACHE_FOLDER)
    share: float | None = 1.0
    if any(
        each.cache is None and each.num_data != SAMPLE_SIZE and len(dataset.cache) == SAMPLE_SIZE
        for each, dataset in zip(datasets, prepared.datasets, strict=True)
    ):
        share = _estimate_share(datasets[0], prepared.main.cache.manifest) if len(datasets) == 1 else None
        words = "" if share is None else f", about {share:.1%} of the data by its size"
        report(Note(f"the lengths are from the first {SAMPLE_SIZE:,} examples{words}"))
    if settings.eval_fraction > 0 and not settings.list_evaluation_datasets():
        return prepared.split(settings.eval_fraction, settings.split_seed)[0], share
    return prepared.split_as_prepared()[0], share


def _estimate_share(dataset: DatasetSpec, manifest: dict[str, Any]) -> float | None:
    """Estimate the share of the data's bytes that a sample was read from; None if they aren't local text files."""
    files = find_files(dataset.path, is_text=dataset.kind == "raw text")
    if not all(file.is_file() and file.suffix.lower() in UNCOMPRESSED for file in files):
        return None
    *_, last = islice(read_records(files, dataset), manifest["conversations"] + manifest["rejected"])
    sizes = {str(file): file.stat().st_size for file in files}
    before = takewhile(lambda file: file != last.location.file, sizes)
    return (sum(map(sizes.__getitem__, before)) + last.location.offset) / sum(sizes.values())


def make_batches(settings: PlanSettings, count: int, data: ExampleLengths) -> list[Integers]:
    """Make the micro-batches (example indices) of the first epoch, as the trainer does, but no empty ones."""
    if not data.is_real:
        return [np.arange(len(data.sources))]
    sources, targets, step_size = data.sources, data.targets, settings.gradient_accumulation_steps * count
    if (tokens := settings.tokens_per_batch) is not None:
        draws = EpochDraws(sources, targets, settings.seed)
        # raises if the budget is too small for an example
        sampler = make_budget_sampler(draws, tokens, settings.packing != "off", step_size)
        return [*sampler.make_batches(0)]
    lengths = sources + targets if settings.group_by_length else np.zeros_like(sources)
    batches = make_count_batches(lengths, settings.per_device_train_batch_size, step_size, settings.seed, epoch=0)
    return [batch for batch in batches if len(batch)]


def find_largest_batch(batches: list[Integers], data: ExampleLengths, packed: bool) -> BatchLengths:
    # of batches with equally many tokens, the batch with the longest examples needs the most memory for attention
    largest = max(batches, key=lambda batch: estimate_cost(data.sources[batch], data.targets[batch], packed))
    return BatchLengths(tuple(data.sources[largest].tolist()), tuple(data.targets[largest].tolist()))


def find_largest_loss_batch(data: ExampleLengths) -> BatchLengths:
    """Return the lengths of the largest batch in an evaluation of the losses.

    If the lengths are assumed, such examples fill the batch.
    """
    lengths = [Lengths(*each) for each in zip(data.targets.tolist(), data.sources.tolist(), strict=True)]
    if not data.is_real:  # all examples are equal
        count = max(1, MAX_TOKENS_PER_BATCH // sum(lengths[0]))
        return BatchLengths((lengths[0].source,) * count, (lengths[0].target,) * count)
    batch = max(make_loss_batches(lengths, None).batches, key=lambda batch: sum(sum(lengths[i]) for i in batch))
    return BatchLengths(tuple(lengths[i].source for i in batch), tuple(lengths[i].target for i in batch))


def compute_padding(settings: PlanSettings, batches: list[Integers], data: ExampleLengths) -> float:
    if settings.packing != "off":
        return 0.0
    useful = int(data.sources.sum() + data.targets.sum())
    padded = sum(len(b) * int(data.sources[b].max() + data.targets[b].max()) for b in batches)
    return round(1 - useful / padded, 4)
