"""Encode raw records: each becomes the ids of a conversation and the spans of its examples, or is rejected.

pipeline = Pipeline(tokenizer_folder, template, dataset, label_task)
for record, encoded in zip(records, pipeline(records)):
    ...
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.data.labels import LabelTask
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.labeled_records import find_misfit
from t5tune.data.reading.raw_records import RawRecord, parse_record
from t5tune.data.reading.rejections import Rejection
from t5tune.data.tokens.encoders import Encoder, make_encoder
from t5tune.data.tokens.encoding import (
    MAX_WORD_LENGTH,
    EncodedConversation,
    Span,
    encode_batch,
    encode_pieces,
    find_long_word,
    join_answers,
)
from t5tune.data.tokens.source_words import SourceEncoder
from t5tune.data.tokens.span_corruption import cut_windows, make_corruption
from t5tune.data.tokens.templates import Piece, Template, render_conversation
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer
from t5tune.data.tokens.vocabulary import RoundTripCheck
from t5tune.errors import DataError
from t5tune.settings.dataset_spec import DatasetSpec
from t5tune.settings.groups.record_format import ReadingSettings

EXCHANGES_PER_BATCH = 256
TOO_SHORT = Counter({"short_texts": 1})


@dataclass(frozen=True)
class EncodedRecord:
    """The result of encoding a record; it is empty if the record is rejected.

    Args:
        parts: the conversation's ids and spans; more than one if it was split.
        key: hash of the conversation's texts, and of the learned turns.
        repairs: counts of repairs, by kind.
        unknown: number of unknown tokens.
        dropped: counts of examples that were left out, by reason.
        lost: characters of the targets that the tokenizer can't reproduce -> (occurrences, targets that contain it).
        has_prefix: whether source_prefix was prepended to the source.
        is_pair: whether the record is a pair of texts, not a list of turns.
        label_names: the classes that the values of a record with labels number.
    """

    rejection: Rejection | None = None
    parts: Sequence[EncodedConversation] = ()
    key: bytes = b""
    repairs: Mapping[str, int] = field(default_factory=dict)
    unknown: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    has_prefix: bool = False
    is_pair: bool = False
    label_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pipeline:
    """Encodes batches of records in this process.

    Another process gets a copy without the tokenizer, and loads it from its folder.

    Args:
        label_task: of records with labels; without names if any label may occur.
        tokenizer: the folder's, if it is loaded already: mT5's takes 400 MB.
    """

    tokenizer_folder: Path
    template: Template
    dataset: DatasetSpec
    label_task: LabelTask | None = None
    tokenizer: Tokenizer | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Pipeline, (self.tokenizer_folder, self.template, self.dataset, self.label_task)

    def __call__(self, batch: list[RawRecord]) -> list[EncodedRecord | DataError]:
        """Return the result of each record. If an array element is not valid JSON, its error is the last result."""
        parsed: list[Conversation | Rejection] = []
        problems: list[DataError] = []
        for record in batch:
            try:
                parsed.append(self._check_labels(read_conversation(record, self.dataset, self._encoder)))
            except DataError as error:
                problems.append(error)
                break
        conversations = [each for each in parsed if isinstance(each, Conversation)]
        if self.label_task is not None:
            labeled = self._encode_labels(conversations)
            return [
                *(EncodedRecord(each) if isinstance(each, Rejection) else next(labeled) for each in parsed),
                *problems,
            ]
        encodings = iter(self._encode(conversations))
        others = iter(self._encode([each.swap_answers() for each in conversations if each.rejected is not None]))

        def encode(each: Conversation) -> EncodedRecord:
            encoded = next(encodings)
            return self._select_examples(
                each, encoded if each.rejected is None else join_answers(encoded, next(others))
            )

        return [*(EncodedRecord(each) if isinstance(each, Rejection) else encode(each) for each in parsed), *problems]

    def _encode(self, conversations: list[Conversation]) -> list[EncodedConversation]:
        # the pieces have no variable, so that they are freed at once: they take more memory than the ids
        return encode_batch(
            [render_conversation(each, self.template) for each in conversations],
            self._encoder,
            self.dataset.model_max_length,
        )

    def _check_labels(self, parsed: Conversation | Rejection) -> Conversation | Rejection:
        if self.label_task is None or isinstance(parsed, Rejection) or parsed.labels is None:
            return parsed
        return find_misfit(parsed.labels, self.label_task, self._known_names) or parsed

    def _encode_labels(self, conversations: list[Conversation]) -> Iterator[EncodedRecord]:
        labels = [each.labels for each in conversations if each.labels is not None]
        encoded = self._source_encoder.encode_labels(labels, self.dataset.model_max_length)
        for conversation, each in zip(conversations, encoded, strict=True):
            if isinstance(each, Rejection):
                yield EncodedRecord(each)
                continue
            yield EncodedRecord(
                parts=[each.conversation],
                key=hash_conversation(conversation),
                repairs=conversation.repairs,
                unknown=each.unknown,
                dropped=each.lost,
                has_prefix=conversation.has_prefix,
                label_names=each.names,
            )

    @cached_property
    def _known_names(self) -> frozenset[str]:
        return frozenset(self.label_task.names if self.label_task is not None else ())

    @cached_property
    def _source_encoder(self) -> SourceEncoder:
        assert self.label_task is not None
        return SourceEncoder(self._tokenizer, self.label_task, self.dataset.source_prefix)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self.tokenizer or load_tokenizer(self.tokenizer_folder)

    @cached_property
    def _encoder(self) -> Encoder:
        return make_encoder(self._tokenizer)

    @cached_property
    def _window(self) -> int:
        """The longest part of a raw text that becomes an example, in tokens."""
        corruption = make_corruption(self.dataset.denoisers, self._tokenizer, seed=0)
        assert corruption is not None, "prepare refuses tokenizers without sentinels"
        max_length = self.dataset.model_max_length
        return corruption.find_largest_window(max_length - self._encoder.special_ids.source_size, max_length - 1)

    @cached_property
    def _round_trip_check(self) -> RoundTripCheck:
        return RoundTripCheck(self._tokenizer)

    def _select_examples(self, conversation: Conversation, encoded: EncodedConversation) -> EncodedRecord:
        """Split a conversation that is too long, and keep the examples that the settings ask for."""
        if conversation.is_raw_text:
            encoded = EncodedConversation(encoded.ids, self._list_windows(len(encoded.ids)))
            return self._describe(conversation, encoded, [encoded], Counter() if encoded.spans else TOO_SHORT)
        dataset, dropped = self.dataset, Counter[str]()
        parts, room = [encoded], dataset.model_max_length - 1
        if conversation.rejected is not None:
            if not encoded.spans:
                dropped["same_answers"] += 1
            pair = EncodedConversation(encoded.ids, self._select_spans(encoded.spans, dropped))
            return self._describe(conversation, encoded, [pair], dropped)
        if unlearned := sum(not turn.learned and bool(turn.text.strip()) for turn in conversation.turns):
            dropped["zero_weight_targets"] = unlearned
        if dataset.split_long and len(encoded.ids) > room:
            pieces = split_conversation(conversation, self.template, self._encoder, room)
            parts = [encode_batch([part], self._encoder, dataset.model_max_length)[0] for part in pieces]
        if dataset.train_on == "last":
            last = max((number for number, part in enumerate(parts) if part.spans), default=None)
            parts = [
                EncodedConversation(part.ids, part.spans[-1:] if number == last else [])
                for number, part in enumerate(parts)
            ]
        selected = [EncodedConversation(part.ids, self._select_spans(part.spans, dropped)) for part in parts]
        return self._describe(conversation, encoded, selected, dropped)

    def _list_windows(self, length: int) -> list[Span]:
        return [
            Span(number, 0, start, end, end, end, end, True, True)
            for number, (start, end) in enumerate(cut_windows(length, self._window))
        ]

    def _describe(
        self,
        conversation: Conversation,
        encoded: EncodedConversation,
        parts: list[EncodedConversation],
        dropped: Counter[str],
    ) -> EncodedRecord:
        return EncodedRecord(
            parts=parts,
            key=hash_conversation(conversation, self.dataset.source_prefix if conversation.has_prefix else ""),
            repairs=conversation.repairs,
            unknown=int(np.count_nonzero(encoded.ids == self._tokenizer.unk_token_id)),
            dropped=dropped,
            lost=self._round_trip_check.count_lost(conversation),
            has_prefix=conversation.has_prefix,
            is_pair=conversation.is_pair,
        )

    def _select_spans(self, spans: Sequence[Span], dropped: Counter[str]) -> list[Span]:
        """Select the spans whose targets are long and whole enough for the settings; count the dropped ones."""
        dataset, selected = self.dataset, []
        for span in spans:
            if dataset.min_target_tokens and span.shortest_target < dataset.min_target_tokens:
                dropped["short_targets"] += 1
            elif dataset.drop_truncated_targets and not span.has_whole_targets:
                dropped["truncated_targets"] += 1
            else:
                selected.append(span)
        return selected


def read_conversation(record: RawRecord, reading: ReadingSettings, encoder: Encoder) -> Conversation | Rejection:
    """Return a record's conversation, or its rejection, also if it would take the tokenizer too much memory.

    Raises:
        DataError: an array element is not valid JSON.
    """
    parsed = parse_record(record, reading)
    if isinstance(parsed, Rejection) or record.size <= MAX_WORD_LENGTH:
        return parsed
    return find_long_word(parsed, encoder) or parsed


def hash_conversation(conversation: Conversation, prefix: str = "") -> bytes:
    """Return 16 bytes that are equal for conversations with the same texts and the same learned turns.

    The first 8 decide whether a conversation is held out. They depend on the texts alone, so that no text is both
    trained on and held out; for preference pairs and texts with labels, on the source alone, for the same reason.

    Args:
        prefix: was prepended to the source, and doesn't count.
    """
    turns = [
        (str(turn.role), turn.text.removeprefix(prefix) if turn.role == "human" else turn.text)
        for turn in conversation.turns
    ]
    if conversation.labels is not None:
        return _hash_texts(turns, 8) + _hash_texts([turns, conversation.labels.values], 8)
    if conversation.rejected is None:
        texts = [conversation.system, *turns]
        key = _hash_texts(texts, 16)
        unlearned = [number for number, turn in enumerate(conversation.turns) if not turn.learned]
        return key[:8] + _hash_texts([*texts, *unlearned], 8) if unlearned else key
    question = [conversation.system, *turns[:-1]]
    return _hash_texts(question, 8) + _hash_texts([*question, turns[-1], ("rejected", conversation.rejected)], 8)


def read_key(hashed: bytes) -> int:
    """Return the key of a conversation in a token cache, which decides whether it is held out, from its hash."""
    return int.from_bytes(hashed[:8], "little")


def _hash_texts(texts: list[Any], size: int) -> bytes:
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=size).digest()


def split_conversation(
    conversation: Conversation, template: Template, encoder: Encoder, room: int
) -> Iterator[list[Piece]]:
    """Split a conversation between exchanges into parts of at most `room` tokens, and yield the pieces of each.

    A longer exchange is a separate part. Parts begin with the system line and a human turn; turns keep their numbers.
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
    for start in range(0, len(exchanges), EXCHANGES_PER_BATCH):
        batch = exchanges[start : start + EXCHANGES_PER_BATCH]
        parts = [_render_turns(conversation, template, *exchange) for exchange in batch]
        lengths += [sum(map(len, ids)) for ids in encode_pieces(parts, encoder, begins=False)]
    return lengths
