"""Pieces of text -> token ids and the spans of each answer's source and target.

Each piece is encoded once. Pieces meet at white space or at an added token, where the tokenizer parts words
anyway, so their ids, joined, are those of the whole text; a test holds that.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.data.templates import Piece
from t5tune.data.vocabulary import extends_words, spaces_are_marks


@dataclass(frozen=True)
class Span:
    """Where one answer's text stands in the ids of its conversation. Ends are exclusive, in tokens.

    The source is ids[:system_end] + ids[source_start:source_end], the target ids[target_start:target_end];
    both get an end token, the target only where `target_is_whole`.
    """

    turn: int
    system_end: int
    source_start: int
    source_end: int
    target_start: int
    target_end: int
    source_is_whole: bool
    target_is_whole: bool


@dataclass(frozen=True)
class Encoded:
    """A conversation's ids and its answers' spans."""

    ids: list[int]
    spans: list[Span]


@dataclass(frozen=True)
class Example:
    """One answer as the model reads it: ids, end tokens included. int64, lengths S and T."""

    source_S: npt.NDArray[np.int64]
    target_T: npt.NDArray[np.int64]


def example_of(ids: Any, span: Span, eos_token_id: int) -> Example:
    """Cut one answer out of its conversation's ids, a list or an array of them."""
    end = [eos_token_id]
    source = np.concatenate([ids[: span.system_end], ids[span.source_start : span.source_end], end])
    target = np.concatenate([ids[span.target_start : span.target_end], end if span.target_is_whole else []])
    return Example(source.astype(np.int64), target.astype(np.int64))


class Encoder:
    """Encodes pieces with a tokenizer. What a user wrote never becomes a control id such as that of `</s>`."""

    def __init__(self, tokenizer: Any) -> None:
        self.spaces_are_marks = spaces_are_marks(tokenizer)
        self._tokenizer = tokenizer
        self._control = _control_pattern(tokenizer)
        self._first = self._following = None
        if tokenizer.is_fast:
            self._first = _backend(tokenizer)
            self._following = self._first
            if extends_words(tokenizer):
                self._following = _backend(tokenizer)
                self._following.pre_tokenizer.prepend_scheme = "never"

    def encode(self, texts: list[str], first: list[bool]) -> list[list[int]]:
        """The ids of each text, without an end token; `first` says where a text begins a sequence."""
        parts: list[tuple[int, str, bool]] = []
        for index, (text, is_first) in enumerate(zip(texts, first, strict=True)):
            for offset, part in enumerate(self._harmless(text)):
                parts.append((index, part, is_first and offset == 0))
        results: list[list[int]] = [[] for _ in texts]
        encoded: dict[int, list[int]] = {}
        for is_first in (True, False):
            chosen = [number for number, part in enumerate(parts) if part[2] == is_first]
            for number, ids in zip(chosen, self._batch([parts[n][1] for n in chosen], is_first), strict=True):
                encoded[number] = ids
        for number, (index, _, _) in enumerate(parts):
            results[index] += encoded[number]
        return results

    def _batch(self, texts: list[str], first: bool) -> list[list[int]]:
        if not texts:
            return []
        backend = self._first if first else self._following
        if backend is None:  # ByT5's tokenizer is Python
            return [self._tokenizer.convert_tokens_to_ids(self._tokenizer._tokenize(text)) for text in texts]
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _harmless(self, text: str) -> list[str]:
        """Cut each written-out control token in two (`<` and `/s>`), so that it can't be read as one."""
        if self._control is None or not self._control.search(text):
            return [text]
        cuts = [0, *(match.start() + 1 for match in self._control.finditer(text)), len(text)]
        return [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if a < b]


def encode_batch(conversations: list[list[Piece]], encoder: Encoder, max_length: int) -> list[Encoded]:
    """The ids and spans of each conversation; `max_length` bounds source and target, end tokens included."""
    shifted = [_shift_spaces(pieces, encoder) for pieces in conversations]
    flat = [(piece.text, number == 0) for pieces in shifted for number, piece in enumerate(pieces)]
    ids = iter(encoder.encode([text for text, _ in flat], [first for _, first in flat]))
    return [_join(pieces, [next(ids) for _ in pieces], encoder, max_length) for pieces in shifted]


def encode_prompt(pieces: list[Piece], encoder: Encoder, max_length: int) -> list[int]:
    """The source ids of a conversation that ends with the assistant's prefix, cut as in training, no end token."""
    encoded = encode_batch([[*pieces, Piece(" x", "answer", pieces[-1].turn)]], encoder, max_length)[0]
    span = encoded.spans[-1]
    return encoded.ids[: span.system_end] + encoded.ids[span.source_start : span.source_end]


def _shift_spaces(pieces: list[Piece], encoder: Encoder) -> list[Piece]:
    """Move the space between two pieces to where the tokenizer wants it.

    Where a space is part of the next word's token it goes to the next piece: a source ends at its prefix's
    last character, and a target begins with a marked word, as every text does. Elsewhere it stays.
    """
    if not encoder.spaces_are_marks:
        return pieces
    result: list[Piece] = []
    for piece in pieces:
        if result and result[-1].text.endswith(" "):
            before = result.pop()
            if before.text != " ":
                result.append(Piece(before.text[:-1], before.kind, before.turn))
            piece = Piece(" " + piece.text, piece.kind, piece.turn)
        result.append(piece)
    return result


def _join(pieces: list[Piece], ids_of: list[list[int]], encoder: Encoder, max_length: int) -> Encoded:
    ids: list[int] = []
    spans: list[Span] = []
    turn_starts: list[int] = []
    system_end = source_end = 0
    turn = -1
    for piece, piece_ids in zip(pieces, ids_of, strict=True):
        if piece.kind == "system":
            system_end = len(piece_ids)
        elif piece.turn != turn:
            turn_starts.append(len(ids))
            turn = piece.turn
        target_start = len(ids)
        ids += piece_ids
        if piece.kind != "answer":
            # a gap parts an answer from what stands before it, and belongs to neither
            source_end = len(ids) if piece.kind != "gap" else source_end
        elif piece.text.strip():
            spans.append(_span(turn, system_end, turn_starts, source_end, target_start, len(ids), max_length))
    return Encoded(ids, spans)


def _span(
    turn: int,
    system_end: int,
    turn_starts: list[int],
    source_end: int,
    target_start: int,
    target_end: int,
    max_length: int,
) -> Span:
    """Cut an example to `max_length`: whole turns first, from the oldest; then tokens of the last turn's start.

    The system line stays; only where it would fill more than half of a source that is too long is it cut too.
    """
    room = max_length - 1  # for the end token
    kept_system = system_end if source_end <= room else min(system_end, room // 2)
    source_start = system_end
    # the last start is this answer's own prefix, which alone is no source: the turn before it loses tokens
    for start in turn_starts[:-1]:
        if kept_system + source_end - source_start <= room:
            break
        source_start = start
    source_start = max(source_start, source_end - (room - kept_system))
    whole_source = source_start == system_end and kept_system == system_end
    whole_target = target_end - target_start <= room
    # a target that is cut gets no end token, so it has room for one more
    target_end = target_end if whole_target else target_start + max_length
    return Span(turn, kept_system, source_start, source_end, target_start, target_end, whole_source, whole_target)


def _backend(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches the control tokens written out as text; they stand in the model's own vocabulary too."""
    tokens = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None
