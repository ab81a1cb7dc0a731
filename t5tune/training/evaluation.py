"""Losses and predictions of a model, with the examples divided among the ranks: for `train` and `evaluate`.

Neither takes more memory than a training step. The losses come from the same chunked head as in training. Batches have
a maximum number of tokens, and in generation also a maximum size of the key-value cache. If memory runs out anyway, all
ranks halve the number of examples per batch.

Every rank makes the same number of forward passes, since under ZeRO-3 each one gathers weights from all ranks.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from t5tune.custom_metrics import compute_custom_metrics, try_custom_metrics
from t5tune.data.encoding import Example
from t5tune.data.tokenizer import Tokenizer, decode_prediction, decode_reference
from t5tune.distributed.collectives import all_gather, any_rank, get_rank_and_size, run_on_rank_0
from t5tune.distributed.world import World
from t5tune.errors import OutOfMemory
from t5tune.metrics import choose_metrics, score
from t5tune.model.device import is_out_of_memory
from t5tune.model.generation import Decoding, generate
from t5tune.progress import Note, Report, count_done, silent
from t5tune.training.batches import PackedCollator, PaddedCollator

EVALUATE_TASK = "evaluate"
MAX_TOKENS_PER_BATCH = 8192  # source and target tokens; a single longer example is a batch of its own

Found = TypeVar("Found")
Fits = Callable[[int, int, int], bool]
"""(number of examples, length of the longest source, length of the longest target) -> whether they fit in a batch."""


@dataclass(frozen=True)
class Losses:
    """For each example the sum of its target tokens' cross-entropies, in nats, and the number of these tokens."""

    sums: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """The mean loss per target token."""
        return sum(self.sums) / sum(self.tokens)

    def get_mean(self, index: int) -> float:
        """Return an example's mean loss per target token."""
        return round(self.sums[index] / self.tokens[index], 6)


def measure_losses(
    model: Any,
    examples: Sequence[Example],
    collator: PaddedCollator | PackedCollator,
    batch_size: int,
    report: Report = silent,
) -> Losses:
    """Measure the cross-entropy of every example's target with teacher forcing.

    Args:
        batch_size: maximum number of examples per batch; long examples make smaller batches.

    Raises:
        OutOfMemory: even a single example doesn't fit into memory.
    """
    device = next(model.parameters()).device

    def measure(indices: list[int]) -> dict[int, float]:
        batch = {name: value.to(device) for name, value in collator([examples[i] for i in indices]).items()}
        losses_BT = model(**batch, reduction="none", use_cache=False)
        if isinstance(collator, PackedCollator):
            lengths = [len(examples[i].target_T) for i in indices]
            parts = losses_BT[0, : sum(lengths)].split(lengths)  # without the row's padding
        else:
            parts = losses_BT.unbind()
        sums_B = torch.stack([part.double().sum() for part in parts])
        return dict(zip(indices, sums_B.tolist(), strict=True))

    def fits(count: int, source: int, target: int) -> bool:
        return count * (source + target) <= MAX_TOKENS_PER_BATCH

    with _switch_to_eval_mode(model), torch.no_grad():
        sums = _measure_all(model, examples, batch_size, fits, measure, "losses", report)
    return Losses(sums, [len(example.target_T) for example in examples])


@dataclass(frozen=True)
class GenerationScorer:
    """Generates predictions for some of the held-out examples and scores them.

    Args:
        answer_suffix: the text that the conversation template adds after each target; it isn't part of a prediction.
        count: number of examples.
        names: the built-in metrics to compute; None: all that fit the targets.
        functions: the custom metrics, as in the setting `metric`. Only rank 0 imports and calls them: some aren't
            deterministic, and all ranks must agree on the best step.
    """

    tokenizer: Tokenizer
    answer_suffix: str
    count: int
    names: Sequence[str] | None
    functions: Sequence[str]
    world: World

    def list_metrics(self, examples: Sequence[Example]) -> list[str]:
        """List the metrics of an evaluation, after trying whether they can be computed. Call on every rank.

        Raises:
            SettingsError: one can't.
        """
        targets = self._decode_targets(self._select_examples(examples))
        return run_on_rank_0(
            self.world, lambda: [*choose_metrics(self.names, targets), *try_custom_metrics(self.functions, targets)]
        )

    def score(self, model: Any, examples: Sequence[Example], batch_size: int, report: Report) -> dict[str, float]:
        """Score greedy predictions for evenly spaced examples. Custom metrics may be NaN or infinite."""
        chosen = self._select_examples(examples)
        longest = find_max_target_length(chosen)
        decoding = Decoding(self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, longest)
        generated = generate_predictions(model, chosen, decoding, batch_size, report)
        predictions = [decode_prediction(self.tokenizer, ids, self.answer_suffix) for ids in generated]
        targets = self._decode_targets(chosen)
        return run_on_rank_0(
            self.world,
            lambda: (
                score(predictions, targets, choose_metrics(self.names, targets))
                | compute_custom_metrics(self.functions, predictions, targets, allow_non_finite=True)
            ),
        )

    def _select_examples(self, examples: Sequence[Example]) -> list[Example]:
        return [examples[index] for index in select_evenly(len(examples), self.count)]

    def _decode_targets(self, examples: Sequence[Example]) -> list[str]:
        return [decode_reference(self.tokenizer, example.target_T, self.answer_suffix) for example in examples]


def generate_predictions(
    model: Any,
    examples: Sequence[Example],
    decoding: Decoding,
    batch_size: int,
    report: Report = silent,
) -> list[list[int]]:
    """Generate a prediction for each example's source; its ids without the EOS token.

    Args:
        batch_size: maximum number of examples per batch; a large key-value cache makes smaller batches.

    Raises:
        OutOfMemory: even a single example doesn't fit into memory.
    """
    sharded = _is_sharded(model)
    budget = _compute_key_value_bytes(model, MAX_TOKENS_PER_BATCH)

    def predict(indices: list[int]) -> dict[int, list[int]]:
        sources = [examples[i].source_S.tolist() for i in indices]
        ids = generate(model, sources, decoding, synced_gpus=sharded)
        return dict(zip(indices, ids, strict=True))

    def fits(count: int, source: int, _target: int) -> bool:
        return count * _estimate_generation_bytes(model, source, decoding.max_new_tokens, decoding.num_beams) <= budget

    with _switch_to_eval_mode(model):
        return _measure_all(model, examples, batch_size, fits, predict, "predictions", report)


def find_max_target_length(examples: Sequence[Example]) -> int:
    """Find the length of the longest target in tokens, including the EOS token."""
    return max(len(example.target_T) for example in examples)


def select_evenly(count: int, wanted: int) -> list[int]:
    """Select `wanted` evenly spaced indices from 0 to `count` - 1: (10, 3) -> [0, 4, 9]."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)})


def _compute_key_value_bytes(model: Any, tokens: int) -> int:
    """Compute the size of the decoder's key-value cache for this many tokens: keys and values in each layer."""
    config = model.config
    width = config.num_heads * config.d_kv
    return int(2 * config.num_decoder_layers * width * tokens * model.dtype.itemsize)


def _estimate_generation_bytes(model: Any, source: int, target: int, beams: int) -> int:
    """Estimate the memory for generating from one source, without the model itself."""
    config = model.config
    cache = beams * _compute_key_value_bytes(model, source + target)
    scores = 2 * config.num_heads * source**2 * model.dtype.itemsize  # encoder position bias, plain and masked
    logits = 4 * beams * config.vocab_size * 4  # of one step in fp32, and copies made by beam search
    return int(cache + scores + logits)


@contextmanager
def _switch_to_eval_mode(model: Any) -> Iterator[None]:
    """Switch dropout off for this block, and restore each module's own mode after it."""
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
    """Apply `measure` to all examples, batch by batch, with the same number of batches on every rank.

    Returns:
        The result for each example, on every rank.
    """
    lengths = [(len(example.target_T), len(example.source_S)) for example in examples]
    longest_first = sorted(range(len(examples)), key=lambda i: lengths[i], reverse=True)
    pending = _make_batches(longest_first, lengths, batch_size, fits)
    rank, num_ranks = get_rank_and_size()
    task = f"{EVALUATE_TASK}: {what}"
    found: dict[int, Found] = {}
    with count_done(task, report, len(examples), "examples") as advance:
        while pending:
            together = pending[:num_ranks]
            size = max(map(len, together))
            # if fewer batches than ranks are left, the other ranks repeat the last one
            batch = together[min(rank, len(together) - 1)]
            results, error = _try_batch(measure, batch)
            # Under ZeRO-3 the other ranks are now waiting in their forward pass for this rank's shards: no retry is
            # possible, so this rank fails, and its exit ends their waiting.
            if error is not None and _is_sharded(model):
                raise _make_memory_error(task, batch, lengths) from error
            if not any_rank(error is not None):
                found |= results
                pending = pending[num_ranks:]
                advance(sum(map(len, together)))
                continue
            if size == 1:
                raise _make_memory_error(task, batch, lengths) from error
            del results, error  # the error's frames keep the batch's tensors in memory
            gc.collect()
            torch.cuda.empty_cache()
            batch_size = -(-size // 2)
            report(Note(f"{task}: out of memory with {size} examples at a time; continuing with {batch_size}", True))
            pending = [batch[i : i + batch_size] for batch in pending for i in range(0, len(batch), batch_size)]
    found = {index: value for part in all_gather(found) for index, value in part.items()}
    return [found[index] for index in range(len(examples))]


def _try_batch(
    measure: Callable[[list[int]], dict[int, Found]], batch: list[int]
) -> tuple[dict[int, Found], Exception | None]:
    """Measure a batch; if memory runs out, return the error."""
    try:
        return measure(batch), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {}, error


def _make_batches(order: list[int], lengths: list[tuple[int, int]], batch_size: int, fits: Fits) -> list[list[int]]:
    """Divide the order, longest targets first, into batches that fit; an example too long to fit is alone."""
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


def _make_memory_error(task: str, batch: list[int], lengths: list[tuple[int, int]]) -> OutOfMemory:
    examples = "one example of" if len(batch) == 1 else f"{len(batch)} examples of up to"
    source, target = max(lengths[i][1] for i in batch), max(lengths[i][0] for i in batch)
    smaller = "shorten examples with model_max_length" if len(batch) == 1 else "set per_device_eval_batch_size to 1"
    return OutOfMemory(
        f"out of memory: {task}: {examples} {source} source and {target} target tokens",
        hint=f"{smaller}, or load the base in four bits with --q-lora",
    )


def _is_sharded(model: Any) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
