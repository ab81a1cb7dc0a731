"""Prepare the token cache of one dataset: find the files, choose the vocabulary and the template, encode, report.

manifest, facts = prepare_dataset(settings, report, Origin())
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from t5tune.checkpoints.base import find_base, read_config
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
from t5tune.file_names import REJECTED_FILE, TEMPLATE_FILE
from t5tune.formatting import format_count
from t5tune.hub.datasets import EVALUATION_SPLITS, DatasetChoice, pin_dataset
from t5tune.io.atomic import hash_file, remove_abandoned, write_folder_atomically
from t5tune.io.reasons import join_first
from t5tune.preparing.cache_files import CacheSource, encode_cache, write_cache
from t5tune.preparing.cache_reuse import find_reusable_manifest
from t5tune.preparing.data_problems import (
    check_rejected,
    report_default_template,
    report_models_template,
    report_problems,
)
from t5tune.preparing.parts.parts import find_parts, join_parts, prepare_part
from t5tune.preparing.parts.shard import find_shard
from t5tune.preparing.record_checks import RecordChecks, keep_rejected, name_rejected_file
from t5tune.preparing.sample import choose_default_template, drain, parse_sample, report_doubtful_headers, take_sample
from t5tune.progress import Note, Report, silent
from t5tune.settings import PrepareSettings
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.records_in_memory import find_records_name


@dataclass(frozen=True)
class Origin:
    """What a token cache takes from elsewhere.

    Args:
        in_use: a run was trained on the existing cache, so a cache of other inputs must not replace it.
        keeps_template: the conversation template of the existing cache is used again, unless the settings name one.
        checkpoint: has that template, if the existing cache may be of other data.
        tokenizer_source: a cache, a mixture or an adapter whose tokenizer and conversation template replace the base's.
        vocabulary: the tokenizer that all datasets of a mixture, or of a run that gets other data, share.
        setting: the setting that the paths come from, for messages.
        is_evaluation: the examples are to evaluate on, so other splits of a dataset on the Hub are the default.
        rejected_file: lists the rejected records if there are too many; default: `cache.rejected.jsonl`, next to it.
        run: the run folder that train prepares for; train mixes datasets and holds out examples itself.
        before_replacing: called before a cache that isn't up to date is replaced, or a new one gets its place.
    """

    in_use: bool = False
    keeps_template: bool = False
    checkpoint: Path | None = None
    tokenizer_source: Path | None = None
    vocabulary: ExtendedTokenizer | None = None
    setting: str = "data_path"
    is_evaluation: bool = False
    rejected_file: Path | None = None
    run: Path | None = None
    before_replacing: Callable[[], None] = lambda: None


def prepare_dataset(settings: PrepareSettings, report: Report, origin: Origin) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write a token cache, or a part of it, unless it is up to date.

    Returns:
        The manifest of the cache or of the part, and what the result says about this call.

    Raises:
        DataError, ModelError, SettingsError: see `prepare`.
    """
    shard = find_shard(settings.shard) if settings.shard is not None else None
    facts: dict[str, Any] = {"up_to_date": False, "shard": None if shard is None else str(shard), "joined": None}
    paths = _bring_data(settings, report, origin)
    files = find_files(paths, report, origin.setting, is_text=settings.is_raw_text)
    stdin = Digest()
    records = read_records(files, settings, stdin)
    sample = take_sample(records)
    base = find_base(settings, report=report)
    encodings = find_encodings(files, settings.encoding, stdin, report)
    report_doubtful_headers(sample, settings, report)
    source = _describe_source(settings, base, paths, files, encodings, stdin, sample, origin)
    folder, data = settings.output_dir, source.checks.data
    _ = source.corruption  # raises if the tokenizer can't have it
    is_divided = shard is not None or settings.join
    if manifest := find_reusable_manifest(folder, source.inputs, origin.in_use, origin.run):
        rejected = Counter(manifest["rejected_by_reason"])
        num_records = manifest["conversations"] + rejected.total()
        check_rejected(rejected, num_records, settings.max_rejected_fraction, data, folder / REJECTED_FILE)
        remove_abandoned(folder)
        if is_divided:
            find_parts(source).remove()
        return manifest, {**facts, "up_to_date": True, "joined": is_divided or None}
    if not is_divided:
        if (parts := find_parts(source)).are_left():
            words = "parts that prepare --shard left; delete the folder if they aren't needed any more"
            report(Note(f"{parts.folder}: {words}"))
        all_records = chain(drain(sample), records)
        with write_folder_atomically(folder) as staged, keep_rejected(staged, source.checks.rejected_file):
            manifest = write_cache(staged, source, lambda staged: encode_cache(staged, source, all_records, report))
            if STDIN in files and STDIN not in encodings:  # its first letters beyond ASCII may come after the sample
                find_encodings([STDIN], settings.encoding, stdin, report)
            origin.before_replacing()
    else:
        sample.clear()  # a part reads its own records
        if shard is not None:
            manifest, is_joined = prepare_part(source, shard, report, origin.before_replacing)
        else:
            manifest, is_joined = join_parts(source, report, origin.before_replacing), True
        facts["joined"] = is_joined
        if not is_joined:
            return manifest, facts
    source.checks.rejected_file.unlink(missing_ok=True)  # of an earlier attempt
    _report_template(source, manifest, report)
    report_problems(manifest, folder, report)
    return manifest, facts


def _describe_source(
    settings: PrepareSettings,
    base: Path,
    paths: list[str],
    files: list[Path],
    encodings: Mapping[Path, str],
    stdin: Digest,
    sample: list[RawRecord],
    origin: Origin,
) -> CacheSource:
    """Choose the vocabulary and the conversation template by the first records."""
    num_rows = count_rows(settings, base)
    vocabulary = origin.vocabulary
    if vocabulary is None:
        vocabulary = choose_vocabulary(settings, base, origin.tokenizer_source, parse_sample(sample, settings))
    # a run is resumed with the template that was the default when it was started
    started_with = (origin.checkpoint or settings.output_dir) if origin.keeps_template else None
    template_folders = (origin.tokenizer_source, base, started_with)
    saved_templates = [each / TEMPLATE_FILE for each in template_folders if each is not None]
    template = find_template(settings.conversation_template, saved_templates)
    default_template = None
    if template is None and settings.is_raw_text:
        template = load_template(PAIR_TEMPLATE)  # raw text has none; this one is for using the model
    if template is None:
        default_template = choose_default_template(sample, files, settings)
        template = load_template(default_template)
    inputs = _describe_inputs(settings, files, encodings, vocabulary.tokenizer, template)
    checks = RecordChecks(
        data=f"{origin.setting}: {join_first(files)}",
        purpose="evaluate on" if origin.is_evaluation else "train on",
        rejected_file=origin.rejected_file or name_rejected_file(settings.output_dir),
        takes_only_pairs=default_template == PAIR_TEMPLATE,
        max_rejected_fraction=settings.max_rejected_fraction,
        num_data=settings.num_data,
    )
    return CacheSource(
        settings, origin.setting, paths, files, stdin, vocabulary, num_rows, template, default_template, inputs, checks
    )


def _report_template(source: CacheSource, manifest: dict[str, Any], report: Report) -> None:
    num_pairs, num_records = manifest["pairs"], manifest["conversations"]
    if source.default_template is not None:
        report_default_template(source.default_template, num_pairs, format_count(num_records, "record"), report)
    elif source.settings.conversation_template is None and source.setting == "data_path" and num_pairs == num_records:
        report_models_template(source.template, report)


def _bring_data(settings: PrepareSettings, report: Report, origin: Origin) -> list[str]:
    """Replace the names of what isn't on this machine by paths; token caches are refused."""
    for path in settings.data_path:
        if has_examples(Path(path)):
            problem = f"{origin.setting}: {path}: is already a token cache"
            raise DataError(problem, hint="prepare reads conversations; give the cache to train")
    names = [str(find_conversations_file()) if path == "pocket" else path for path in settings.data_path]
    if origin.in_use and is_cache(settings.output_dir):  # a resumed run reads what it was started with
        sources = read_manifest(settings.output_dir).get("sources") or []
        names = [pin_dataset(name, sources) if is_dataset_name(name) else name for name in names]
    choice = DatasetChoice(settings.data_subset, settings.data_split)
    if origin.is_evaluation:
        choice = replace(choice, defaults=EVALUATION_SPLITS)
    if origin.setting == "eval_data_path":
        choice = replace(choice, setting="eval_data_split")
    is_text = settings.is_raw_text
    return bring_data(names, choice, origin.setting, settings.cache_dir, report, is_text)


def count_rows(settings: PrepareSettings, base: Path) -> int:
    """Count the base's embedding rows; raise if the base isn't a supported model."""
    return find_architecture(read_config(base), base, settings.family).dimensions.num_rows


def choose_vocabulary(
    settings: PrepareSettings, base: Path, tokenizer_source: Path | None, sample: Iterator[Conversation]
) -> ExtendedTokenizer:
    """Take the tokenizer of `tokenizer_source`, or extend the base's with what the sample of conversations needs."""
    if tokenizer_source is None:
        num_rows = count_rows(settings, base)
        return extend_tokenizer(load_tokenizer(base), settings.add_tokens, num_rows, sample)
    return take_vocabulary(tokenizer_source, base)


def take_vocabulary(source: Path, base: Path) -> ExtendedTokenizer:
    """Take the tokenizer of a cache, a mixture, an adapter or a checkpoint, which extends the base's."""
    tokenizer = load_tokenizer(find_tokenizer_folder(source))
    vocabulary = tokenizer.get_vocab()
    added = sorted(vocabulary.keys() - load_tokenizer(base).get_vocab().keys(), key=vocabulary.__getitem__)
    return ExtendedTokenizer(tokenizer, added, [])


def read_sample(settings: PrepareSettings, origin: Origin) -> Iterator[Conversation]:
    """Read the conversations by which prepare chooses the tokens to add."""
    is_text = settings.is_raw_text
    files = find_files(_bring_data(settings, silent, origin), silent, origin.setting, is_text)
    yield from parse_sample(take_sample(read_records(files, settings)), settings)


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
                "file": find_records_name(file.name) or file.name,
                "sha256": hash_file(file) if file != STDIN else None,
                **({"encoding": encodings[file]} if file in encodings else {}),
            }
            for file in files
        ],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": template.hash,
        **chosen,
    }
