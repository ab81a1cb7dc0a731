"""Problems of the data that a token cache is made from: too many are an error, the others are reported."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5tune.data.records import LABELED_BAD
from t5tune.data.vocabulary import REPLACEMENT_CHARACTER
from t5tune.data.writer import REJECTED_FILE, CacheWriter
from t5tune.errors import DataError
from t5tune.progress import Note, Report

MAX_REPORTED_CHARACTERS = 5  # lost characters in a note
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
        raise DataError(
            f"{data}: {count} of {num_records} records rejected ({_format_counts(broken)}), more than "
            f"max_rejected_fraction {allowed}{f'; {bad} more are labeled bad and not counted' if bad else ''}",
            hint=hint,
        )


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
        raise DataError(
            f"{data}: {_format_all_bad(writer.num_records)}, so there is nothing to train on",
            hint="add records labeled good (label: true, kto_tag: true), or rename the key if it means something else",
        )
    if writer.dropped:
        hint = "every target was dropped by min_target_tokens or drop_truncated_targets"
    elif writer.first_rejected:
        hint = format_first_rejected(writer)
    else:
        hint = "the data is empty; " if not writer.num_records else ""
        hint += 'expected {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}'
    dropped = _format_counts(writer.rejected + writer.dropped)
    among = _format_record_count(writer.num_records) + (f" ({dropped})" if dropped else "")
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
        report(Note(f"no conversation to train on in {format_files(unused)}", True))
    if manifest["repaired"]:
        report(Note("repaired or left out: " + ", ".join(f"{kind} {n}" for kind, n in manifest["repaired"].items())))
    if manifest["dropped"]:
        report(Note("examples left out: " + ", ".join(f"{kind} {n}" for kind, n in manifest["dropped"].items())))
    for side in ("sources", "targets"):
        if count := manifest[f"truncated_{side}"]:
            limit = manifest["inputs"]["model_max_length"]
            shown_by = f"t5tune inspect {folder} --worst-cut shows the worst"
            report(Note(f"{count} {side} truncated to model_max_length {limit}; {shown_by}", True))
    _report_lost_characters(manifest["lost_characters"], report)
    if left_out := manifest["left_out_tokens"]:
        tokens = " ".join(map(repr, left_out[:MAX_REPORTED_CHARACTERS]))
        num_more = len(left_out) - MAX_REPORTED_CHARACTERS
        more = f" and {num_more} more tokens" if num_more > 0 else ""
        report(Note(f"no unused embedding row is left for {tokens}{more}", True))


def _report_rejections(manifest: dict[str, Any], folder: Path, report: Report) -> None:
    reasons = Counter(manifest["rejected_by_reason"])
    if bad := reasons.pop(LABELED_BAD, 0):
        records = f"{_format_record_count(bad)} {LABELED_BAD_TEXT}"
        report(Note(f"{records} left out of supervised training: {folder / REJECTED_FILE}", True))
    if reasons:
        report(Note(f"{reasons.total()} records rejected ({_format_counts(reasons)}): {folder / REJECTED_FILE}", True))


def _report_lost_characters(lost: list[dict[str, Any]], report: Report) -> None:
    for what, chosen in (
        ("not in the vocabulary", [item for item in lost if item["becomes"] == REPLACEMENT_CHARACTER]),
        ("changed by the tokenizer", [item for item in lost if item["becomes"] != REPLACEMENT_CHARACTER]),
    ):
        if chosen:
            worst = ", ".join(map(_format_lost, chosen[:MAX_REPORTED_CHARACTERS]))
            more = ", …" if len(chosen) > MAX_REPORTED_CHARACTERS else ""
            report(Note(f"{what}: {worst}{more}", True))


def _format_lost(item: dict[str, Any]) -> str:
    return f"{item['text']!r} (in {item['answers']} {'target' if item['answers'] == 1 else 'targets'})"


def format_files(files: Sequence[Path | str]) -> str:
    """Format file names for a message: the first three, and the number of the others."""
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def format_first_rejected(writer: CacheWriter) -> str:
    """Format the first rejected record for a hint."""
    return f"the first rejected record: {next(iter(writer.first_rejected.values()), None)}"


def _format_record_count(count: int) -> str:
    return "1 record" if count == 1 else f"{count} records"


def _format_all_bad(count: int) -> str:
    return f"its only record is {LABELED_BAD_TEXT}" if count == 1 else f"all {count} records are {LABELED_BAD_TEXT}"


def _format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
