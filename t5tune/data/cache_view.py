"""Decoded examples of a token cache, as the model sees them, with the tokens that were cut."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from t5tune.data.cache import Cache
from t5tune.data.histogram import Histogram
from t5tune.data.tokenizer import Tokenizer, load_tokenizer
from t5tune.data.vocabulary import TextRun, iterate_text_runs

_Part = tuple[list[int], bool]  # ids, and whether they were cut off


@dataclass(frozen=True)
class ExampleView:
    """One example as the model sees it.

    Args:
        index: position in the cache; `conversation` and `turn` are its origin.
        source_ids, target_ids: EOS tokens included.
        truncated: which of "source" and "target" were cut.
        source_cut: tokens that were removed from the source, after its first `source_head` tokens.
        target_cut: tokens that were removed from the end of the target.
    """

    index: int
    conversation: int
    turn: int
    source_ids: list[int]
    target_ids: list[int]
    source_text: str
    target_text: str
    truncated: list[str]
    source_head: int
    source_cut: list[int]
    target_cut: list[int]

    def group_runs_by_side(self, tokenizer: Tokenizer, added: set[int]) -> dict[str, Iterator[tuple[TextRun, bool]]]:
        """Return source and target as runs of text, each with whether it was cut off."""
        head, source = self.source_head, self.source_ids
        parts = {
            "source": [(source[:head], False), (self.source_cut, True), (source[head:], False)],
            "target": [(self.target_ids, False), (self.target_cut, True)],
        }
        return {side: _iterate_runs(of_side, tokenizer, added) for side, of_side in parts.items()}


def _iterate_runs(parts: list[_Part], tokenizer: Tokenizer, added: set[int]) -> Iterator[tuple[TextRun, bool]]:
    before = None
    for ids, is_cut in parts:
        for run in iterate_text_runs(ids, tokenizer, added, before):
            yield run, is_cut
        before = ids[-1] if ids else before


@dataclass(frozen=True)
class LengthStatistics:
    """Lengths of a cache's examples.

    Args:
        padding_random: share of padding, 0 to 1, in random batches of `batch_size`.
        padding_by_length: the same for batches of similar lengths, as training makes them.
        longest: indices of the longest examples, longest first.
    """

    source: Histogram
    target: Histogram
    batch_size: int
    padding_random: float
    padding_by_length: float
    longest: list[int]


class CacheView(Sequence[ExampleView]):
    """Some examples of a cache, each decoded on access."""

    def __init__(self, cache: Cache, indices: Sequence[int]) -> None:
        self.cache = cache
        self.tokenizer = load_tokenizer(cache.tokenizer_folder)
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: Any) -> Any:
        return view_example(self.cache, self._indices[number], self.tokenizer)


def view_example(cache: Cache, index: int, tokenizer: Tokenizer) -> ExampleView:
    """Decode the example at `index`, with the tokens that were cut from it."""
    example, conversation, ids, span = cache.read_untruncated(index)
    source, target = example.source_S.tolist(), example.target_T.tolist()
    return ExampleView(
        index=index,
        conversation=conversation,
        turn=span.turn,
        source_ids=source,
        target_ids=target,
        source_text=tokenizer.decode(source[:-1]),
        target_text=tokenizer.decode(target[: span.target_end - span.target_start]),
        truncated=["source"] * (not span.source_is_whole) + ["target"] * (not span.target_is_whole),
        source_head=span.system_end,
        source_cut=ids[span.system_end : span.source_start].tolist(),
        target_cut=ids[span.target_end : span.answer_end].tolist(),
    )
