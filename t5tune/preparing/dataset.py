"""One dataset of a token cache: find its files, take the first records, choose its conversation template.

opened = open_dataset(settings, report, Origin())
source = describe_source(opened, base, vocabulary, Origin())
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t5tune.checkpoints.base import read_config
from t5tune.checkpoints.pocket import find_conversations_file
from t5tune.data.caches.cache import is_cache, read_manifest
from t5tune.data.caches.examples import find_tokenizer_folder, has_examples
from t5tune.data.reading.files import STDIN, Digest, find_encodings, find_files
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.reading.readers import read_records
from t5tune.data.reading.sources import bring_data, is_dataset_name
from t5tune.data.tokens.templates import PAIR_TEMPLATE, Template, find_template, load_template
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer
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
from t5tune.preparing.record_checks import RecordChecks, name_rejected_file
from t5tune.preparing.sample import choose_default_template, drain, parse_sample, report_doubtful_headers, take_sample
from t5tune.progress import Report
from t5tune.settings import PrepareSettings
from t5tune.settings.affects import Affects, select_settings


@dataclass(frozen=True)
class Origin:
    """What a token cache takes from elsewhere.

    Args:
        checkpoint: of a run that was trained on the existing cache, so a cache of other inputs must not replace it, and
            its conversation template is used again, unless the settings name one.
        tokenizer_source: a cache or an adapter whose tokenizer and conversation template replace the base's.
        setting: the setting that the paths come from, for messages.
        is_evaluation: the examples are to evaluate on, so other splits of a dataset on the Hub are the default.
        rejected_file: lists the rejected records if there are too many; default: `cache.rejected.jsonl`, next to it.
        run: the run folder that train prepares for; train mixes datasets and holds out examples itself.
    """

    checkpoint: Path | None = None
    tokenizer_source: Path | None = None
    setting: str = "data_path"
    is_evaluation: bool = False
    rejected_file: Path | None = None
    run: Path | None = None


@dataclass(frozen=True)
class OpenedDataset:
    """The files of a dataset, of which the first records are read.

    Args:
        settings: those of this dataset alone.
        paths: what the files were found from.
        encodings: of the text files that aren't UTF-8.
        sample: the first records; `iterate_records` drains it.
    """

    settings: PrepareSettings
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
        return parse_sample(self.sample, self.settings)


def open_dataset(settings: PrepareSettings, report: Report, origin: Origin) -> OpenedDataset:
    """Find the files of a dataset, download what isn't on this machine, and read the first records.

    Raises:
        DataError: a path leads to no data.
    """
    paths = _bring_data(settings, report, origin)
    files = find_files(paths, report, origin.setting, is_text=settings.is_raw_text)
    stdin = Digest()
    records = read_records(files, settings, stdin)
    sample = take_sample(records)
    encodings = find_encodings(files, settings.encoding, stdin, report)
    report_doubtful_headers(sample, settings, report)
    return OpenedDataset(settings, paths, files, encodings, stdin, sample, records)


def describe_source(opened: OpenedDataset, base: Path, vocabulary: ExtendedTokenizer, origin: Origin) -> CacheSource:
    """Choose the conversation template by the first records, and describe all that the cache is made from.

    Raises:
        ModelError: the tokenizer has no sentinels for raw text.
    """
    settings, sample = opened.settings, opened.sample
    # a run is resumed with the template that was the default when it was started
    started_with = settings.output_dir if origin.checkpoint is not None else None
    template_folders = (origin.tokenizer_source, base, started_with)
    saved_templates = [each / TEMPLATE_FILE for each in template_folders if each is not None]
    template = find_template(settings.conversation_template, saved_templates)
    default_template = None
    if template is None and settings.is_raw_text:
        template = load_template(PAIR_TEMPLATE)  # raw text has none; this one is for using the model
    if template is None:
        default_template = choose_default_template(sample, opened.files, settings)
        template = load_template(default_template)
    inputs = _describe_inputs(settings, opened.files, opened.encodings, vocabulary.tokenizer, template)
    checks = RecordChecks(
        data=f"{origin.setting}: {join_first(opened.files)}",
        purpose="evaluate on" if origin.is_evaluation else "train on",
        rejected_file=origin.rejected_file or name_rejected_file(settings.output_dir),
        takes_only_pairs=default_template == PAIR_TEMPLATE,
        max_rejected_fraction=settings.max_rejected_fraction,
        num_data=settings.num_data,
    )
    num_rows = count_rows(settings, base)
    source = CacheSource(
        settings, origin.setting, opened.paths, opened.files, opened.stdin, vocabulary, num_rows, template,
        default_template, inputs, checks, opened.iterate_records(),
    )  # fmt: skip
    _ = source.corruption  # raises if the tokenizer can't have it
    return source


def report_template(source: CacheSource, manifest: dict[str, Any], report: Report) -> None:
    """Report which conversation template was chosen, if the settings don't name one."""
    num_pairs, num_records = manifest["pairs"], manifest["conversations"]
    if source.default_template is not None:
        report_default_template(source.default_template, num_pairs, format_count(num_records, "record"), report)
    elif source.settings.conversation_template is None and source.setting == "data_path" and num_pairs == num_records:
        report_models_template(source.template, report)


def _bring_data(settings: PrepareSettings, report: Report, origin: Origin) -> list[str]:
    """Replace the names of what isn't on this machine by paths; token caches are refused."""
    refuse_caches(settings.data_path, origin.setting)
    names = [str(find_conversations_file()) if path == "pocket" else path for path in settings.data_path]
    if origin.checkpoint is not None and is_cache(settings.output_dir):  # a resumed run reads what it was started with
        sources = read_manifest(settings.output_dir).get("sources") or []
        names = [pin_dataset(name, sources) if is_dataset_name(name) else name for name in names]
    choice = DatasetChoice(settings.data_subset, settings.data_split)
    if origin.is_evaluation:
        choice = replace(choice, defaults=EVALUATION_SPLITS)
    if origin.setting == "eval_data_path":
        choice = replace(choice, setting="eval_data_split")
    is_text = settings.is_raw_text
    return bring_data(names, choice, origin.setting, settings.cache_dir, report, is_text)


def refuse_caches(paths: list[str], setting: str) -> None:
    """Check that no path of data is a token cache.

    Raises:
        DataError: one is.
    """
    for path in paths:
        if has_examples(Path(path)):
            problem = f"{setting}: {path}: is already a token cache"
            raise DataError(problem, hint="prepare reads conversations; give the cache to train")


def count_rows(settings: PrepareSettings, base: Path) -> int:
    """Count the base's embedding rows; raise if the base isn't a supported model."""
    return find_architecture(read_config(base), base, settings.family).dimensions.num_rows


def choose_vocabulary(
    settings: PrepareSettings, base: Path, source: Path | None, sample: Iterator[Conversation]
) -> ExtendedTokenizer:
    """Take the tokenizer of `source`, or extend the base's with what the sample of conversations needs."""
    if source is None:
        num_rows = count_rows(settings, base)
        return extend_tokenizer(load_tokenizer(base), settings.add_tokens, num_rows, sample)
    return take_vocabulary(source, base)


def take_vocabulary(source: Path, base: Path) -> ExtendedTokenizer:
    """Take the tokenizer of a cache, an adapter or a checkpoint, which extends the base's."""
    tokenizer = load_tokenizer(find_tokenizer_folder(source))
    vocabulary = tokenizer.get_vocab()
    added = sorted(vocabulary.keys() - load_tokenizer(base).get_vocab().keys(), key=vocabulary.__getitem__)
    return ExtendedTokenizer(tokenizer, added, [])


def _describe_inputs(
    settings: PrepareSettings,
    files: list[Path],
    encodings: Mapping[Path, str],
    tokenizer: Tokenizer,
    template: Template,
) -> dict[str, Any]:
    """Describe everything that the cache depends on: the same inputs give the same bytes."""
    vocabulary = tokenizer.backend.to_str() if tokenizer.backend is not None else "bytes"
    chosen = {name: getattr(settings, name) for name in select_settings(PrepareSettings, Affects.CACHE)}
    return {
        # standard input can't be hashed before it is read, so a cache of it is never up to date
        "data": [
            {
                "file": file.name,
                "sha256": hash_file(file) if file != STDIN else None,
                **({"encoding": encodings[file]} if file in encodings else {}),
            }
            for file in files
        ],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": template.hash,
        **chosen,
    }
