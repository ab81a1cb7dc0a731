"""Encode the pieces of a rendered conversation (data/tokens/templates.py), and find each example's source and target.

Each piece is encoded once. The special tokens that its template spells out are found first, and become their ids.
Pieces meet at whitespace or at an added token, where the tokenizer splits words anyway, so their concatenated ids are
the ids of the whole text (tests/commands/prepare/test_pieces.py checks this). The exception is an indentation token, a
newline with spaces that belong to two pieces.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from t5tune.data.labels import LabelTask, Values, read_values, renumber
from t5tune.data.reading.formats import Conversation, Turn
from t5tune.data.reading.rejections import RecordLocation, Rejection
from t5tune.data.tokens.encoders import Beginning, Encoder, Ids, Text, WordEncoder
from t5tune.data.tokens.templates import Piece, Template, render_conversation
from t5tune.data.tokens.tokenizer import SpecialIds

MAX_ANSWER = 1 << 30  # tokens: no limit
MAX_WORD_LENGTH = 100_000  # characters; the tokenizer takes 13 MB for a word of this length


class Span(NamedTuple):
    """The positions of one example in the ids of its conversation, in tokens. Ends are exclusive.

    The source is ids[:system_end] + ids[source_start:source_end], the target is ids[target_start:target_end]. A space
    token between them belongs to neither. The special tokens around a source aren't included, and neither is the EOS
    token that follows the target if `target_is_whole`. The untruncated target ends at answer_end.

    The target of a preference pair is the chosen answer. The rejected answer is ids[rejected_start:rejected_end];
    rejected_start 0: no rejected answer.
    """

    turn: int
    system_end: int
    source_start: int
    source_end: int
    target_start: int
    target_end: int
    answer_end: int
    source_is_whole: bool
    target_is_whole: bool
    rejected_start: int = 0
    rejected_end: int = 0
    rejected_answer_end: int = 0
    rejected_is_whole: bool = True

    @property
    def has_whole_targets(self) -> bool:
        """Whether no target was truncated."""
        return self.target_is_whole and self.rejected_is_whole

    @property
    def shortest_target(self) -> int:
        """Tokens of the target without the EOS token; for a preference pair, of the shorter answer."""
        target, rejected = self.target_end - self.target_start, self.rejected_end - self.rejected_start
        return min(target, rejected) if self.rejected_start else target


@dataclass(frozen=True)
class EncodedConversation:
    """The ids of a conversation, in the cache's dtype, and the spans of its examples."""

    ids: Ids
    spans: list[Span]


@dataclass(frozen=True)
class Example:
    """Source and target ids for the model, special tokens included; int64 of lengths S and T."""

    source_S: npt.NDArray[np.int64]
    target_T: npt.NDArray[np.int64]

    @property
    def targets(self) -> tuple[npt.NDArray[np.int64], ...]:
        """The target; the chosen and the rejected one of a preference pair."""
        return (self.target_T,)

    @property
    def num_tokens(self) -> int:
        """Tokens of the source and of all targets."""
        return len(self.source_S) + sum(map(len, self.targets))


@dataclass(frozen=True)
class PreferencePair(Example):
    """A source with the ids of the preferred answer, target_T, and of the rejected one; int64 of length R.

    `reference` has the answers' log-probabilities under the reference model, once they are computed.
    """

    rejected_R: npt.NDArray[np.int64]
    reference: tuple[float, float] | None = None

    @property
    def targets(self) -> tuple[npt.NDArray[np.int64], ...]:
        return self.target_T, self.rejected_R


@dataclass(frozen=True)
class LabeledExample(Example):
    """A source with its label; target_T is empty.

    Args:
        values: float64. With `per_token`, a class number or a number for each token of source_S; NaN: not learned, also
            for the special tokens. Otherwise one class number or number, or the numbers of all classes that a text
            with several labels has. A dummy example has a single NaN.
    """

    values: Values


def extract_example(ids: Any, span: Span, special: SpecialIds) -> Example:
    """Cut an example out of the ids of its conversation, a list or an array."""
    source = [special.source_start, ids[: span.system_end], ids[span.source_start : span.source_end]]
    source_S = _join([*source, special.source_end])

    def cut_target(start: int, end: int, is_whole: bool) -> npt.NDArray[np.int64]:
        return _join([ids[start:end], [special.target_end] if is_whole else []])

    target_T = cut_target(span.target_start, span.target_end, span.target_is_whole)
    if not span.rejected_start:
        return Example(source_S, target_T)
    rejected_R = cut_target(span.rejected_start, span.rejected_end, span.rejected_is_whole)
    return PreferencePair(source_S, target_T, rejected_R)


def extract_labels(ids: npt.NDArray[Any], span: Span, special: SpecialIds, task: LabelTask) -> LabeledExample:
    """Cut a source and its values, as they are stored, out of a record's int32 ids."""
    source_S = extract_example(ids, span, special).source_S
    values = read_values(ids[span.target_start : span.target_end])
    if task.per_token:
        around = (np.full(len(side), np.nan) for side in (special.source_start, special.source_end))
        before, after = around
        values = np.concatenate([before, values, after])
    return LabeledExample(source_S, np.zeros(0, np.int64), values)


def renumber_spans(encoded: EncodedConversation, numbers: Values) -> EncodedConversation:
    """Replace the class numbers of a record with labels."""
    ids = encoded.ids.copy()
    for span in encoded.spans:
        values = read_values(ids[span.target_start : span.target_end])
        values[:] = renumber(values, numbers)
    return replace(encoded, ids=ids)


def surround(source: Any, target: Any, special: SpecialIds) -> Example:
    """Add the special tokens to the ids of a source and a target."""
    return Example(_join([special.source_start, source, special.source_end]), _join([target, [special.target_end]]))


def _join(parts: list[Any]) -> npt.NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64)


def find_long_word(conversation: Conversation, encoder: Encoder) -> Rejection | None:
    """Return the rejection of a conversation that would take the tokenizer too much memory; None: it is fine."""
    for text in conversation.texts:
        if isinstance(encoder, WordEncoder) and len(text) > MAX_WORD_LENGTH:
            length = encoder.measure_longest_word(text)
            if length > MAX_WORD_LENGTH:
                return Rejection("long_word", f"a word of {length:,} characters, more than {MAX_WORD_LENGTH:,}")
    return None


def encode_batch(conversations: list[list[Piece]], encoder: Encoder, max_length: int) -> list[EncodedConversation]:
    """Encode conversations; `max_length` limits source and target separately, special tokens included."""
    shifted = [_shift_spaces(pieces, encoder) for pieces in conversations]
    ids_by_piece = encode_pieces(shifted, encoder)
    source_room = max_length - encoder.special_ids.source_size
    return [
        _join_pieces(pieces, ids, encoder, source_room, max_length - 1)
        for pieces, ids in zip(shifted, ids_by_piece, strict=True)
    ]


def encode_answers(texts: list[str], template: Template, encoder: Encoder) -> list[npt.NDArray[np.int64]]:
    """Encode texts as targets of training, with the template's text and the token after them."""
    turns = ((Turn("human", "x"), Turn("assistant", text)) for text in texts)
    conversations = (Conversation(RecordLocation("answer", 1, 0, 0), None, pair) for pair in turns)
    encoded = encode_batch([render_conversation(each, template) for each in conversations], encoder, MAX_ANSWER)
    return [extract_example(each.ids, each.spans[0], encoder.special_ids).target_T for each in encoded]


def join_answers(chosen: EncodedConversation, rejected: EncodedConversation) -> EncodedConversation:
    """Append the rejected answer to the ids of a preference pair's conversation.

    The result has no span if both answers, as far as they weren't truncated, have the same ids.
    """
    (span,), (other,) = chosen.spans, rejected.spans
    if np.array_equal(_cut_target(chosen), _cut_target(rejected)):
        return EncodedConversation(chosen.ids, [])
    moved = len(chosen.ids) - other.target_start
    span = span._replace(
        rejected_start=len(chosen.ids),
        rejected_end=other.target_end + moved,
        rejected_answer_end=other.answer_end + moved,
        rejected_is_whole=other.target_is_whole,
    )
    return EncodedConversation(np.concatenate([chosen.ids, rejected.ids[other.target_start :]]), [span])


def _cut_target(encoded: EncodedConversation) -> Ids:
    (span,) = encoded.spans
    return encoded.ids[span.target_start : span.target_end]


def encode_pieces(conversations: list[list[Piece]], encoder: Encoder, begins: bool = True) -> list[list[Ids]]:
    """Encode the pieces of conversations, each alone. `begins`: the first piece of each begins a sequence."""
    plans = [[_split_at_markers(piece, encoder) for piece in pieces] for pieces in conversations]
    texts: list[Text] = []
    for plan in plans:
        parts = chain.from_iterable(plan)
        texts += (
            Beginning(part) if begins and number == 0 else part
            for number, part in enumerate(parts)
            if isinstance(part, str)
        )
    ids = iter(encoder.encode(texts))

    def join(parts: list[str | int]) -> Ids:
        if len(parts) == 1 and isinstance(parts[0], str):
            return next(ids)
        found = [next(ids) if isinstance(part, str) else np.array([part], encoder.dtype) for part in parts]
        return np.concatenate(found)

    return [[join(parts) for parts in plan] for plan in plans]


def _split_at_markers(piece: Piece, encoder: Encoder) -> list[str | int]:
    start, end = piece.message
    before, after = encoder.markers.split(piece.text[:start]), encoder.markers.split(piece.text[end:])
    if all(isinstance(part, str) for part in (*before, *after)):
        return [piece.text]
    parts: list[str | int] = []
    for part in (*before, piece.text[start:end], *after):
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        elif part != "":
            parts.append(part)
    return parts


class EncodedPrompt(NamedTuple):
    """A source to reply to.

    Args:
        ids: without special tokens.
        dropped_turns: number of oldest turns that were left out.
        cut_tokens: tokens that were cut off from the system line and from the first remaining turn.
    """

    ids: list[int]
    dropped_turns: int
    cut_tokens: int


def encode_prompt(pieces: list[Piece], encoder: Encoder, max_length: int) -> EncodedPrompt:
    """Encode a conversation up to the assistant's prefix as a source, as in training."""
    # A dummy answer, so that a span and its truncated source are computed. Its template may have no assistant prefix;
    # then the last piece belongs to the human turn.
    answer_turn = 1 + max(piece.turn for piece in pieces if piece.kind == "human")
    whole = _shift_spaces([*pieces, Piece(" x", "answer", answer_turn, (1, 2))], encoder)
    (ids_by_piece,) = encode_pieces([whole], encoder)
    encoded = _join_pieces(whole, ids_by_piece, encoder, max_length - encoder.special_ids.source_size, max_length - 1)
    span = encoded.spans[-1]
    turn_starts: dict[int, int] = {}
    length = system_end = 0
    for piece, piece_ids in zip(whole, ids_by_piece, strict=True):
        if piece.kind == "system":
            system_end = len(piece_ids)
        elif piece.turn < answer_turn:
            turn_starts.setdefault(piece.turn, length)
        length += len(piece_ids)
    first_kept = max(start for start in turn_starts.values() if start <= span.source_start)
    return EncodedPrompt(
        ids=[*encoded.ids[: span.system_end].tolist(), *encoded.ids[span.source_start : span.source_end].tolist()],
        dropped_turns=sum(start < first_kept for start in turn_starts.values()),
        cut_tokens=system_end - span.system_end + span.source_start - first_kept,
    )


def _shift_spaces(pieces: list[Piece], encoder: Encoder) -> list[Piece]:
    """Move the space between two pieces to the piece whose token contains it.

    If a space is part of the next word's token, it moves to the next piece: a source then ends with the last
    character of its prefix, and a target's first word gets its metaspace, as every text's does. Otherwise it stays.
    """
    result: list[Piece] = []
    for piece in pieces:
        # a record's own space at the end of its text stays there
        if result and result[-1].text[result[-1].message[1] :].endswith(encoder.joined_spaces):
            before = result.pop()
            # kept even if it is empty now: where the source ends depends on the kinds of the pieces
            result.append(replace(before, text=before.text[:-1]))
            piece = piece.prepend(before.text[-1])
        result.append(piece)
    last = result[-1]
    if last.kind == "answer" and len(last.text) > last.message[1] and last.text.endswith(encoder.joined_spaces):
        result[-1] = replace(last, text=last.text[:-1])  # an earlier answer loses it to the next piece, too
    return result


def _join_pieces(
    pieces: list[Piece], ids_by_piece: list[Ids], encoder: Encoder, source_room: int, target_room: int
) -> EncodedConversation:
    spans: list[Span] = []
    turn_starts: list[int] = []
    length = system_end = source_end = 0
    turn = -1
    for piece, piece_ids in zip(pieces, ids_by_piece, strict=True):
        if piece.kind == "system":
            system_end = len(piece_ids)
        elif piece.turn != turn:
            turn_starts.append(length)
            turn = piece.turn
        target_start = length
        length += len(piece_ids)
        if piece.kind != "answer":
            # a gap separates a target from its source, and belongs to neither
            source_end = length if piece.kind != "gap" else source_end
        elif piece.text[slice(*piece.message)].strip():  # without the template's suffix
            # A target is a text by itself. The template's space before it is part of its first word, but before an
            # added token it is a token, which the tokenizer doesn't write at the beginning of a text.
            target_start += piece.message[0] == 1 and encoder.adds_token(piece.text)
            whole = Span(turn, system_end, system_end, source_end, target_start, length, length, True, True)
            spans.append(_truncate(whole, turn_starts, source_room, target_room))
    return EncodedConversation(np.concatenate(ids_by_piece), spans)


def _truncate(span: Span, turn_starts: list[int], source_room: int, target_room: int) -> Span:
    """Truncate an example: drop the oldest turns first, then tokens from the start of the last turn.

    The system line stays; it is cut only if it would fill more than half of a source that is too long.
    """
    turn, system_end, source_start, source_end, target_start, target_end, *_ = span
    kept_system = system_end if source_end <= source_room else min(system_end, source_room // 2)
    earliest = source_end - (source_room - kept_system)
    # Never start at the last entry: it is only this target's assistant prefix. Truncate the turn before it instead.
    if earliest > system_end and (last := len(turn_starts) - 2) >= 0:
        source_start = turn_starts[bisect_left(turn_starts, earliest, 0, last)]
    source_start = max(source_start, earliest)
    whole_source = source_start == system_end and kept_system == system_end
    whole_target = target_end - target_start <= target_room
    # a truncated target gets no EOS token, so it has room for one more token
    kept_end = target_end if whole_target else target_start + target_room + 1
    return Span(
        turn, kept_system, source_start, source_end, target_start, kept_end, target_end, whole_source, whole_target
    )
