"""Span corruption, T5's pretraining objective: spans of a text are masked, and the target contains them.

    The sun is a <X> in the middle of the <Y>      the source: each masked span is replaced with a sentinel
    <X> star <Y> solar system                      the target: each sentinel, and the span in its place

This is `random_spans_noise_mask` of the released T5 code (Raffel et al. 2020, sections 3.1.4 and 3.3.4): a text begins
with an unmasked span and ends with a masked one, so no sentinel follows the last span as in the paper's figure. UL2's
denoisers mask larger shares of the text, longer spans, or its end (Tay et al. 2022, table 1).

The seed and the example's index determine its denoiser and the number of masked tokens, so its lengths are the same in
every epoch. Only the positions of the masked spans differ.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.data.tokens.tokenizer import BYTES_OFFSET, Tokenizer
from t5tune.settings.denoisers import Denoiser, find_denoisers

Integers = npt.NDArray[np.int64]
ROUNDING = 8  # tokens
MIN_WINDOW = 2  # tokens: a masked and an unmasked one
MAX_SENTINELS = 100  # of bytes: ByT5 was pretrained with the last 100 byte ids as sentinels (Xue et al. 2022)
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_DENOISER, _SUFFIX = 1, 2  # purposes of random numbers


@dataclass(frozen=True)
class SpanCorruption:
    """Masks spans of windows of a text.

    Args:
        sentinels: the ids that replace the first masked span, the second, and so on.
        seed: with the index of an example, determines its denoiser and its lengths.
    """

    denoisers: tuple[Denoiser, ...]
    sentinels: tuple[int, ...]
    seed: int = 0

    def count_masked(self, indices: Integers, lengths: Integers) -> tuple[Integers, Integers]:
        """Count the masked tokens and the masked spans of windows of these lengths, in tokens."""
        chosen = (self._draw(indices, _DENOISER) * len(self.denoisers)).astype(np.int64)
        density, mean_length, is_suffix = (column[chosen] for column in self._columns)
        longest_suffix = np.maximum(np.rint(2 * density * lengths), 1)
        suffix = 1 + np.floor(self._draw(indices, _SUFFIX) * longest_suffix)
        wanted = np.where(is_suffix, suffix, np.rint(density * lengths))
        masked = np.clip(wanted.astype(np.int64), 1, lengths - 1)
        spans = np.maximum(np.rint(masked / mean_length).astype(np.int64), 1)
        # each masked span follows an unmasked one, and both have at least one token
        spans = np.where(is_suffix, 1, np.minimum.reduce([spans, masked, lengths - masked]))
        return masked, np.minimum(spans, len(self.sentinels))

    def corrupt(self, ids: Any, masked: int, spans: int, index: int, repeat: int) -> tuple[Integers, Integers]:
        """Return the source and the target of a window, without the special tokens around them.

        `masked` and `spans` are the result of `count_masked`. `repeat`: how many times the example was sampled before.
        """
        ids = np.asarray(ids, np.int64)
        rng = np.random.default_rng([self.seed, index, repeat])
        hidden = _divide(masked, spans, rng)
        ends = np.cumsum(_divide(len(ids) - masked, spans, rng) + hidden)
        starts = ends - hidden
        is_masked = np.zeros(len(ids) + 1, np.int64)
        is_masked[starts] += 1
        is_masked[ends] -= 1
        is_hidden = np.cumsum(is_masked[:-1]).astype(bool)
        sentinels = np.array(self.sentinels[:spans])
        marked = ids.copy()
        marked[starts] = sentinels
        is_in_source = ~is_hidden
        is_in_source[starts] = True
        return marked[is_in_source], np.insert(ids[is_hidden], np.cumsum(hidden) - hidden, sentinels)

    def find_largest_window(self, source_room: int, target_room: int) -> int:
        """Find the longest window whose source and target fit with any denoiser; limits without special tokens."""

        def fits(length: int) -> bool:
            return all(self._fits(denoiser, length, source_room, target_room) for denoiser in self.denoisers)

        lengths = range(MIN_WINDOW, 2 * (source_room + target_room))
        about = MIN_WINDOW + bisect_left(lengths, True, key=lambda length: not fits(length))
        # rounded counts make the lengths increase by less than one token here and there
        return next((length for length in range(about + ROUNDING, MIN_WINDOW, -1) if fits(length)), MIN_WINDOW)

    def _fits(self, denoiser: Denoiser, length: int, source_room: int, target_room: int) -> bool:
        if denoiser.mean_length is None:  # the masked suffix has from one token to twice its mean length
            return length <= source_room and max(round(2 * denoiser.density * length), 1) + 1 <= target_room
        masked = min(max(round(denoiser.density * length), 1), length - 1)
        spans = min(max(round(masked / denoiser.mean_length), 1), masked, length - masked)
        fits = length - masked + spans <= source_room and masked + spans <= target_room
        return fits and spans <= len(self.sentinels)

    @cached_property
    def _columns(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        density = np.array([denoiser.density for denoiser in self.denoisers])
        mean_length = np.array([denoiser.mean_length or 1.0 for denoiser in self.denoisers])
        return density, mean_length, np.array([denoiser.mean_length is None for denoiser in self.denoisers])

    def _draw(self, indices: Integers, purpose: int) -> npt.NDArray[np.float64]:
        """Draw a number from 0 to 1 for each index; SplitMix64 (Steele et al. 2014) of seed, purpose and index."""
        with np.errstate(over="ignore"):
            start = np.uint64(self.seed) * _MIX_1 + np.uint64(purpose) * _MIX_2
            state = start + (indices.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        return (mix_bits(state) >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def mix_bits(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Map each number to a different, random-looking number: the output function of SplitMix64."""
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def _divide(count: int, parts: int, rng: np.random.Generator) -> Integers:
    """Divide `count` items into `parts` parts of at least one item; all divisions are equally likely."""
    cuts = np.sort(rng.choice(count - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [count]]))


def cut_windows(length: int, largest: int) -> list[tuple[int, int]]:
    """Cut a text into as few windows as possible, of about the same length: (start, end) of each.

    A text that is too short to be masked has no window.
    """
    if length < MIN_WINDOW:
        return []
    count = -(-length // largest)
    bounds = [length * number // count for number in range(count + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def find_sentinels(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Find the ids of a tokenizer's sentinels, in T5's order; empty: no sentinels."""
    if tokenizer.backend is None:
        return tuple(BYTES_OFFSET + 255 - number for number in range(MAX_SENTINELS))
    found: list[int] = []
    while True:
        name = f"<extra_id_{len(found)}>"
        # in mT5's SentencePiece model they are words
        ids = [index for index in tokenizer.convert_tokens_to_ids([name, f"▁{name}"]) if index >= 0]
        if not ids:
            return tuple(found)
        found.append(ids[0])


def make_corruption(names: Sequence[str], tokenizer: Tokenizer, seed: int) -> SpanCorruption | None:
    """Make the span corruption of the setting `denoisers`; None if the tokenizer has no sentinels."""
    sentinels = find_sentinels(tokenizer)
    return SpanCorruption(find_denoisers(names), sentinels, seed) if sentinels else None
