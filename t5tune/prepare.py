"""`t5tune prepare`: conversations -> a token cache.

result = prepare(PrepareSettings(model_name_or_path="pocket", data_path="chats.jsonl", output_dir="cache"))
result.cache, result.examples
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from t5tune import __version__
from t5tune.data.cache import (
    EXAMPLE,
    FORMAT,
    MANIFEST,
    CacheWriter,
    hash_files,
    is_cache,
    lengths_of,
    percentiles,
    read_manifest,
    verify_files,
)
from t5tune.data.encoding import Encoder, encode_batch
from t5tune.data.records import Conversation, Rejected, find_files, read_records
from t5tune.data.templates import Template, find_template, lay_out
from t5tune.data.tokenizer import load_tokenizer, save_tokenizer
from t5tune.data.vocabulary import extend_tokenizer
from t5tune.errors import DataError
from t5tune.progress import Note, Report, silent, track
from t5tune.publish import published_folder, sha256, write_json
from t5tune.settings import PrepareSettings
from t5tune.weights.adapter import TEMPLATE
from t5tune.weights.base import find_base, read_config
from t5tune.weights.pocket import conversations_file
from t5tune.yaml_file import to_yaml

BATCH = 256  # conversations per call of the tokenizer


@dataclass(frozen=True)
class Prepared:
    """What prepare made. Counts are of records, examples and tokens; `truncated_*` counts examples."""

    cache: Path
    conversations: int
    rejected: int
    examples: int
    source_tokens: int
    target_tokens: int
    truncated_sources: int
    truncated_targets: int
    unknown_tokens: int
    added_tokens: int
    up_to_date: bool
    seconds: float


def prepare(settings: PrepareSettings, report: Report = silent) -> Prepared:
    """Write the token cache of the conversations, or leave it be where it is what these inputs give.

    Raises:
        DataError: a file can't be used, or nothing in the data can be trained on.
        ModelError: the base has no usable tokenizer, or too few spare rows for the added tokens.
        SettingsError: there is no such conversation template.
    """
    started = time.monotonic()
    files = find_files([str(conversations_file()) if path == "pocket" else path for path in settings.data_path])
    base = find_base(settings)
    template = find_template(settings.conversation_template, [base / TEMPLATE])
    num_rows = int(read_config(base).get("vocab_size", 0))
    tokenizer, added = extend_tokenizer(load_tokenizer(base), settings.add_tokens, num_rows)
    inputs = _inputs(settings, files, tokenizer, template)

    folder = settings.output_dir
    if is_cache(folder):
        if manifest := _up_to_date(folder, inputs):
            return _result(folder, manifest, True, started)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"output_dir: {folder}: holds something that is no token cache", hint="name another folder")

    with published_folder(folder) as staged:
        counts = _write(staged, files, settings, template, Encoder(tokenizer), tokenizer, num_rows, report)
        save_tokenizer(tokenizer, staged / "tokenizer")
        layout = {name: value for name, value in vars(template).items()}
        (staged / "template.yaml").write_text(to_yaml(layout), encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "made_by": f"t5tune {__version__}",
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "added_tokens": added,
            "added_token_ids": tokenizer.convert_tokens_to_ids(added) if added else [],
            "inputs": inputs,
            **counts,
            "files": hash_files(staged),
        }
        write_json(staged / MANIFEST, manifest)
    _tell(manifest, folder, report)
    return _result(folder, manifest, False, started)


def _inputs(settings: PrepareSettings, files: list[Path], tokenizer: Any, template: Template) -> dict[str, Any]:
    """What the cache depends on: if all of this is the same, so is every byte of it."""
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "data": [{"file": file.name, "sha256": sha256(file)} for file in files],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": template.hash,
        "model_max_length": settings.model_max_length,
        "num_data": settings.num_data,
        "add_tokens": settings.add_tokens,
    }


def _up_to_date(folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, where the cache is what the inputs give and none of its files was touched since."""
    try:
        manifest = read_manifest(folder)
        verify_files(folder, manifest["files"])
    except DataError:
        return None
    return manifest if manifest["inputs"] == inputs else None


def _write(
    folder: Path,
    files: list[Path],
    settings: PrepareSettings,
    template: Template,
    encoder: Encoder,
    tokenizer: Any,
    num_rows: int,
    report: Report,
) -> dict[str, Any]:
    """Write tokens, spans and rejected records; return the manifest's counts."""
    rejected: Counter[str] = Counter()
    repaired: Counter[str] = Counter()
    unknown = 0
    with (
        CacheWriter(folder, num_rows) as writer,
        open(folder / "rejected.jsonl", "w", encoding="utf-8") as refused,
    ):

        def accepted() -> Iterator[Conversation]:
            for record in track(read_records(files), "prepare", report, unit="records"):
                if isinstance(record, Rejected):
                    rejected[record.reason] += 1
                    refused.write(json.dumps(vars(record), ensure_ascii=True) + "\n")
                else:
                    repaired.update(dict(record.repairs))
                    yield record

        for batch in _batches(accepted(), BATCH):
            pieces = [lay_out(conversation, template) for conversation in batch]
            for encoded in encode_batch(pieces, encoder, settings.model_max_length):
                unknown += encoded.ids.count(tokenizer.unk_token_id)
                writer.add(encoded)
        accepted_records = writer.num_conversations
    if writer.num_examples == 0:
        reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.most_common())
        raise DataError(
            f"data_path: {', '.join(map(str, files))}: no conversation to train on among "
            f"{accepted_records + rejected.total()} records{f' ({reasons})' if reasons else ''}",
            hint='expected {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}',
        )
    if settings.num_data is not None:
        _keep_first(folder / "examples.bin", settings.num_data)
    rows = np.fromfile(folder / "examples.bin", EXAMPLE)
    sources, targets = lengths_of(rows)
    return {
        "dtype": writer.dtype.str,
        "conversations": accepted_records,
        "rejected": rejected.total(),
        "rejected_by_reason": dict(sorted(rejected.items())),
        "repaired": dict(sorted(repaired.items())),
        "examples": len(rows),
        "source_tokens": int(sources.sum()),
        "target_tokens": int(targets.sum()),
        "truncated_sources": int((~rows["source_is_whole"]).sum()),
        "truncated_targets": int((~rows["target_is_whole"]).sum()),
        "unknown_tokens": unknown,
        "source_length": percentiles(sources),
        "target_length": percentiles(targets),
    }


def _batches(items: Iterable[Conversation], size: int) -> Iterator[list[Conversation]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _keep_first(path: Path, count: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(min(path.stat().st_size, count * EXAMPLE.itemsize))


def _tell(manifest: dict[str, Any], folder: Path, report: Report) -> None:
    """Say what was refused, mended, cut, or can't be written."""
    if manifest["rejected"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in manifest["rejected_by_reason"].items())
        report(Note(f"{manifest['rejected']} records refused ({reasons}): {folder / 'rejected.jsonl'}", True))
    if manifest["repaired"]:
        report(Note("mended: " + ", ".join(f"{kind} {n}" for kind, n in manifest["repaired"].items())))
    for side in ("sources", "targets"):
        if count := manifest[f"truncated_{side}"]:
            limit = manifest["inputs"]["model_max_length"]
            report(Note(f"{count} {side} cut to model_max_length {limit}", True))
    if manifest["unknown_tokens"]:
        report(Note(f"{manifest['unknown_tokens']} tokens are characters that the vocabulary can't write", True))


def _result(folder: Path, manifest: dict[str, Any], up_to_date: bool, started: float) -> Prepared:
    return Prepared(
        cache=folder,
        conversations=manifest["conversations"],
        rejected=manifest["rejected"],
        examples=manifest["examples"],
        source_tokens=manifest["source_tokens"],
        target_tokens=manifest["target_tokens"],
        truncated_sources=manifest["truncated_sources"],
        truncated_targets=manifest["truncated_targets"],
        unknown_tokens=manifest["unknown_tokens"],
        added_tokens=len(manifest["added_tokens"]),
        up_to_date=up_to_date,
        seconds=round(time.monotonic() - started, 3),
    )
