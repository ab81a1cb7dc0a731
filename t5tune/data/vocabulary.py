r"""What a tokenizer can't write, and the tokens that mend it.

T5's vocabulary has no newline, tab, `<`, `\`, `^`, backquote, braces or `~`, and runs of spaces shrink to one.
Its embedding has more rows than its tokenizer has entries (32,128 and 32,100), so tokens for these need no
change of shape: they take the spare rows, and only those rows are trained.

A naive `add_tokens` ruins every space of a text: a token is normalised first, and newline and tab become a
space in it. And T5's own pre-tokenizer drops white space and writes the mark of a word's start behind each
added token, so that "\nx" and "\n x" are the same. So the tokenizer is rebuilt: tokens are matched before
normalisation, each remaining space is kept as a mark, and a mark is put only before the first word of a text.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

import numpy as np

from t5tune.data.formats import Conversation
from t5tune.data.tokenizer import Tokenizer, decoder_of
from t5tune.errors import ModelError

CHARACTERS = ["\n", "\t", "<", "\\", "^", "`", "{", "}", "~"]
INDENTATION = ["\n" + " " * width for width in (2, 4, 6, 8, 10, 12, 14, 16)]
FASTCHAT_PAD = "[PAD]"
FASTCHAT = ["<", "{", "\n", "}", "`", " ", "\\", "^", "\t"]
MARK = "▁"
UNKNOWN = "\ufffd"
SHARE = 0.005  # of the answers that must hold a character for a row to be spent on it
MOST_CHARACTERS = 50_000  # that are remembered
_RUN = re.compile("  +")
_RUN_PLACE = 0  # no record holds U+0000


def extend_tokenizer(
    tokenizer: Tokenizer, add_tokens: list[str], num_rows: int, sample: Iterable[Conversation] = ()
) -> tuple[Tokenizer, list[str], list[str]]:
    """Give a tokenizer the tokens that `--add-tokens` asks for.

    Args:
        add_tokens: ["auto"], ["none"], ["fastchat"] or the tokens themselves.
        num_rows: rows of the base's embedding, which the ids must stay below.
        sample: conversations; auto adds what SHARE of their answers hold and the tokenizer can't write.

    Returns: the tokenizer (the same where nothing is added), the added tokens in the order of their ids, and those
    for which no row was left.

    Raises:
        ModelError: there are fewer spare rows than tokens asked for.
    """
    if add_tokens == ["none"] or not _is_metaspace(tokenizer):
        return tokenizer, [], []
    spare = num_rows - len(tokenizer)
    left_out: list[str] = []
    if add_tokens in (["auto"], ["fastchat"]) and all(_is_entry(tokenizer, text) for text in FASTCHAT):
        return _fastchat(tokenizer), [], []  # fastchat-t5: it was trained with them
    if add_tokens == ["fastchat"]:
        _check_room([FASTCHAT_PAD, *FASTCHAT], spare)
        return _fastchat(tokenizer), [FASTCHAT_PAD, *FASTCHAT], []
    if add_tokens == ["auto"]:
        missing = [text for text in CHARACTERS if not can_write(tokenizer, text)]
        wanted = missing + [text for text in _costly(tokenizer, sample) if text not in missing]
        room = max(spare, len(missing))
        wanted, left_out = wanted[:room], wanted[room:]
        # indentation makes code shorter, but nothing is lost without it: it takes what room is left
        wanted += (INDENTATION if "\n" in missing else [])[: room - len(wanted)]
        if not wanted:
            return tokenizer, [], []
    else:
        # the rebuilt tokenizer keeps white space, so the two kinds that it would lose come with any list
        wanted = [token for token in dict.fromkeys([*add_tokens, "\n", "\t"]) if not _is_entry(tokenizer, token)]
    _check_room(wanted, spare)
    return _rebuilt(tokenizer, wanted), wanted, left_out


def _costly(tokenizer: Tokenizer, sample: Iterable[Conversation]) -> list[str]:
    """Characters that are unknown to the tokenizer and stand in SHARE of the answers or more, the costliest first."""
    writable, lost = Writable(tokenizer), Lost()
    answers = 0
    for conversation in sample:
        answers += sum(turn.is_target for turn in conversation.turns)
        lost.add(writable.lost(conversation))
    held = ((text, number) for text, _, number in lost.worst())
    enough = takewhile(lambda item: item[1] >= SHARE * answers, held)
    return [text for text, _ in enough if writable.becomes(text) == UNKNOWN]


class Lost:
    """Counts of lost characters, and of runs of spaces: an array, which all of Unicode makes no larger."""

    def __init__(self) -> None:
        self._counts = np.zeros((sys.maxunicode + 1, 2), np.int64)  # (how often, in how many answers)

    def add(self, lost: Mapping[str, tuple[int, int]]) -> None:
        """Add what `Writable.lost` gave."""
        for text, counts in lost.items():
            self._counts[_RUN_PLACE if len(text) > 1 else ord(text)] += counts

    def worst(self) -> Iterator[tuple[str, int, int]]:
        """(text, how often, in how many answers), what stands in the most answers first."""
        places = np.flatnonzero(self._counts[:, 1])
        for place in places[np.argsort(-self._counts[places, 1], kind="stable")]:
            often, answers = self._counts[place].tolist()
            yield "  " if place == _RUN_PLACE else chr(place), often, answers


class Writable:
    """What of a text a tokenizer can't write; remembers the characters that it was asked for last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._becomes: dict[str, str] = {}
        self._fine: set[str] = set()
        ascii_fine = [text for text in map(chr, range(128)) if self.becomes(text) == text]
        self._plain = re.compile("[" + re.escape("".join(ascii_fine)) + "]*")
        self._keeps_runs = self.becomes("  ") == "  "

    def lost(self, conversation: Conversation) -> dict[str, tuple[int, int]]:
        """Characters (and runs of spaces, as two) of the answers that don't come back -> (how often, in how many)."""
        lost: dict[str, tuple[int, int]] = {}
        for turn in conversation.turns:
            if turn.is_target:
                for text, count in self._lost(turn.text):
                    before = lost.get(text, (0, 0))
                    lost[text] = before[0] + count, before[1] + 1
        return lost

    def becomes(self, text: str) -> str:
        """What comes back of a text between two letters; UNKNOWN where it has no token."""
        if text not in self._becomes:
            if len(self._becomes) >= MOST_CHARACTERS:
                self._becomes.clear()
                self._fine.clear()
            self._becomes[text] = _round_trip(self._tokenizer, text)
            if self._becomes[text] == text:
                self._fine.add(text)
        return self._becomes[text]

    def _lost(self, text: str) -> Iterator[tuple[str, int]]:
        if not self._plain.fullmatch(text):
            for character in sorted(set(text) - self._fine):
                if self.becomes(character) != character:
                    yield character, text.count(character)
        if not self._keeps_runs and "  " in text:
            yield "  ", len(_RUN.findall(text))


def _round_trip(tokenizer: Tokenizer, text: str) -> str:
    ids = tokenizer.encode(f"a{text}b")
    if tokenizer.backend is not None and tokenizer.unk_token_id in ids:
        return UNKNOWN
    back = tokenizer.decode(ids)
    return back[1:-1] if back[:1] == "a" and back[-1:] == "b" else back


@dataclass(frozen=True)
class TextRun:
    """Tokens in a row as text: `added` is one added token, `unknown` one that stands for what has none."""

    text: str
    kind: Literal["text", "added", "unknown", "end"]


def text_runs(ids: list[int], tokenizer: Tokenizer, added: set[int], before: int | None = None) -> Iterator[TextRun]:
    """Tokens as runs of text, in order; every added, unknown and end token stands alone.

    Args:
        before: the token in front of them; None: they begin a text.
    """
    plain: list[int] = []
    for index in ids:
        kind: Literal["added", "unknown", "end"] | None = (
            "added"
            if index in added
            else "unknown"
            if index == tokenizer.unk_token_id
            else "end"
            if index == tokenizer.eos_token_id
            else None
        )
        if kind is None:
            plain.append(index)
            continue
        if plain:
            yield TextRun(_text_behind(before, plain, tokenizer), "text")
        plain, before = [], index
        yield TextRun(tokenizer.decode([index]), kind)
    if plain:
        yield TextRun(_text_behind(before, plain, tokenizer), "text")


def _text_behind(before: int | None, ids: list[int], tokenizer: Tokenizer) -> str:
    """Their text behind another token: a decoder drops the space that the first may carry at a text's start."""
    if before is None:
        return tokenizer.decode(ids)
    return tokenizer.decode([before, *ids]).removeprefix(tokenizer.decode([before]))


def can_write(tokenizer: Tokenizer, text: str) -> bool:
    """Whether `text` between two letters comes back from the tokenizer as it went in."""
    return _round_trip(tokenizer, text) == text


def extends_words(tokenizer: Tokenizer) -> bool:
    """Whether a text that follows another must be encoded without a mark before its first word."""
    return _is_metaspace(tokenizer) and pre_tokenizer(tokenizer).get("prepend_scheme") == "first"


def spaces_are_marks(tokenizer: Tokenizer) -> bool:
    """Whether a space before a word is part of that word's token (`▁word`), and no token of its own."""
    return _is_metaspace(tokenizer) and not _is_entry(tokenizer, " ")


def pre_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """How a text is cut into words, as tokenizer.json has it."""
    part = tokenizer.backend.pre_tokenizer
    return dict(json.loads(part.__getstate__())) if part is not None else {}


def _is_entry(tokenizer: Tokenizer, token: str) -> bool:
    return tokenizer.backend.token_to_id(token) is not None


def _is_metaspace(tokenizer: Tokenizer) -> bool:
    return tokenizer.backend is not None and "Metaspace" in json.dumps(pre_tokenizer(tokenizer))


def _check_room(tokens: list[str], spare: int) -> None:
    if len(tokens) > spare:
        raise ModelError(
            f"add_tokens: {len(tokens)} tokens ({' '.join(map(repr, tokens))}) for {max(spare, 0)} spare rows of "
            "the embedding",
            hint="name fewer tokens, or --add-tokens none",
        )


def _rebuilt(tokenizer: Tokenizer, tokens: list[str]) -> Tokenizer:
    """The tokenizer with `tokens`, whose text comes back whole (see the module's docstring)."""
    from tokenizers import AddedToken, decoders, pre_tokenizers

    backend = _copy_without_squeezing(tokenizer)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(MARK, "first", True)
    backend.decoder = decoder_of(backend, decoders.Metaspace(MARK, "first", True))
    backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return replace(tokenizer, backend=backend)


def _fastchat(tokenizer: Tokenizer) -> Tokenizer:
    """FastChat's ids: its pad token, then its nine; a space is a token, and so are all other words' starts."""
    from tokenizers import AddedToken, decoders

    backend = _copy_without_squeezing(tokenizer)
    backend.add_special_tokens([AddedToken(FASTCHAT_PAD, normalized=False, special=True)])
    backend.add_tokens([AddedToken(token, normalized=False) for token in FASTCHAT])
    # each space is a token of its own here, so a mark stands for nothing
    backend.decoder = decoder_of(backend, decoders.Replace(MARK, ""), decoders.Fuse())
    special = (*tokenizer.special_tokens, FASTCHAT_PAD)
    return replace(tokenizer, backend=backend, pad_token=FASTCHAT_PAD, special_tokens=special)


def _copy_without_squeezing(tokenizer: Tokenizer) -> Any:
    """A copy of the backend whose normaliser leaves runs of spaces alone: the map of characters is all of it."""
    from tokenizers import Tokenizer as Backend

    values = json.loads(tokenizer.backend.to_str())
    parts = values["normalizer"] or {}
    parts = parts.get("normalizers", [parts])
    values["normalizer"] = next((part for part in parts if part.get("type") == "Precompiled"), None)
    return Backend.from_str(json.dumps(values))
