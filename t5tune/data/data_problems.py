"""Problems of the data that a token cache is made from: too many are an error, the others are reported."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5tune.data.records import LABELED_BAD
from t5tune.data.vocabulary import REPLACEMENT_CHARACTER
from t5tune.data.writer import REJECTED_FILE, CacheWriter
from t5tune.errors import DataError
from t5tune.io.reasons import join_first
from t5tune.progress import Note, Report

LABELED_BAD_TEXT = "labeled bad (label: false, kto_tag: false)"


def check_rejected(rejected: Counter[str], num_records: int, allowed: float | None, data: str, hint: str) -> None:
    """Check that not more than the fraction `allowed` of the records is rejected.

    Args:
        data: the setting and its files, for the message.

    Raises:
        DataError: more are rejected.
    """
    if allowed is None:
        return
    bad = rejected[LABELED_BAD]
    # in a KTO dataset half of the records are labeled bad, which doesn't mean that the records are broken
    broken = Counter({reason: count for reason, count in rejected.items() if reason != LABELED_BAD})
    count, num_records = broken.total(), num_records - bad
    if count > allowed * num_records:
        problem = f"{count} of {num_records} records rejected ({_format_counts(broken)})"
        not_counted = f"; {bad} more are labeled bad and not counted" if bad else ""
        raise DataError(f"{data}: {problem}, more than max_rejected_fraction {allowed}{not_counted}", hint=hint)


def check_any_used(data: str, files: list[str], writer: CacheWriter) -> None:
    """Check that at least one of the files, which one path led to, has a conversation; single files may have none.

    Raises:
        DataError: none has.
    """
    if any(writer.usable[name] for name in files):
        return
    bad = sum(writer.labeled_bad[name] for name in files)
    hint = _format_all_bad(bad) if bad else "it contains no record"
    if rejected := [writer.first_rejected[name] for name in files if name in writer.first_rejected]:
        hint = f"the first rejected record: {rejected[0]}"
    raise DataError(f"{data}: contains no conversation to train on", hint=hint)


def check_any_example(data: str, writer: CacheWriter) -> None:
    """Check that there is an example.

    Raises:
        DataError: there is none.
    """
    if writer.num_examples:
        return
    if writer.num_records and writer.rejected[LABELED_BAD] == writer.num_records:
        hint = "add records labeled good (label: true, kto_tag: true), or rename the key if it means something else"
        problem = f"{data}: {_format_all_bad(writer.num_records)}, so there is nothing to train on"
        raise DataError(problem, hint=hint)
    if writer.dropped:
        hint = "every target was dropped by min_target_tokens or drop_truncated_targets"
    elif writer.first_rejected:
        hint = format_first_rejected(writer)
    else:
        hint = "the data is empty; " if not writer.num_records else ""
        hint += 'expected {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}'
    dropped = _format_counts(writer.rejected + writer.dropped)
    among = _format_number(writer.num_records, "record") + (f" ({dropped})" if dropped else "")
    raise DataError(f"{data}: no conversation to train on among {among}", hint=hint)


def report_problems(manifest: dict[str, Any], folder: Path, report: Report) -> None:
    """Report what was rejected, repaired, left out or truncated, and which characters can't be encoded.

    Args:
        manifest: of the token cache in `folder`.
    """
    _report_rejections(manifest, folder, report)
    if (prefix := manifest["inputs"]["source_prefix"]) and not manifest["conversations_with_prefix"]:
        report(Note(f"source_prefix: {prefix!r} has no effect: no record is a source/target pair", True))
    if unused := manifest["unused_files"]:
        report(Note(f"no conversation to train on in {join_first(unused)}", True))
    for what, key in (("repaired or left out", "repaired"), ("examples left out", "dropped")):
        if counts := manifest[key]:
            report(Note(f"{what}: {_format_counts(counts)}"))
    for side in ("sources", "targets"):
        if count := manifest[f"truncated_{side}"]:
            limit = manifest["inputs"]["model_max_length"]
            shown_by = f"t5tune inspect {folder} --worst-cut shows the worst"
            report(Note(f"{count} {side} truncated to model_max_length {limit}; {shown_by}", True))
    _report_lost_characters(manifest["lost_characters"], report)
    if left_out := manifest["left_out_tokens"]:
        report(Note(f"no unused embedding row is left for the tokens {join_first(list(map(repr, left_out)))}", True))


def _report_rejections(manifest: dict[str, Any], folder: Path, report: Report) -> None:
    reasons = Counter(manifest["rejected_by_reason"])
    if bad := reasons.pop(LABELED_BAD, 0):
        left_out = f"{_format_number(bad, 'record')} {LABELED_BAD_TEXT} left out of supervised training"
        report(Note(f"{left_out}: {folder / REJECTED_FILE}", True))
    if reasons:
        report(Note(f"{reasons.total()} records rejected ({_format_counts(reasons)}): {folder / REJECTED_FILE}", True))


def _report_lost_characters(lost: list[dict[str, Any]], report: Report) -> None:
    for what, is_missing in (("not in the vocabulary", True), ("changed by the tokenizer", False)):
        characters = [
            f"{item['text']!r} (in {_format_number(item['answers'], 'target')})"
            for item in lost
            if (item["becomes"] == REPLACEMENT_CHARACTER) == is_missing
        ]
        if characters:
            report(Note(f"{what}: {join_first(characters)}", True))


def format_first_rejected(writer: CacheWriter) -> str:
    """Format the first rejected record for a hint."""
    return f"the first rejected record: {next(iter(writer.first_rejected.values()), None)}"


def _format_number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _format_all_bad(count: int) -> str:
    return f"its only record is {LABELED_BAD_TEXT}" if count == 1 else f"all {count} records are {LABELED_BAD_TEXT}"


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(counts).most_common())
