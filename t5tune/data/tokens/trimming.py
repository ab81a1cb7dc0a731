"""Choose the tokens of a smaller vocabulary, and cut a tokenizer's files to them. Imports no torch.

    vocabulary = TrimmableVocabulary(load_tokenizer(folder), None)
    kept = vocabulary.fill(vocabulary.list_required([]), ranked, limit=8000)
    tokenizer = vocabulary.cut(kept)

A text whose tokens are all kept is split as before:

- Unigram chooses the pieces with the highest sum of scores. Fewer pieces mean fewer candidates, but the best of them is
  still there. An unknown character costs the lowest score less 10, and SentencePiece's user-defined pieces cost by the
  highest score, so the pieces with these scores are kept.
- BPE merges characters to tokens, the pair of the highest rank first. So each part that a token is merged from is kept.

Any other text is split into more tokens, but no character becomes unknown: all tokens of one character are kept.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Backend

from t5tune.data.tokens.tokenizer import BYTE_TOKEN, Tokenizer
from t5tune.data.tokens.vocabulary import METASPACE
from t5tune.errors import ModelError
from t5tune.formatting import shorten

NORMAL_PIECE, BYTE_PIECE = 1, 6  # types of a SentencePiece piece
PIECE_IDS = ("unk_id", "bos_id", "eos_id", "pad_id")  # in a SentencePiece model's trainer_spec


class TrimmableVocabulary:
    """The vocabulary of a tokenizer of type Unigram or BPE.

    Args:
        sentencepiece: the SentencePiece model (a message of protobuf) next to tokenizer.json, if there is one.

    Attributes:
        tokens: the id of each token.
        ids: of all tokens.

    Raises:
        ModelError: the vocabulary can't be cut, or the SentencePiece model has different pieces.
    """

    def __init__(self, tokenizer: Tokenizer, sentencepiece: Any | None) -> None:
        self._state, self._sentencepiece = json.loads(tokenizer.backend.to_str()), sentencepiece
        self._tokenizer = replace(tokenizer, backend=None)  # mT5's takes a quarter of a gigabyte
        self._model = self._state["model"]
        kind, tokens = self._model["type"], tokenizer.get_vocab()
        # with marks around parts of words, a token's name isn't made of its parts' names
        marks = self._model.get("continuing_subword_prefix") or self._model.get("end_of_word_suffix")
        if kind not in ("Unigram", "BPE") or marks:
            raise ModelError(f"{tokenizer.folder}: trim can cut only Unigram and BPE, and its tokenizer is {kind}")
        self._is_unigram, self.tokens, self.ids = kind == "Unigram", tokens, {*tokens.values()}
        for index, piece in enumerate(self._pieces):
            # Gemma's tokenizer.json has a tab in place of the byte <0x09>
            if piece.type != BYTE_PIECE and tokens.get(piece.piece) != index:
                found = f"token {index}, {shorten(repr(piece.piece))}, is only in its SentencePiece model"
                raise ModelError(f"{tokenizer.folder}: {found}", hint="copy all files from the published model")
        added = {token["id"] for token in self._state["added_tokens"]}
        if self._pieces and (lost := self.ids - added - {*range(len(self._pieces))}):
            found = f"token {min(lost)} is not in its SentencePiece model, which has {len(self._pieces)} pieces"
            raise ModelError(f"{tokenizer.folder}: {found}", hint="copy all files from the published model")

    @property
    def _pieces(self) -> Sequence[Any]:
        return [] if self._sentencepiece is None else self._sentencepiece.pieces

    def list_required(self, named: Iterable[int]) -> set[int]:
        """List the tokens that must stay: special tokens, bytes, characters, and the tokens that configs name."""
        required = {token["id"] for token in self._state["added_tokens"]} | {*named} & self.ids
        required.update(map(self.tokens.__getitem__, self._tokenizer.special_tokens))
        required |= {index for index, piece in enumerate(self._pieces) if piece.type != NORMAL_PIECE}
        required |= {index for token, index in self.tokens.items() if self._is_character(token)}
        _convert_ids(self._state["post_processor"], required.add)
        if self._is_unigram:
            scores = {index: score for index, (_, score) in enumerate(self._model["vocab"])}
            required |= {index for index, score in scores.items() if score == 0}  # not a normal piece
            normal = [*scores.keys() - required] or [*scores]
            required |= {choose(normal, key=scores.__getitem__) for choose in (min, max)}
        return self.add_parts(required)

    def add_parts(self, ids: Iterable[int]) -> set[int]:
        """Add the tokens that BPE merges on the way to these tokens."""
        if self._is_unigram:
            return {*ids}
        return {part for index in ids for part in (index, *self._list_parts(index))}

    def fill(self, required: Iterable[int], ranked: Iterable[int], limit: int) -> list[int]:
        """Add tokens in the order of `ranked`, with their parts, up to `limit` tokens. Return them all, ascending."""
        kept = {*required}
        for index in ranked:
            if len(kept) >= limit:
                break
            more = self.add_parts([index]) - kept
            if len(kept) + len(more) <= limit:
                kept |= more
        return sorted(kept)

    def cut(self, kept: list[int]) -> Tokenizer:
        """Make the tokenizer of the kept tokens, which are numbered in the same order."""
        new_ids = {old: new for new, old in enumerate(kept)}
        state = {**self._state, "model": self._cut_model(new_ids)}
        state["added_tokens"] = [{**token, "id": new_ids[token["id"]]} for token in state["added_tokens"]]
        state["post_processor"] = _convert_ids(state["post_processor"], new_ids.__getitem__)
        backend = Backend.from_str(json.dumps(state))
        expected = {token: new_ids[index] for token, index in self.tokens.items() if index in new_ids}
        if wrong := backend.get_vocab().items() ^ expected.items():
            problem = f"{self._tokenizer.folder}: its tokens can't be renumbered in their order ({min(wrong)[0]!r})"
            raise ModelError(problem, hint="save the tokenizer with AutoTokenizer, and trim again")
        return replace(self._tokenizer, backend=backend)

    def _cut_model(self, new_ids: dict[int, int]) -> dict[str, Any]:
        model = self._model
        if self._is_unigram:
            pieces = [entry for index, entry in enumerate(model["vocab"]) if index in new_ids]
            return {**model, "vocab": pieces, "unk_id": new_ids.get(model["unk_id"])}
        vocab = {token: new_ids[index] for token, index in model["vocab"].items() if index in new_ids}
        merges = [pair for pair in self._ranks if {*pair, "".join(pair)} <= vocab.keys()]
        return {**model, "vocab": vocab, "merges": merges}

    def cut_sentencepiece(self, kept: list[int]) -> Any | None:
        """Make the SentencePiece model of the kept tokens; None: the tokenizer has no SentencePiece model."""
        if self._sentencepiece is None:
            return None
        new_ids = {old: new for new, old in enumerate(kept)}
        parts = {field.name: value for field, value in self._sentencepiece.ListFields()}
        parts.pop("self_test_data", None)  # older releases refuse a model that splits these texts differently
        parts["pieces"] = [piece for index, piece in enumerate(self._pieces) if index in new_ids]
        cut = type(self._sentencepiece)(**parts)
        cut.trainer_spec.vocab_size = len(cut.pieces)
        for name in PIECE_IDS:
            setattr(cut.trainer_spec, name, new_ids.get(getattr(cut.trainer_spec, name), -1))
        return cut

    def _is_character(self, token: str) -> bool:
        """Whether a token is a byte or a character, perhaps after a space if the character is no token (ProtT5)."""
        is_only_form = len(token) == 2 and token[0] == METASPACE and token[1] not in self.tokens
        return len(token) == 1 or is_only_form or BYTE_TOKEN.fullmatch(token) is not None

    @cached_property
    def _ranks(self) -> dict[tuple[str, ...], int]:
        """The pairs that BPE merges, in order; older releases of tokenizers write each as a text."""
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in self._model["merges"])
        return {tuple(pair): rank for rank, pair in enumerate(pairs)}

    @cached_property
    def _names(self) -> dict[int, str]:
        return {index: token for token, index in self._model["vocab"].items()}

    def _list_parts(self, index: int) -> set[int]:
        """Merge a token's characters as BPE does, whatever its neighbors are; list all tokens on the way."""
        parts, last = [*self._names.get(index, "")], len(self._ranks)
        found = {*parts}
        while ranks := [self._ranks.get(pair, last) for pair in zip(parts, parts[1:], strict=False)]:
            if (best := min(ranks)) == last:
                break
            place = ranks.index(best)
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
            found.add(parts[place])
        return {self._model["vocab"][part] for part in found if part in self._model["vocab"]}


def _convert_ids(part: Any, convert: Callable[[int], Any]) -> Any:
    """Convert the ids in a post-processor, which adds special tokens to a text."""
    if isinstance(part, list):
        return [_convert_ids(each, convert) for each in part]
    if not isinstance(part, dict):
        return part
    return {
        name: [*map(convert, value)]
        if name == "ids"
        else [value[0], convert(value[1])]
        if name in ("cls", "sep")
        else _convert_ids(value, convert)
        for name, value in part.items()
    }
