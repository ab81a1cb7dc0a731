"""Encode the sources of a model with labels, and find each word's first token.

    encoder = SourceEncoder(tokenizer, task, "tag: ")
    encoder.encode([["Two", "hats"]])    # the ids of "tag: Two hats", and the positions of ▁Two and ▁hat

The ids are the ids of the whole text. A word that begins inside a token of the text before it has no first token.
Characters are separate words: with spaces between them if the vocabulary has letters with a space (ProtT5's `▁M`),
otherwise without (Ankh's and ByT5's `M`).
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5tune.data.labels import IDS_PER_VALUE, LabelTask, TextLabels, Values
from t5tune.data.reading.rejections import Rejection
from t5tune.data.tokens.encoders import Beginning, Ids, PlacedIds, make_encoder
from t5tune.data.tokens.encoding import EncodedConversation, Span
from t5tune.data.tokens.tokenizer import BYTES_OFFSET, Tokenizer
from t5tune.formatting import shorten
from t5tune.settings.groups.record_format import SourceWords

MAX_SHOWN_WORD = 40  # characters
SPACED_LETTER = "▁M"
RARE_RESIDUES = str.maketrans("UZOB", "XXXX")


class EncodedSource(NamedTuple):
    """The ids of a source, without special tokens, and the position of each word's first token, if words have labels.

    A word's first token isn't a token of white space alone. None: the word has no other tokens, or is in `unaligned`.

    Args:
        unaligned: the numbers of the words that begin inside a token of the text before them.
    """

    ids: Ids
    firsts: list[int | None]
    unaligned: list[int]


class EncodedLabels(NamedTuple):
    """A record's ids and values, and the lost labels.

    Args:
        names: the classes that the values number.
        unknown: the number of unknown tokens.
        lost: counts of labels that no token has, by reason.
    """

    conversation: EncodedConversation
    names: tuple[str, ...]
    unknown: int
    lost: dict[str, int]


def write_words(text: str, source_words: SourceWords, tokenizer: Tokenizer) -> str:
    """Write the text that has the tokens of a source's words."""
    if source_words == "residues":
        text = text.translate(RARE_RESIDUES)
    return text if source_words == "text" else _find_separator(source_words, tokenizer).join(text)


def _find_separator(source_words: SourceWords, tokenizer: Tokenizer) -> str:
    return " " if source_words == "text" or SPACED_LETTER in tokenizer.get_vocab() else ""


class SourceEncoder:
    """Encodes words after the prefix, as the task divides a text into words."""

    def __init__(self, tokenizer: Tokenizer, task: LabelTask, prefix: str) -> None:
        self.special_ids = tokenizer.special_ids
        self._encoder = make_encoder(tokenizer)
        self._task, self._unk_id = task, tokenizer.unk_token_id
        self._separator = _find_separator(task.source_words, tokenizer)
        is_apart = task.source_words == "text" or not prefix or prefix.endswith(self._separator)
        self._prefix = prefix if is_apart else prefix + self._separator
        if tokenizer.backend is None:
            self._white_ids = {byte + BYTES_OFFSET for byte in b" \t\n\r"}
        else:
            vocabulary = tokenizer.get_vocab().items()
            self._white_ids = {index for token, index in vocabulary if not token.strip(" ▁Ġ\t\n")}

    def encode(self, sources: Sequence[Sequence[str]]) -> list[EncodedSource]:
        """Encode the words of each source, which has at least one word."""
        texts = [self._write_text(words) for words in sources]
        if not self._task.per_token:
            return [EncodedSource(ids, [], []) for ids in self._encoder.encode([*map(Beginning, texts)])]
        encoded = self._encoder.encode_with_places(texts)
        return [self._find_first_tokens(*pair) for pair in zip(sources, encoded, strict=True)]

    def encode_labels(self, texts: Sequence[TextLabels], max_length: int) -> list[EncodedLabels | Rejection]:
        """Encode records; a source longer than `max_length` with its special tokens loses its end, and its labels."""
        room = max_length - self.special_ids.source_size
        sources = self.encode([text.words for text in texts])
        return [
            _reject_unaligned(text, source) or self._add_values(text, source, room)
            for text, source in zip(texts, sources, strict=True)
        ]

    def _write_text(self, words: Sequence[str]) -> str:
        text = self._separator.join(words)
        return self._prefix + (text.translate(RARE_RESIDUES) if self._task.source_words == "residues" else text)

    def _find_first_tokens(self, words: Sequence[str], encoded: PlacedIds) -> EncodedSource:
        """Find each word's first token, which has characters of the word, and none of the text before it but spaces."""
        tokens = [number for number, index in enumerate(encoded.ids.tolist()) if index not in self._white_ids]
        token_starts, token_ends = encoded.starts[tokens].tolist(), encoded.ends[tokens].tolist()
        source = EncodedSource(encoded.ids, [], [])
        start = len(self._prefix)
        written = len(self._prefix.rstrip())  # the end of the text before the word
        for number, word in enumerate(words):
            token = bisect_right(token_ends, start)  # the first that doesn't end before the word
            is_blank = token == len(tokens) or token_starts[token] >= start + len(word)
            is_inside = not is_blank and token_starts[token] < written
            source.firsts.append(None if is_blank or is_inside else tokens[token])
            if is_inside:
                source.unaligned.append(number)
            written = start + len(word.rstrip())
            start += len(word) + len(self._separator)
        return source

    def _add_values(self, labels: TextLabels, source: EncodedSource, room: int) -> EncodedLabels:
        kept, lost = min(len(source.ids), room), {}
        learned = [(place, value) for place, value in enumerate(labels.values) if value is not None]
        if labels.per_token:
            placed = [(source.firsts[word], value) for word, value in learned]
            learned = [(place, value) for place, value in placed if place is not None and place < kept]
            lost = {
                "blank_words": sum(place is None for place, _ in placed),
                "truncated_labels": sum(place is not None and place >= kept for place, _ in placed),
                "texts_without_labels": int(not learned),
            }
        numbers: dict[str | float, float] = {}
        if self._task.objective != "regress":
            numbers = {name: number for number, name in enumerate(dict.fromkeys(value for _, value in learned))}
        values: Values = np.full(kept if labels.per_token else len(learned), np.nan, np.float64)
        for place, value in learned:
            values[place] = numbers.get(value, value)
        size = len(source.ids)
        end = size + IDS_PER_VALUE * len(values)
        # the source keeps its beginning, as a system line of a conversation
        span = Span(0, kept, size, size, size, end, end, kept == size, True)
        ids = np.concatenate([source.ids.astype(np.int32), values.view(np.int32)])
        spans = [] if lost.get("texts_without_labels") else [span]
        return EncodedLabels(
            EncodedConversation(ids, spans),
            tuple(map(str, numbers)),
            int(np.count_nonzero(source.ids == self._unk_id)),
            {reason: count for reason, count in lost.items() if count},
        )


def _reject_unaligned(labels: TextLabels, source: EncodedSource) -> Rejection | None:
    number = next((number for number in source.unaligned if labels.values[number] is not None), None)
    if number is None:
        return None
    word = shorten(repr(labels.words[number]), MAX_SHOWN_WORD)
    problem = f"word {number + 1}, {word}, begins inside a token of the text before it"
    return Rejection("unaligned_word", f"{problem}, so no token can have its label")
