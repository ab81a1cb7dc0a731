"""Raw records -> encoded conversations, in the records' order, by as many processes as there are cores.

for outcome in encode_records(records, Recipe(...), num_workers=4):
    ...

What comes out doesn't depend on the number of processes: each batch is encoded alone, and batches come back in order.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from t5tune.data.encoding import Encoded, Encoder, encode_batch
from t5tune.data.formats import Conversation, conversation_of
from t5tune.data.records import Place, Raw, Refused, Rejected, check_characters, may_hold_forbidden, value_of
from t5tune.data.templates import Piece, Template, lay_out
from t5tune.data.tokenizer import load_tokenizer
from t5tune.data.vocabulary import Writable
from t5tune.errors import TrainingError
from t5tune.io.processes import python_module
from t5tune.settings import PrepareSettings
from t5tune.settings.data import ReadingSettings

BATCH_RECORDS = 256
BATCH_BYTES = 1 << 19
BYTES_PER_WORKER = 16 << 20  # of data, below which another process costs more than it brings


@dataclass(frozen=True)
class Recipe:
    """All that decides what a record becomes.

    Args:
        tokenizer: a folder.
    """

    tokenizer: Path
    template: Template
    settings: PrepareSettings


@dataclass(frozen=True)
class Accepted:
    """A conversation's ids and spans; several where it was split.

    Args:
        repairs: what was mended in the record, by kind.
        key: a hash of what was said.
        unknown: tokens that stand for what the tokenizer has no token for.
        dropped: examples that were left out, by reason.
        has_prefix: source_prefix was put before its question.
        lost: characters of the answers that the tokenizer can't write -> (how often they stand there, in how many
            answers).
    """

    place: Place
    repairs: Mapping[str, int]
    encoded: list[Encoded]
    key: bytes
    unknown: int
    dropped: dict[str, int] = field(default_factory=dict)
    lost: dict[str, tuple[int, int]] = field(default_factory=dict)
    has_prefix: bool = False


Record = Raw | Rejected
Outcome = Accepted | Rejected


class Pipeline:
    """Encodes batches of records by one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        tokenizer = load_tokenizer(recipe.tokenizer)
        self.encoder = Encoder(tokenizer)
        self.writable = Writable(tokenizer)

    def __call__(self, batch: list[Record]) -> list[Outcome]:
        """The outcome of each record.

        Raises:
            DataError: an array's element is no JSON.
        """
        records = [read_record(record, self.recipe.settings) for record in batch]
        conversations = [record for record in records if isinstance(record, Conversation)]
        # no name for the pieces: of a long conversation they take more than its ids, and aren't needed any longer
        encodings = iter(
            encode_batch(
                [lay_out(conversation, self.recipe.template) for conversation in conversations],
                self.encoder,
                self.recipe.settings.model_max_length,
            )
        )
        return [
            record if isinstance(record, Rejected) else self._accepted(record, next(encodings)) for record in records
        ]

    def _accepted(self, conversation: Conversation, encoded: Encoded) -> Accepted:
        settings = self.recipe.settings
        room = settings.model_max_length - 1
        parts, dropped = [encoded], Counter[str]()
        if unlearned := sum(not turn.learned and bool(turn.text.strip()) for turn in conversation.turns):
            dropped["zero_weight_targets"] = unlearned
        if settings.split_long and len(encoded.ids) > room:
            pieces = split(conversation, self.recipe.template, self.encoder, room)
            parts = [encode_batch([part], self.encoder, settings.model_max_length)[0] for part in pieces]
        if settings.train_on == "last":
            last = max((number for number, part in enumerate(parts) if part.spans), default=None)
            parts = [Encoded(part.ids, part.spans[-1:] if number == last else []) for number, part in enumerate(parts)]
        for index, part in enumerate(parts):
            spans = []
            for span in part.spans:
                if settings.min_target_tokens and span.target_end - span.target_start < settings.min_target_tokens:
                    dropped["short_targets"] += 1
                elif settings.drop_truncated_targets and not span.target_is_whole:
                    dropped["truncated_targets"] += 1
                else:
                    spans.append(span)
            parts[index] = Encoded(part.ids, spans)
        unknown = int(np.count_nonzero(encoded.ids == self.encoder.unk_token_id))
        lost = self.writable.lost(conversation)
        place, repairs, key = conversation.place, conversation.repairs, key_of(conversation)
        return Accepted(place, repairs, parts, key, unknown, dict(dropped), lost, conversation.has_prefix)


def read_record(record: Record, reading: ReadingSettings) -> Conversation | Rejected:
    """The record as a conversation, or why it is none; what was mended while it was read is counted too."""
    if isinstance(record, Rejected):
        return record
    try:
        value = value_of(record)
    except Refused as refused:
        return Rejected(record.place, refused.reason, str(refused), record.data, record.size)
    try:
        if not isinstance(record.data, bytes) or may_hold_forbidden(record.data):
            check_characters(value)
        conversation = conversation_of(value, record.place, reading)
    except Refused as refused:
        reason, message = refused.reason, str(refused)
        if reason == "lone_surrogate" and not isinstance(record.data, bytes):  # which stands for a byte in a table
            reason, message = "invalid_utf8", f"a cell with bytes that are no UTF-8 ({message})"
        return Rejected(record.place, reason, message, record.data, record.size)
    if not record.repairs:
        return conversation
    return replace(conversation, repairs=Counter(conversation.repairs) + Counter(dict(record.repairs)))


def key_of(conversation: Conversation) -> bytes:
    """16 bytes that are the same for conversations of the same words."""
    said = [conversation.system, *((turn.role, turn.text) for turn in conversation.turns)]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).digest()


def encode_records(
    records: Iterable[Record], recipe: Recipe, num_workers: int
) -> Generator[tuple[Record, Outcome], None, None]:
    """Each record and its outcome, in order.

    Raises:
        DataError: as the records' reader does, or an array's element is no JSON; only behind all records before it.
    """
    batches = _batches(records)
    if num_workers == 1:
        pipeline = Pipeline(recipe)
        for batch in batches:
            yield from zip(batch, pipeline(batch), strict=True)
        return
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
            except Exception as error:  # what was read before it comes first, as with one process
                read, problem = None, error
            if read is not None:
                if idle.empty() and len(workers) < num_workers:
                    workers.append(Worker(recipe))
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
    """A process that encodes batches. It ends with its input, so with this process too, however that may end.

    It is a plain `python -m t5tune.data.worker`: multiprocessing would run the user's own script once more.
    """

    def __init__(self, recipe: Recipe) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = python_module("t5tune.data.worker")
        # a group of its own: Ctrl-C is for this process, which ends the worker
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0
        )
        self._send(recipe)

    def __call__(self, batch: list[Record]) -> list[Outcome]:
        """As `Pipeline`."""
        assert self._process.stdout is not None
        try:
            self._send(batch)
            outcome = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise TrainingError(f"a worker that encodes records ended with {self._process.wait()}") from None
        if isinstance(outcome, Exception):
            raise outcome
        return list(outcome)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(value, self._process.stdin)
        self._process.stdin.flush()


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
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


def split(conversation: Conversation, template: Template, encoder: Encoder, room: int) -> Iterator[list[Piece]]:
    """The pieces of a conversation as several that fit in `room` tokens, as far as single exchanges do.

    Each begins with the system line and a human turn; turns keep their numbers.
    """
    starts = [index for index, turn in enumerate(conversation.turns) if turn.role == "human"]
    ends = [*starts[1:], len(conversation.turns)]
    places = list(zip(starts, ends, strict=True))
    alone = _lengths(conversation, template, places, encoder)
    later = replace(conversation, system=""), replace(template, human=template.turn_separator + template.human)
    behind = _lengths(*later, places, encoder)
    begin = length = 0
    for number in range(len(starts)):
        length += behind[number] if number > begin else alone[number]
        if length > room and number > begin:
            yield _pieces_of(conversation, template, starts[begin], ends[number - 1])
            begin, length = number, alone[number]
    yield _pieces_of(conversation, template, starts[begin], len(conversation.turns))


def _pieces_of(conversation: Conversation, template: Template, start: int, end: int) -> list[Piece]:
    pieces = lay_out(replace(conversation, turns=conversation.turns[start:end]), template)
    return [replace(piece, turn=piece.turn + start) if piece.turn >= 0 else piece for piece in pieces]


def _lengths(
    conversation: Conversation, template: Template, places: list[tuple[int, int]], encoder: Encoder
) -> list[int]:
    """The tokens of each exchange, of which few are held at a time."""
    lengths: list[int] = []
    for start in range(0, len(places), BATCH_RECORDS):
        parts = [_pieces_of(conversation, template, *place) for place in places[start : start + BATCH_RECORDS]]
        flat = [piece.text for pieces in parts for piece in pieces]
        ids = iter(encoder.encode(flat, [False] * len(flat)))
        lengths += [sum(len(next(ids)) for _ in pieces) for pieces in parts]
    return lengths
