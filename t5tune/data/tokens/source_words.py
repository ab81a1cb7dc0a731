"""Encode the sources of a model with labels word by word, so that each word's first token is known.

    encoder = SourceEncoder(tokenizer, task, "tag: ")
    encoder.encode([["Two", "hats"]])    # the ids of "tag: Two hats", and the positions of ▁Two and ▁hat

A word is encoded with the space before it; a tokenizer splits a text there anyway, so the ids are the ids of the whole
text. Characters are separate words: with spaces before them if the vocabulary has letters with a space (ProtT5's `▁M`),
otherwise without (Ankh's and ByT5's `M`).
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

from t5tune.data.labels import IDS_PER_VALUE, LabelTask, TextLabels, Values
from t5tune.data.tokens.encoders import Beginning, Ids, Text, make_encoder
from t5tune.data.tokens.encoding import EncodedConversation, Span
from t5tune.data.tokens.tokenizer import BYTES_OFFSET, Tokenizer
from t5tune.settings.groups.record_format import SourceWords

SPACED_LETTER = "▁M"
RARE_RESIDUES = str.maketrans("UZOB", "XXXX")


class EncodedSource(NamedTuple):
    """The ids of a source, without special tokens, and the position of each word's first token.

    A word's first token isn't a token of white space alone. None: the word has no other tokens.
    """

    ids: Ids
    firsts: list[int | None]


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
    return " ".join(text) if source_words != "text" and SPACED_LETTER in tokenizer.get_vocab() else text


class SourceEncoder:
    """Encodes words after the prefix, as the task divides a text into words."""

    def __init__(self, tokenizer: Tokenizer, task: LabelTask, prefix: str) -> None:
        vocabulary = tokenizer.get_vocab()
        self.special_ids = tokenizer.special_ids
        self._encoder = make_encoder(tokenizer)
        self._task, self._unk_id = task, tokenizer.unk_token_id
        self._space = " " if task.source_words == "text" or SPACED_LETTER in vocabulary else ""
        is_apart = prefix.endswith(" ") or (task.source_words != "text" and self._space and prefix)
        self._prefix, self._first_space = prefix.removesuffix(" "), " " if is_apart else ""
        self._white_ids = {index for token, index in vocabulary.items() if not token.strip(" ▁Ġ\t\n")}
        if tokenizer.backend is None:
            self._white_ids = {byte + BYTES_OFFSET for byte in b" \t\n\r"}

    def encode(self, sources: Sequence[Sequence[str]]) -> list[EncodedSource]:
        """Encode the words of each source, which has at least one word."""
        pieces = [self._list_pieces(words) for words in sources]
        distinct = [*dict.fromkeys(chain.from_iterable(pieces))]  # a protein has few different residues
        encoded = {
            piece: (ids, self._find_first(ids))
            for piece, ids in zip(distinct, self._encoder.encode(distinct), strict=True)
        }
        found = []
        for words, of_source in zip(sources, pieces, strict=True):
            parts = [encoded[piece] for piece in of_source]
            starts = accumulate((len(ids) for ids, _ in parts), initial=0)
            firsts = [
                None if first is None else start + first for start, (_, first) in zip(starts, parts, strict=False)
            ]
            found.append(EncodedSource(np.concatenate([ids for ids, _ in parts]), firsts[len(parts) - len(words) :]))
        return found

    def encode_labels(self, texts: Sequence[TextLabels], max_length: int) -> list[EncodedLabels]:
        """Encode records; a source longer than `max_length` with its special tokens loses its end, and its labels."""
        room = max_length - self.special_ids.source_size
        sources = self.encode([text.words for text in texts])
        return [self._add_values(*pair, room) for pair in zip(texts, sources, strict=True)]

    def _list_pieces(self, words: Sequence[str]) -> list[Text]:
        if self._task.source_words == "residues":
            words = [word.translate(RARE_RESIDUES) for word in words]
        first = self._first_space + words[0]
        if not self._prefix or not (self._first_space or self._task.per_token):
            pieces = [self._prefix + first]  # the tokenizer may join the prefix with the text
        else:
            pieces = [self._prefix, first]
        return [Beginning(pieces[0]), *pieces[1:], *(self._space + word for word in words[1:])]

    def _find_first(self, ids: Ids) -> int | None:
        return next((number for number, index in enumerate(ids.tolist()) if index not in self._white_ids), None)

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
