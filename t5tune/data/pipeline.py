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
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

from t5tune.data.encoding import Encoded, Encoder, encode_batch
from t5tune.data.formats import Conversation, conversation_of
from t5tune.data.records import Raw, Refused, Rejected, value_of
from t5tune.data.templates import Piece, Template, lay_out
from t5tune.data.tokenizer import load_tokenizer
from t5tune.data.vocabulary import Writable
from t5tune.errors import DataError, TrainingError
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
        key: a hash of what was said.
        unknown: tokens that stand for what the tokenizer has no token for.
        dropped: examples that were left out, by reason.
        lost: characters of the answers that the tokenizer can't write -> (how often they stand there, in how many
            answers).
    """

    conversation: Conversation
    encoded: list[Encoded]
    key: bytes
    unknown: int
    dropped: dict[str, int] = field(default_factory=dict)
    lost: dict[str, tuple[int, int]] = field(default_factory=dict)


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
        pieces = [lay_out(conversation, self.recipe.template) for conversation in conversations]
        encodings = iter(encode_batch(pieces, self.encoder, self.recipe.settings.model_max_length))
        return [
            record if isinstance(record, Rejected) else self._accepted(record, next(encodings)) for record in records
        ]

    def _accepted(self, conversation: Conversation, encoded: Encoded) -> Accepted:
        settings = self.recipe.settings
        room = settings.model_max_length - 1
        parts, dropped = [encoded], Counter[str]()
        if settings.split_long and len(encoded.ids) > room:
            pieces = _split(conversation, self.recipe.template, self.encoder, room)
            parts = encode_batch(pieces, self.encoder, settings.model_max_length)
        if settings.train_on == "last":
            parts = [Encoded(part.ids, part.spans[-1:] if part is parts[-1] else []) for part in parts]
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
        return Accepted(conversation, parts, key_of(conversation), unknown, dict(dropped), lost)


def read_record(record: Record, reading: ReadingSettings) -> Conversation | Rejected:
    """The record as a conversation, or why it is none; what was mended while it was read is counted too."""
    if isinstance(record, Rejected):
        return record
    try:
        value = value_of(record)
    except Refused as refused:
        return Rejected(record.place, refused.reason, str(refused), record.data)
    try:
        conversation = conversation_of(value, record.place, reading)
    except Refused as refused:
        return Rejected(record.place, refused.reason, str(refused), value)
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
        DataError: as the records' reader does, or an array's element is no JSON.
    """
    batches = _batches(records)
    if num_workers == 1:
        pipeline = Pipeline(recipe)
        for batch in batches:
            yield from zip(batch, pipeline(batch), strict=True)
        return
    workers = local()
    started: list[Worker] = []

    def begin() -> None:
        workers.mine = Worker(recipe)
        started.append(workers.mine)

    executor = ThreadPoolExecutor(num_workers, initializer=begin)  # each thread only waits for its worker
    try:
        waiting: deque[tuple[list[Record], Future[list[Outcome]]]] = deque()
        for batch in batches:
            waiting.append((batch, executor.submit(lambda records: workers.mine(records), batch)))
            if len(waiting) > 2 * num_workers:
                done, outcomes = waiting.popleft()
                yield from zip(done, outcomes.result(), strict=True)
        for done, outcomes in waiting:
            yield from zip(done, outcomes.result(), strict=True)
    finally:
        executor.shutdown(cancel_futures=True)
        for worker in started:
            worker.close()


class Worker:
    """A process that encodes batches. It ends with its input, so with this process too, however that may end.

    It is a plain `python -m t5tune.data.worker`: multiprocessing would run the user's own script once more.
    """

    def __init__(self, recipe: Recipe) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "t5tune.data.worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._send(recipe)

    def __call__(self, batch: list[Record]) -> list[Outcome]:
        """As `Pipeline`."""
        self._send(batch)
        assert self._process.stdout is not None
        try:
            outcome = pickle.load(self._process.stdout)
        except EOFError:
            raise TrainingError(f"a worker that encodes records ended with {self._process.wait()}") from None
        if isinstance(outcome, tuple):
            message, hint = outcome
            raise DataError(message, hint=hint)
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
    for record in records:
        batch.append(record)
        size += len(record.data) if isinstance(record, Raw) else 0
        if len(batch) == BATCH_RECORDS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _split(conversation: Conversation, template: Template, encoder: Encoder, room: int) -> list[list[Piece]]:
    """The pieces of a conversation as several that fit in `room` tokens, as far as single exchanges do.

    Each begins with the system line and a human turn; turns keep their numbers.
    """
    starts = [index for index, turn in enumerate(conversation.turns) if turn.role == "human"]
    parts: list[list[Piece]] = []
    start = 0
    for end in [*starts[1:], len(conversation.turns)]:
        pieces = _pieces_of(conversation, template, start, end)
        begins = next((index for index in reversed(starts) if index < end), start)
        if begins > start and _length(pieces, encoder) > room:
            parts.append(_pieces_of(conversation, template, start, begins))
            start = begins
    parts.append(_pieces_of(conversation, template, start, len(conversation.turns)))
    return parts


def _pieces_of(conversation: Conversation, template: Template, start: int, end: int) -> list[Piece]:
    pieces = lay_out(replace(conversation, turns=conversation.turns[start:end]), template)
    return [replace(piece, turn=piece.turn + start) if piece.turn >= 0 else piece for piece in pieces]


def _length(pieces: list[Piece], encoder: Encoder) -> int:
    return sum(map(len, encoder.encode([piece.text for piece in pieces], [False] * len(pieces))))
