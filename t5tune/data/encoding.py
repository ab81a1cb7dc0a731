"""Encode the pieces of a rendered conversation (see data/templates.py), and find each example's source and target.

Each piece is encoded once. Pieces meet at whitespace or at an added token, where the tokenizer splits words anyway, so
their concatenated ids are those of the whole text (tests/commands/test_prepare.py checks this). The one exception is an
indentation token, a newline with spaces, of which each of two pieces has a part.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from t5tune.data.encoders import Beginning, Encoder, Ids, Text, WordEncoder
from t5tune.data.formats import Conversation
from t5tune.data.records import Rejection
from t5tune.data.templates import Piece

MAX_WORD_LENGTH = 100_000  # characters; the tokenizer takes 13 MB for such a word


class Span(NamedTuple):
    """The positions of one example in the ids of its conversation, in tokens. Ends are exclusive.

    The source is ids[:system_end] + ids[source_start:source_end], the target is ids[target_start:target_end].
    An EOS token is appended to the source, and to the target if `target_is_whole`. The untruncated target ends at
    answer_end.
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


@dataclass(frozen=True)
class EncodedConversation:
    """The ids of a conversation, in the cache's dtype, and the spans of its examples."""

    ids: Ids
    spans: list[Span]


@dataclass(frozen=True)
class Example:
    """Source and target ids as the model reads them, EOS tokens included; int64 of lengths S and T."""

    source_S: npt.NDArray[np.int64]
    target_T: npt.NDArray[np.int64]


def extract_example(ids: Any, span: Span, eos_token_id: int) -> Example:
    """Cut one example out of the ids of its conversation, which are a list or an array."""
    end = [eos_token_id]
    source = np.concatenate([ids[: span.system_end], ids[span.source_start : span.source_end], end])
    target = np.concatenate([ids[span.target_start : span.target_end], end if span.target_is_whole else []])
    return Example(source.astype(np.int64), target.astype(np.int64))


def find_long_word(conversation: Conversation, encoder: Encoder) -> Rejection | None:
    """Return the rejection of a conversation that would take the tokenizer too much memory; None if it is fine."""
    for text in conversation.texts:
        if isinstance(encoder, WordEncoder) and len(text) > MAX_WORD_LENGTH:
            length = encoder.measure_longest_word(text)
            if length > MAX_WORD_LENGTH:
                return Rejection("long_word", f"a word of {length:,} characters, more than {MAX_WORD_LENGTH:,}")
    return None


def encode_batch(conversations: list[list[Piece]], encoder: Encoder, max_length: int) -> list[EncodedConversation]:
    """Encode conversations; `max_length` limits source and target separately, EOS tokens included."""
    shifted = [_shift_spaces(pieces, encoder) for pieces in conversations]
    texts: list[Text] = [
        piece.text if number else Beginning(piece.text) for pieces in shifted for number, piece in enumerate(pieces)
    ]
    ids = iter(encoder.encode(texts))
    return [_join_pieces(pieces, [next(ids) for _ in pieces], max_length) for pieces in shifted]


def encode_prompt(pieces: list[Piece], encoder: Encoder, max_length: int) -> list[int]:
    """Encode a conversation up to the assistant's prefix as a source, truncated as in training, without EOS token."""
    # a dummy answer, so that a span (and its truncated source) is computed
    encoded = encode_batch([[*pieces, Piece(" x", "answer", pieces[-1].turn)]], encoder, max_length)[0]
    span = encoded.spans[-1]
    return [*encoded.ids[: span.system_end].tolist(), *encoded.ids[span.source_start : span.source_end].tolist()]


def _shift_spaces(pieces: list[Piece], encoder: Encoder) -> list[Piece]:
    """Move the space between two pieces to the piece whose token contains it.

    If a space is part of the next word's token, it moves to the next piece: a source then ends with the last
    character of its prefix, and a target begins with a metaspace, as every text does. Otherwise it stays.
    """
    if not encoder.is_space_part_of_word:
        return pieces
    result: list[Piece] = []
    for piece in pieces:
        if result and result[-1].text.endswith(" "):
            before = result.pop()
            # kept even if it is empty now: where the source ends depends on the kinds of the pieces
            result.append(Piece(before.text[:-1], before.kind, before.turn))
            piece = Piece(" " + piece.text, piece.kind, piece.turn)
        result.append(piece)
    return result


def _join_pieces(pieces: list[Piece], ids_by_piece: list[Ids], max_length: int) -> EncodedConversation:
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
        elif piece.text.strip():
            whole = Span(turn, system_end, system_end, source_end, target_start, length, length, True, True)
            spans.append(_truncate(whole, turn_starts, max_length))
    return EncodedConversation(np.concatenate(ids_by_piece), spans)


def _truncate(span: Span, turn_starts: list[int], max_length: int) -> Span:
    """Truncate an example to `max_length`: drop the oldest turns first, then tokens from the start of the last turn.

    The system line stays; it is cut only if it would fill more than half of a source that is too long.
    """
    turn, system_end, source_start, source_end, target_start, target_end, *_ = span
    room = max_length - 1  # for the EOS token
    kept_system = system_end if source_end <= room else min(system_end, room // 2)
    earliest = source_end - (room - kept_system)
    # Never start at the last entry: it is only this target's assistant prefix. Truncate the turn before it instead.
    if earliest > system_end and (last := len(turn_starts) - 2) >= 0:
        source_start = turn_starts[bisect_left(turn_starts, earliest, 0, last)]
    source_start = max(source_start, earliest)
    whole_source = source_start == system_end and kept_system == system_end
    whole_target = target_end - target_start <= room
    # a truncated target gets no EOS token, so it has room for one more token
    kept_end = target_end if whole_target else target_start + max_length
    return Span(
        turn, kept_system, source_start, source_end, target_start, kept_end, target_end, whole_source, whole_target
    )
