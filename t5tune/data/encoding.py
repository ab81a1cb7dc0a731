"""Pieces of text -> token ids and the spans of each answer's source and target.

Each piece is encoded once. Pieces meet at white space or at an added token, where the tokenizer parts words
anyway, so their ids, joined, are those of the whole text; a test holds that.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from t5tune.data.long_text import PART, Cutter, Unigram, unigram_of
from t5tune.data.templates import Piece
from t5tune.data.tokenizer import BYTES_OFFSET, Tokenizer
from t5tune.data.vocabulary import MARK, extends_words, pre_tokenizer, spaces_are_marks

MOST_WORDS = 100_000  # that an encoder remembers: about 20 MB
LONGEST_WORD = 40  # characters
LONG_TEXT = 2 * PART  # characters beyond which a text is encoded in parts
# Letters, digits and signs that stay on their side of a space when a text is normalised: no combining mark, joiner or
# modifier, nothing that decomposes into a space and a mark, no white space but the space itself.
_PLAIN_SIGNS = (
    " -~\u00a1-\u00a7\u00a9\u00ab\u00ac\u00ae\u00b0-\u00b3\u00b5-\u00b7\u00b9-\u02d7\u0391-\u03ce\u0400-\u0482"
    "\u048a-\u052f\u2010-\u2027\u2030-\u203b\u20ac\u2190-\u21ff\u3001-\u303f\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff5e"
)
_PLAIN = re.compile(f"[{_PLAIN_SIGNS}]+")

Ids = npt.NDArray[np.integer[Any]]
_Fragment = str | tuple[str]  # a text; in a tuple where it begins a sequence


class Span(NamedTuple):
    """Where one answer's text stands in the ids of its conversation. Ends are exclusive, in tokens.

    The source is ids[:system_end] + ids[source_start:source_end], the target ids[target_start:target_end];
    both get an end token, the target only where `target_is_whole`. The whole answer ends at answer_end.
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
class Encoded:
    """A conversation's ids, in the cache's dtype, and its answers' spans."""

    ids: Ids
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
    """Encodes pieces with a tokenizer. What a user wrote never becomes a control id such as that of `</s>`.

    T5's tokenizers cut a text at its spaces and at added tokens and encode each word alone, so words are looked up
    in a table of those met before, and only new ones go to the tokenizer. Text with characters that could join
    over a space (combining marks, joiners, …) goes there whole. So the ids are the tokenizer's own; a test with
    odd Unicode holds that.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.spaces_are_marks = spaces_are_marks(tokenizer)
        self.unk_token_id = tokenizer.unk_token_id
        self.dtype = ids_dtype(len(tokenizer))
        self._tokenizer = tokenizer
        self._control = _control_pattern(tokenizer)
        self._known: dict[_Fragment, bytes] = {}
        self._cut: re.Pattern[str] | None = None
        self._words: re.Pattern[str] | None = None
        self._cutter: Cutter | None = None
        self._drops_spaces = False
        if tokenizer.backend is not None:
            self._backend = _backend(tokenizer)
            self._drops_spaces = not extends_words(tokenizer)
            self._mark_first_word("never")
            if _is_split_at_spaces(tokenizer):
                added = _added_tokens(tokenizer)
                self._cutter = Cutter(added, _normalise(self._backend))
                self._cut = re.compile(f"({_any_of(added)})" if added else "(?!)")
                if extends_words(tokenizer) and all(token[0] in added for token in added):
                    self._words = _words_pattern(added)
                    self._plain_text = re.compile(f"[{_PLAIN_SIGNS}{re.escape(''.join(added))}]+")
                    self._beginnings = {" ", *(token[0] for token in added)}

    def encode(self, texts: list[str], first: list[bool]) -> list[Ids]:
        """The ids of each text, without an end token; `first` says where a text begins a sequence."""
        if self._tokenizer.backend is None:
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) + BYTES_OFFSET for text in texts]
        if self._cutter is None or max(map(len, texts), default=0) <= LONG_TEXT:
            return self._encode(texts, first)
        return [self._encode_long(self._cutter, *each) for each in zip(texts, first, strict=True)]

    def _encode_long(self, cutter: Cutter, text: str, first: bool) -> Ids:
        parts = cutter.parts(text)
        return np.concatenate([self._encode([part], [first and not number])[0] for number, part in enumerate(parts)])

    def _encode(self, texts: list[str], first: list[bool]) -> list[Ids]:
        known = self._known
        plans = [self._plan(text, is_first) for text, is_first in zip(texts, first, strict=True)]
        found = [list(map(known.get, plan)) for plan in plans]
        if new := [number for number, parts in enumerate(found) if None in parts]:
            fresh = self._encode_new({f for number in new for f in plans[number] if f not in known})
            for number in new:
                found[number] = [known[f] if f in known else fresh[f] for f in plans[number]]
            if len(known) < MOST_WORDS:
                words = (f for f in fresh if isinstance(f, str) and len(f) <= LONGEST_WORD)
                known.update((f, fresh[f]) for f in words)
        return [np.frombuffer(b"".join(parts), self.dtype) for parts in found]  # type: ignore[arg-type]

    def _plan(self, text: str, first: bool) -> list[_Fragment]:
        """Cut a text into fragments that can be encoded alone: ` two`, ` hats`, an added token, …"""
        plan: list[_Fragment] = []
        for part in self._harmless(text):
            if self._words is not None and self._plain_text.fullmatch(part):
                words: list[str] = self._words.findall(part)
                if first and words[0][0] not in self._beginnings:
                    words[0] = " " + words[0]
                plan += words
            else:
                plan += self._plan_by_segment(part, first)
            first = False
        return plan

    def _plan_by_segment(self, text: str, first: bool) -> Iterator[_Fragment]:
        for number, segment in enumerate(self._cut.split(text) if self._cut else [text]):
            if not number % 2 and self._cut is not None and _PLAIN.fullmatch(segment):
                yield from self._words_of(segment, first)
            elif segment:
                yield (segment,) if first else segment
            first = first and not segment

    def _words_of(self, segment: str, first: bool) -> list[str]:
        """`two red hats` -> two, ` red`, ` hats`; the first with a space too where the tokenizer marks it."""
        if self._drops_spaces:
            return segment.split()
        words = segment.replace(" ", "\0 ").split("\0")
        if not words[0]:
            return words[1:]
        if first:
            words[0] = " " + words[0]
        return words

    def _encode_new(self, fragments: set[_Fragment]) -> dict[_Fragment, bytes]:
        """The ids of fragments that were not met before."""
        fresh: dict[_Fragment, bytes] = {}
        for fragment in [f for f in fragments if len(f if isinstance(f, str) else f[0]) > LONG_TEXT]:
            if (ids := self._encode_long_word(fragment)) is not None:
                fresh[fragment] = ids
                fragments.remove(fragment)
        if beginnings := [fragment for fragment in fragments if isinstance(fragment, tuple)]:
            self._mark_first_word("first")
            for beginning in beginnings:
                fresh[beginning] = self._bytes(self._backend.encode(beginning[0], add_special_tokens=False))
            self._mark_first_word("never")
        others = [fragment for fragment in fragments if isinstance(fragment, str)]
        found = self._backend.encode_batch_fast(others, add_special_tokens=False) if others else []
        for fragment, encoding in zip(others, found, strict=True):
            fresh[fragment] = self._bytes(encoding)
        return fresh

    def _encode_long_word(self, fragment: _Fragment) -> bytes | None:
        """The ids of one word that is too long for the tokenizer; None: it is no such word."""
        text, is_first = (fragment, False) if isinstance(fragment, str) else (fragment[0], True)
        word = text.removeprefix(" ")
        is_marked = is_first or self._drops_spaces or word != text
        if self._cutter is None or self._unigram is None:
            return None
        if not (word.isascii() and word.isprintable()):
            word = self._cutter.normalised(word)
        if re.search(rf"\s|{MARK}", word):
            return None
        word = MARK * is_marked + word
        return np.fromiter(self._unigram.encode(word), self.dtype).tobytes()

    @cached_property
    def _unigram(self) -> Unigram | None:
        return unigram_of(self._backend)

    def _mark_first_word(self, scheme: str) -> None:
        """Whether a text's first word gets a mark too, where the tokenizer marks it at a sequence's start only."""
        if not self._drops_spaces:
            self._backend.pre_tokenizer.prepend_scheme = scheme

    def _bytes(self, encoding: Any) -> bytes:
        return np.asarray(encoding.ids, self.dtype).tobytes()

    def _harmless(self, text: str) -> list[str]:
        """Cut each written-out control token in two (`<` and `/s>`), so that it can't be read as one."""
        if self._control is None or not self._control.search(text):
            return [text]
        cuts = [0, *(match.start() + 1 for match in self._control.finditer(text)), len(text)]
        return [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if a < b]


def encode_batch(conversations: list[list[Piece]], encoder: Encoder, max_length: int) -> list[Encoded]:
    """The ids and spans of each conversation; `max_length` bounds source and target, end tokens included."""
    shifted = [_shift_spaces(pieces, encoder) for pieces in conversations]
    texts = [piece.text for pieces in shifted for piece in pieces]
    ids = iter(encoder.encode(texts, [number == 0 for pieces in shifted for number in range(len(pieces))]))
    return [_join(pieces, [next(ids) for _ in pieces], max_length) for pieces in shifted]


def ids_dtype(num_rows: int) -> np.dtype[Any]:
    """uint16 little-endian where every id fits, else int32."""
    return np.dtype("<u2" if num_rows <= 1 << 16 else "<i4")


def encode_prompt(pieces: list[Piece], encoder: Encoder, max_length: int) -> list[int]:
    """The source ids of a conversation that ends with the assistant's prefix, cut as in training, no end token."""
    encoded = encode_batch([[*pieces, Piece(" x", "answer", pieces[-1].turn)]], encoder, max_length)[0]
    span = encoded.spans[-1]
    return [*encoded.ids[: span.system_end].tolist(), *encoded.ids[span.source_start : span.source_end].tolist()]


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


def _join(pieces: list[Piece], ids_of: list[Ids], max_length: int) -> Encoded:
    spans: list[Span] = []
    turn_starts: list[int] = []
    length = system_end = source_end = 0
    turn = -1
    for piece, piece_ids in zip(pieces, ids_of, strict=True):
        if piece.kind == "system":
            system_end = len(piece_ids)
        elif piece.turn != turn:
            turn_starts.append(length)
            turn = piece.turn
        target_start = length
        length += len(piece_ids)
        if piece.kind != "answer":
            # a gap parts an answer from what stands before it, and belongs to neither
            source_end = length if piece.kind != "gap" else source_end
        elif piece.text.strip():
            spans.append(_span(turn, system_end, turn_starts, source_end, target_start, length, max_length))
    return Encoded(np.concatenate(ids_of), spans)


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
    earliest = source_end - (room - kept_system)
    source_start = system_end
    # the last start is this answer's own prefix, which alone is no source: the turn before it loses tokens
    if earliest > system_end and (last := len(turn_starts) - 2) >= 0:
        source_start = turn_starts[bisect_left(turn_starts, earliest, 0, last)]
    source_start = max(source_start, earliest)
    whole_source = source_start == system_end and kept_system == system_end
    whole_target = target_end - target_start <= room
    # a target that is cut gets no end token, so it has room for one more
    kept_end = target_end if whole_target else target_start + max_length
    return Span(
        turn, kept_system, source_start, source_end, target_start, kept_end, target_end, whole_source, whole_target
    )


def _normalise(backend: Any) -> Callable[[str], str]:
    return backend.normalizer.normalize_str if backend.normalizer is not None else str


def _backend(tokenizer: Tokenizer) -> Any:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.encode_special_tokens = True
    return backend


def _is_split_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer encodes each word alone, as T5's do."""
    parts = pre_tokenizer(tokenizer)
    kinds = [part["type"] for part in parts.get("pretokenizers", [parts])]
    is_t5s = kinds == ["WhitespaceSplit", "Metaspace"] or (kinds == ["Metaspace"] and extends_words(tokenizer))
    return is_t5s and '"split": true' in json.dumps(parts)


def _added_tokens(tokenizer: Tokenizer) -> list[str]:
    """The added tokens that text is cut at, the longest first, as the tokenizer does."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return sorted((token.content for token in added if not token.special), key=len, reverse=True)


def _any_of(tokens: list[str]) -> str:
    return "|".join(map(re.escape, tokens))


def _words_pattern(added: list[str]) -> re.Pattern[str]:
    """Finds added tokens, words with the space before them, and spaces that no word follows."""
    beginnings = re.escape("".join(sorted({token[0] for token in added})))
    return re.compile(f"{_any_of(added)}| ?[^ {beginnings}]+| " if added else " ?[^ ]+| ")


def _control_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Matches the control tokens written out as text; they stand in the model's own vocabulary too."""
    if tokenizer.backend is None:
        return None
    patterns = list(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True)))
    if tokenizer.backend.token_to_id("<0x00>") is not None:
        patterns.append("<0x[0-9A-F]{2}>")  # pieces of byte fallback, which SentencePiece never takes from a text
    return re.compile("|".join(patterns)) if patterns else None
