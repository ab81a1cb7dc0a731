"""`t5tune trim`: write a smaller base, with the tokens that the data needs and their embedding rows.

    result = trim(TrimSettings(model_name_or_path="google/mt5-base", data_path="chats.jsonl", output_dir="mt5-trimmed"))
    result.checkpoint, result.rows

Each row of the new embedding and head is a row of the base, so the logits of kept tokens keep their bits. Streams the
weights: all other tensors are copied unchanged, and only a few rows are in memory at a time.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.checkpoints.adapter_folder import is_adapter
from t5tune.checkpoints.base import find_base, open_base, pin_base, read_config
from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.fingerprint import compute_fingerprint
from t5tune.checkpoints.model_folder import convert_token_ids, copy_supporting_files, write_config
from t5tune.checkpoints.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_FILES,
    read_supporting_files,
    write_added_tokens,
)
from t5tune.checkpoints.training_data import read_label_task, read_training_data
from t5tune.data.caches.batching import Integers
from t5tune.data.caches.prepared import has_examples, open_examples, read_datasets
from t5tune.data.labels import LabelTask
from t5tune.data.reading.files import find_data_suffix
from t5tune.data.tokens.chat_template import write_chat_template
from t5tune.data.tokens.tokenizer import load_tokenizer, read_sentencepiece, save_tokenizer
from t5tune.data.tokens.trimming import TrimmableVocabulary
from t5tune.errors import ModelError, SettingsError
from t5tune.families import FAMILIES, find_family
from t5tune.families.encoder import Encoder
from t5tune.file_names import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    SENTENCEPIECE_FILES,
    TEMPLATE_FILE,
    TEXT_SUFFIXES,
    TOKENIZER_CONFIG_FILE,
    TRIM_FILE,
)
from t5tune.formatting import format_parameters
from t5tune.io.atomic import (
    check_free_space,
    check_overwrite,
    check_replaceable,
    make_scratch_folder,
    write_file,
    write_folder_atomically,
    write_json,
)
from t5tune.io.untrusted import has_file, read_json_object
from t5tune.merging.shards import plan_shards, write_shards
from t5tune.preparing.dataset import check_cache_tokenizer
from t5tune.preparing.datasets import prepare_datasets
from t5tune.preparing.plan import Origin, PreparePlan
from t5tune.preparing.record_checks import name_rejected_file
from t5tune.preparing.resolve_datasets import resolve_datasets
from t5tune.progress import Note, Report, count_done, silent, without_folder
from t5tune.settings import TrimSettings, write_settings
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_list import DatasetSettings
from t5tune.settings.dataset_spec import list_shared
from t5tune.settings.groups.base import BaseModelSettings
from t5tune.settings.groups.data import SplitSettings

MULTIPLE = 128  # of the number of rows, for fast matrix products
NUM_SPARE_ROWS = 28  # for the tokens that prepare adds; T5 has the same number of unused rows


@dataclass(frozen=True)
class TrimResult:
    """The trimmed base, and its sizes before and after.

    Args:
        rows: of the embedding.
        kept_share: share of the data's tokens that are kept, from 0 to 1.
    """

    checkpoint: Path
    tokens: int
    rows: int
    parameters: int
    kept_share: float
    base_tokens: int
    base_rows: int
    base_parameters: int
    seconds: float

    def __str__(self) -> str:
        share = math.floor(self.kept_share * 1e4) / 1e4  # 100% only if all are kept
        before, after = map(format_parameters, (self.base_parameters, self.parameters))
        return (
            f"tokens {self.base_tokens:,} → {self.tokens:,} · rows {self.base_rows:,} → {self.rows:,} · "
            f"{share * 100:.4g}% of your data's tokens kept · {before} → {after} parameters"
        )


def trim(settings: TrimSettings, report: Report = silent) -> TrimResult:
    """Write the trimmed base to `output_dir`.

    Raises:
        ModelError, CheckpointError: the base can't be used, or its vocabulary can't be cut.
        DataError: the data can't be used, or a token cache was prepared with a different tokenizer.
        SettingsError: vocab_size is too small or too large, or the data needs all rows.
    """
    started = time.monotonic()
    output, name = settings.output_dir, settings.model_name_or_path
    settings, folder = _find_base(settings, report)
    vocabulary = _open_vocabulary(folder, name)
    task = read_label_task(folder)
    base = open_base(folder, settings.family, task)
    base.check_tensors()
    base.check_copies()
    num_rows = base.architecture.dimensions.num_rows
    names = _list_row_tensors(base)
    if (last := max(vocabulary.ids)) >= num_rows:
        problem = f"{folder}: its tokenizer has a token {last:,}, but the embedding has only {num_rows:,} rows"
        raise ModelError(problem, hint="copy the tokenizer's files from the published model")
    named = _list_named_ids(base, folder, settings.family, task)
    required = vocabulary.list_required(named)
    num_spare = max(NUM_SPARE_ROWS, len({*range(num_rows)}.intersection(named) - vocabulary.ids))
    limit = _find_limit(settings.vocab_size, len(required), num_spare, num_rows)
    counts = _count_ids(settings, folder, num_rows, report)
    used = vocabulary.ids.intersection(np.flatnonzero(counts).tolist())
    if limit is None:
        limit = _round_up(len(vocabulary.add_parts(required | used)) + num_spare)
        if limit > num_rows:
            problem = f"data_path: needs {len(used):,} of the {len(vocabulary.ids):,} tokens, so no row can go"
            raise SettingsError(problem, hint="give a smaller --vocab-size, which leaves out the rarest tokens")
    ranked = sorted(vocabulary.ids, key=lambda index: (-counts[index], index))
    kept = vocabulary.fill(required, ranked, limit - num_spare)
    rows = _choose_rows(kept, vocabulary.ids, named, num_rows)[:limit]
    trimmed = base.select_rows(names, rows)
    with write_folder_atomically(output, settings.overwrite) as staged:
        _write_weights(trimmed, output, staged, report)
        write_config(folder, staged, base.is_tied(), None, settings.family, task)
        _write_tokenizer(vocabulary, kept, folder, staged)
        _convert_configs(staged, settings.family, rows)
        origin = {"base": name, "revision": settings.revision, "fingerprint": compute_fingerprint(base)}
        facts = {**origin, "base_rows": num_rows, "tokens": len(kept), "rows": rows.tolist()}
        write_file(staged / TRIM_FILE, json.dumps(facts).encode())
        write_settings(staged, settings)
    result = TrimResult(
        checkpoint=output,
        tokens=len(kept),
        rows=len(rows),
        parameters=_count_parameters(trimmed),
        kept_share=float(counts[kept].sum() / max(counts[[*used]].sum(), 1)),
        base_tokens=len(vocabulary.ids),
        base_rows=num_rows,
        base_parameters=_count_parameters(base),
        seconds=round(time.monotonic() - started, 3),
    )
    report(Note(str(result)))
    return result


def _find_base(settings: TrimSettings, report: Report) -> tuple[TrimSettings, Path]:
    """Find the folder of the base, and pin its revision. Check that the output doesn't replace an input."""
    output, name = settings.output_dir, settings.model_name_or_path
    check_replaceable(output, settings.overwrite, [name, *settings.data_path])
    if is_adapter(Path(name)):
        hint = "merge it first, then trim the merged checkpoint"
        raise ModelError(f"{name}: is an adapter", hint, setting="model_name_or_path")
    settings = pin_base(settings, report)
    folder = find_base(settings, report=report)
    if settings.overwrite:
        check_overwrite(output, [folder])
    return settings, folder


def _list_named_ids(base: Checkpoint, folder: Path, family: str | None, task: LabelTask | None) -> list[int]:
    """List the ids of tokens that the configs name, which must stay."""
    named = [] if task else [base.architecture.start_token_id]  # raises if no command can generate with it
    for file, config in _read_configs(folder, family).items():
        convert_token_ids(config, named.append, folder / file)
    return named


def _list_row_tensors(base: Checkpoint) -> list[str]:
    """List the tensors with a row for each token: the embeddings, and the head."""
    architecture = base.architecture
    kinds = ("embedding",) if isinstance(architecture, Encoder) else ("embedding", "head")  # not a head of labels
    names = [name for name in base.list_names() if architecture.classify(name) in kinds]
    return [name for name in names if len(base.get_dtype_and_shape(name)[1]) > 1]  # an image's embedding is one row


def _open_vocabulary(folder: Path, name: str) -> TrimmableVocabulary:
    tokenizer = load_tokenizer(folder)
    if tokenizer.backend is None:
        problem = f"{name}: its tokens are bytes; there is nothing to trim"
        raise ModelError(problem, setting="model_name_or_path")
    file = next((file for file in SENTENCEPIECE_FILES if has_file(folder, file)), None)
    return TrimmableVocabulary(tokenizer, file and read_sentencepiece(folder / file))


def _read_configs(folder: Path, family: str | None) -> dict[str, dict[str, Any]]:
    """Read config.json, with the ids that it leaves out, and generation_config.json, if there is one."""
    config = read_config(folder)
    defaults = find_family(config, folder, family).architecture.default_config
    configs = {CONFIG_FILE: config | {key: id for key, id in defaults.items() if config.get(key) is None}}
    if has_file(folder, GENERATION_CONFIG_FILE):
        configs[GENERATION_CONFIG_FILE] = read_json_object(folder, GENERATION_CONFIG_FILE)
    return configs


def _round_up(count: int) -> int:
    rounded = -(-count // MULTIPLE) * MULTIPLE
    return rounded + MULTIPLE * (rounded == FAMILIES["byt5"].num_rows)  # means ByT5 in a config.json


def _find_limit(vocab_size: int | None, num_required: int, num_spare: int, num_rows: int) -> int | None:
    """Round vocab_size up, and check that it isn't too small or too large; None: the data decides."""
    if vocab_size is None:
        return None
    rounded = _round_up(vocab_size)
    if rounded > num_rows:
        problem = f"vocab_size: {vocab_size}: the base has only {num_rows:,} rows"
        raise SettingsError(problem, hint=f"use at most {num_rows // MULTIPLE * MULTIPLE:,}, or leave it out")
    if rounded < (needed := num_required + num_spare):
        must = f"{num_required:,} tokens must stay (characters, bytes, special tokens), and {num_spare} spare rows"
        raise SettingsError(f"vocab_size: {vocab_size}: {must}", hint=f"use at least {needed:,}, or leave it out")
    return rounded


def _list_datasets(settings: TrimSettings) -> Iterator[DatasetSettings]:
    """Yield the datasets, with text files as raw text, unless the settings say how to read them."""
    for dataset in settings.list_datasets():
        given = {"objective", "pair_lines"} & (dataset.model_fields_set | settings.model_fields_set)
        texts = [] if given else [path for path in dataset.path if find_data_suffix(Path(path), True) in TEXT_SUFFIXES]
        others = [path for path in dataset.path if path not in texts]
        if settings.data is None and len(others) == 1 and has_examples(Path(others[0])):
            yield from read_datasets(Path(others[0]))[0]
        elif others:
            yield dataset.model_copy(update={"path": others})
        if texts:
            name = None if others else dataset.name
            yield dataset.model_copy(update={"path": texts, "name": name, "objective": "span-corruption"})


def _count_ids(settings: TrimSettings, folder: Path, num_rows: int, report: Report) -> Integers:
    """Count how often each id of the base occurs in the data, encoded as prepare does, or in token caches."""
    given = settings.model_fields_set & {*select_settings(TrimSettings, Affects.CACHE), "conversation_template"}
    made = read_training_data(folder)  # of a merged model
    specs = resolve_datasets(
        [*_list_datasets(settings)],
        list_shared(settings),
        setting="data_path" if settings.data is None else "data",
        recorded=made and replace(made, datasets=[]),  # whose templates the checkpoint doesn't have
        must_match={name: getattr(settings, name) for name in given},
        report=report,
    )
    for cache in (spec.cache for spec in specs if spec.cache is not None):
        check_cache_tokenizer(cache, folder)
    if not any(spec.weight for spec in specs):
        raise SettingsError("data: every weight is 0, so there are no tokens to count")
    specs = tuple(spec.model_copy(update={"weight": 1.0}) for spec in specs if spec.weight)  # each text counts once
    output = settings.output_dir
    with make_scratch_folder(Path(os.path.realpath(output))) as scratch:
        data = scratch / "prepared" / "data"  # prepare locks its parent, and `scratch` is locked
        plan = PreparePlan(
            specs,
            settings.select_part(BaseModelSettings),
            data,
            SplitSettings(),
            settings.add_tokens,
            origin=Origin(rejected_file=name_rejected_file(output), run=scratch),  # without the mixing notes
            num_spare_rows=NUM_SPARE_ROWS,
        )
        prepare_datasets(plan, without_folder(report, scratch))
        caches = [dataset.cache for dataset in open_examples(data).datasets]
        counts = np.zeros(num_rows, np.int64)
        for ids in chain.from_iterable(cache.iterate_ids() for cache in caches):
            np.add.at(counts, ids[ids < num_rows], 1)
        return counts


def _choose_rows(kept: list[int], tokens: set[int], named: Iterable[int], num_rows: int) -> Integers:
    """List the base's rows in their new order: kept tokens, unused rows (first those that configs name), the rest."""
    unused = sorted({*range(num_rows)} - tokens, key=lambda index: (index not in named, index))
    return np.array([*kept, *unused, *sorted(tokens.difference(kept))], np.int64)


def _count_parameters(base: Checkpoint) -> int:
    """Count the values of all tensors, without copies of a shared tensor."""
    copies = base.architecture.list_shared(base.is_tied())
    names = (name for name in base.list_names() if name not in copies)
    return sum(math.prod(base.get_dtype_and_shape(name)[1]) for name in names)


def _write_weights(trimmed: Checkpoint, output: Path, staged: Path, report: Report) -> None:
    shards = plan_shards(trimmed, None, None)
    check_free_space(output, size := sum(shard.size for shard in shards))
    with count_done("trim", report, size, "bytes") as advance:
        for written in write_shards(trimmed, shards, {}, staged):
            advance(written)


def _write_tokenizer(vocabulary: TrimmableVocabulary, kept: list[int], folder: Path, staged: Path) -> None:
    """Write the cut tokenizer, and copy the conversation template, the training data and the chat templates."""
    tokenizer = vocabulary.cut(kept)
    save_tokenizer(tokenizer, staged)
    if (pieces := vocabulary.cut_sentencepiece(kept)) is not None:
        (staged / SENTENCEPIECE_FILES[0]).write_bytes(pieces.SerializeToString())
        write_added_tokens(staged, len(pieces.pieces))
    config = read_json_object(folder, TOKENIZER_CONFIG_FILE) if has_file(folder, TOKENIZER_CONFIG_FILE) else {}
    if template := config.get("chat_template"):
        write_chat_template(staged, template, tokenizer)
    files = read_supporting_files(folder, folder / TEMPLATE_FILE)
    replaced = TOKENIZER_FILES - {CHAT_TEMPLATE_FILE}
    others = {name: content for name, content in files.items() if name not in replaced}
    copy_supporting_files(folder, others, staged, has_file(folder, GENERATION_CONFIG_FILE))


def _convert_configs(staged: Path, family: str | None, rows: Integers) -> None:
    """Write the configs with the new ids, and the new number of rows, also of encoder and decoder."""
    new_ids = {old: new for new, old in enumerate(rows.tolist())}

    def set_rows(part: dict[str, Any]) -> dict[str, Any]:
        changed = {key: set_rows(value) if isinstance(value, dict) else value for key, value in part.items()}
        return changed | ({"vocab_size": len(rows)} if "vocab_size" in part else {})

    for name, config in _read_configs(staged, family).items():
        converted = convert_token_ids(config, lambda index: new_ids.get(index, index), staged / name)
        write_json(staged / name, set_rows(converted))
