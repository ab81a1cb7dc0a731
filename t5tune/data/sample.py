"""The first records of the data, by which prepare chooses the tokens to add."""

import sys
from collections.abc import Iterator
from dataclasses import replace

from t5tune.data.encoding import MAX_WORD_LENGTH
from t5tune.data.formats import Conversation
from t5tune.data.raw_records import RawRecord, parse_record
from t5tune.data.records import Rejection
from t5tune.settings import PrepareSettings

SAMPLE_BYTES = 8 << 20
RECORD_OVERHEAD_BYTES = 512  # memory of a record in addition to its text
TURN_OVERHEAD_BYTES = 100  # memory of a parsed turn in addition to its text
MAX_MEMORY_RATIO = 1.5  # of a conversation to its record


def take_sample(records: Iterator[RawRecord]) -> list[RawRecord]:
    """Take records until they need SAMPLE_BYTES of memory."""
    sample, size = [], 0
    while size < SAMPLE_BYTES and (record := next(records, None)) is not None:
        sample.append(record)
        size += RECORD_OVERHEAD_BYTES + record.size
    return sample


def parse_sample(sample: list[RawRecord], settings: PrepareSettings) -> Iterator[Conversation]:
    """Parse the records in place, and yield the conversations.

    A conversation replaces its record's data, so that it isn't parsed again for encoding. But the data is kept if the
    conversation takes much more memory (many short turns, characters beyond U+FFFF), or if the record may still be
    rejected, because rejected.jsonl contains it.

    Raises:
        DataError: an array element is not valid JSON.
    """
    for number, record in enumerate(sample):
        parsed = parse_record(record, settings)
        if isinstance(parsed, Rejection):
            sample[number] = replace(record, parsed=parsed)
            continue
        yield parsed
        is_accepted = settings.dedupe == "none" and record.size <= MAX_WORD_LENGTH
        memory = sum(sys.getsizeof(text) + TURN_OVERHEAD_BYTES for text in parsed.texts)
        if is_accepted and memory <= MAX_MEMORY_RATIO * record.size:
            sample[number] = replace(record, data=b"", parsed=parsed)


def drain(sample: list[RawRecord]) -> Iterator[RawRecord]:
    """Yield each record and drop it from the list, so that its memory is freed."""
    sample.reverse()
    while sample:
        yield sample.pop()
