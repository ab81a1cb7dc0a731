"""The examples of a token cache: one or more datasets that are trained or evaluated on together.

    mixture.json          the datasets' common contents, their weights, and how they are mixed
    template.yaml         the conversation template of the first dataset, for chat and evaluate
    training_data.json    how the examples of all datasets were made
    NAME/                 the cache of a dataset (see cache.py), unless it is elsewhere

All caches have the same tokenizer. The examples are numbered through all datasets.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.data.caches.batching import Integers
from t5tune.data.caches.cache import Cache
from t5tune.data.caches.held_out import find_held_out_keys
from t5tune.data.caches.manifest import COUNTS
from t5tune.data.caches.mixing import EpochCounts, Mixing, bound_epoch_sum, compute_rates, draw_epoch
from t5tune.data.labels import LabelTask, join_tasks
from t5tune.data.tokens.encoding import Example
from t5tune.data.tokens.templates import Template
from t5tune.data.tokens.tokenizer import Tokenizer, decode_reference
from t5tune.errors import DataError
from t5tune.file_names import MIXTURE_FILE, TEMPLATE_FILE, TRAINING_DATA_FILE
from t5tune.formatting import format_count
from t5tune.io.reasons import join_first
from t5tune.label_metrics import find_labels
from t5tune.progress import Note

MIXTURE_FORMAT = 4
MAX_TARGETS_FOR_LABELS = 10_000
PREPARED_CONTENTS = {MIXTURE_FILE, TEMPLATE_FILE, TRAINING_DATA_FILE}


@dataclass(frozen=True)
class Dataset:
    """A dataset whose examples are trained or evaluated on.

    Args:
        weight: with mixing by weights, how many of its examples an epoch has, relative to the rest.
        num_data: how many examples of its cache are used; None: all.
    """

    name: str
    cache: Cache
    weight: float = 1.0
    num_data: int | None = None

    def count_prepared(self, held_out: npt.NDArray[np.uint64]) -> dict[str, int]:
        """Return the counts of the cache, with the number of used examples. `held_out` has keys of conversations."""
        counts = {name: int(self.cache.manifest[name]) for name in COUNTS}
        if self.num_data is not None:
            counts["examples"] = len(self.cache.whole.limit_training(self.num_data, held_out))
        return counts


class Examples(Sequence[Example]):
    """The examples of one or more token caches, read from disk on access.

    Args:
        folder: contains mixture.json.
        are_several: whether there are two or more datasets, so that texts and metrics name them; None: count them.
            Held-out examples may be of a single dataset among several.
    """

    def __init__(
        self, folder: Path, datasets: Sequence[Dataset], mixing: Mixing, are_several: bool | None = None
    ) -> None:
        self.folder = folder
        self.are_several = len(datasets) > 1 if are_several is None else are_several
        self.datasets = tuple(datasets)
        self.mixing = mixing
        self._sizes = [len(dataset.cache) for dataset in self.datasets]
        self._ends = list(accumulate(self._sizes))
        self.shares = mixing.compute_shares(self._sizes, [dataset.weight for dataset in self.datasets])
        self.rates = compute_rates(self._sizes, self.shares)
        self._counts = EpochCounts(self.rates)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        return self.read(index, repeat=0)

    def read(self, index: int, repeat: int) -> Example:
        """Return an example that was sampled `repeat` times before."""
        dataset, index_in_it = self._locate(index)
        return dataset.cache.read(index_in_it, repeat)

    def _locate(self, index: int) -> tuple[Dataset, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._ends, index)
        return self.datasets[number], index - (self._ends[number] - self._sizes[number])

    def get_template(self, index: int) -> Template:
        """Return the conversation template of an example's dataset."""
        return self._locate(index)[0].cache.template

    def is_raw_text(self, index: int) -> bool:
        """Return whether spans of an example's text are masked."""
        return self._locate(index)[0].cache.corruption is not None

    def name_example(self, index: int) -> int | str:
        """Name an example as `t5tune inspect` does: its index in its cache, after its dataset if there are several."""
        dataset, index_in_it = self._locate(index)
        number = dataset.cache.name_example(index_in_it)
        return f"{dataset.name}: {number}" if self.are_several else number

    def list_datasets(self) -> list[tuple[str, range]]:
        """List the name and the examples of each dataset, if there are several."""
        pairs = zip(self.datasets, self._list_bounds(), strict=True)
        return [(dataset.name, bounds) for dataset, bounds in pairs] if self.are_several else []

    def _list_bounds(self) -> list[range]:
        return [range(end - size, end) for end, size in zip(self._ends, self._sizes, strict=True)]

    def draw_epoch(self, seed: int, epoch: int) -> tuple[Integers, Integers]:
        """Draw the examples of an epoch: (indices by dataset, how many times each was sampled before)."""
        starts, ends = self._counts.sum_epochs(epoch), self._counts.sum_epochs(epoch + 1)
        return draw_epoch(self._sizes, starts, ends, seed)

    def make_epoch_bound(self, values: Integers) -> Callable[[int], int]:
        """Make a function that bounds the sum of a number over the examples of an epoch, without drawing them."""
        sorted_values = [np.sort(values[bounds.start : bounds.stop])[::-1] for bounds in self._list_bounds()]
        largest = [np.concatenate([[0], np.cumsum(each)]) for each in sorted_values]
        return lambda epoch: bound_epoch_sum(largest, *map(self._counts.sum_epochs, (epoch, epoch + 1)))

    @property
    def has_every_example_once(self) -> bool:
        """Whether every epoch has every example once."""
        return self.rates == self._sizes

    def read_lengths(self) -> tuple[Integers, Integers]:
        """Return (source lengths, target lengths) in tokens, including special tokens, of all examples."""
        sources, targets = zip(*(dataset.cache.read_lengths() for dataset in self.datasets), strict=True)
        return np.concatenate(sources), np.concatenate(targets)

    def read_longest_targets(self) -> Integers:
        """Return the length of each example's target in tokens; for a preference pair, of the longer answer."""
        return np.concatenate([dataset.cache.read_longest_targets() for dataset in self.datasets])

    @property
    def has_preferences(self) -> bool:
        """Whether the examples are preference pairs."""
        return self.main.cache.has_preferences

    @property
    def main(self) -> Dataset:
        """The dataset whose template and prefix are used for chat: the first that isn't raw text."""
        return next((each for each in self.datasets if each.cache.corruption is None), self.datasets[0])

    @cached_property
    def label_task(self) -> LabelTask | None:
        """Describes the labels of all datasets; None: the examples have no labels."""
        pairs = [(each.cache.label_task, each.cache.has_given_order) for each in self.datasets if each.cache.label_task]
        tasks = {task for task, _ in pairs}
        return next(iter(tasks), None) if len(tasks) < 2 else join_tasks(pairs)

    def map_labels(self, task: LabelTask | None = None) -> "Examples":
        """Return the same examples with the class numbers of `task`; default: `label_task`.

        Raises:
            DataError: a dataset has classes that the task lacks, or there are no classes.
        """
        task = self.label_task if task is None else task
        if task is not None and task.objective != "regress" and not task.names:
            raise DataError("data_path: no text has a label, so there are no classes", hint="add texts with labels")
        return self if task is None else self._replace_caches([each.cache.map_labels(task) for each in self.datasets])

    def compute_label_scale(self) -> tuple[float, float]:
        """Return a power of two near the standard deviation of the numbers to predict, and their mean."""
        found = [values for dataset in self.datasets for values in dataset.cache.iterate_values()]
        values = np.concatenate(found)
        values = values[~np.isnan(values)]
        deviation = float(values.std())
        return 2.0 ** round(math.log2(deviation)) if deviation > 0 else 1.0, float(values.mean())

    def count_classes(self) -> Counter[str]:
        """Count the learned texts or words of each class."""
        task = self.label_task
        assert task is not None
        counts = np.zeros(len(task.names), np.int64)
        for dataset in self.datasets if task.names else ():
            for values in dataset.cache.iterate_values():
                np.add.at(counts, values[~np.isnan(values)].astype(np.int64), 1)
        return Counter(dict(zip(task.names, counts.tolist(), strict=True)))

    def describe_rates(self) -> list[dict[str, float]]:
        """Describe each dataset's share of an epoch, from 0 to 1, and how many examples that is on average."""
        pairs = zip(self.shares, self.rates, strict=True)
        return [{"share": round(float(share), 6), "examples_per_epoch": _round_rate(rate)} for share, rate in pairs]

    def list_drawn(self) -> Integers:
        """List the examples of the datasets that have a share."""
        drawn = zip(self._list_bounds(), self.shares, strict=True)
        return np.concatenate([np.arange(bounds.start, bounds.stop) for bounds, share in drawn if share])

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer that encoded the caches, with a chat template for the main dataset."""
        return self.main.cache.tokenizer_folder

    @property
    def added_tokens(self) -> list[str]:
        """The tokens that were added to the base model's tokenizer, in the order of their ids."""
        return self.datasets[0].cache.added_tokens

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Describes these examples in mixture.json, which `prepare` writes for those that aren't held out."""
        manifests = {dataset.name: dataset.cache.manifest for dataset in self.datasets}
        counts = {dataset.name: dataset.cache.count_contents() for dataset in self.datasets}
        first = self.datasets[0].cache.manifest
        rejected = Counter[str]()
        for manifest in manifests.values():
            rejected.update(manifest["rejected_by_reason"])
        sources = [source for manifest in manifests.values() for source in manifest.get("sources", [])]
        inputs = {name: manifest["inputs"] for name, manifest in manifests.items()}
        return {
            "format": MIXTURE_FORMAT,
            "made_by": first["made_by"],
            **_sum_counts(counts.values()),
            "rejected_by_reason": dict(sorted(rejected.items())),
            "added_tokens": first["added_tokens"],
            "added_token_ids": first["added_token_ids"],
            **{key: _merge(manifests, key) for key in ("eval_fraction", "split_seed", "seed")},
            "inputs": {key: _merge(inputs, key) for key in dict.fromkeys(chain.from_iterable(inputs.values()))},
            **({"sources": sources} if sources else {}),
            "mixing": asdict(self.mixing),
            "datasets": [
                {
                    "name": dataset.name,
                    "cache": self._write_path(dataset.cache.folder),
                    "weight": dataset.weight,
                    **({} if dataset.num_data is None else {"num_data": dataset.num_data}),
                    **facts,
                    **counts[dataset.name],
                }
                for dataset, facts in zip(self.datasets, self.describe_rates(), strict=True)
            ],
        }

    def count_prepared(self) -> dict[str, int]:
        """Return the sums of the caches' counts, which include held-out examples."""
        held_out = self.find_prepared_keys()
        return _sum_counts([dataset.count_prepared(held_out) for dataset in self.datasets])

    def _write_path(self, cache: Path) -> str:
        return cache.name if cache.parent == self.folder else str(cache.resolve())

    def identify(self) -> dict[str, Any]:
        """Return each dataset's hashes, with its name if there are several: equal for the same examples in order."""
        datasets = [[each.name if self.are_several else None, each.cache.identify()] for each in self.datasets]
        return {"datasets": datasets}

    def take(self, count: int) -> "Examples":
        """Return the first `count` examples of each dataset."""
        return self._replace_caches([dataset.cache.take(count) for dataset in self.datasets])

    def limit_training(self, count: int | None = None) -> "Examples":
        """Return all held-out examples, and the first `count` of the rest of each dataset; default: its `num_data`."""
        # a text that one dataset holds out isn't trained on anywhere, so it doesn't count in any dataset
        keys = self.find_prepared_keys()
        pairs = [(each.cache, each.num_data if count is None else count) for each in self.datasets]
        return self._replace_caches(
            [cache if limit is None else cache.limit_training(limit, keys) for cache, limit in pairs]
        )

    def split(self, held_out: float, split_seed: int) -> tuple["Examples", "Examples"]:
        """Return (training, held out): hold out the fraction `held_out` of each dataset's conversations.

        A text that is held out in one dataset is held out in all.
        """
        return self._split([(held_out, split_seed)] * len(self.datasets))

    def split_as_prepared(self) -> tuple["Examples", "Examples | None"]:
        """Return (training, held out) according to prepare's eval_fraction; held out is None for a fraction of 0."""
        wanted = [dataset.cache.prepared_split for dataset in self.datasets]
        return self._split(wanted) if any(fraction for fraction, _ in wanted) else (self, None)

    def read_keys(self) -> npt.NDArray[np.uint64]:
        """Return the key of each example's conversation, dataset by dataset."""
        return np.concatenate([dataset.cache.read_keys() for dataset in self.datasets])

    def find_prepared_keys(self) -> npt.NDArray[np.uint64]:
        """Find the keys of the conversations that prepare held out in any dataset."""
        return self._find_held_out_keys([dataset.cache.prepared_split for dataset in self.datasets])

    def _find_held_out_keys(self, wanted: Sequence[tuple[float, int]]) -> npt.NDArray[np.uint64]:
        keys = [np.zeros(0, np.uint64)]
        for dataset, (fraction, split_seed) in zip(self.datasets, wanted, strict=True):
            if fraction:
                try:
                    keys.append(find_held_out_keys(dataset.cache, fraction, split_seed))
                except DataError as error:
                    problem = f"{dataset.name}: {error.message}" if self.are_several else error.message
                    raise DataError(problem, hint=error.hint) from None
        return np.unique(np.concatenate(keys))

    def _split(self, wanted: Sequence[tuple[float, int]]) -> tuple["Examples", "Examples"]:
        keys = self._find_held_out_keys(wanted)
        pairs = zip(self.datasets, wanted, strict=True)
        parts = [dataset.cache.split_by_keys(keys, split_seed) for dataset, (_, split_seed) in pairs]
        for dataset, (kept, _) in zip(self.datasets, parts, strict=True):
            if not len(kept):
                problem = f"{dataset.name}: all of its texts are also in other datasets, which hold them out"
                raise DataError(problem, hint="leave it out, or hold out fewer examples with eval_fraction")
        training = self._replace_caches([part for part, _ in parts])
        held_out = [
            replace(dataset, cache=part) for dataset, (_, part) in zip(self.datasets, parts, strict=True) if len(part)
        ]
        return training, Examples(self.folder, held_out, Mixing(), self.are_several)

    def mix(self, mixing: Mixing) -> "Examples":
        """Return the same datasets with a different mixing."""
        return Examples(self.folder, self.datasets, mixing, self.are_several)

    def _replace_caches(self, caches: Sequence[Cache]) -> "Examples":
        pairs = zip(self.datasets, caches, strict=True)
        datasets = [replace(dataset, cache=cache) for dataset, cache in pairs]
        return Examples(self.folder, datasets, self.mixing, self.are_several)


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for each in counts:
        total.update(each)
    return dict(total)


def describe_shares(examples: Examples) -> list[Note]:
    """Say how many examples of each dataset an epoch has, on average, if there are several."""
    if not examples.are_several:
        return []
    parts = [
        f"{dataset.name} {float(share):.1%} ({_round_rate(rate):,} of {format_count(len(dataset.cache), 'example')})"
        for dataset, share, rate in zip(examples.datasets, examples.shares, examples.rates, strict=True)
    ]
    notes = [Note(f"an epoch has {format_count(int(sum(examples.rates)), 'example')}: {', '.join(parts)}")]
    for dataset, rate in zip(examples.datasets, examples.rates, strict=True):
        if rate == 0:
            notes.append(Note(f"dataset {dataset.name}: not trained on, since its share is 0"))
        elif rate < 1:
            epochs = format_count(min(round(1 / rate), 10**9), "epoch")
            notes.append(Note(f"dataset {dataset.name}: only one example in about {epochs}", warning=True))
    return notes


def decode_targets(tokenizer: Tokenizer, examples: Examples, indices: Iterable[int]) -> Iterator[str]:
    """Decode the targets of some examples, without the template's answer suffix."""
    for index in indices:
        suffix, is_raw_text = examples.get_template(index).answer_suffix, examples.is_raw_text(index)
        yield decode_reference(tokenizer, examples[index].target_T, suffix, is_raw_text)


def find_missing_labels(tokenizer: Tokenizer, training: Examples, held_out: Examples) -> list[Note]:
    """Name the labels among the training targets that no held-out example has."""
    if training.label_task is not None:
        found, held = training.count_classes(), held_out.count_classes()
        return _report_missing([name for name, count in found.items() if count and not held[name]])
    indices = range(0, len(training), -(-len(training) // MAX_TARGETS_FOR_LABELS))
    missing = dict.fromkeys(find_labels(decode_targets(tokenizer, training, indices)))
    for target in decode_targets(tokenizer, held_out, range(len(held_out))):
        if not missing:
            return []
        missing.pop(target, None)
    return _report_missing([*missing])


def _report_missing(missing: Sequence[str]) -> list[Note]:
    labels = f"{'label' if len(missing) == 1 else 'labels'} {join_first([*map(repr, missing)])}"
    advice = "use a larger eval_fraction, a different split_seed, or a file with every label as eval_data_path"
    return [Note(f"no held-out example has the {labels}; {advice}", warning=True)] if missing else []


def _round_rate(rate: Fraction) -> float:
    rounded = round(float(rate), 4)
    return int(rounded) if rounded.is_integer() else rounded


def _merge(values: Mapping[str, Mapping[str, Any]], key: str) -> Any:
    """Return the value of `key` that all datasets have, otherwise the value of each."""
    by_dataset = {dataset: value.get(key) for dataset, value in values.items()}
    first, *others = by_dataset.values()
    return first if all(value == first for value in others) else by_dataset
