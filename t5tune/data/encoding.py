"""Encode the pieces of a rendered conversation (see data/templates.py), and find each example's source and target.

Each piece is encoded once. Pieces meet at whitespace or at an added token, where the tokenizer splits words anyway, so
their concatenated ids are those of the whole text (tests/commands/test_prepare.py checks this).
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

from t5tune.data.long_text import PART_LENGTH, TextSplitter, Unigram, load_unigram
from t5tune.data.templates import Piece
from t5tune.data.tokenizer import BYTES_OFFSET, Tokenizer
from t5tune.data.vocabulary import METASPACE, is_prepend_scheme_first, is_space_part_of_word, read_pre_tokenizer_config

MAX_CACHED_WORDS = 100_000  # about 20 MB
MAX_CACHED_WORD_LENGTH = 40  # characters
LONG_TEXT_LENGTH = 2 * PART_LENGTH  # characters; a longer text is encoded in parts
# Letters, digits and symbols that Unicode normalization never joins with a neighbor across a space: no combining mark,
# joiner or modifier, nothing that decomposes into a space and a mark, and no whitespace except the space itself.
_PLAIN_CHARACTERS = (
    " -~\u00a1-\u00a7\u00a9\u00ab\u00ac\u00ae\u00b0-\u00b3\u00b5-\u00b7\u00b9-\u02d7\u0391-\u03ce\u0400-\u0482"
    "\u048a-\u052f\u2010-\u2027\u2030-\u203b\u20ac\u2190-\u21ff\u3001-\u303f\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff5e"
)
_PLAIN = re.compile(f"[{_PLAIN_CHARACTERS}]+")

Ids = npt.NDArray[np.integer[Any]]
_Fragment = str | tuple[str]  # a text fragment, wrapped in a 1-tuple if it starts the sequence


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


class Encoder:
    """Encodes pieces with a tokenizer; text from the data never becomes a special token such as `</s>`.

    T5's tokenizers split a text at spaces and at added tokens and encode each word separately. So this class caches
    the ids of words, and only new words go to the tokenizer. A text with characters that could join across a space
    (combining marks, joiners, …) is encoded whole. The ids are therefore the tokenizer's own, which
    tests/commands/test_prepare.py checks with unusual Unicode text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.is_space_part_of_word = is_space_part_of_word(tokenizer)
        self.unk_token_id = tokenizer.unk_token_id
        self.dtype = choose_ids_dtype(len(tokenizer))
        self._tokenizer = tokenizer
        self._special_pattern = _compile_special_pattern(tokenizer)
        self._known: dict[_Fragment, bytes] = {}
        self._cut: re.Pattern[str] | None = None
        self._words: re.Pattern[str] | None = None
        self._splitter: TextSplitter | None = None
        self._drops_spaces = False
        if tokenizer.backend is not None:
            self._backend = _copy_backend(tokenizer)
            self._drops_spaces = not is_prepend_scheme_first(tokenizer)
            self._set_prepend_scheme("never")
            if _is_split_at_spaces(tokenizer):
                added = _list_added_tokens(tokenizer)
                self._splitter = TextSplitter(added, _get_normalizer(self._backend))
                self._cut = re.compile(f"({_match_any(added)})" if added else "(?!)")
                if is_prepend_scheme_first(tokenizer) and all(token[0] in added for token in added):
                    self._words = _compile_word_pattern(added)
                    self._plain_text = re.compile(f"[{_PLAIN_CHARACTERS}{re.escape(''.join(added))}]+")
                    self._beginnings = {" ", *(token[0] for token in added)}

    def encode(self, texts: list[str], first: list[bool]) -> list[Ids]:
        """Return the ids of each text, without EOS tokens; `first` is true for a text that begins a sequence."""
        if self._tokenizer.backend is None:
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) + BYTES_OFFSET for text in texts]
        if self._splitter is None or max(map(len, texts), default=0) <= LONG_TEXT_LENGTH:
            return self._encode(texts, first)
        return [self._encode_long(self._splitter, *each) for each in zip(texts, first, strict=True)]

    def _encode_long(self, splitter: TextSplitter, text: str, first: bool) -> Ids:
        parts = splitter.split(text)
        return np.concatenate([self._encode([part], [first and not number])[0] for number, part in enumerate(parts)])

    def _encode(self, texts: list[str], first: list[bool]) -> list[Ids]:
        known = self._known
        plans = [self._split_into_fragments(text, is_first) for text, is_first in zip(texts, first, strict=True)]
        found = [list(map(known.get, plan)) for plan in plans]
        if new := [number for number, parts in enumerate(found) if None in parts]:
            fresh = self._encode_new({f for number in new for f in plans[number] if f not in known})
            for number in new:
                found[number] = [known[f] if f in known else fresh[f] for f in plans[number]]
            if len(known) < MAX_CACHED_WORDS:
                words = (f for f in fresh if isinstance(f, str) and len(f) <= MAX_CACHED_WORD_LENGTH)
                known.update((f, fresh[f]) for f in words)
        return [np.frombuffer(b"".join(parts), self.dtype) for parts in found]  # type: ignore[arg-type]

    def _split_into_fragments(self, text: str, first: bool) -> list[_Fragment]:
        """Split a text into fragments that can be encoded separately: ` two`, ` hats`, an added token, …"""
        plan: list[_Fragment] = []
        for part in self._split_special_tokens(text):
            if self._words is not None and self._plain_text.fullmatch(part):
                words: list[str] = self._words.findall(part)
                if first and words[0][0] not in self._beginnings:
                    words[0] = " " + words[0]
                plan += words
            else:
                plan += self._split_by_added_tokens(part, first)
            first = False
        return plan

    def _split_by_added_tokens(self, text: str, first: bool) -> Iterator[_Fragment]:
        for number, segment in enumerate(self._cut.split(text) if self._cut else [text]):
            if not number % 2 and self._cut is not None and _PLAIN.fullmatch(segment):
                yield from self._split_into_words(segment, first)
            elif segment:
                yield (segment,) if first else segment
            first = first and not segment

    def _split_into_words(self, segment: str, first: bool) -> list[str]:
        """Split `two red hats` into `two`, ` red`, ` hats`; at the start of a sequence the first gets a space too."""
        if self._drops_spaces:
            return segment.split()
        words = segment.replace(" ", "\0 ").split("\0")
        if not words[0]:
            return words[1:]
        if first:
            words[0] = " " + words[0]
        return words

    def _encode_new(self, fragments: set[_Fragment]) -> dict[_Fragment, bytes]:
        """Encode fragments that are not in the cache."""
        fresh: dict[_Fragment, bytes] = {}
        for fragment in [f for f in fragments if len(f if isinstance(f, str) else f[0]) > LONG_TEXT_LENGTH]:
            if (ids := self._encode_long_word(fragment)) is not None:
                fresh[fragment] = ids
                fragments.remove(fragment)
        if beginnings := [fragment for fragment in fragments if isinstance(fragment, tuple)]:
            self._set_prepend_scheme("first")
            for beginning in beginnings:
                fresh[beginning] = self._to_bytes(self._backend.encode(beginning[0], add_special_tokens=False))
            self._set_prepend_scheme("never")
        others = [fragment for fragment in fragments if isinstance(fragment, str)]
        found = self._backend.encode_batch_fast(others, add_special_tokens=False) if others else []
        for fragment, encoding in zip(others, found, strict=True):
            fresh[fragment] = self._to_bytes(encoding)
        return fresh

    def _encode_long_word(self, fragment: _Fragment) -> bytes | None:
        """Encode a single word that would take the tokenizer too much memory; None if the text is no such word."""
        text, is_first = (fragment, False) if isinstance(fragment, str) else (fragment[0], True)
        word = text.removeprefix(" ")
        has_metaspace = is_first or self._drops_spaces or word != text
        if self._splitter is None or self._unigram is None:
            return None
        if not (word.isascii() and word.isprintable()):
            word = self._splitter.normalize_word(word)
        if re.search(rf"\s|{METASPACE}", word):
            return None
        word = METASPACE * has_metaspace + word
        return np.fromiter(self._unigram.encode(word), self.dtype).tobytes()

    @cached_property
    def _unigram(self) -> Unigram | None:
        return load_unigram(self._backend)

    def _set_prepend_scheme(self, scheme: str) -> None:
        """Set whether the first word of a text gets a metaspace: "first" at the start of a sequence, or "never"."""
        if not self._drops_spaces:
            self._backend.pre_tokenizer.prepend_scheme = scheme

    def _to_bytes(self, encoding: Any) -> bytes:
        return np.asarray(encoding.ids, self.dtype).tobytes()

    def _split_special_tokens(self, text: str) -> list[str]:
        """Split each special token that the text spells out (`<` and `/s>`), so that it isn't encoded as one."""
        if self._special_pattern is None or not self._special_pattern.search(text):
            return [text]
        cuts = [0, *(match.start() + 1 for match in self._special_pattern.finditer(text)), len(text)]
        return [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if a < b]


def encode_batch(conversations: list[list[Piece]], encoder: Encoder, max_length: int) -> list[EncodedConversation]:
    """Encode conversations; `max_length` limits source and target separately, EOS tokens included."""
    shifted = [_shift_spaces(pieces, encoder) for pieces in conversations]
    texts = [piece.text for pieces in shifted for piece in pieces]
    ids = iter(encoder.encode(texts, [number == 0 for pieces in shifted for number in range(len(pieces))]))
    return [_join_pieces(pieces, [next(ids) for _ in pieces], max_length) for pieces in shifted]


def choose_ids_dtype(num_rows: int) -> np.dtype[Any]:
    """Return little-endian uint16 if every id fits, else int32."""
    return np.dtype("<u2" if num_rows <= 1 << 16 else "<i4")


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
            if before.text != " ":
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
            spans.append(_make_span(turn, system_end, turn_starts, source_end, target_start, length, max_length))
    return EncodedConversation(np.concatenate(ids_by_piece), spans)


def _make_span(
    turn: int,
    system_end: int,
    turn_starts: list[int],
    source_end: int,
    target_start: int,
    target_end: int,
    max_length: int,
) -> Span:
    """Truncate an example to `max_length`: drop the oldest turns first, then tokens from the start of the last turn.

    The system line stays; it is cut only if it would fill more than half of a source that is too long.
    """
    room = max_length - 1  # for the EOS token
    kept_system = system_end if source_end <= room else min(system_end, room // 2)
    earliest = source_end - (room - kept_system)
    source_start = system_end
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


def _get_normalizer(backend: Any) -> Callable[[str], str]:
    return backend.normalizer.normalize_str if backend.normalizer is not None else str


def _copy_backend(tokenizer: Tokenizer) -> Any:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.encode_special_tokens = True
    return backend


def _is_split_at_spaces(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer encodes each word separately, as T5's tokenizers do."""
    parts = read_pre_tokenizer_config(tokenizer)
    kinds = [part["type"] for part in parts.get("pretokenizers", [parts])]
    splits_at_metaspace = kinds == ["Metaspace"] and is_prepend_scheme_first(tokenizer)
    is_t5s = splits_at_metaspace or kinds == ["WhitespaceSplit", "Metaspace"]
    return is_t5s and '"split": true' in json.dumps(parts)


def _list_added_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the added tokens at which text is split, longest first, which is the order of the tokenizer."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return sorted((token.content for token in added if not token.special), key=len, reverse=True)


def _match_any(tokens: list[str]) -> str:
    return "|".join(map(re.escape, tokens))


def _compile_word_pattern(added: list[str]) -> re.Pattern[str]:
    """Compile a pattern for added tokens, words with the space before them, and spaces without a word after them."""
    beginnings = re.escape("".join(sorted({token[0] for token in added})))
    return re.compile(f"{_match_any(added)}| ?[^ {beginnings}]+| " if added else " ?[^ ]+| ")


def _compile_special_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Compile a pattern for special tokens that a text spells out; the tokenizer would encode them as their ids."""
    if tokenizer.backend is None:
        return None
    patterns = list(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True)))
    if tokenizer.backend.token_to_id("<0x00>") is not None:
        patterns.append("<0x[0-9A-F]{2}>")  # byte-fallback tokens, which SentencePiece never matches in a text
    return re.compile("|".join(patterns)) if patterns else None
