"""Encode texts to the tokenizer's own ids, each word only once, and in bounded memory.

    encoder = make_encoder(tokenizer)
    encoder.encode([Beginning("Two red"), " hats"])  # the ids of "Two red hats", in two arrays

Text from the data never becomes a special token such as `</s>`. `encoder.markers.split` finds the special tokens that a
conversation template spells out.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from t5tune.data.tokens.tokenizer import BYTES_OFFSET, Tokenizer
from t5tune.data.tokens.vocabulary import is_prepend_scheme_first, list_joined_spaces, read_pre_tokenizer_config

MAX_CACHED_WORDS = 100_000  # about 20 MB
MAX_CACHED_WORD_LENGTH = 40  # characters
PART_LENGTH = 1 << 16  # characters; longer texts are encoded in parts: the tokenizer takes 130 bytes per character
# Letters, digits and symbols that Unicode normalization never joins with a neighbor across a space: no combining mark,
# joiner or modifier, nothing that decomposes into a space and a mark, and no whitespace except the space itself.
_PLAIN_CHARACTERS = (
    " -~\u00a1-\u00a7\u00a9\u00ab\u00ac\u00ae\u00b0-\u00b3\u00b5-\u00b7\u00b9-\u02d7\u0391-\u03ce\u0400-\u0482"
    "\u048a-\u052f\u2010-\u2027\u2030-\u203b\u20ac\u2190-\u21ff\u3001-\u303f\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff5e"
)
_PLAIN = re.compile(f"[{_PLAIN_CHARACTERS}]+")
_NEVER = "(?!)"  # a pattern that matches nothing
# letters, digits, punctuation, symbols and spaces, but no marks, joiners or modifiers
_SEPARATE_CATEGORIES = {"Lu", "Ll", "Lo", "Nd", "Po", "Pd", "Ps", "Pe", "So", "Sm", "Sc", "Zs"}

Ids = npt.NDArray[np.integer[Any]]


class Beginning(NamedTuple):
    """A text that begins a sequence. A plain `str` continues one."""

    text: str


Text = str | Beginning


class PlacedIds(NamedTuple):
    """Ids, and where they are in a text: number i is from the character `starts[i]` to before `ends[i]`.

    A token may include the space before it, and the tokens of a single character's bytes all have its place.
    """

    ids: Ids
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


class Markers:
    """Finds the special tokens that a conversation template spells out, as the tokenizer does in any text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = zip(tokenizer.special_tokens, tokenizer.convert_tokens_to_ids([*tokenizer.special_tokens]), strict=True)
        known = {token: index for token, index in ids if index >= 0}
        added = {} if tokenizer.backend is None else tokenizer.backend.get_added_tokens_decoder()
        flags = {token.content: token for token in added.values()}
        patterns = []
        for token in sorted(known, key=len, reverse=True):
            # some tokens include the whitespace around them
            before, after = (r"\s*" if getattr(flags.get(token), side, False) else "" for side in ("lstrip", "rstrip"))
            patterns.append(f"{before}({re.escape(token)}){after}")
        pattern = re.compile("|".join(patterns) or _NEVER)
        # not a bound method, whose cycle would stay until Python looks for cycles, which a server does rarely
        self.split = functools.lru_cache(4096)(functools.partial(_split_at_markers, pattern, known))


def _split_at_markers(pattern: re.Pattern[str], ids: Mapping[str, int], text: str) -> tuple[str | int, ...]:
    """Split a template's text into plain texts and the ids of special tokens."""
    parts: list[str | int] = []
    start = 0
    for match in pattern.finditer(text):
        assert match.lastindex is not None
        parts += [text[start : match.start()], ids[match[match.lastindex]]]
        start = match.end()
    return tuple(part for part in (*parts, text[start:]) if part != "")


def make_encoder(tokenizer: Tokenizer) -> "Encoder":
    if tokenizer.backend is None:
        return ByteEncoder(tokenizer)
    is_by_words = _is_split_at_spaces(tokenizer) and not _has_context_tokens(tokenizer)
    return WordEncoder(tokenizer) if is_by_words else WholeTextEncoder(tokenizer)


class ByteEncoder:
    """Encodes texts for ByT5, whose ids are bytes."""

    joined_spaces: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.special_ids = tokenizer.special_ids
        self.markers = Markers(tokenizer)
        self.dtype = choose_ids_dtype(len(tokenizer))

    def adds_token(self, text: str) -> bool:
        """Whether the space at the beginning of a text is an additional token."""
        return False

    def encode(self, texts: list[Text]) -> list[Ids]:
        """Return the ids of each text, without special tokens."""
        return [np.frombuffer(_get_text(text).encode(), np.uint8).astype(self.dtype) + BYTES_OFFSET for text in texts]

    def encode_with_places(self, texts: list[str]) -> list[PlacedIds]:
        """Return the ids of texts that begin a sequence, without special tokens, with their places."""
        return [PlacedIds(ids, *_find_bytes(text)) for text, ids in zip(texts, self.encode([*texts]), strict=True)]


class WholeTextEncoder:
    """Encodes each text with a separate call to the tokenizer, for tokenizers that may not encode words separately."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.special_ids = tokenizer.special_ids
        self.markers = Markers(tokenizer)
        self.joined_spaces = list_joined_spaces(tokenizer)
        self._tokenizers = _TokenizerPair(tokenizer)
        self.adds_token = _make_space_check(tokenizer, self._tokenizers.encode_texts)  # with self, it would be a cycle
        self.dtype = self._tokenizers.dtype

    def encode(self, texts: list[Text]) -> list[Ids]:
        """Return the ids of each text, without special tokens."""
        return self._tokenizers.encode_texts(texts)

    def encode_with_places(self, texts: list[str]) -> list[PlacedIds]:
        """Return the ids of texts that begin a sequence, without special tokens, with their places."""
        return self._tokenizers.encode_with_places([self._cut(text) for text in texts])

    def _cut(self, text: str) -> list[str]:
        """Cut a text into parts whose concatenated ids are the ids of the text."""
        return self._tokenizers.split_special_tokens(text)


class WordEncoder(WholeTextEncoder):
    """Encodes texts for T5's tokenizers, which split a text at spaces and at added tokens and encode each word alone.

    The ids of words are cached, and only new words go to the tokenizer. Text with characters that could join across a
    space (combining marks, joiners, …) is encoded as a whole. So the ids are the tokenizer's, which
    test_tokenizer.py and test_sentencepiece.py in tests/data/tokens check with unusual Unicode text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._known: dict[Text, bytes] = {}  # only of type str, because Python finds those faster
        self._drops_spaces = not is_prepend_scheme_first(tokenizer)
        added = _list_added_tokens(tokenizer)
        self._added = re.compile(f"({_match_any(added)})")
        starts = re.escape("".join(sorted({token[0] for token in added})))
        # a text of plain characters is split with a single pattern, unless a word could contain part of an added token
        is_simple = not self._drops_spaces and all(token[0] in added for token in added)
        self._simple_text = re.compile(f"[{_PLAIN_CHARACTERS}{re.escape(''.join(added))}]+" if is_simple else _NEVER)
        # added tokens, words with the space before them, and spaces without a word after them
        self._words = re.compile(f"{_match_any(added)}| ?[^ {starts}]+| ")
        # a word that has the same ids at the beginning of a sequence as after a space
        is_alike = is_simple and " " not in starts
        self._first_word = re.compile(f"(?![ {starts}])[{_PLAIN_CHARACTERS}]+" if is_alike else _NEVER)
        # where a text may be cut: before an added token (\1), and before the space between two characters (\2, \3)
        space = "[ \t\n]" if self._drops_spaces else " "
        self._cuts = re.compile(f"({_match_any(added)})|(?<=(.))(?={space}(.))", re.DOTALL)
        normalizer = tokenizer.backend.normalizer
        normalize = normalizer.normalize_str if normalizer is not None else str
        self._is_separate = functools.lru_cache(4096)(functools.partial(_is_separate, normalize))

    def encode(self, texts: list[Text]) -> list[Ids]:
        """Return the ids of each text, without special tokens."""
        if max(map(len, map(_get_text, texts)), default=0) <= PART_LENGTH:
            return self._encode(texts)
        return [np.concatenate([self._encode([part])[0] for part in _split(text, self._cut)]) for text in texts]

    def measure_longest_word(self, text: str) -> int:
        """Return the length of the longest part of a text that can't be cut, in characters."""
        return max(end - start for start, end in pairwise(chain([0], self._find_cuts(text), [len(text)])))

    def _cut(self, text: str) -> list[str]:
        """Cut a text into parts of about PART_LENGTH characters, whose concatenated ids are the ids of the text."""
        parts: list[str] = []
        for whole in super()._cut(text):
            if len(whole) <= PART_LENGTH:
                parts.append(whole)
                continue
            bounds = [0]
            for position in self._find_cuts(whole):
                if position - bounds[-1] >= PART_LENGTH:
                    bounds.append(position)
            parts += (whole[start:end] for start, end in pairwise([*bounds, len(whole)]))
        return parts

    def _find_cuts(self, text: str) -> Iterator[int]:
        for match in self._cuts.finditer(text):
            if match[1] or (self._is_separate(match[2]) and self._is_separate(match[3])):
                yield match.start()

    def _encode(self, texts: list[Text]) -> list[Ids]:
        known = self._known
        plans = [self._split_into_fragments(text) for text in texts]
        found = [list(map(known.get, plan)) for plan in plans]
        if new := [number for number, parts in enumerate(found) if None in parts]:
            fresh = self._tokenizers.encode({f for number in new for f in plans[number] if f not in known})
            for number in new:
                found[number] = [known[f] if f in known else fresh[f] for f in plans[number]]
            if len(known) < MAX_CACHED_WORDS:
                words = (f for f in fresh if isinstance(f, str) and len(f) <= MAX_CACHED_WORD_LENGTH)
                known.update((word, fresh[word]) for word in words)
        return [np.frombuffer(b"".join(parts), self.dtype) for parts in found]  # type: ignore[arg-type]

    def _split_into_fragments(self, text: Text) -> list[Text]:
        """Split a text into fragments that can be encoded separately: ` two`, ` hats`, an added token, …"""
        plan: list[Any] = []
        for part in self._tokenizers.split_special_tokens(_get_text(text)):
            is_simple = self._simple_text.fullmatch(part)
            plan += self._words.findall(part) if is_simple else self._split_by_added_tokens(part)
        if plan and isinstance(text, Beginning):
            # the ids of the word after a space may be cached
            plan[0] = f" {plan[0]}" if self._first_word.fullmatch(plan[0]) else Beginning(plan[0])
        return plan

    def _split_by_added_tokens(self, text: str) -> Iterator[str]:
        for number, segment in enumerate(self._added.split(text)):
            if not number % 2 and _PLAIN.fullmatch(segment):
                yield from self._split_into_words(segment)
            elif segment:
                yield segment

    def _split_into_words(self, segment: str) -> list[str]:
        """Split `two red hats` into `two`, ` red`, ` hats`."""
        if self._drops_spaces:
            return segment.split()
        words = segment.replace(" ", "\0 ").split("\0")
        return words if words[0] else words[1:]


Encoder = ByteEncoder | WholeTextEncoder


class _TokenizerPair:
    """The tokenizer, for texts that begin a sequence and for texts that continue one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.dtype = choose_ids_dtype(len(tokenizer))
        self._beginning, self._continuing = _copy_backend(tokenizer.backend), _copy_backend(tokenizer.backend)
        if is_prepend_scheme_first(tokenizer):
            config = read_pre_tokenizer_config(tokenizer)
            self._continuing.pre_tokenizer = pre_tokenizers.Metaspace(config["replacement"], "never", config["split"])
        self._special_pattern = _compile_special_pattern(tokenizer)

    def split_special_tokens(self, text: str) -> list[str]:
        """Split each special token that the text spells out (`<` and `/s>`), so that it isn't encoded as one."""
        if not self._special_pattern.search(text):
            return [text]
        cuts = [0, *(match.start() + 1 for match in self._special_pattern.finditer(text)), len(text)]
        return [text[start:end] for start, end in pairwise(cuts) if start < end]

    def encode_texts(self, texts: list[Text]) -> list[Ids]:
        """Return the ids of each text, without special tokens."""
        plans = [_split(text, self.split_special_tokens) for text in texts]
        ids = self.encode({part for plan in plans for part in plan})
        return [np.frombuffer(b"".join([ids[part] for part in plan]), self.dtype) for plan in plans]

    def encode(self, texts: set[Text]) -> dict[Text, bytes]:
        """Return the bytes of each text's ids."""
        found: dict[Text, bytes] = {}
        for backend, kind in ((self._beginning, Beginning), (self._continuing, str)):
            chosen = [text for text in texts if isinstance(text, kind)]
            encodings = backend.encode_batch_fast(list(map(_get_text, chosen)), add_special_tokens=False)
            for text, encoding in zip(chosen, encodings, strict=True):
                found[text] = np.asarray(encoding.ids, self.dtype).tobytes()
        return found

    def encode_with_places(self, texts: list[list[str]]) -> list[PlacedIds]:
        """Return the ids and the places of each text, which is cut into at least one part."""
        begun = self._beginning.encode_batch([parts[0] for parts in texts], add_special_tokens=False)
        return [self._join_parts(*pair) for pair in zip(texts, begun, strict=True)]

    def _join_parts(self, parts: list[str], begun: Any) -> PlacedIds:
        """Join the encoding of the first part with the rest, which is encoded part by part to save memory."""
        ids, places = [np.asarray(begun.ids, self.dtype)], [np.array(begun.offsets, np.int64).reshape(-1, 2)]
        start = len(parts[0])
        for part in parts[1:]:
            encoding = self._continuing.encode(part, add_special_tokens=False)
            ids.append(np.asarray(encoding.ids, self.dtype))
            places.append(np.array(encoding.offsets, np.int64).reshape(-1, 2) + start)
            start += len(part)
        starts, ends = np.concatenate(places).T
        return PlacedIds(np.concatenate(ids), starts, ends)


def _copy_backend(backend: Any) -> Any:
    """Copy a tokenizer for encoding: the copy treats special tokens as text, and shares the model, the largest part."""
    copy = Backend(backend.model)
    copy.normalizer, copy.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    copy.add_tokens([added[index] for index in sorted(added)])
    assert copy.get_added_tokens_decoder() == added
    copy.encode_special_tokens = True
    return copy


def _find_bytes(text: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where the character of each UTF-8 byte of a text starts and ends."""
    sizes = [len(character.encode()) for character in text]
    starts = np.repeat(np.arange(len(text)), sizes)
    return starts, starts + 1


def choose_ids_dtype(num_rows: int) -> np.dtype[Any]:
    """Return little-endian uint16 if every id fits, else int32."""
    return np.dtype("<u2" if num_rows <= 1 << 16 else "<i4")


def _get_text(text: Text) -> str:
    return text if isinstance(text, str) else text.text


def _split(text: Text, split: Callable[[str], list[Any]]) -> list[Text]:
    # the first part begins a sequence if the text does
    if isinstance(text, str):
        return split(text)
    parts = split(text.text)
    return [Beginning(parts[0]), *parts[1:]] if parts else []


def _is_separate(normalize: Callable[[str], str], character: str) -> bool:
    texts = (f"a {character}", f"{character} a")
    return unicodedata.category(character) in _SEPARATE_CATEGORIES and all(normalize(text) == text for text in texts)


def _is_split_at_spaces(tokenizer: Tokenizer) -> bool:
    parts = read_pre_tokenizer_config(tokenizer)
    kinds = [part.get("type") for part in parts.get("pretokenizers", [parts])]
    splits_at_metaspace = kinds == ["Metaspace"] and is_prepend_scheme_first(tokenizer)
    is_t5s = splits_at_metaspace or kinds == ["WhitespaceSplit", "Metaspace"]
    return is_t5s and '"split": true' in json.dumps(parts)


def _has_context_tokens(tokenizer: Tokenizer) -> bool:
    # not found by their text alone, but in the normalized text or as whole words, as add_tokens(["{"]) makes them
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return any((token.normalized or token.single_word) and not token.special for token in added)


def _list_added_tokens(tokenizer: Tokenizer) -> list[str]:
    # longest first, as the tokenizer matches them
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return sorted((token.content for token in added if not token.special), key=len, reverse=True)


def _make_space_check(tokenizer: Tokenizer, encode: Callable[[list[Text]], list[Ids]]) -> Callable[[str], bool]:
    """Make the function `adds_token` of an encoder: it asks the tokenizer, except about plain characters."""
    if not (is_prepend_scheme_first(tokenizer) and " " in list_joined_spaces(tokenizer)):
        return lambda text: False
    # a second space belongs to the text and isn't joined to the first
    plain = re.compile(f" (?: |(?!{_match_any(_list_added_tokens(tokenizer))})[{_PLAIN_CHARACTERS}])")

    @functools.lru_cache(4096)
    def ask(text: str) -> bool:
        with_space, without = encode([text, Beginning(text[1:])])
        return bool(np.array_equal(with_space[1:], without))

    return lambda text: plain.match(text) is None and ask(text[:MAX_CACHED_WORD_LENGTH])


def _match_any(tokens: list[str]) -> str:
    return "|".join(map(re.escape, tokens)) or _NEVER


def _compile_special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    patterns = list(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True)))
    if tokenizer.backend.token_to_id("<0x00>") is not None:
        patterns.append("<0x[0-9A-F]{2}>")  # byte-fallback tokens, which SentencePiece never matches in a text
    return re.compile("|".join(patterns) or _NEVER)
