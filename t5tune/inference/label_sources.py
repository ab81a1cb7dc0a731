"""Texts as a model with labels reads them, and its predictions for them.

    reader = make_reader(loaded, source_prefix=None, max_length=2048)
    source = reader.read("Two hats")
    (logits_MK,) = compute_logits(model, [source.example], collator)
    reader.describe(source, logits_MK)    # {"prediction": ["O", "B-goods"], "probabilities": [0.98, 0.97]}

K is the number of classes, or 1 for numbers; M is the number of tokens of a source, or 1 for the labels of a text.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from t5tune.data.labels import LabelTask
from t5tune.data.reading.cleaning import normalize_text
from t5tune.data.reading.formats import Conversation, Turn
from t5tune.data.reading.rejections import RecordLocation
from t5tune.data.tokens.encoders import Encoder, make_encoder
from t5tune.data.tokens.encoding import LabeledExample, find_long_word
from t5tune.data.tokens.source_words import SourceEncoder
from t5tune.errors import SettingsError
from t5tune.inference.label_predictions import Logits, predict_labels
from t5tune.inference.loading import ModelFiles
from t5tune.inference.prompts import check_encodable
from t5tune.progress import Note, Report, silent
from t5tune.settings.messages import shorten_value

WORDS = {"text": re.compile(r"\S+"), "characters": re.compile(".", re.DOTALL), "residues": re.compile(r"\S")}


@dataclass(frozen=True)
class Word:
    """A word, from the character `start` of a text to `end`.

    Args:
        token: the position in the ids of the token that has its label; None: it was cut off, is white space, or begins
            inside a token of the text before it.
    """

    text: str
    start: int
    end: int
    token: int | None = None


@dataclass(frozen=True)
class Source:
    """The model's input.

    Args:
        example: its ids, with special tokens, and no label.
        words: if words have labels; otherwise empty.
        num_tokens: without special tokens, and without `cut_tokens`, the number of tokens that were cut off.
    """

    example: LabeledExample
    words: list[Word]
    num_tokens: int
    cut_tokens: int


@dataclass(frozen=True)
class SourceReader:
    """Encodes texts as in training. `max_length`: of a source, in tokens."""

    task: LabelTask
    encoder: SourceEncoder
    text_encoder: Encoder
    max_length: int

    def read(self, text: str | Sequence[str]) -> Source:
        """Encode a text, or words; of more than `max_length` tokens, the beginning.

        Raises:
            SettingsError: there is nothing to read, it isn't valid UTF-8, or a word is too long.
        """
        if not isinstance(text, str | Sequence) or not all(isinstance(word, str) for word in text):
            raise SettingsError(f"text: {shorten_value(text)}", hint="give a text, or a list of words")
        words = _find_words(text, self.task)
        whole = " ".join(word.text for word in words)
        check_encodable(whole, "text")
        if not whole.strip():
            raise SettingsError("text: nothing to read")
        parsed = Conversation(RecordLocation("text", 1, 0, 0), None, (Turn("human", whole),))
        if rejection := find_long_word(parsed, self.text_encoder):
            raise SettingsError(f"text: {rejection.message}")
        ((ids, firsts, _),) = self.encoder.encode([[word.text for word in words]])
        special = self.encoder.special_ids
        kept, before = min(len(ids), self.max_length - special.source_size), len(special.source_start)
        example = make_unlabeled_example(special.surround_source(ids[:kept].tolist()), self.task)
        places = [None if first is None or first >= kept else first + before for first in firsts]
        # of a task without words with labels, `firsts` is empty
        placed = [replace(word, token=place) for word, place in zip(words, places, strict=self.task.per_token)]
        return Source(example, placed, kept, len(ids) - kept)

    def describe(self, source: Source, logits_MK: Logits) -> dict[str, Any]:
        """Describe the prediction of the logits, with the keys of predictions.jsonl.

        Of a source with words, the values are lists with an item for each word: None if it has no token.
        """
        if not self.task.per_token:
            return predict_labels(logits_MK, self.task)
        tokens = [word.token for word in source.words if word.token is not None]
        found = {name: iter(values) for name, values in predict_labels(logits_MK[tokens], self.task).items()}
        return {
            name: [None if word.token is None else next(values) for word in source.words]
            for name, values in found.items()
        }


def make_reader(files: ModelFiles, source_prefix: str | None, max_length: int, report: Report = silent) -> SourceReader:
    """Find how the sources of a model with labels are encoded: with the prefix of training, if none is given."""
    assert files.label_task is not None, "a model with labels"
    if source_prefix is None:
        source_prefix = "" if files.training_data is None else files.training_data.source_prefix
        if source_prefix:
            report(Note(f"each text is prefixed with {source_prefix!r}, as in training"))
    encoder = SourceEncoder(files.tokenizer, files.label_task, source_prefix)
    return SourceReader(files.label_task, encoder, make_encoder(files.tokenizer), max_length)


def make_unlabeled_example(ids: Sequence[int], task: LabelTask) -> LabeledExample:
    """Make an example without labels of a source's ids, with special tokens."""
    values = np.full(len(ids) if task.per_token else 1, np.nan)
    return LabeledExample(np.array(ids, np.int64), np.empty(0, np.int64), values)


def _find_words(text: str | Sequence[str], task: LabelTask) -> list[Word]:
    """Divide a text as the data of training. The places of given words are in the text that they make."""
    is_text = task.source_words == "text"
    if isinstance(text, str):
        has_words = task.per_token or not is_text
        spans = [match.span() for match in WORDS[task.source_words].finditer(text)] if has_words else [(0, len(text))]
        words = [Word(text[start:end], start, end) for start, end in spans]
        if is_text:
            words = [replace(word, text=normalize_text(word.text, Counter())) for word in words]
        return [word for word in words if word.text]
    if is_text and not task.per_token:
        whole = " ".join(text)
        return [Word(whole, 0, len(whole))]
    words, start = [], 0
    for word in text:
        words.append(Word(word, start, start + len(word)))
        start += len(word) + is_text
    return words
