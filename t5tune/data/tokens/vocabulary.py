r"""Find characters that a tokenizer can't reproduce, and add tokens for them.

T5's vocabulary has no newline, tab, `<`, `\`, `^`, backquote, braces or `~`, and its tokenizer reduces runs of spaces
to one space. T5's embedding has more rows (32,128) than its tokenizer has tokens (32,100), so tokens for these
characters don't change its shape: they take unused embedding rows, and only those rows are trained.

A naive `add_tokens` loses whitespace: an added token is normalized first, which turns newline and tab into a space.
And T5's own pre-tokenizer drops whitespace and writes a metaspace (`▁`) after each added token, so that "\nx" and
"\n x" become the same ids. So the tokenizer is rebuilt: added tokens are matched before normalization, each remaining
space is kept as a metaspace, and otherwise only the first word of a text gets a metaspace (prepend_scheme "first").
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from t5tune.data.reading.formats import Conversation
from t5tune.data.tokens.tokenizer import Tokenizer, build_decoder
from t5tune.errors import ModelError
from t5tune.families import FASTCHAT_CHARACTERS, FASTCHAT_PAD, FASTCHAT_TOKENS
from t5tune.formatting import format_count

MISSING_CHARACTERS = ["\n", "\t", "<", "\\", "^", "`", "{", "}", "~"]
INDENTATION_TOKENS = ["\n" + " " * width for width in (2, 4, 6, 8, 10, 12, 14, 16)]
METASPACE = "▁"
REPLACEMENT_CHARACTER = "\ufffd"
MIN_TARGET_SHARE = 0.005  # a character gets a row if at least this share of the targets contains it
MAX_CACHED_CHARACTERS = 50_000
_SPACE_RUN = re.compile("  +")
_SPACE_RUN_INDEX = 0  # U+0000, which no record contains


class ExtendedTokenizer(NamedTuple):
    """A tokenizer with added tokens.

    Args:
        added: tokens that the base's tokenizer lacks, in the order of their ids.
        left_out: tokens that weren't added, because no unused embedding row was left.
    """

    tokenizer: Tokenizer
    added: list[str]
    left_out: list[str]


def extend_tokenizer(
    tokenizer: Tokenizer, add_tokens: list[str], num_rows: int, sample: Iterable[Conversation] = ()
) -> ExtendedTokenizer:
    """Add the tokens of `--add-tokens` to a tokenizer.

    Args:
        add_tokens: ["auto"], ["none"], ["fastchat"] or the tokens themselves.
        num_rows: rows of the base's embedding; every id must be smaller.
        sample: conversations; auto adds characters that the tokenizer can't encode and that at least
            MIN_TARGET_SHARE of their targets contain.
    """
    if not _has_metaspace(tokenizer):
        _check_none_requested(tokenizer, add_tokens)
        return ExtendedTokenizer(tokenizer, [], [])
    if add_tokens == ["none"]:
        return ExtendedTokenizer(tokenizer, [], [])
    num_unused = max(num_rows - len(tokenizer), 0)
    if add_tokens in (["auto"], ["fastchat"]) and all(_is_in_vocabulary(tokenizer, t) for t in FASTCHAT_CHARACTERS):
        # fastchat-t5, which was trained with these tokens
        return ExtendedTokenizer(_add_fastchat_tokens(tokenizer), [], [])
    if add_tokens == ["fastchat"]:
        _check_unused_rows(FASTCHAT_TOKENS, num_unused)
        return ExtendedTokenizer(_add_fastchat_tokens(tokenizer), list(FASTCHAT_TOKENS), [])
    if add_tokens == ["auto"]:
        return _add_missing_characters(tokenizer, num_unused, sample)
    wanted = [token for token in dict.fromkeys(add_tokens) if not _is_in_vocabulary(tokenizer, token)]
    _check_unused_rows(wanted, num_unused)
    return ExtendedTokenizer(_rebuild_with_tokens(tokenizer, wanted), wanted, [])


def _add_missing_characters(tokenizer: Tokenizer, num_unused: int, sample: Iterable[Conversation]) -> ExtendedTokenizer:
    """Add tokens for MISSING_CHARACTERS and for the characters in the most targets, as far as rows suffice."""
    # characters that it can't write even if it keeps whitespace; with byte fallback, this may be empty
    rebuilt = _rebuild_with_tokens(tokenizer, [])
    round_trip = make_round_trip(rebuilt)
    missing = [text for text in MISSING_CHARACTERS if round_trip(text) != text]
    check, lost, num_targets = RoundTripCheck(tokenizer), LostCharacterCounts(), 0
    for conversation in sample:
        num_targets += len(conversation.targets)
        lost.add(check.count_lost(conversation))
    counts = {text: number for text, _, number in lost.iterate_by_targets()}
    frequent = [text for text, number in counts.items() if number >= MIN_TARGET_SHARE * num_targets]
    round_trip = check.round_trip
    unwritable = [text for text in frequent if round_trip(text) == REPLACEMENT_CHARACTER]
    wanted = missing + [text for text in unwritable if text not in missing]
    by_targets = sorted(wanted, key=lambda text: -counts.get(text, 0))
    left_out = by_targets[num_unused:]
    added = [text for text in wanted if text not in left_out]
    # indentation tokens shorten code, but nothing is lost without them: they only take the remaining rows
    added += (INDENTATION_TOKENS if "\n" in missing else [])[: num_unused - len(added)]
    if not added:
        loses_whitespace = any(round_trip(text) != text for text in MISSING_CHARACTERS)
        return ExtendedTokenizer(rebuilt if loses_whitespace and not left_out else tokenizer, [], left_out)
    _add_tokens(rebuilt, added)
    return ExtendedTokenizer(rebuilt, added, left_out)


class LostCharacterCounts:
    """Counts of lost characters and of runs of spaces, in an array whose size doesn't depend on the data."""

    def __init__(self) -> None:
        # occurrences, and targets that contain the character; a row is searched without copying it
        self._counts = np.zeros((2, sys.maxunicode + 1), np.int64)

    def add(self, lost: Mapping[str, tuple[int, int]]) -> None:
        """Add the result of `RoundTripCheck.count_lost`."""
        for text, counts in lost.items():
            self._counts[:, _SPACE_RUN_INDEX if len(text) > 1 else ord(text)] += counts

    def iterate_by_targets(self) -> Iterator[tuple[str, int, int]]:
        """Yield (text, occurrences, targets that contain it), the text in the most targets first."""
        indices = np.flatnonzero(self._counts[1])
        for index in indices[np.argsort(-self._counts[1, indices], kind="stable")]:
            count, num_targets = self._counts[:, index].tolist()
            yield "  " if index == _SPACE_RUN_INDEX else chr(index), count, num_targets


class RoundTripCheck:
    """Checks which characters survive encoding and decoding; caches the results."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.round_trip = lru_cache(MAX_CACHED_CHARACTERS)(make_round_trip(tokenizer))
        self._unchanged = {text for text in map(chr, range(128)) if self.round_trip(text) == text}
        self._plain = re.compile(f"[{re.escape(''.join(sorted(self._unchanged)))}]*" if self._unchanged else "")
        self._keeps_runs = self.round_trip("  ") == "  "

    def count_lost(self, conversation: Conversation) -> dict[str, tuple[int, int]]:
        """Count characters that decoding changes: character -> (occurrences, targets that contain it).

        Two spaces represent any run of spaces.
        """
        lost: dict[str, tuple[int, int]] = {}
        for target in conversation.targets:
            for text, count in self._iterate_lost(target):
                before = lost.get(text, (0, 0))
                lost[text] = before[0] + count, before[1] + 1
        return lost

    def _iterate_lost(self, text: str) -> Iterator[tuple[str, int]]:
        if not self._plain.fullmatch(text):
            for character in sorted(set(text) - self._unchanged):
                if self.round_trip(character) != character:
                    yield character, text.count(character)
        if not self._keeps_runs and "  " in text:
            yield "  ", len(_SPACE_RUN.findall(text))


def make_round_trip(tokenizer: Tokenizer) -> Callable[[str], str]:
    """Return a function that encodes and decodes a character between two letters; REPLACEMENT_CHARACTER: no token.

    A vocabulary that has letters only as words, such as ProtT5's, can't write two in a row. There, spaces surround any
    character but whitespace.
    """

    def encode(text: str) -> list[int] | None:
        ids = tokenizer.encode(text)
        return None if tokenizer.backend is not None and tokenizer.unk_token_id in ids else ids

    letter = next((each for each in chain("a", _iterate_letters(tokenizer)) if encode(each)), "a")
    space = "" if encode(2 * letter) else " "

    def round_trip(text: str) -> str:
        before, after = (letter, letter) if text.isspace() else (letter + space, space + letter)
        ids = encode(before + text + after)
        if ids is None:
            return REPLACEMENT_CHARACTER
        back = tokenizer.decode(ids)
        is_framed = back.startswith(before) and back.endswith(after)
        return back[len(before) : len(back) - len(after)] if is_framed else back

    return round_trip


def _iterate_letters(tokenizer: Tokenizer) -> Iterator[str]:
    tokens = (token.removeprefix(METASPACE) for token in tokenizer.get_vocab())
    yield from sorted(token for token in tokens if len(token) == 1 and token.isalpha())


def is_prepend_scheme_first(tokenizer: Tokenizer) -> bool:
    """Return whether only the first word of a sequence gets a metaspace if no space is before it.

    If so, a text that continues a sequence must be encoded without a metaspace before its first word.
    """
    return _has_metaspace(tokenizer) and read_pre_tokenizer_config(tokenizer).get("prepend_scheme") == "first"


def list_joined_spaces(tokenizer: Tokenizer) -> tuple[str, ...]:
    """List the whitespace that becomes part of the next word's token (`▁word`), because it has no token."""
    if not _has_metaspace(tokenizer):
        return ()
    normalizer = tokenizer.backend.normalizer
    normalize = normalizer.normalize_str if normalizer is not None else str
    return tuple(text for text in " \n\t" if normalize(text) == " " and not _is_in_vocabulary(tokenizer, text))


def read_pre_tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the pre-tokenizer's configuration in tokenizer.json: how a text is split into words."""
    part = tokenizer.backend.pre_tokenizer
    return dict(json.loads(part.__getstate__())) if part is not None else {}


def _is_in_vocabulary(tokenizer: Tokenizer, token: str) -> bool:
    return tokenizer.backend.token_to_id(token) is not None


def _has_metaspace(tokenizer: Tokenizer) -> bool:
    return tokenizer.backend is not None and "Metaspace" in json.dumps(read_pre_tokenizer_config(tokenizer))


def _check_none_requested(tokenizer: Tokenizer, add_tokens: list[str]) -> None:
    """Refuse tokens for a tokenizer that can't be rebuilt with them; it has bytes for everything without a token."""
    if add_tokens in (["none"], ["auto"]):
        return
    wanted = FASTCHAT_TOKENS if add_tokens == ["fastchat"] else add_tokens
    known = tokenizer.get_vocab()
    if missing := [token for token in wanted if token not in known]:
        problem = f"add_tokens: {', '.join(map(repr, missing))}: t5tune can't add tokens to this base's tokenizer"
        raise ModelError(problem, hint="leave out --add-tokens: the tokenizer writes every text without them")


def _check_unused_rows(tokens: list[str], num_unused: int) -> None:
    if len(tokens) > num_unused:
        rows = f"the embedding has only {format_count(max(num_unused, 0), 'unused row')}"
        problem = f"add_tokens: {format_count(len(tokens), 'token')} ({' '.join(map(repr, tokens))}), but {rows}"
        raise ModelError(problem, hint="name fewer tokens, or use --add-tokens none")


def _rebuild_with_tokens(tokenizer: Tokenizer, tokens: list[str]) -> Tokenizer:
    """Rebuild the tokenizer with `tokens`, so that decoding restores all whitespace (see the module's docstring)."""
    backend = _copy_without_merging_spaces(tokenizer)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(METASPACE, "first", True)
    backend.decoder = build_decoder(backend, decoders.Metaspace(METASPACE, "first", True))
    rebuilt = replace(tokenizer, backend=backend)
    _add_tokens(rebuilt, tokens)
    return rebuilt


def _add_tokens(tokenizer: Tokenizer, tokens: list[str]) -> None:
    tokenizer.backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])


def _add_fastchat_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Add FastChat's tokens with FastChat's ids: its pad token, then its nine tokens, including the space."""
    backend = _copy_without_merging_spaces(tokenizer)
    backend.add_special_tokens([AddedToken(FASTCHAT_PAD, normalized=False, special=True)])
    backend.add_tokens([AddedToken(token, normalized=False) for token in FASTCHAT_CHARACTERS])
    # each space is a separate token here, so a metaspace decodes to nothing
    backend.decoder = build_decoder(backend, decoders.Replace(METASPACE, ""), decoders.Fuse())
    special = (*tokenizer.special_tokens, FASTCHAT_PAD)
    return replace(tokenizer, backend=backend, pad_token=FASTCHAT_PAD, special_tokens=special)


def _copy_without_merging_spaces(tokenizer: Tokenizer) -> Any:
    """Copy the backend with a normalizer that keeps runs of spaces: only the character map remains.

    The vocabulary isn't copied: mT5's takes 0.4 GB.
    """
    backend = tokenizer.backend
    copy, normalizer = Backend(backend.model), backend.normalizer
    parts: Any = normalizer if isinstance(normalizer, normalizers.Sequence) else [normalizer]
    copy.normalizer = next((part for part in parts if isinstance(part, normalizers.Precompiled)), None)
    for name in ("pre_tokenizer", "post_processor", "decoder"):
        setattr(copy, name, getattr(backend, name))
    copy.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    return copy
