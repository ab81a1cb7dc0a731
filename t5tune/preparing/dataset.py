"""One dataset of a token cache: find its files, take the first records, choose its conversation template.

opened = open_dataset(plan, dataset, report)
source = describe_source(plan, opened, base, vocabulary, trained_labels=None)
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from t5tune.checkpoints.base import read_config
from t5tune.checkpoints.pocket import find_conversations_file
from t5tune.data.caches.cache import is_cache
from t5tune.data.caches.manifest import read_manifest
from t5tune.data.caches.prepared import find_tokenizer_folder, has_examples
from t5tune.data.labels import LabelTask
from t5tune.data.reading.files import STDIN, Digest, find_encodings, find_files
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.reading.readers import read_records
from t5tune.data.reading.sources import bring_data, is_dataset_name
from t5tune.data.reading.tables import find_class_names
from t5tune.data.reading.workbooks import split_sheet
from t5tune.data.tokens.templates import PAIR_TEMPLATE, Template, find_template, load_template
from t5tune.data.tokens.tokenizer import Tokenizer, find_other_token, load_tokenizer
from t5tune.data.tokens.vocabulary import ExtendedTokenizer, extend_tokenizer
from t5tune.errors import DataError
from t5tune.families import find_architecture
from t5tune.file_names import TEMPLATE_FILE
from t5tune.formatting import format_count
from t5tune.hub.datasets import EVALUATION_SPLITS, DatasetChoice, pin_dataset
from t5tune.io.atomic import hash_file
from t5tune.io.reasons import join_first
from t5tune.preparing.cache_files import CacheSource
from t5tune.preparing.data_problems import (
    report_default_template,
    report_models_template,
)
from t5tune.preparing.parts.shard import count_cores_of
from t5tune.preparing.plan import PreparePlan
from t5tune.preparing.record_checks import RecordChecks, name_rejected_file
from t5tune.preparing.sample import (
    choose_default_template,
    drain,
    iterate_labels,
    parse_sample,
    report_doubts,
    take_sample,
)
from t5tune.progress import Report
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_spec import DatasetSpec
from t5tune.settings.field_types import Settings
from t5tune.settings.groups.data import SplitSettings
from t5tune.settings.groups.record_format import ConversationSettings, ReadingSettings, SelectionSettings


@dataclass(frozen=True)
class OpenedDataset:
    """The files of a dataset, and their first records.

    Args:
        paths: as given; they lead to `files`.
        encodings: of the text files that aren't UTF-8.
        sample: the first records; `iterate_records` drains it.
    """

    dataset: DatasetSpec
    paths: list[str]
    files: list[Path]
    encodings: Mapping[Path, str]
    stdin: Digest
    sample: list[RawRecord]
    rest: Iterator[RawRecord]

    def iterate_records(self) -> Iterator[RawRecord]:
        """Yield all records, once."""
        yield from drain(self.sample)
        yield from self.rest

    def parse_sample(self) -> Iterator[Conversation]:
        """Yield the conversations among the first records."""
        return parse_sample(self.sample, self.dataset)


def open_dataset(plan: PreparePlan, dataset: DatasetSpec, report: Report) -> OpenedDataset:
    """Find the files of a dataset, download them if needed, and read the first records."""
    paths = _bring_data(plan, dataset, report)
    files = find_files(paths, report, plan.origin.setting, dataset.kind == "raw text", dataset.pair_lines)
    stdin = Digest()
    records = read_records(files, dataset, stdin)
    sample = take_sample(records)
    encodings = find_encodings(files, dataset.encoding, stdin, report)
    report_doubts(sample, dataset, report)
    return OpenedDataset(dataset, paths, files, encodings, stdin, sample, records)


def describe_source(
    plan: PreparePlan,
    opened: OpenedDataset,
    base: Path,
    vocabulary: ExtendedTokenizer,
    trained_labels: LabelTask | None,
) -> CacheSource:
    """Choose the conversation template from the first records, and describe everything that the cache depends on.

    Args:
        plan: with the origin of this dataset.
        trained_labels: of the model that the data is to evaluate.
    """
    origin, dataset, sample = plan.origin, opened.dataset, opened.sample
    # a run is resumed with the template that was the default when it was started
    started_with = plan.output_dir / dataset.name if origin.checkpoint is not None else None
    template_folders = (origin.tokenizer_source, base, started_with)
    saved_templates = [each / TEMPLATE_FILE for each in template_folders if each is not None]
    template = find_template(dataset.conversation_template, saved_templates)
    default_template = None
    if template is None and dataset.kind in ("raw text", "labels"):
        template = load_template(PAIR_TEMPLATE)  # these have no template; this one is for using the model
    if template is None:
        default_template = choose_default_template(sample, opened.files, dataset)
        template = load_template(default_template)
    label_task = (trained_labels or _find_label_task(opened)) if dataset.kind == "labels" else None
    inputs = _describe_inputs(plan, opened, vocabulary.tokenizer, template, label_task)
    checks = RecordChecks(
        data=f"{origin.setting}: {join_first(opened.files)}",
        purpose="evaluate on" if origin.is_evaluation else "train on",
        rejected_file=origin.rejected_file or name_rejected_file(plan.output_dir),
        takes_only_pairs=default_template == PAIR_TEMPLATE,
        max_rejected_fraction=dataset.max_rejected_fraction,
        num_data=dataset.num_data,
    )
    num_rows = max(count_rows(base, plan.base.family), len(vocabulary.tokenizer))
    num_cores = count_cores_of(plan.shard)
    source = CacheSource(
        dataset, plan.split, plan.base.model_name_or_path, num_cores, origin.setting, opened.paths, opened.files,
        opened.stdin, vocabulary, num_rows, template, default_template, inputs, checks, opened.iterate_records(),
        label_task,
    )  # fmt: skip
    _ = source.corruption  # raises if the tokenizer can't have it
    return source


def _find_label_task(opened: OpenedDataset) -> LabelTask:
    """Find the form of the first record's labels, and the names if they are known."""
    dataset = opened.dataset
    first = next(iterate_labels(opened.sample, dataset), None)
    per_token, several = (False, False) if first is None else (first.per_token, first.several)
    names = dataset.labels or (() if dataset.objective == "regress" else find_class_names(opened.files, dataset))
    match dataset.objective:
        case "classify" | "regress" | "tag" as objective:
            return LabelTask(objective, per_token, several, tuple(names), dataset.source_words)
    raise AssertionError(f"{dataset.objective} has no labels")


def report_template(source: CacheSource, manifest: dict[str, Any], report: Report) -> None:
    """Report which conversation template was chosen, if the settings don't name one."""
    num_pairs, num_records = manifest["pairs"], manifest["conversations"]
    if source.default_template is not None:
        report_default_template(source.default_template, num_pairs, format_count(num_records, "record"), report)
    elif source.dataset.conversation_template is None and source.setting == "data_path" and num_pairs == num_records:
        report_models_template(source.template, report)


def _bring_data(plan: PreparePlan, dataset: DatasetSpec, report: Report) -> list[str]:
    """Replace names of data that isn't on this machine by paths; token caches are refused."""
    origin, cache = plan.origin, plan.output_dir / dataset.name
    refuse_caches(dataset.path, origin.setting)
    names = [str(find_conversations_file()) if path == "pocket" else path for path in dataset.path]
    if origin.checkpoint is not None and is_cache(cache):  # a resumed run reads the commit that it was started with
        sources = read_manifest(cache).get("sources") or []
        names = [pin_dataset(name, sources) if is_dataset_name(name) else name for name in names]
    choice = DatasetChoice(dataset.data_subset, dataset.data_split)
    if origin.is_evaluation:
        choice = replace(choice, defaults=EVALUATION_SPLITS)
    if origin.setting == "eval_data_path":
        choice = replace(choice, setting="eval_data_split")
    return bring_data(names, choice, origin.setting, plan.base.cache_dir, report, dataset.kind == "raw text")


def refuse_caches(paths: list[str], setting: str) -> None:
    """Check that no path of data is a token cache."""
    for path in paths:
        if has_examples(Path(path)):
            problem = f"{setting}: {path}: is already a token cache"
            raise DataError(problem, hint="prepare reads conversations; give the cache to train")


def count_rows(base: Path, family: str | None) -> int:
    """Count the base's embedding rows; raise if the base isn't a supported model."""
    return find_architecture(read_config(base), base, family).dimensions.num_rows


def choose_vocabulary(
    plan: PreparePlan, base: Path, source: Path | None, sample: Iterator[Conversation]
) -> ExtendedTokenizer:
    """Take the tokenizer of `source`, or extend the base's with the tokens that the sample needs."""
    if source is None:
        num_rows = count_rows(base, plan.base.family)
        tokenizer = load_tokenizer(base)
        num_rows = max(num_rows, len(tokenizer) + plan.num_spare_rows)
        return extend_tokenizer(tokenizer, plan.add_tokens, num_rows, sample)
    return take_vocabulary(source, base)


def check_cache_tokenizer(cache: Path, base: Path) -> None:
    """Check that a token cache has the tokens of the base with the same ids, which are rows of its embedding."""
    found = load_tokenizer(find_tokenizer_folder(cache))
    if (other := find_other_token(load_tokenizer(base), found)) is None:
        return
    token, index = other
    ids = f"{token!r} is token {index:,} of {base}, and {found.get_vocab().get(token, 'none')} of the cache"
    problem = f"data_path: {cache}: prepared with a different tokenizer: {ids}"
    raise DataError(problem, hint="give the data in place of the cache")


def take_vocabulary(source: Path, base: Path) -> ExtendedTokenizer:
    """Take the tokenizer of a cache, an adapter or a checkpoint, which extends the base's."""
    tokenizer = load_tokenizer(find_tokenizer_folder(source))
    vocabulary = tokenizer.get_vocab()
    added = sorted(vocabulary.keys() - load_tokenizer(base).get_vocab().keys(), key=vocabulary.__getitem__)
    return ExtendedTokenizer(tokenizer, added, [])


def _describe_inputs(
    plan: PreparePlan,
    opened: OpenedDataset,
    tokenizer: Tokenizer,
    template: Template,
    label_task: LabelTask | None,
) -> dict[str, Any]:
    """Describe everything that the cache depends on: the same inputs give the same bytes."""
    vocabulary = tokenizer.backend.to_str() if tokenizer.backend is not None else "bytes"

    def select(group: type[Settings], part: Settings) -> dict[str, Any]:
        return {name: getattr(part, name) for name in select_settings(group, Affects.CACHE)}

    return {
        # standard input can't be hashed before it is read, so a cache of it is never up to date
        "data": [
            {
                "file": file.name,
                "sha256": hash_file(split_sheet(file)[0]) if file != STDIN else None,
                **({"encoding": opened.encodings[file]} if file in opened.encodings else {}),
            }
            for file in opened.files
        ],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": template.hash,
        **select(ConversationSettings, opened.dataset),
        **select(ReadingSettings, opened.dataset),
        "add_tokens": plan.add_tokens,
        "num_data": opened.dataset.num_data,
        **select(SelectionSettings, opened.dataset),
        **select(SplitSettings, plan.split),
        **({} if label_task is None else {"label_task": {**asdict(label_task), "names": [*label_task.names]}}),
    }
