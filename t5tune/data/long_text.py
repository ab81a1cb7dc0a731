"""Encode texts that are too long for one call of the tokenizer.

A tokenizer needs a few hundred bytes of memory per character, so a record of a few megabytes would need a gigabyte.
`TextSplitter` splits a text only where the concatenated ids of the parts are those of the whole text. `Unigram` encodes
a word that is too long and can't be split.
"""

import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Any

PART_LENGTH = 1 << 15  # characters, about
_LETTERS = {"Lu", "Ll", "Lo", "Nd", "Po", "Pd", "Ps", "Pe", "So", "Sm", "Sc"}
UNKNOWN_PENALTY = 10.0  # an unknown character's score is this much below the lowest (SentencePiece's unigram_model.cc)


class TextSplitter:
    """Splits long texts for a tokenizer that encodes each word separately.

    Args:
        added: the added tokens at which the tokenizer splits a text.
        normalize: the tokenizer's normalizer.
    """

    def __init__(self, added: list[str], normalize: Callable[[str], str]) -> None:
        self._normalize = normalize
        self._inert: dict[str, bool] = {}
        inside = "".join(token[1:] for token in added)
        self._breaks = {token for token in added if len(token) == 1 and token not in inside}
        # after this many spaces, the next space can't belong to an added token that begins with another character
        self._run = "" if any(token[0] == " " for token in added) else " " * max(map(len, added), default=1)
        self._cuts_spaces = not any(self._is_inert(before) for token in added for before in re.findall("(.) ", token))

    def split(self, text: str) -> Iterator[str]:
        """Split a text into parts of about PART_LENGTH characters, longer if there is no safe place to cut."""
        start = 0
        while len(text) - start > PART_LENGTH:
            positions = chain(
                range(start + PART_LENGTH, start + PART_LENGTH // 2, -1), range(start + PART_LENGTH + 1, len(text))
            )
            end = next((position for position in positions if self._can_cut(text, position)), len(text))
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:]

    def normalize_word(self, word: str) -> str:
        """Normalize a long word in parts, as the tokenizer would normalize the whole."""
        positions = [0]
        for position in range(1, len(word)):
            if position - positions[-1] >= PART_LENGTH and self._is_apart(word[position - 1 : position + 1]):
                positions.append(position)
        return "".join(self._normalize(word[a:b]) for a, b in pairwise([*positions, len(word)]))

    def _is_apart(self, pair: str) -> bool:
        return all(map(self._is_inert, pair)) and self._normalize(pair) == pair

    def _can_cut(self, text: str, position: int) -> bool:
        """Return whether a text can be cut before `position`.

        It can be cut before an added token that is always matched alone, and before a space that joins no neighbor.
        """
        if text[position] in self._breaks:
            return True
        if text[position] != " " or text[position + 1 : position + 2] == " ":
            return text[position] == " " and self._run != "" and text.endswith(self._run, 0, position)
        return (
            self._cuts_spaces
            and self._is_inert(text[position - 1])
            and self._is_inert(text[position + 1 : position + 2])
        )

    def _is_inert(self, character: str) -> bool:
        """Return whether normalization leaves a character unchanged and separate from an adjacent space."""
        if character not in self._inert:
            is_letter = character != "" and unicodedata.category(character) in _LETTERS
            texts = (f"a {character}", f"{character} a")
            self._inert[character] = is_letter and all(self._normalize(text) == text for text in texts)
        return self._inert[character]


class Unigram:
    """Viterbi segmentation of a word with a unigram model (Kudo 2018), using two bytes per character.

    Ties are broken as in the `tokenizers` library.

    Args:
        model: the "model" object of tokenizer.json.
    """

    def __init__(self, model: dict[str, Any]) -> None:
        self._pieces = {piece: (index, float(score)) for index, (piece, score) in enumerate(model["vocab"])}
        self._longest = max(map(len, self._pieces))
        self._unknown = int(model["unk_id"])
        self._unknown_score = min(score for _, score in self._pieces.values()) - UNKNOWN_PENALTY

    def encode(self, word: str) -> Iterator[int]:
        """Encode a normalized word; consecutive unknown characters become one unknown token."""
        lengths = self._find_best_lengths(word)
        positions = array("L")
        end = len(word)
        while end:
            positions.append(end)
            end -= lengths[end]
        start, before = 0, -1
        for end in reversed(positions):
            index = self._pieces.get(word[start:end], (self._unknown, 0.0))[0]
            if index != self._unknown or before != self._unknown:
                yield index
            start, before = end, index

    def _find_best_lengths(self, word: str) -> "array[int]":
        """Return, for each position, the length of the last token in the best segmentation up to there."""
        scores = [0.0] * (self._longest + 1)  # ring buffer with the best scores of the last positions
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


def load_unigram(backend: Any) -> Unigram | None:
    """Return the unigram model of a tokenizer, or None if it uses another algorithm."""
    model = json.loads(backend.to_str())["model"]
    return Unigram(model) if model["type"] == "Unigram" and not model.get("byte_fallback") else None
