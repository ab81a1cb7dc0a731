"""The first records of the data: prepare chooses the added tokens and the conversation template from them."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from t5tune.data.labels import TextLabels
from t5tune.data.reading.files import STDIN
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.raw_records import RawRecord, parse_record
from t5tune.data.reading.readers import read_records
from t5tune.data.reading.rejections import Rejection
from t5tune.data.tokens.encoding import MAX_WORD_LENGTH
from t5tune.data.tokens.templates import DEFAULT_TEMPLATE, PAIR_TEMPLATE
from t5tune.errors import DataError
from t5tune.io.reasons import join_first
from t5tune.label_metrics import describe_similar_labels, find_labels, find_similar_labels
from t5tune.progress import Note, Report
from t5tune.settings.dataset_spec import DatasetSpec
from t5tune.settings.groups.record_format import ReadingSettings

SAMPLE_BYTES = 8 << 20
RECORD_OVERHEAD_BYTES = 512  # memory of a record in addition to its text
TURN_OVERHEAD_BYTES = 100  # memory of a parsed turn in addition to its text
MAX_MEMORY_RATIO = 1.5  # of a conversation to its record
RECORDS_FOR_LABELS = 10_000
FIRST_RECORDS = 100  # of each file, to find a usable record


def take_sample(records: Iterator[RawRecord]) -> list[RawRecord]:
    """Take records until they need SAMPLE_BYTES of memory."""
    sample, size = [], 0
    while size < SAMPLE_BYTES and (record := next(records, None)) is not None:
        sample.append(record)
        size += RECORD_OVERHEAD_BYTES + record.size
    return sample


def parse_sample(sample: list[RawRecord], dataset: DatasetSpec) -> Iterator[Conversation]:
    """Parse the records in place, and yield the conversations.

    A conversation replaces its record's data, so that it isn't parsed again for encoding. But the data is kept if the
    conversation takes much more memory (many short turns, characters beyond U+FFFF), or if the record may still be
    rejected, because rejected.jsonl contains it.
    """
    for number, record in enumerate(sample):
        parsed = parse_record(record, dataset)
        if isinstance(parsed, Rejection):
            sample[number] = replace(record, parsed=parsed)
            continue
        yield parsed
        is_accepted = dataset.dedupe == "none" and record.size <= MAX_WORD_LENGTH and parsed.labels is None
        memory = sum(sys.getsizeof(text) + TURN_OVERHEAD_BYTES for text in parsed.texts)
        if is_accepted and memory <= MAX_MEMORY_RATIO * record.size:
            sample[number] = replace(record, data=b"", parsed=parsed)


def iterate_labels(sample: list[RawRecord], reading: ReadingSettings) -> Iterator[TextLabels]:
    """Yield the labels of the usable records."""
    yield from (parsed.labels for parsed in _parse_usable(sample, reading) if parsed.labels is not None)


def report_doubts(sample: list[RawRecord], reading: ReadingSettings, report: Report) -> None:
    """Report tables whose first line looks like data, unless the user says that it has names, and similar labels."""
    files = dict.fromkeys(record.location.file for record in sample if record.has_doubtful_header)
    if files and "header" not in reading.model_fields_set:
        problem = "the first line looks like data, but is read as the names of the columns"
        report(Note(f"{join_first([*files])}: {problem}; --no-header reads it as the first row", warning=True))
    first = islice(_parse_usable(sample, reading), RECORDS_FOR_LABELS)
    targets = chain.from_iterable(conversation.targets for conversation in first)
    if groups := find_similar_labels(find_labels(targets)):
        report(Note(describe_similar_labels(groups), warning=True))


def drain(sample: list[RawRecord]) -> Iterator[RawRecord]:
    """Yield each record and drop it from the list, so that its memory is freed."""
    sample.reverse()
    while sample:
        yield sample.pop()


def choose_default_template(sample: list[RawRecord], files: list[Path], reading: ReadingSettings) -> str:
    """Choose the conversation template for a model without a template: plain if all records are pairs of texts.

    It is chosen by the usable records of the sample and the first usable record of each file.
    """
    return PAIR_TEMPLATE if _has_only_pairs(sample, files, reading) else DEFAULT_TEMPLATE


def _has_only_pairs(sample: list[RawRecord], files: list[Path], reading: ReadingSettings) -> bool:
    """Whether there are usable records, and no record is a list of turns."""
    has_pairs = False
    others = [] if reading.pair_lines else [file for file in files if file != STDIN]
    firsts = chain.from_iterable(_parse_first(file, reading) for file in others)
    for conversation in chain(_parse_usable(sample, reading), firsts):
        if not conversation.is_pair:
            return False
        has_pairs = True
    return has_pairs


def _parse_first(file: Path, reading: ReadingSettings) -> Iterator[Conversation]:
    """Yield the first usable record of a file, if there is one at its beginning."""
    with suppress(DataError):  # it is raised again if the file is read so far
        records = islice(read_records([file], reading), FIRST_RECORDS)
        yield from islice(_parse_usable(records, reading), 1)


def _parse_usable(records: Iterable[RawRecord], reading: ReadingSettings) -> Iterator[Conversation]:
    for record in records:
        parsed = parse_record(record, reading)
        if isinstance(parsed, Conversation):
            yield parsed
