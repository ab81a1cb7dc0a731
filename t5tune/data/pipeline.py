"""Encode raw records as conversations in several processes, in the order of the records.

    for record, outcome in encode_records(records, PipelineConfig(...), num_workers=4):
        ...

The result doesn't depend on the number of processes: batches are encoded independently and returned in order.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from t5tune.data.encoding import EncodedConversation, Encoder, Span, encode_batch
from t5tune.data.formats import Conversation, parse_conversation
from t5tune.data.records import (
    RawRecord,
    RecordLocation,
    RejectedRecord,
    RejectionError,
    can_contain_forbidden,
    check_characters,
    parse_record,
)
from t5tune.data.templates import Piece, Template, render_conversation
from t5tune.data.tokenizer import load_tokenizer
from t5tune.data.vocabulary import RoundTripCheck
from t5tune.errors import TrainingError
from t5tune.io.processes import make_module_command
from t5tune.settings import PrepareSettings
from t5tune.settings.data import ReadingSettings

BATCH_RECORDS = 256
BATCH_BYTES = 1 << 19
BYTES_PER_WORKER = 16 << 20  # of data; for less, starting another process takes longer than it saves


@dataclass(frozen=True)
class PipelineConfig:
    """Everything that determines how a record is encoded.

    Args:
        tokenizer: folder of the tokenizer.
    """

    tokenizer: Path
    template: Template
    settings: PrepareSettings


@dataclass(frozen=True)
class AcceptedRecord:
    """An encoded record.

    Args:
        repairs: counts of what was repaired or left out, by kind.
        encoded: the conversation's ids and spans; more than one if it was split.
        key: hash of the conversation's texts.
        unknown: number of unknown tokens.
        dropped: counts of examples that were left out, by reason.
        lost: characters of the targets that the tokenizer can't reproduce -> (occurrences, targets that contain it).
        has_prefix: whether source_prefix was prepended to the source.
    """

    location: RecordLocation
    repairs: Mapping[str, int]
    encoded: list[EncodedConversation]
    key: bytes
    unknown: int
    dropped: dict[str, int] = field(default_factory=dict)
    lost: dict[str, tuple[int, int]] = field(default_factory=dict)
    has_prefix: bool = False


Record = RawRecord | RejectedRecord
Outcome = AcceptedRecord | RejectedRecord


class Pipeline:
    """Encodes batches of records in this process."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        tokenizer = load_tokenizer(config.tokenizer)
        self.encoder = Encoder(tokenizer)
        self.round_trip_check = RoundTripCheck(tokenizer)

    def __call__(self, batch: list[Record]) -> list[Outcome]:
        """Return the outcome of each record.

        Raises:
            DataError: an array element is not valid JSON.
        """
        records = [convert_record(record, self.config.settings) for record in batch]
        conversations = [record for record in records if isinstance(record, Conversation)]
        # the pieces have no variable, so that they are freed at once: they take more memory than the ids
        encodings = iter(
            encode_batch(
                [render_conversation(conversation, self.config.template) for conversation in conversations],
                self.encoder,
                self.config.settings.model_max_length,
            )
        )
        return [
            record if isinstance(record, RejectedRecord) else self._accept(record, next(encodings))
            for record in records
        ]

    def _accept(self, conversation: Conversation, encoded: EncodedConversation) -> AcceptedRecord:
        settings = self.config.settings
        room = settings.model_max_length - 1
        parts, dropped = [encoded], Counter[str]()
        if unlearned := sum(not turn.learned and bool(turn.text.strip()) for turn in conversation.turns):
            dropped["zero_weight_targets"] = unlearned
        if settings.split_long and len(encoded.ids) > room:
            pieces = split_conversation(conversation, self.config.template, self.encoder, room)
            parts = [encode_batch([part], self.encoder, settings.model_max_length)[0] for part in pieces]
        if settings.train_on == "last":
            last = max((number for number, part in enumerate(parts) if part.spans), default=None)
            parts = [
                EncodedConversation(part.ids, part.spans[-1:] if number == last else [])
                for number, part in enumerate(parts)
            ]
        parts = [EncodedConversation(part.ids, self._select_spans(part.spans, dropped)) for part in parts]
        unknown = int(np.count_nonzero(encoded.ids == self.encoder.unk_token_id))
        lost = self.round_trip_check.count_lost(conversation)
        location, repairs, key = conversation.location, conversation.repairs, hash_conversation(conversation)
        return AcceptedRecord(location, repairs, parts, key, unknown, dict(dropped), lost, conversation.has_prefix)

    def _select_spans(self, spans: Sequence[Span], dropped: Counter[str]) -> list[Span]:
        """Select the spans whose targets are long enough and whole, as the settings require; count the others."""
        settings = self.config.settings
        selected = []
        for span in spans:
            if settings.min_target_tokens and span.target_end - span.target_start < settings.min_target_tokens:
                dropped["short_targets"] += 1
            elif settings.drop_truncated_targets and not span.target_is_whole:
                dropped["truncated_targets"] += 1
            else:
                selected.append(span)
        return selected


def convert_record(record: Record, reading: ReadingSettings) -> Conversation | RejectedRecord:
    """Convert a record to a conversation, or reject it; repairs that were made while reading are counted too."""
    if isinstance(record, RejectedRecord):
        return record
    try:
        value = parse_record(record)
    except RejectionError as error:
        return RejectedRecord(record.location, error.reason, str(error), record.data, record.size)
    try:
        if not isinstance(record.data, bytes) or can_contain_forbidden(record.data):
            check_characters(value)
        conversation = parse_conversation(value, record.location, reading)
    except RejectionError as error:
        reason, message = error.reason, str(error)
        # in a table, a lone surrogate represents an invalid byte
        if reason == "lone_surrogate" and not isinstance(record.data, bytes):
            reason, message = "invalid_utf8", f"a cell with bytes that are not UTF-8 ({message})"
        return RejectedRecord(record.location, reason, message, record.data, record.size)
    if not record.repairs:
        return conversation
    return replace(conversation, repairs=Counter(conversation.repairs) + Counter(dict(record.repairs)))


def hash_conversation(conversation: Conversation) -> bytes:
    """Return 16 bytes that are equal for conversations with the same texts."""
    texts = [conversation.system, *((turn.role, turn.text) for turn in conversation.turns)]
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()


def encode_records(
    records: Iterable[Record], config: PipelineConfig, num_workers: int
) -> Generator[tuple[Record, Outcome], None, None]:
    """Yield each record with its outcome, in order.

    Raises:
        DataError: from the records' reader, or for an array element that is not valid JSON. It is raised only after
            all previous records were yielded.
    """
    batches = _group_into_batches(records)
    if num_workers == 1:
        pipeline = Pipeline(config)
        for batch in batches:
            yield from zip(batch, pipeline(batch), strict=True)
        return
    yield from _encode_in_workers(batches, config, num_workers)


def _encode_in_workers(
    batches: Iterator[list[Record]], config: PipelineConfig, num_workers: int
) -> Generator[tuple[Record, Outcome], None, None]:
    executor = ThreadPoolExecutor(num_workers)  # each thread only waits for a worker
    workers: list[Worker] = []
    idle: SimpleQueue[Worker] = SimpleQueue()

    def encode(batch: list[Record]) -> list[Outcome]:
        worker = idle.get()
        try:
            return worker(batch)
        finally:
            idle.put(worker)

    try:
        waiting: deque[tuple[list[Record], Future[list[Outcome]]]] = deque()
        problem: Exception | None = None
        while True:
            try:
                read = next(batches, None)
            except Exception as error:  # yield what was read before the error first, as with a single process
                read, problem = None, error
            if read is not None:
                if idle.empty() and len(workers) < num_workers:
                    workers.append(Worker(config))
                    idle.put(workers[-1])
                waiting.append((read, executor.submit(encode, read)))
            while waiting and (read is None or len(waiting) > 2 * num_workers):
                done, outcomes = waiting.popleft()
                yield from zip(done, outcomes.result(), strict=True)
            if read is None:
                break
        if problem is not None:
            raise problem
    finally:
        for worker in workers:
            worker.close()
        executor.shutdown(cancel_futures=True)


class Worker:
    """A process that encodes batches. It ends when its input is closed, so also when this process dies.

    It runs `python -m t5tune.data.worker`, because multiprocessing would import the user's main script again.
    """

    def __init__(self, config: PipelineConfig) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = make_module_command("t5tune.data.worker")
        # a separate process group, so that Ctrl-C reaches only this process, which then kills the worker
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, process_group=0)
        self._send(config)

    def __call__(self, batch: list[Record]) -> list[Outcome]:
        """Return the outcome of each record, like `Pipeline`."""
        assert self._process.stdout is not None
        try:
            self._send(batch)
            outcome = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise TrainingError(
                f"a worker process that encodes records exited with code {self._process.wait()}"
            ) from None
        if isinstance(outcome, Exception):
            raise outcome
        return list(outcome)

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(value, self._process.stdin)
        self._process.stdin.flush()


def _group_into_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group records into batches; if reading fails, yield the records before the error first."""
    batch: list[Record] = []
    size = 0
    try:
        for record in records:
            batch.append(record)
            size += record.size
            if len(batch) == BATCH_RECORDS or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def split_conversation(
    conversation: Conversation, template: Template, encoder: Encoder, room: int
) -> Iterator[list[Piece]]:
    """Split a conversation between exchanges into parts of at most `room` tokens, and yield the pieces of each.

    A longer exchange is a part of its own. Parts begin with the system line and a human turn; turns keep their numbers.
    """
    starts = [index for index, turn in enumerate(conversation.turns) if turn.role == "human"]
    ends = [*starts[1:], len(conversation.turns)]
    exchanges = list(zip(starts, ends, strict=True))
    alone = _count_exchange_tokens(conversation, template, exchanges, encoder)
    later = replace(conversation, system=""), replace(template, human=template.turn_separator + template.human)
    # an exchange that continues a part has no system line, but has the separator before its human turn
    continued = _count_exchange_tokens(*later, exchanges, encoder)
    begin = length = 0
    for number in range(len(starts)):
        length += continued[number] if number > begin else alone[number]
        if length > room and number > begin:
            yield _render_turns(conversation, template, starts[begin], ends[number - 1])
            begin, length = number, alone[number]
    yield _render_turns(conversation, template, starts[begin], len(conversation.turns))


def _render_turns(conversation: Conversation, template: Template, start: int, end: int) -> list[Piece]:
    """Render turns start to end, without end, as a conversation; the pieces keep the turns' original numbers."""
    pieces = render_conversation(replace(conversation, turns=conversation.turns[start:end]), template)
    return [replace(piece, turn=piece.turn + start) if piece.turn >= 0 else piece for piece in pieces]


def _count_exchange_tokens(
    conversation: Conversation, template: Template, exchanges: list[tuple[int, int]], encoder: Encoder
) -> list[int]:
    """Count the tokens of each exchange, a few exchanges at a time to limit memory."""
    lengths: list[int] = []
    for start in range(0, len(exchanges), BATCH_RECORDS):
        parts = [
            _render_turns(conversation, template, *exchange) for exchange in exchanges[start : start + BATCH_RECORDS]
        ]
        flat = [piece.text for pieces in parts for piece in pieces]
        ids = iter(encoder.encode(flat, [False] * len(flat)))
        lengths += [sum(len(next(ids)) for _ in pieces) for pieces in parts]
    return lengths
