"""Batches for the model: padded, or packed into one row.

N texts, S source tokens of a row or of the longest text, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t5tune.data.labels import LabelTask
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


@dataclass(frozen=True)
class LabelCollator:
    """Packs or pads `LabeledExample`s.

    The labels are float32, NaN if they aren't learned: the number or the class number of each text (N,), 1 for each of
    its labels if there may be several (N, K), or the number or class number of each token, (1, S) or (N, S).

    Args:
        pad_token_id, divides_rows, num_stages: see PackedCollator.
    """

    task: LabelTask
    pad_token_id: int
    is_packed: bool
    divides_rows: bool = False
    num_stages: int | None = None

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        sources, values = [each.source_S for each in examples], [each.values for each in examples]
        if not self.is_packed:
            inputs: dict[str, Any] = {"attention_mask": _pad([np.ones_like(source) for source in sources], 0)}
        else:
            segments, padding = Segments(tuple(map(len, sources)), ()), 0
            if self.divides_rows:
                rows = divide_rows(segments.sources, (), num_stages=self.num_stages)
                segments, padding = replace(segments, rows=rows), rows.source_length - sum(segments.sources)
            inputs = {"packing": segments}
            sources = [np.concatenate([*sources, np.full(padding, self.pad_token_id)])]
            if self.task.per_token:
                values = [np.concatenate([*values, np.full(padding, np.nan)])]
        labels = _pad(values, np.nan, np.float32) if self.task.per_token else self._stack(values)
        return {"input_ids": _pad(sources, self.pad_token_id), "labels": labels, **inputs}

    def _stack(self, values: Sequence[Any]) -> Tensor:
        if not self.task.several:
            return torch.tensor([value for (value,) in values], dtype=torch.float32)
        labels_NK = torch.zeros(len(values), self.task.num_outputs)
        for labels_K, classes in zip(labels_NK, values, strict=True):
            if np.isnan(classes).any():  # a dummy example
                labels_K[:] = np.nan
            else:
                labels_K[classes.astype(np.int64)] = 1
        return labels_NK


Collator = PackedCollator | PaddedCollator | LabelCollator


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


def _pad(rows: Sequence[Any], value: float, dtype: type[np.generic] = np.int64) -> Tensor:
    padded_BT = np.full((len(rows), max(map(len, rows))), value, dtype)
    for line, row in zip(padded_BT, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(padded_BT)
