r"""The token cache: a folder with the ids of each conversation, stored once, and the spans of its examples.

    tokens.bin          the ids of all conversations, concatenated: uint16 little-endian, or int32 if the
                        vocabulary is larger than 65,536, or the texts have labels: after a text's ids come its values,
                        as the bits of float64: class numbers or numbers, for the text or for each of its tokens
    conversations.bin   a row per conversation, of CONVERSATION_DTYPE
    examples.bin        a row per example, of EXAMPLE_DTYPE, in the order of the data
    tokenizer/          the tokenizer that encoded the conversations, with its added tokens
    template.yaml       the conversation template
    training_data.json  how the examples were made; chat and evaluate read it (see checkpoints/training_data.py)
    rejected.jsonl      the rejected records, with file, line, index, byte offset and reason
    manifest.json       format, hashes, settings, counts, length percentiles, and the SHA-256 of each file

The same inputs give the same bytes.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.data.caches.batching import Integers
from t5tune.data.caches.manifest import CONTENT_COUNTS, PREPARE_AGAIN, TABLES, read_manifest
from t5tune.data.caches.tables import check_tables, map_tables
from t5tune.data.labels import LabelTask, Values, describe_form, read_values, renumber, sort_names
from t5tune.data.tokens.encoding import Example, Span, extract_example, extract_labels, surround
from t5tune.data.tokens.span_corruption import SpanCorruption, find_sentinels
from t5tune.data.tokens.templates import Template, parse_template
from t5tune.data.tokens.tokenizer import SpecialIds, load_tokenizer
from t5tune.errors import DataError
from t5tune.file_names import (
    CACHE_MANIFEST_FILE,
    REJECTED_FILE,
    TEMPLATE_FILE,
    TOKENS_FILE,
    TRAINING_DATA_FILE,
)
from t5tune.formatting import format_count
from t5tune.io.atomic import hash_file
from t5tune.io.reasons import describe_error, join_first
from t5tune.io.yaml_file import read_yaml
from t5tune.settings.denoisers import find_denoisers
from t5tune.settings.groups.record_format import KINDS

CACHE_CONTENTS = {*TABLES, "tokenizer", TEMPLATE_FILE, TRAINING_DATA_FILE, REJECTED_FILE, CACHE_MANIFEST_FILE}
_verified = set[Any]()  # caches by the stats of their files: a run opens a given cache several times


class Cache(Sequence[Example]):
    """The examples of a cache, or those at `indices`, read from disk on access.

    Args:
        label_task: numbers the classes of labels; None: as in the cache's data, which may have no labels.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        indices: Integers | None = None,
        label_task: LabelTask | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.label_task = _read_label_task(folder, manifest) if label_task is None else label_task
        self.corruption = _read_corruption(folder, manifest)
        start, end = (tuple(manifest[f"source_{side}_ids"]) for side in ("start", "end"))
        self.special_ids = SpecialIds(start, end, manifest["eos_token_id"])
        self._tables = map_tables(folder, manifest["dtype"])
        self._tokens, self._conversations, self._examples = self._tables
        self._given_indices = indices

    def __len__(self) -> int:
        indices = self._given_indices
        return len(self._examples) if indices is None else len(indices)

    @cached_property
    def _indices(self) -> Integers:
        """The indices in the whole cache, 8 bytes per example: prepare only counts a new cache, and needs no array."""
        indices = self._given_indices
        return np.arange(len(self._examples)) if indices is None else indices

    def __getitem__(self, index: Any) -> Any:
        return self.read(index, repeat=0)

    def read(self, index: int, repeat: int) -> Example:
        """Return an example that was sampled `repeat` times before; in raw text, each time masks different spans."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        conversation, span = self._read_row(index)
        ids = self._tokens[int(self._conversations["start"][conversation]) :]
        if self.label_task is not None:
            example = extract_labels(ids, span, self.special_ids, self.label_task)
            return replace(example, values=self._number_classes(example.values))
        if self.corruption is None:
            return extract_example(ids, span, self.special_ids)
        masked, spans = (int(counts[index]) for counts in self._masked)
        window = ids[span.source_start : span.source_end]
        source, target = self.corruption.corrupt(window, masked, spans, int(self._indices[index]), repeat)
        return surround(source, target, self.special_ids)

    def iterate_ids(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the ids of each conversation once, truncated parts included."""
        starts = self._conversations["start"].astype(np.int64)
        numbers, examples = np.unique(self._read_column("conversation"), return_index=True)
        ends = np.append(starts[1:], len(self._tokens))[numbers]
        if self.label_task is not None:  # values follow the ids
            ends = starts[numbers] + self._read_column("target_start")[examples]
        for start, end in zip(starts[numbers], ends, strict=True):
            yield self._tokens[start:end]

    def iterate_values(self) -> Iterator[Values]:
        """Yield the values of each example with labels, without special tokens."""
        return (self._number_classes(read_values(target)) for target in self.iterate_targets())

    def iterate_targets(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the ids of each example's target, without special tokens; of an example with labels, its values."""
        starts = self._conversations["start"][self._read_column("conversation")].astype(np.int64)
        bounds = (starts + self._read_column(name) for name in ("target_start", "target_end"))
        for start, end in zip(*bounds, strict=True):
            yield self._tokens[start:end]

    def map_labels(self, task: LabelTask) -> "Cache":
        """Return the same examples with the class numbers of a task; DataError: the cache has other labels."""
        if (form := describe_form(self.label_task)) != (wanted := describe_form(task)):
            raise DataError(f"{self.folder}: has {form}, and the model's labels are: {wanted}")
        known = {*task.names}
        if missing := [repr(name) for name in self.manifest["labels"]["names"] if name not in known]:
            among = f"the {format_count(len(task.names), 'label')} to predict"
            are = "label that isn't" if len(missing) == 1 else "labels that aren't"
            problem = f"{self.folder}: {len(missing):,} {are} among {among}: {join_first(missing)}"
            raise DataError(problem, hint="give the data in place of the cache: records with such labels are left out")
        return Cache(self.folder, self.manifest, self._given_indices, task)

    def check(self) -> None:
        """Check that the manifest fits the tokenizer, and that the tables fit both; DataError: they don't."""
        manifest, tokenizer = self.manifest, load_tokenizer(self.tokenizer_folder)
        same = {
            "source_start_ids, source_end_ids or eos_token_id": (self.special_ids, tokenizer.special_ids),
            "added_token_ids": (manifest["added_token_ids"], tokenizer.convert_tokens_to_ids(self.added_tokens)),
            "examples": (manifest["examples"], len(self.whole)),
        }
        if self.corruption is not None:
            same["sentinel_ids"] = (self.corruption.sentinels, find_sentinels(tokenizer))
        for name, (saved, found) in same.items():
            if saved != found:
                problem = f"{self.folder / CACHE_MANIFEST_FILE}: {name}: differs from the cache's files"
                raise DataError(problem, hint=PREPARE_AGAIN)
        kind = KINDS[manifest["inputs"]["objective"]]
        check_tables(self.folder, self._tables, self.special_ids, len(tokenizer), kind, self.label_task)

    @property
    def has_given_order(self) -> bool:
        """Whether the order of the classes is given, by the user or by a ClassLabel."""
        return bool(self.manifest["labels"]["is_ordered"])

    def _number_classes(self, values: Values) -> Values:
        return values if self._class_numbers is None else renumber(values, self._class_numbers)

    @cached_property
    def _class_numbers(self) -> Values | None:
        """The number of each class in `label_task`, by its number in the cache; None: the values are numbers."""
        assert self.label_task is not None
        numbers = {name: number for number, name in enumerate(self.label_task.names)}
        return np.array([numbers[name] for name in self.manifest["labels"]["names"]], np.float64) if numbers else None

    def read_untruncated(self, index: int) -> tuple[Example, int, npt.NDArray[Any], Span]:
        """Return (example, conversation number, the conversation's ids up to the untruncated target's end, span)."""
        conversation, span = self._read_row(index)
        start = int(self._conversations["start"][conversation])
        end = max(span.answer_end, span.rejected_answer_end)
        return self[index], conversation, self._tokens[start : start + end], span

    def count_cut_tokens(self) -> Integers:
        """Count the tokens that model_max_length cut from each example's source and target."""
        none = np.zeros(len(self), int)
        if self.corruption is not None:  # a raw text isn't truncated; source_start is where a window begins in it
            return none
        pairs = ("source_start", "system_end"), ("answer_end", "target_end"), ("rejected_answer_end", "rejected_end")
        return sum((self._read_column(whole) - self._read_column(kept) for whole, kept in pairs), none)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer that encoded the cache."""
        return self.folder / "tokenizer"

    @property
    def added_tokens(self) -> list[str]:
        """The tokens that were added to the base model's tokenizer, in the order of their ids."""
        return list(self.manifest["added_tokens"])

    def read_lengths(self) -> tuple[Integers, Integers]:
        """Return (source lengths, target lengths) in tokens, including special tokens, in the order of the cache.

        Targets of a preference pair count together.
        """
        source, target, rejected = self._compute_lengths()
        return source, target + rejected

    def read_longest_targets(self) -> Integers:
        """Return the length of each example's target in tokens; for a preference pair, of the longer answer."""
        _, target, rejected = self._compute_lengths()
        return np.maximum(target, rejected)

    def _compute_lengths(self) -> tuple[Integers, ...]:
        has_labels = self.label_task is not None
        return compute_lengths(self._read_column, self.special_ids, self.corruption, self._indices, has_labels)

    @property
    def has_preferences(self) -> bool:
        """Whether the examples are preference pairs."""
        return KINDS[self.manifest["inputs"]["objective"]] == "pairs"

    @cached_property
    def _masked(self) -> tuple[Integers, Integers]:
        """How many tokens and spans of each example are masked."""
        assert self.corruption is not None
        windows = self._read_column("source_end") - self._read_column("source_start")
        return self.corruption.count_masked(self._indices, windows)

    def _read_row(self, index: int) -> tuple[int, Span]:
        conversation, *span = self._examples.item(self._indices[index])
        return conversation, Span._make(span)

    def _read_column(self, name: str) -> Integers:
        return np.asarray(self._examples[name][self._indices], np.int64)

    def name_example(self, index: int) -> int:
        """Return an example's index in the whole cache, as `t5tune inspect` counts; this may be a part of it."""
        return int(self._indices[index])

    @cached_property
    def template(self) -> Template:
        """The conversation template."""
        path = self.folder / TEMPLATE_FILE
        return parse_template(read_yaml(path), path)

    def identify(self) -> dict[str, Any]:
        """Return hashes of the files, and of the indices in the whole cache: equal for the same examples."""
        files = {name: self.manifest["files"][name] for name in TABLES}
        # the files have the windows of raw text, and the seed determines the masked spans
        seed = {} if self.corruption is None else {"seed": self.manifest["seed"]}
        labels = {} if self.label_task is None else {"labels": [*self.label_task.names]}
        indices = hashlib.sha256(self._indices.astype("<i8").tobytes())
        return {**files, **seed, **labels, "examples": indices.hexdigest()}

    def count_contents(self) -> dict[str, int]:
        """Count the examples, their conversations and their tokens; this may be a part of the cache."""
        if self._given_indices is None:
            return {name: int(self.manifest[name]) for name in CONTENT_COUNTS}
        sources, targets = self.read_lengths()
        conversations = len(np.unique(self._read_column("conversation")))
        counts = conversations, len(self), int(sources.sum()), int(targets.sum())
        return dict(zip(CONTENT_COUNTS, counts, strict=True))

    def take(self, count: int) -> "Cache":
        """Return the first `count` examples."""
        return self._select(self._indices[:count])

    def limit_training(self, count: int, held_out: npt.NDArray[np.uint64]) -> "Cache":
        """Return all examples of the conversations with the keys `held_out`, and the first `count` of the rest."""
        is_held_out = np.isin(self.read_keys(), held_out)
        chosen = is_held_out | (np.cumsum(~is_held_out) <= count)
        return self._select(self._indices[chosen])

    def _select(self, indices: Integers | None, **changes: Any) -> "Cache":
        return Cache(self.folder, {**self.manifest, **changes}, indices, self.label_task)

    @property
    def whole(self) -> "Cache":
        """All examples of the folder."""
        return self._select(None)

    @property
    def prepared_split(self) -> tuple[float, int]:
        """The eval_fraction and the split_seed that prepare held out examples with; a fraction of 0: no examples."""
        return float(self.manifest["eval_fraction"]), int(self.manifest["split_seed"])

    def split_by_keys(self, held_out: npt.NDArray[np.uint64], split_seed: int) -> tuple["Cache", "Cache"]:
        """Return (training, held out): hold out the conversations with these keys.

        `split_seed` also determines the masked spans of held-out raw text.
        """
        is_held_out = np.isin(self.read_keys(), held_out)
        return self._select(self._indices[~is_held_out]), self._select(self._indices[is_held_out], seed=split_seed)

    def read_keys(self) -> npt.NDArray[np.uint64]:
        """Return the key of each example's conversation."""
        keys: npt.NDArray[np.uint64] = self._conversations["key"][self._read_column("conversation")]
        return keys


def compute_lengths(
    column: Callable[[str], Integers],
    special: SpecialIds,
    corruption: SpanCorruption | None,
    indices: Integers,
    has_labels: bool,
) -> tuple[Integers, ...]:
    """Compute the lengths of examples' sources, targets and rejected targets, special tokens included.

    Without a rejected target, its length is 0; so is the length of labels.

    Args:
        column: reads columns of EXAMPLE_DTYPE.
        indices: of the examples in the whole cache.
    """
    if corruption is not None:
        windows = column("source_end") - column("source_start")
        masked, spans = corruption.count_masked(indices, windows)
        return windows - masked + spans + special.source_size, masked + spans + 1, np.zeros_like(masked)
    source = column("system_end") + column("source_end") - column("source_start") + special.source_size
    if has_labels:
        return source, np.zeros_like(source), np.zeros_like(source)
    target = column("target_end") - column("target_start") + column("target_is_whole")
    rejected = column("rejected_end") - column("rejected_start") + column("rejected_is_whole")
    return source, target, np.where(column("rejected_start") > 0, rejected, 0)


def _read_corruption(folder: Path, manifest: dict[str, Any]) -> SpanCorruption | None:
    if (saved := manifest.get("span_corruption")) is None:
        return None
    try:
        sentinels = tuple(map(int, saved["sentinel_ids"]))
        return SpanCorruption(find_denoisers(saved["denoisers"]), sentinels, int(manifest["seed"]))
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{folder / CACHE_MANIFEST_FILE}: span_corruption: {describe_error(error)}"
        raise DataError(problem, hint=PREPARE_AGAIN) from error


def _read_label_task(folder: Path, manifest: dict[str, Any]) -> LabelTask | None:
    if (saved := manifest.get("labels")) is None:
        return None
    try:
        names = tuple(saved["names"]) if saved["is_ordered"] else sort_names(saved["names"])
        own = {name: manifest["inputs"][name] for name in ("objective", "source_words")}
        return LabelTask(**own, per_token=saved["per_token"], several=saved["several"], names=names)
    except (KeyError, TypeError) as error:
        problem = f"{folder / CACHE_MANIFEST_FILE}: labels: {describe_error(error)}"
        raise DataError(problem, hint=PREPARE_AGAIN) from error


def is_cache(path: Path) -> bool:
    """Return whether a folder looks like a token cache."""
    # os.path, because pathlib raises if the folder can't be searched
    return os.path.isfile(path / CACHE_MANIFEST_FILE) and os.path.isfile(path / TOKENS_FILE)


def open_cache(folder: Path) -> Cache:
    """Verify a cache and memory-map it.

    Raises:
        DataError: a file is missing or has changed, or its author has written wrong values.
    """
    manifest = read_manifest(folder)
    stats = []
    for path in (folder / name for name in [CACHE_MANIFEST_FILE, *manifest["files"]]):
        if not path.is_file():
            raise DataError(f"{path}: missing from the token cache", hint=PREPARE_AGAIN)
        found = path.stat()
        stats.append((found.st_ino, found.st_size, found.st_ctime_ns))
    if (key := (folder.resolve(), *stats)) not in _verified:
        for name, expected in manifest["files"].items():
            if hash_file(folder / name) != expected:
                raise DataError(f"{folder / name}: differs from what prepare wrote", hint=PREPARE_AGAIN)
        Cache(folder, manifest).check()
        _verified.add(key)
    return Cache(folder, manifest)


def hash_files(folder: Path) -> dict[str, str]:
    """Return {name: SHA-256} of every file below the folder except the manifest, sorted by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CACHE_MANIFEST_FILE)
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}
