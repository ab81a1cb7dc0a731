"""Texts that are too long to be encoded at once: where they may be cut, and words without end.

A tokenizer takes some hundred bytes of memory a character, so a record of a few megabytes would take a gigabyte. A
text is cut where the ids of its parts, joined, are those of the whole; a word that can't be cut is segmented here.
"""

import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Any

PART = 1 << 15  # characters, about
_LETTERS = {"Lu", "Ll", "Lo", "Nd", "Po", "Pd", "Ps", "Pe", "So", "Sm", "Sc"}
UNKNOWN_PENALTY = 10.0  # below the worst piece's score (SentencePiece, unigram_model.cc)


class Cutter:
    """Cuts long texts for a tokenizer that encodes each word alone.

    Args:
        added: the added tokens that it cuts a text at.
        normalise: what it does to a text first.
    """

    def __init__(self, added: list[str], normalise: Callable[[str], str]) -> None:
        self._normalise = normalise
        self._inert: dict[str, bool] = {}
        inside = "".join(token[1:] for token in added)
        self._breaks = {token for token in added if len(token) == 1 and token not in inside}
        # behind so many spaces none belongs to a token that begins otherwise
        self._run = "" if any(token[0] == " " for token in added) else " " * max(map(len, added), default=1)
        self._cuts_spaces = not any(self._is_inert(before) for token in added for before in re.findall("(.) ", token))

    def parts(self, text: str) -> Iterator[str]:
        """The text in parts of PART characters or so; longer where it can't be cut."""
        start = 0
        while len(text) - start > PART:
            places = chain(range(start + PART, start + PART // 2, -1), range(start + PART + 1, len(text)))
            end = next((place for place in places if self._can_cut(text, place)), len(text))
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:]

    def normalised(self, word: str) -> str:
        """What the tokenizer makes of a word before it segments it."""
        places = [0]
        for place in range(1, len(word)):
            if place - places[-1] >= PART and self._is_apart(word[place - 1 : place + 1]):
                places.append(place)
        return "".join(self._normalise(word[a:b]) for a, b in pairwise([*places, len(word)]))

    def _is_apart(self, pair: str) -> bool:
        return all(map(self._is_inert, pair)) and self._normalise(pair) == pair

    def _can_cut(self, text: str, place: int) -> bool:
        """Before a token that stands alone wherever it stands, and before a space that joins with nothing."""
        if text[place] in self._breaks:
            return True
        if text[place] != " " or text[place + 1 : place + 2] == " ":
            return text[place] == " " and self._run != "" and text.endswith(self._run, 0, place)
        return self._cuts_spaces and self._is_inert(text[place - 1]) and self._is_inert(text[place + 1 : place + 2])

    def _is_inert(self, character: str) -> bool:
        """Whether a character stays what it is, and apart from a space beside it, when a text is normalised."""
        if character not in self._inert:
            is_letter = character != "" and unicodedata.category(character) in _LETTERS
            self._inert[character] = is_letter and all(
                self._normalise(text) == text for text in (f"a {character}", f"{character} a")
            )
        return self._inert[character]


class Unigram:
    """The likeliest segmentation of a word, in two bytes a character (Kudo 2018; ties are broken as `tokenizers` does).

    Args:
        model: of tokenizer.json.
    """

    def __init__(self, model: dict[str, Any]) -> None:
        self._pieces = {piece: (index, float(score)) for index, (piece, score) in enumerate(model["vocab"])}
        self._longest = max(map(len, self._pieces))
        self._unknown = int(model["unk_id"])
        self._unknown_score = min(score for _, score in self._pieces.values()) - UNKNOWN_PENALTY

    def encode(self, word: str) -> Iterator[int]:
        """The ids of a normalised word; unknown characters in a row are one."""
        lengths = self._best_lengths(word)
        places = array("L")
        end = len(word)
        while end:
            places.append(end)
            end -= lengths[end]
        start, before = 0, -1
        for end in reversed(places):
            index = self._pieces.get(word[start:end], (self._unknown, 0.0))[0]
            if index != self._unknown or before != self._unknown:
                yield index
            start, before = end, index

    def _best_lengths(self, word: str) -> "array[int]":
        """For each place the length of the last piece of the likeliest way there."""
        scores = [0.0] * (self._longest + 1)  # of the last places, in turn
        size = len(scores)
        lengths = array("H", [0])
        for end in range(1, len(word) + 1):
            best, best_length = None, 0
            for length in range(min(self._longest, end), 0, -1):
                piece = self._pieces.get(word[end - length : end])
                if piece is None:
                    if length > 1:
                        continue
                    score = self._unknown_score
                else:
                    score = piece[1]
                score += scores[(end - length) % size]
                if best is None or score > best:
                    best, best_length = score, length
            scores[end % size] = best or 0.0
            lengths.append(best_length)
        return lengths


def unigram_of(backend: Any) -> Unigram | None:
    """The segmentation of a tokenizer's words; None: it has another algorithm."""
    model = json.loads(backend.to_str())["model"]
    return Unigram(model) if model["type"] == "Unigram" and not model.get("byte_fallback") else None
