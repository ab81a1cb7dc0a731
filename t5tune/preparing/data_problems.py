"""Report problems of the data; too many rejected records are an error."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5tune.data.labels import sort_names
from t5tune.data.reading.raw_records import KEYED_RECORDS
from t5tune.data.reading.rejections import LABELED_BAD, LEFT_OUT_REASONS, UTF8_HINT, RecordLocation
from t5tune.data.tokens.templates import DEFAULT_TEMPLATE, PAIR_TEMPLATE, Template, load_template
from t5tune.data.tokens.vocabulary import REPLACEMENT_CHARACTER
from t5tune.errors import DataError
from t5tune.families import FAMILIES
from t5tune.file_names import REJECTED_FILE
from t5tune.formatting import format_count, shorten
from t5tune.io.reasons import MAX_NAMES, join_first
from t5tune.label_metrics import describe_similar_labels, find_similar_labels
from t5tune.preparing.counts import OTHER_FIELDS, RecordCounts
from t5tune.progress import Note, Report

LABELED_BAD_TEXT = "labeled bad (label: false, kto_tag: false)"
# kind of repair in the manifest -> singular, plural
REPAIRS = {
    KEYED_RECORDS: ("record keyed by id", "records keyed by id"),
    "byte_order_mark": ("byte order mark", "byte order marks"),
    "carriage_returns": ("carriage return", "carriage returns"),
    "zero_width_characters": ("zero-width character", "zero-width characters"),
    "blank_turns": ("blank turn", "blank turns"),
    "leading_assistant_turns": ("answer before the first question", "answers before the first question"),
    "trailing_human_turns": ("question without an answer", "questions without an answer"),
    "merged_same_role_turns": ("turn merged with the turn before", "turns merged with the turn before"),
    "merged_turns_not_learned": ("merged turn that isn't learned", "merged turns that aren't learned"),
    "last_answers_replaced_by_chosen": ("last answer replaced by chosen", "last answers replaced by chosen"),
    "split_conversations": ("conversation split", "conversations split"),
    "tool_calls_as_text": ("turn with tool calls as text", "turns with tool calls as text"),
    "null_arguments_left_out": ("null argument of tool calls left out", "null arguments of tool calls left out"),
    "weights_taken_as_1": ("weight taken as 1", "weights taken as 1"),
    "html_turns": ("turn converted from HTML", "turns converted from HTML"),
    "html_turns_left_alone": ("turn of HTML that can't be converted", "turns of HTML that can't be converted"),
    "html_entities": ("HTML entity", "HTML entities"),
    "markdown_escapes": ("backslash of Markdown", "backslashes of Markdown"),
    OTHER_FIELDS: ("other unused field", "other unused fields"),
}
# prefix of kinds in the manifest -> owner of the unused field, and its kind
UNUSED = {
    "ignored_field_": ("record", "column"),
    "ignored_turn_field_": ("turn", "key"),
    "ignored_part_": ("turn", "part of type"),
}
DROPPED = {
    "texts_without_labels": ("text whose words with labels are cut off", "texts whose words with labels are cut off"),
    "zero_weight_targets": ("target of weight 0", "targets of weight 0"),
    "short_texts": ("text of a single token", "texts of a single token"),
    "same_answers": ("pair whose answers have the same tokens", "pairs whose answers have the same tokens"),
    "short_targets": ("target shorter than min_target_tokens", "targets shorter than min_target_tokens"),
    "truncated_targets": ("target longer than model_max_length", "targets longer than model_max_length"),
}

MAX_NUMBERED_CLASSES = 1000  # more classes that are all numbers are probably numbers to predict
MIN_RARE_CLASSES, MAX_LABEL = 10, 40
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
MAX_UNKNOWN_FRACTION = 0.01  # of tokens that the vocabulary lacks; more of them get a warning
PROTEIN_UNKNOWN_FRACTION = 0.2  # of sources' tokens; words of a text have fewer, but each protein is an unknown word


class RejectedRecordsError(DataError):
    """Too many records are rejected; the caller keeps the file that lists them."""

    kind = DataError.__name__


def check_rejected(
    rejected: Counter[str], num_records: int, allowed: float | None, data: str, file: Path, first: str | None = None
) -> None:
    """Check that at most the fraction `allowed` of the records is rejected.

    Args:
        data: the setting and its files, for the message.
        file: lists the rejected records.
        first: the first of them, for the hint.

    Raises:
        RejectedRecordsError: more are rejected.
    """
    if allowed is None:
        return
    left_out = count_left_out(rejected)
    # in a KTO dataset half of the records are labeled bad, which doesn't mean that the records are broken
    broken = Counter({reason: count for reason, count in rejected.items() if reason not in LEFT_OUT_REASONS})
    count, num_records = broken.total(), num_records - left_out
    if count > allowed * num_records:
        problem = f"{count:,} of {format_count(num_records, 'record')} rejected ({_format_counts(broken)})"
        not_counted = f"; {left_out:,} more are left out on purpose" if left_out else ""
        hint = f"all are in {file}, with the reasons; correct the data, or allow it with --max-rejected-fraction 1"
        raise RejectedRecordsError(
            f"{data}: {problem}, more than max_rejected_fraction {allowed}{not_counted}",
            hint=f"{first}; {hint}" if first else hint,
        )


def count_left_out(rejected: Mapping[str, int]) -> int:
    """Count the records that are left out on purpose."""
    return sum(rejected.get(reason, 0) for reason in LEFT_OUT_REASONS)


def check_any_used(data: str, files: list[str], counts: RecordCounts, purpose: str) -> None:
    """Check that at least one of the files that a path leads to has a conversation.

    Args:
        purpose: `train on` or `evaluate on`.
    """
    if any(counts.usable[name] for name in files):
        return
    bad = sum(counts.labeled_bad[name] for name in files)
    hint = _format_all_bad(bad) if bad else "it contains no records"
    if rejected := [counts.first_rejected[name] for name in files if name in counts.first_rejected]:
        hint = f"the first rejected record: {rejected[0]}"
    raise DataError(f"{data}: contains nothing to {purpose}", hint=hint)


def check_any_example(data: str, counts: RecordCounts, purpose: str, file: Path) -> None:
    """Check that there is an example.

    Args:
        purpose: `train on` or `evaluate on`.
        file: lists the rejected records.
    """
    if counts.num_examples:
        return
    if counts.num_records and counts.rejected[LABELED_BAD] == counts.num_records:
        hint = "add records labeled good (label: true, kto_tag: true), or rename the key if it means something else"
        problem = f"{data}: {_format_all_bad(counts.num_records)}, so there is nothing to {purpose}"
        raise DataError(problem, hint=hint)
    if counts.dropped["texts_without_labels"]:
        hint = "every label is of a word that model_max_length cuts off, or of a blank word"
    elif counts.dropped["short_texts"]:
        hint = "every text is a single token, and at least two are needed to mask one"
    elif counts.dropped:
        hint = "every target was dropped by min_target_tokens or drop_truncated_targets"
    elif counts.first_rejected:
        hint = f"{format_first_rejected(counts)}; all are in {file}"
    else:
        hint = "the data is empty; " if not counts.num_records else ""
        hint += 'expected {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}'
    dropped = _format_counts(counts.rejected + counts.dropped)
    among = format_count(counts.num_records, "record") + (f" ({dropped})" if dropped else "")
    kind = RejectedRecordsError if counts.first_rejected else DataError
    raise kind(f"{data}: nothing to {purpose} among {among}", hint=hint)


def make_mixed_data_error(location: RecordLocation, num_pairs: int) -> DataError:
    """Make the error for a conversation after many pairs: the template of pairs was already chosen."""
    return DataError(
        f"{location}: a conversation, after {format_count(num_pairs, 'source/target pair')}",
        hint=f"choose one template for both: --conversation-template {DEFAULT_TEMPLATE} or {PAIR_TEMPLATE}",
    )


def report_default_template(name: str, num_pairs: int, among: str, report: Report) -> None:
    """Report the conversation template that was chosen by the data, unless the data is only conversations.

    Args:
        among: how many there are in all, such as `5 records`.
    """
    if num_pairs == 0:
        return
    what = "the data is" if name == PAIR_TEMPLATE else f"{num_pairs:,} of {among} are"
    text = f"conversation template {name}: {what} source/target pairs"
    report(Note(f"{text}; --conversation-template chooses a different template"))


def report_models_template(template: Template, report: Report) -> None:
    """Report that source/target pairs get the model's own template, if it adds anything to them."""
    if template == load_template(PAIR_TEMPLATE):
        return
    advice = f"--conversation-template {PAIR_TEMPLATE} passes only the source"
    report(Note(f"conversation template: the model's own; {advice}"))


def report_problems(manifest: dict[str, Any], folder: Path, report: Report) -> None:
    """Report rejected, repaired, dropped and truncated records, and characters that can't be encoded.

    Args:
        manifest: of the token cache in `folder`.
    """
    _report_rejections(manifest, folder, report)
    if (prefix := manifest["inputs"]["source_prefix"]) and not manifest["conversations_with_prefix"]:
        report(Note(f"source_prefix: {prefix!r} has no effect: no record is a source/target pair", True))
    if unused := manifest["unused_files"]:
        report(Note(f"nothing to train on in {join_first(unused)}", True))
    _report_repairs(manifest["repaired"], report)
    left_out = {name: count for name, count in manifest["dropped"].items() if name in DROPPED}
    if dropped := _format_named_counts(left_out, DROPPED):
        report(Note(f"examples left out: {dropped}"))
    for side in ("source", "target"):
        if count := manifest[f"truncated_{side}s"]:
            limit = manifest["inputs"]["model_max_length"]
            shown_by = f"t5tune inspect {folder} --worst-cut shows the worst"
            report(Note(f"{format_count(count, side)} truncated to model_max_length {limit}; {shown_by}", True))
    add_tokens, left_out = manifest["inputs"]["add_tokens"], manifest["left_out_tokens"]
    is_list = add_tokens not in (["auto"], ["none"], ["fastchat"])
    advice = "; to keep them, list them in add_tokens" if is_list else ""
    _report_lost_characters(manifest["lost_characters"], advice, report)
    unknown, count = manifest["unknown_tokens"], manifest["source_tokens"] + manifest["target_tokens"]
    if (labels := manifest.get("labels")) is not None:
        _report_labels(labels, manifest, report)
    elif unknown > MAX_UNKNOWN_FRACTION * count:
        problem = f"{unknown:,} of {count:,} tokens ({unknown / count:.0%}) are unknown to the vocabulary"
        advice = (
            "mT5's vocabulary covers most scripts, and ByT5 reads any text; t5tune inspect --unknown shows an example"
        )
        report(Note(f"{problem}; {advice}", True))
    if (
        add_tokens == ["auto"]
        and labels is None
        and not (manifest["added_tokens"] or left_out or manifest["lost_characters"])
    ):
        report(Note("no tokens added: the base's tokenizer writes every character of the targets"))
    if left_out:
        report(Note(_format_left_out(left_out, len(manifest["added_tokens"])), True))


def _report_labels(labels: Mapping[str, Any], manifest: dict[str, Any], report: Report) -> None:
    """Report the labels, how many of them were lost, and sources that the vocabulary can't write."""
    names, dropped, inputs = sort_names(labels["names"]), manifest["dropped"], manifest["inputs"]
    if names:
        shown = [shorten(name, MAX_LABEL) for name in (labels["names"] if labels["is_ordered"] else names)]
        report(Note(f"{format_count(len(names), 'label')}: {join_first(shown)}"))
    are_rare = len(names) > max(MIN_RARE_CLASSES, manifest["examples"] // 2)
    if (are_rare or len(names) > MAX_NUMBERED_CLASSES) and all(map(_NUMBER.fullmatch, names)):
        problem = f"the labels are {len(names):,} different numbers, each a class"
        report(Note(f"{problem}; to predict numbers, use --objective regress", True))
    elif are_rare:
        problem = f"{len(names):,} labels in {format_count(manifest['examples'], 'example')}: most are rare"
        is_word = inputs["objective"] == "tag" and inputs["source_words"] == "text"
        advice = "; for a label per character, set source_words: characters or residues" if is_word else ""
        report(Note(f"{problem}{advice}", True))
    if groups := find_similar_labels(names):
        report(Note(describe_similar_labels(groups), True))
    if lost := dropped.get("truncated_labels"):
        problem = f"{format_count(lost, 'label')} cut off by model_max_length {inputs['model_max_length']}"
        report(Note(f"{problem}; they aren't learned", True))
    if lost := dropped.get("blank_words"):
        report(
            Note(f"{format_count(lost, 'label')} of words without a token, such as spaces; they aren't learned", True)
        )
    if count := manifest["with_unknown_tokens"]:
        has = "has" if count == 1 else "have"
        problem = f"{count:,} of {format_count(manifest['conversations'], 'source')} {has} unknown tokens"
        advice = "t5tune inspect --unknown shows an example"
        may_be_proteins = manifest["unknown_tokens"] > PROTEIN_UNKNOWN_FRACTION * manifest["source_tokens"]
        if may_be_proteins and inputs["source_words"] != "residues":
            advice += ", and for proteins, set source_words: residues"
        report(Note(f"{problem}; {advice}", True))


def _format_left_out(tokens: list[str], num_rows: int) -> str:
    """Format the tokens that exceed the base's `num_rows` unused embedding rows, and name models with more rows."""
    more = [f"{each.name} ({each.num_unused_rows})" for each in FAMILIES.values() if each.num_unused_rows > num_rows]
    problem = f"only {format_count(num_rows, 'unused embedding row')}, so there is no token for "
    advice = f"models with more rows: {', '.join(more)}; " if more else ""
    return f"{problem}{join_first(list(map(repr, tokens)))}; {advice}mT5 and ByT5 write every character"


def _report_rejections(manifest: dict[str, Any], folder: Path, report: Report) -> None:
    reasons = Counter(manifest["rejected_by_reason"])
    if bad := reasons.pop(LABELED_BAD, 0):
        left_out = f"{format_count(bad, 'record')} {LABELED_BAD_TEXT} left out of supervised training"
        report(Note(f"{left_out}: {folder / REJECTED_FILE}", True))
    if reasons:
        rejected = f"{format_count(reasons.total(), 'record')} rejected ({_format_counts(reasons)})"
        hint = f"; {UTF8_HINT}" if reasons["invalid_utf8"] else ""
        report(Note(f"{rejected}: {folder / REJECTED_FILE}{hint}", True))


def _report_repairs(repaired: Mapping[str, int], report: Report) -> None:
    unused: dict[str, dict[str, int]] = {prefix: {} for prefix in UNUSED}
    repairs: dict[str, int] = {}
    for kind, count in repaired.items():
        prefix = next((prefix for prefix in UNUSED if kind.startswith(prefix)), None)
        if prefix is None:
            repairs[kind] = count
        else:
            unused[prefix][kind.removeprefix(prefix)] = count
    if cleaned := _format_named_counts(repairs, REPAIRS):
        report(Note(f"cleaned up: {cleaned}"))
    for prefix, (owner, what) in UNUSED.items():
        if unused[prefix]:
            report(Note(_format_unused(unused[prefix], owner, what)))


def _format_unused(counts: Mapping[str, int], owner: str, what: str) -> str:
    """Format unused fields, grouped by the number of owners: `160 records: unused columns ID, section_header`."""
    names: dict[int, list[str]] = {}
    for name, count in counts.items():
        names.setdefault(count, []).append(name)
    groups = sorted(names.items(), reverse=True)
    return "; ".join(
        f"{format_count(count, owner)}: unused {what if len(of_count) == 1 else f'{what}s'} {join_first(of_count)}"
        for count, of_count in groups[:MAX_NAMES]
    ) + (f"; and {sum(len(of_count) for _, of_count in groups[MAX_NAMES:])} more" if len(groups) > MAX_NAMES else "")


def _format_named_counts(counts: Mapping[str, int], names: Mapping[str, tuple[str, str]]) -> str:
    return ", ".join(format_count(count, *names[kind]) for kind, count in Counter(counts).most_common())


def _report_lost_characters(lost: list[dict[str, Any]], advice: str, report: Report) -> None:
    missing = [item for item in lost if item["becomes"] == REPLACEMENT_CHARACTER]
    if missing:
        characters = [f"{item['text']!r} ({format_count(item['answers'], 'target')})" for item in missing]
        report(Note(f"not in the vocabulary: {join_first(characters)}{advice}", True))
    if changed := [item for item in lost if item not in missing]:
        characters = [f"{item['text']!r} in {format_count(item['answers'], 'target')}" for item in changed]
        report(Note(f"the tokenizer changes {join_first(characters)}{advice}", True))


def format_first_rejected(counts: RecordCounts) -> str:
    """Format the first rejected record for a hint."""
    return f"the first rejected record: {next(iter(counts.first_rejected.values()), None)}"


def _format_all_bad(count: int) -> str:
    return f"its only record is {LABELED_BAD_TEXT}" if count == 1 else f"all {count:,} records are {LABELED_BAD_TEXT}"


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in Counter(counts).most_common())
