"""Losses and replies of a model on examples, shared among the ranks: for training's evaluation and for evaluate.

Neither takes more memory than a training step. The losses come from the same chunked head as in training; a batch
has a limited number of tokens, and in generation of what its key-value cache takes; and where memory runs out all the
same, all ranks continue with half of the examples at a time.

Every rank makes the same number of forward passes, since under ZeRO-3 each of them gathers from all ranks.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from t5tune.data.encoding import Example
from t5tune.distributed.collectives import any_rank, gather, rank_and_size
from t5tune.errors import OutOfMemory
from t5tune.model.device import is_out_of_memory
from t5tune.model.generation import generate
from t5tune.model.loss import HeadLoss
from t5tune.progress import Advanced, Finished, Note, Report, Started, silent
from t5tune.training.batches import PackedCollator, PaddedCollator

TASK = "evaluate"
TOKENS_AT_ONCE = 8192  # source and target tokens of a batch of several examples

Found = TypeVar("Found")
Fits = Callable[[int, int, int], bool]
"""Whether so many examples go into one batch, of at most so many source and target tokens each."""


@dataclass(frozen=True)
class Losses:
    """Of each example: the sum of its target tokens' cross-entropies in nats, and their number."""

    sums: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """The loss per target token."""
        return sum(self.sums) / sum(self.tokens)


def measure_losses(
    model: Any,
    head_loss: HeadLoss,
    examples: Sequence[Example],
    collator: PaddedCollator | PackedCollator,
    batch_size: int,
    report: Report = silent,
) -> Losses:
    """The cross-entropy of every example's target, the model reading the true target as it goes.

    Args:
        head_loss: the model's.
        batch_size: examples of a batch, at most; fewer where they are long.

    Raises:
        OutOfMemory: a single example doesn't fit.
    """
    device = next(model.parameters()).device

    def measure(indices: list[int]) -> dict[int, float]:
        batch = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in collator([examples[i] for i in indices]).items()
        }
        labels_BT = batch.pop("labels")
        with head_loss.of_each(labels_BT):
            losses_BT = model(**batch, use_cache=False).logits.view(labels_BT.shape)
        if isinstance(collator, PackedCollator):
            parts = losses_BT[0].split([len(examples[i].target_T) for i in indices])
        else:
            parts = losses_BT.unbind()
        sums_B = torch.stack([part.double().sum() for part in parts])
        return dict(zip(indices, sums_B.tolist(), strict=True))

    def fits(count: int, source: int, target: int) -> bool:
        return count * (source + target) <= TOKENS_AT_ONCE

    with _evaluating(model), torch.no_grad():
        sums = _measure_all(model, examples, batch_size, fits, measure, "losses", report)
    return Losses(sums, [len(example.target_T) for example in examples])


def generate_replies(
    model: Any,
    examples: Sequence[Example],
    eos_token_id: int,
    pad_token_id: int,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    report: Report = silent,
) -> list[list[int]]:
    """The reply to each example's source, without its end token: the likeliest by greedy or beam search.

    Args:
        batch_size: examples of a batch, at most; fewer where their key-value cache would be large.

    Raises:
        OutOfMemory: a single example doesn't fit.
    """
    sharded = _is_sharded(model)
    budget = _key_value_bytes(model, TOKENS_AT_ONCE)

    def reply(indices: list[int]) -> dict[int, list[int]]:
        sources = [examples[i].source_S.tolist() for i in indices]
        ids = generate(model, sources, eos_token_id, pad_token_id, max_new_tokens, num_beams, synced_gpus=sharded)
        return dict(zip(indices, ids, strict=True))

    def fits(count: int, source: int, _target: int) -> bool:
        return count * _generation_bytes(model, source, max_new_tokens, num_beams) <= budget

    with _evaluating(model):
        return _measure_all(model, examples, batch_size, fits, reply, "replies", report)


def longest_target(examples: Sequence[Example]) -> int:
    """Tokens, the end token included."""
    return max(len(example.target_T) for example in examples)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the indices below `count`, evenly spread: (10, 3) -> [0, 4, 9]."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)})


def _key_value_bytes(model: Any, tokens: int) -> int:
    """What the decoder keeps of so many tokens: keys and values in each of its layers."""
    config = model.config
    width = config.num_heads * config.d_kv
    return int(2 * config.num_decoder_layers * width * tokens * _bytes_per_value(model))


def _generation_bytes(model: Any, source: int, target: int, beams: int) -> int:
    """What generation takes for one source, besides the model."""
    config = model.config
    cache = beams * _key_value_bytes(model, source + target)
    scores = 2 * config.num_heads * source**2 * _bytes_per_value(model)  # the encoder's bias, and that with its mask
    logits = 4 * beams * config.vocab_size * 4  # a step's, in fp32, and what beam search makes of them
    return int(cache + scores + logits)


def _bytes_per_value(model: Any) -> int:
    return int(model.dtype.itemsize)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for a while: no dropout. What trained before trains again after."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def _measure_all(
    model: Any,
    examples: Sequence[Example],
    batch_size: int,
    fits: Fits,
    measure: Callable[[list[int]], dict[int, Found]],
    what: str,
    report: Report,
) -> list[Found]:
    """What `measure` finds of each example, batch by batch, each rank doing as many batches as any other."""
    lengths = [(len(example.target_T), len(example.source_S)) for example in examples]
    longest_first = sorted(range(len(examples)), key=lambda i: lengths[i], reverse=True)
    pending = _batches(longest_first, lengths, batch_size, fits)
    rank, num_ranks = rank_and_size()
    device = next(model.parameters()).device
    task = f"{TASK}: {what}"
    found: dict[int, Found] = {}
    done = 0
    report(Started(task, len(examples), "examples"))
    while pending:
        together = pending[:num_ranks]
        size = max(map(len, together))
        # the last batch is repeated where others have one more
        batch = together[min(rank, len(together) - 1)]
        try:
            results, error = measure(batch), None
        except (RuntimeError, MemoryError) as raised:
            if not is_out_of_memory(raised):
                raise
            results, error = {}, raised
        # a rank that leaves a forward under ZeRO-3 leaves the others waiting for its part of the weights
        if error is not None and _is_sharded(model):
            raise _out_of_memory(task, batch, lengths) from error
        if not any_rank(error is not None, device):
            found |= results
            pending = pending[num_ranks:]
            done += sum(map(len, together))
            report(Advanced(task, done))
            continue
        if size == 1:
            raise _out_of_memory(task, batch, lengths) from error
        del results, error  # its frames would keep the tensors that there was no room for
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        batch_size = -(-size // 2)
        report(
            Note(f"{task}: out of memory with {size} examples at a time; continuing with {batch_size}", warning=True)
        )
        pending = [batch[i : i + batch_size] for batch in pending for i in range(0, len(batch), batch_size)]
    report(Finished(task))
    found = {index: value for part in gather(found) for index, value in part.items()}
    return [found[index] for index in range(len(examples))]


def _batches(order: list[int], lengths: list[tuple[int, int]], batch_size: int, fits: Fits) -> list[list[int]]:
    """Cut the order, longest targets first, into batches that fit; what fits in none is one by itself."""
    batches: list[list[int]] = []
    longest_source = longest_target = 0
    for index in order:
        target, source = lengths[index]
        longest = max(longest_source, source), max(longest_target, target)
        if batches and len(batches[-1]) < batch_size and fits(len(batches[-1]) + 1, *longest):
            batches[-1].append(index)
            longest_source, longest_target = longest
        else:
            batches.append([index])
            longest_source, longest_target = source, target
    return batches


def _out_of_memory(task: str, batch: list[int], lengths: list[tuple[int, int]]) -> OutOfMemory:
    examples = "one example," if len(batch) == 1 else f"{len(batch)} examples"
    source, target = max(lengths[i][1] for i in batch), max(lengths[i][0] for i in batch)
    smaller = "shorten examples with model_max_length" if len(batch) == 1 else "set per_device_eval_batch_size to 1"
    return OutOfMemory(
        f"out of memory: {task} of {examples} of up to {source} source and {target} target tokens",
        hint=f"{smaller}, or load the base in four bits with --q-lora",
    )


def _is_sharded(model: Any) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
