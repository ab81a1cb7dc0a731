"""Batches for the model: padded, or packed into one row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t5tune.data.tokens.encoding import Example, PreferencePair
from t5tune.model.attention.segments import Segments
from t5tune.model.kernels.flex_attention import divide_rows
from t5tune.model.loss import IGNORED_LABEL

REFERENCE = "reference"
"""Key in a micro-batch of preference pairs: the log-probabilities under the reference model, (pairs, 2)."""


@dataclass(frozen=True)
class PackedCollator:
    """Concatenates the examples of a batch in one row (see model/attention/packing.py).

    Args:
        pad_token_id: fills rows up to whole blocks.
        divides_rows: whether to divide rows into blocks, for attention in one kernel.
        num_stages: see flex_attention.PackedRows.
    """

    decoder_start_token_id: int
    pad_token_id: int
    divides_rows: bool = False
    num_stages: int | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        sources = [example.source_S for example in examples]
        targets = _list_targets(examples)
        shifted = _shift_right(targets, self.decoder_start_token_id)
        per_source = len(targets) // len(sources)
        segments = Segments(tuple(map(len, sources)), tuple(map(len, targets)), targets_per_source=per_source)
        if self.divides_rows:
            rows = divide_rows(segments.sources, segments.targets, segments.targets_by_source, self.num_stages)
            segments = replace(segments, rows=rows)
            sources.append(np.full(rows.source_length - sum(segments.sources), self.pad_token_id))
            padding = rows.target_length - sum(segments.targets)
            shifted.append(np.full(padding, self.pad_token_id))
            targets.append(np.full(padding, IGNORED_LABEL))
        return {
            "input_ids": _concatenate(sources),
            "decoder_input_ids": _concatenate(shifted),
            "labels": _concatenate(targets),
            "packing": segments,
            **_list_reference(examples),
        }


@dataclass(frozen=True)
class PaddedCollator:
    """Pads a batch to its longest source and target.

    The decoder's input is its start token and the targets shifted right; padding gets the label -100. The attention
    mask is made from lengths, so that a pad token within a text counts as text. The two targets of a preference pair
    follow each other.
    """

    pad_token_id: int
    decoder_start_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        sources = [example.source_S for example in examples]
        targets = _list_targets(examples)
        shifted = _shift_right(targets, self.decoder_start_token_id)
        return {
            "input_ids": _pad(sources, self.pad_token_id),
            "attention_mask": _pad([np.ones_like(source) for source in sources], 0),
            "decoder_input_ids": _pad(shifted, self.pad_token_id),
            "labels": _pad(targets, IGNORED_LABEL),
            **_list_reference(examples),
        }


def make_collator(
    start_token_id: int, pad_token_id: int, is_packed: bool, divides_rows: bool = False, num_stages: int | None = None
) -> PackedCollator | PaddedCollator:
    if is_packed:
        return PackedCollator(start_token_id, pad_token_id, divides_rows, num_stages)
    return PaddedCollator(pad_token_id, start_token_id)


def _list_targets(examples: Sequence[Example]) -> list[Any]:
    return [target for example in examples for target in example.targets]


def _list_reference(examples: Sequence[Example]) -> dict[str, Tensor]:
    known = [each.reference for each in examples if isinstance(each, PreferencePair) and each.reference is not None]
    return {REFERENCE: torch.tensor(known, dtype=torch.float64)} if known else {}


def _shift_right(targets: list[Any], start: int) -> list[Any]:
    return [np.concatenate([[start], target[:-1]]) for target in targets]


def _concatenate(parts: list[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]


def _pad(rows: list[Any], value: int) -> Tensor:
    padded_BT = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for line, row in zip(padded_BT, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(padded_BT)
