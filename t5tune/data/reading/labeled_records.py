"""Parse records with labels: a text and its class, its classes or a number, or words and a label for each.

    reading = ReadingSettings(objective="tag", source_words="residues")
    parse_labeled({"sequence": "MKT", "label": "CHH", "mask": "011"}, location, reading).labels
    # TextLabels("MKT", (None, "H", "H"), per_token=True, several=False)

Labels are texts, whole numbers, or true and false. `null`, an empty text, -100 (unless numbers are predicted) and words
whose `mask` is 0 aren't learned. A dataset's ClassLabel (in a Parquet file's metadata) names its numbers.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from t5tune.data.labels import LabelTask, TextLabels
from t5tune.data.reading.cleaning import clean, normalize_text
from t5tune.data.reading.formats import Conversation, Turn, list_keys, suggest_key
from t5tune.data.reading.record_turns import EMPTY_VALUES, UNTYPED_FILE, count_ignored, name_json_type, parse_text
from t5tune.data.reading.rejections import BadCell, RecordLocation, Rejection, RejectionError
from t5tune.formatting import format_count, shorten
from t5tune.settings.groups.record_format import ReadingSettings

TEXT_KEYS, WORD_KEYS = ("text", "sentence", "sequence", "source"), ("tokens", "words")
LABEL_KEYS = {
    "classify": ("label", "labels", "target"),
    "regress": ("score", "label", "labels", "target"),
    "tag": ("ner_tags", "tags", "labels", "label", "target"),
}
MASK_KEY, ZEROS, ONES = "mask", {"0", "0.0", "False"}, {"1", "1.0", "True"}
NOT_LEARNED = "-100"
LARGEST_NUMBER = float(np.finfo(np.float32).max)
WORD_NOUNS = {"text": "word", "characters": "character", "residues": "residue"}


def parse_labeled(value: Any, location: RecordLocation, reading: ReadingSettings) -> Conversation:
    """Parse a record as a conversation of one turn, the source, with its labels; RejectionError: it can't be used."""
    if not isinstance(value, dict):
        raise RejectionError("not_an_object", f"expected an object, found {name_json_type(value)}")
    repairs: Counter[str] = Counter()
    sources, target = find_columns(value, reading)
    value = {key: _read_list(item, location) if key in (*sources, target) else item for key, item in value.items()}
    given, is_tagged = value[target], reading.objective == "tag"
    per_token = is_tagged or (reading.objective == "regress" and isinstance(given, list))
    words, is_spaced = _read_words(sources, value, per_token, reading, repairs)
    if is_tagged and isinstance(given, str):
        given = given.split() if reading.source_words == "text" else [*("".join(given.split()) if is_spaced else given)]
    elif is_tagged and not isinstance(given, list):
        problem = f"{target}: expected a list of labels, or a text with a label per character"
        raise RejectionError("bad_label", f"{problem}, found {name_json_type(given)}")
    read = _read_number if reading.objective == "regress" else _read_name
    several = reading.objective == "classify" and isinstance(given, list)
    values = tuple(read(target, item) for item in (given if isinstance(given, list) else [given]))
    if per_token:
        values = _apply_mask(values, words, value.get(MASK_KEY), reading)
    if several:
        values = tuple(dict.fromkeys(name for name in values if name is not None))
    elif all(each is None for each in values):
        raise RejectionError("no_label", f"{target}: no label to learn")
    count_ignored("field", value, {*sources, target, "id", *([MASK_KEY] if per_token else [])}, repairs)
    text = (" " if reading.source_words == "text" else "").join(words)
    counts = {kind: count for kind, count in sorted(repairs.items()) if count}
    labels, has_prefix = TextLabels(words, values, per_token, several), bool(reading.source_prefix)
    return Conversation(location, None, (Turn("human", text, learned=False),), counts, has_prefix, labels=labels)


def find_columns(keys: Collection[str], reading: ReadingSettings) -> tuple[list[str], str]:
    """Find the columns of the source and of the labels: the named ones, or the first with a common name."""
    given = reading.source_column
    is_tagged = reading.objective == "tag"
    names = (*WORD_KEYS, *TEXT_KEYS) if is_tagged else (*TEXT_KEYS, *WORD_KEYS)
    sources = [given] if isinstance(given, str) else given or [_find_key("source", names, keys)]
    target = reading.target_column or _find_key("target", LABEL_KEYS[reading.objective], keys)
    assert isinstance(target, str), "the settings refuse several"
    if missing := [name for name in (*sources, target) if name not in keys]:
        advice = suggest_key(missing[0], set(keys) - {*sources, target})
        problem = f"no column {', '.join(missing)}; the record has {list_keys(keys)}{advice}"
        raise RejectionError("unknown_format", problem, suggests_key=bool(advice))
    return sources, target


def list_label_columns(reading: ReadingSettings) -> set[str]:
    """List the columns that are read if a table has them."""
    given = reading.source_column
    sources = {given} if isinstance(given, str) else set(given or (*TEXT_KEYS, *WORD_KEYS))
    target = reading.target_column
    return sources | {MASK_KEY} | ({target} if isinstance(target, str) else set(LABEL_KEYS[reading.objective]))


def _find_key(side: str, names: Sequence[str], keys: Collection[str]) -> str:
    if (found := next((name for name in names if name in keys), None)) is not None:
        return found
    problem = f"its keys are {list_keys(keys)}; expected {', '.join(names[:-1])} or {names[-1]}"
    raise RejectionError("unknown_format", f"{problem}; or name the column with --{side}-column")


def _read_list(value: Any, location: RecordLocation) -> Any:
    """Read a list that a table's cell has as JSON."""
    if isinstance(value, str) and value.startswith("[") and UNTYPED_FILE.search(location.file):
        with suppress(ValueError):
            return json.loads(value)
    return value


def _read_words(
    names: list[str], value: Mapping[str, Any], per_token: bool, reading: ReadingSettings, repairs: Counter[str]
) -> tuple[Sequence[str], bool]:
    """Return the words of a source, and whether white space between residues was left out."""
    shown, given, is_spaced = ", ".join(names), value[names[0]], False
    words: Sequence[str]
    if isinstance(given, list) and len(names) == 1:
        words = [parse_text(shown, word) for word in given]
        if reading.source_words == "text" and not per_token:
            words = [" ".join(words)]
    else:
        texts = [parse_text(name, value[name]) for name in names if len(names) == 1 or value[name] not in EMPTY_VALUES]
        text = "\n".join(texts)
        if reading.source_words == "text":
            text = normalize_text(text, repairs)
            text = clean(text, repairs) if reading.clean else text
            words = text.split() if per_token else [text]
        else:
            words = "".join(text.split()) if reading.source_words == "residues" else text
            is_spaced = words != text
    if not any(map(str.strip, words)):
        raise RejectionError("no_source", f"{shown}: no text to read")
    return words, is_spaced


def _read_name(place: str, value: Any) -> str | None:
    """Return the name of a class; None: not learned."""
    if isinstance(value, BadCell):
        raise RejectionError("bad_cell", f"{place}: {value}")
    if isinstance(value, float) and value.is_integer():  # as pandas writes whole numbers next to missing values
        value = int(value)
    if value in EMPTY_VALUES or _is_nan(value):
        return None
    if isinstance(value, float) or not isinstance(value, str | int):
        found = (
            f"{value:g}; for numbers, use --objective regress" if isinstance(value, float) else name_json_type(value)
        )
        raise RejectionError("bad_label", f"{place}: expected a label (text or a whole number), found {found}")
    name = str(value).lower() if isinstance(value, bool) else str(value)
    return None if name == NOT_LEARNED else name


def _read_number(place: str, value: Any) -> float | None:
    """Return a number to predict; None: not learned."""
    if isinstance(value, BadCell):
        raise RejectionError("bad_cell", f"{place}: {value}")
    if value in EMPTY_VALUES or _is_nan(value):
        return None
    number = math.inf
    if not isinstance(value, bool):
        with suppress(ValueError, TypeError, OverflowError):
            number = float(value)
    if math.isnan(number):  # written as text
        return None
    if abs(number) > LARGEST_NUMBER:
        found = shorten(repr(value), 60) if isinstance(value, str | int | float) else name_json_type(value)
        raise RejectionError("bad_label", f"{place}: expected a number, found {found}")
    return number


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _apply_mask(
    values: tuple[str | float | None, ...], words: Sequence[str], mask: Any, reading: ReadingSettings
) -> tuple[str | float | None, ...]:
    of_words = format_count(len(words), WORD_NOUNS[reading.source_words])
    if len(values) != len(words):
        noun = "number" if reading.objective == "regress" else "label"
        raise RejectionError("label_count", f"{format_count(len(values), noun)} for {of_words}")
    if mask in EMPTY_VALUES:
        return values
    if not isinstance(mask, str | list) or not set(map(str, mask)) <= ZEROS | ONES:
        raise RejectionError("bad_label", f"{MASK_KEY}: expected 0 or 1 for each word, found {shorten(repr(mask), 60)}")
    if len(mask) != len(words):
        raise RejectionError("label_count", f"{MASK_KEY}: {format_count(len(mask), 'value')} for {of_words}")
    return tuple(None if str(item) in ZEROS else value for value, item in zip(values, mask, strict=True))


def find_misfit(labels: TextLabels, task: LabelTask, known: Collection[str]) -> Rejection | None:
    """Return why a record's labels don't fit the task: a list in place of one label, or a label that isn't `known`.

    Args:
        known: the task's names; empty if any may occur.
    """
    if (labels.per_token, labels.several) != (task.per_token, task.several):
        noun = "number" if task.objective == "regress" else "label"
        forms = f"one {noun}", f"a list of {noun}s"
        wanted, found = forms if labels.per_token or labels.several else forms[::-1]
        return Rejection("bad_label", f"expected {wanted}, as in the first records, found {found}")
    unknown = next((name for name in labels.values if name is not None and known and name not in known), None)
    if unknown is None:
        return None
    shown = json.dumps(shorten(str(unknown), 80), ensure_ascii=False)
    return Rejection("unknown_label", f"label {shown} isn't among the {format_count(len(known), 'label')}")


def read_class_names(schema: Any) -> dict[str, list[str]]:
    """Read the names of the classes of each column that has a ClassLabel in the metadata of an Arrow schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {column: names for column, feature in features.items() if (names := _find_class_names(feature))}
    except (LookupError, ValueError, TypeError, AttributeError):  # without features, or of a different form
        return {}


def _find_class_names(feature: Any) -> list[str]:
    feature = feature[0] if isinstance(feature, list) else feature  # a list, as older releases of datasets write it
    if feature.get("_type") == "ClassLabel":
        return [str(name) for name in feature["names"]]
    return _find_class_names(feature["feature"]) if "feature" in feature else []


def name_classes(value: Any, names: Sequence[str]) -> Any:
    """Replace class numbers by their names; negative numbers mean no label."""
    if isinstance(value, list):
        return [name_classes(item, names) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and value < len(names):
        return names[value] if value >= 0 else None
    return value
