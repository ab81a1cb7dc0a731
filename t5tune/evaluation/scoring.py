"""Losses and predictions of a model, with the examples divided among the ranks: for `train` and `evaluate`.

Both take no more memory than a training step. The losses come from the same chunked head as in training. Batches have a
maximum number of tokens, and in generation also a maximum size of the key-value cache (see batches.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from t5tune.constraints import Matcher
from t5tune.custom_metrics import compute_custom_metrics, try_custom_metrics
from t5tune.data.caches.examples import Examples, decode_targets
from t5tune.data.tokens.encoding import Example
from t5tune.data.tokens.tokenizer import Tokenizer, decode_prediction
from t5tune.distributed.collectives import run_on_rank_0
from t5tune.distributed.world import World
from t5tune.evaluation.batches import Batches, BatchRun, Lengths, make_batches
from t5tune.inference.generation import Decoding, generate
from t5tune.inference.target_scores import collate, split_by_target
from t5tune.label_metrics import ALL, LabelTable, find_labels, score_labels
from t5tune.metrics import choose_metrics, has_label_metrics, prefix_metric, score
from t5tune.model.batches import Collator
from t5tune.model.zero3 import gather_decoder
from t5tune.progress import Report, silent

EVALUATE_TASK = "evaluate"
LOSSES_TASK = f"{EVALUATE_TASK}: losses"
MAX_TOKENS_PER_BATCH = 8192  # source and target tokens; a longer example gets a separate batch
MIN_GENERATION_BYTES = 1 << 29  # less than small models take in training; without it, their batches would be small


@dataclass(frozen=True)
class Losses:
    """For each example, the sum of its target tokens' cross-entropies in nats, and the number of these tokens."""

    sums: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """The mean loss per target token."""
        return sum(self.sums) / sum(self.tokens)

    def select(self, indices: Iterable[int]) -> "Losses":
        """Return the losses of some examples."""
        chosen = list(indices)
        return Losses([self.sums[index] for index in chosen], [self.tokens[index] for index in chosen])


def measure_losses(
    model: Any,
    examples: Sequence[Example],
    collator: Collator,
    batch_size: int | None,
    report: Report = silent,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Losses:
    """Measure the cross-entropy of every example's target with teacher forcing. Call on every rank.

    The target of a preference pair is the chosen answer.

    Args:
        batch_size: maximum number of examples per batch; long examples make smaller batches.
        is_stopped: whether a signal asked this rank to stop; called after each batch.
    """
    sums = measure_targets(model, examples, collator, batch_size, report, is_stopped)
    return Losses([each[0] for each in sums], [len(example.target_T) for example in examples])


def measure_targets(
    model: Any,
    examples: Sequence[Example],
    collator: Collator,
    batch_size: int | None,
    report: Report = silent,
    is_stopped: Callable[[], bool] = lambda: False,
    task: str = LOSSES_TASK,
    measure: Callable[[Any, Sequence[Example], Collator], Sequence[Any]] | None = None,
) -> list[Any]:
    """Measure the summed cross-entropy of each target of every example, as `measure_losses` does: a tuple of floats.

    `measure` measures something else of a batch, such as `score_targets`.
    """

    def measure_batch(indices: list[int]) -> dict[int, Any]:
        found = (measure or _sum_losses)(model, [examples[i] for i in indices], collator)
        return dict(zip(indices, found, strict=True))

    batches = make_loss_batches(_list_lengths(examples), batch_size)
    with _switch_to_eval_mode(model), torch.no_grad():
        return BatchRun(batches, measure_batch, task, report, is_stopped).run(_is_sharded(model))


def _sum_losses(model: Any, examples: Sequence[Example], collator: Collator) -> list[tuple[float, ...]]:
    losses_BT = model(**collate(model, examples, collator), reduction="none", use_cache=False)
    by_target = split_by_target(losses_BT, examples, collator)
    # on the CPU, because Apple's GPUs have no float64
    sums = iter(torch.stack([part.double().sum() for parts in by_target for part in parts]).tolist())
    return [tuple(islice(sums, len(parts))) for parts in by_target]


def make_loss_batches(lengths: Sequence[Lengths], batch_size: int | None) -> Batches:
    """Make the batches of `measure_losses`."""

    def count_tokens(count: int, source: int, target: int) -> int:
        return count * (source + target)

    return make_batches(lengths, batch_size, count_tokens, MAX_TOKENS_PER_BATCH)


@dataclass(frozen=True)
class GenerationScorer:
    """Generates predictions for some held-out examples and scores them: all together (""), and per dataset.

    Args:
        names: the built-in metrics to compute; None: all that fit the targets.
        functions: the custom metrics, as in the setting `metric`. Only rank 0 imports and calls them: some aren't
            deterministic, and all ranks must agree on the best step.
        labels: the labels among all held-out targets, as from `find_held_out_labels`.
        autocast: see `generate_predictions`.
    """

    tokenizer: Tokenizer
    count: int
    names: Sequence[str] | None
    functions: Sequence[str]
    labels: Mapping[str, Sequence[str]]
    world: World
    autocast: bool

    def list_metrics(self, examples: Examples) -> list[str]:
        """List the metrics of an evaluation, after trying to compute them. Call on every rank."""

        def list_names() -> list[str]:
            found: list[str] = []
            for name, targets in self._group(self._decode_targets(examples)).items():
                metrics = (*self._choose(name, targets), *try_custom_metrics(self.functions, targets))
                found += (prefix_metric(name, metric) for metric in metrics)
            return found

        return run_on_rank_0(self.world, list_names)

    def score(
        self, model: Any, examples: Examples, batch_size: int | None, report: Report, is_stopped: Callable[[], bool]
    ) -> tuple[dict[str, float], dict[str, LabelTable]]:
        """Score greedy predictions for evenly spaced examples; also return the tables of labels, by dataset.

        Custom metrics may be NaN or infinite.
        """
        predictions: dict[str, list[str]] = {}
        for name, indices in self._select_examples(examples).items():
            # separately: the longest target of a dataset limits its predictions
            chosen = [examples[index] for index in indices]
            longest = find_max_target_length(chosen)
            decoding = Decoding(self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, longest)
            generated = generate_predictions(model, chosen, decoding, batch_size, report, is_stopped, self.autocast)
            predictions[name] = decode_predictions(self.tokenizer, examples, indices, [best for best, *_ in generated])

        def compute() -> tuple[dict[str, float], dict[str, LabelTable]]:
            scores: dict[str, float] = {}
            tables: dict[str, LabelTable] = {}
            predicted = self._group(predictions)
            for name, targets in self._group(self._decode_targets(examples)).items():
                texts, metrics, labels = predicted[name], self._choose(name, targets), self.labels[name]
                custom = compute_custom_metrics(self.functions, texts, targets, allow_non_finite=True)
                found = score(texts, targets, metrics, labels) | custom
                scores |= {prefix_metric(name, metric): value for metric, value in found.items()}
                if has_label_metrics(metrics):
                    _, tables[name or ALL] = score_labels(texts, targets, labels)
            return scores, tables

        return run_on_rank_0(self.world, compute)

    def _select_examples(self, examples: Examples) -> dict[str, list[int]]:
        """Select evenly spaced examples, equally many of each dataset: name -> indices. A single dataset is ""."""
        datasets = examples.list_datasets() or [("", range(len(examples)))]
        share = -(-self.count // len(datasets))
        return {name: [of[number] for number in select_evenly(len(of), share)] for name, of in datasets}

    def _decode_targets(self, examples: Examples) -> dict[str, list[str]]:
        parts = self._select_examples(examples).items()
        return {name: [*decode_targets(self.tokenizer, examples, indices)] for name, indices in parts}

    def _group(self, texts: dict[str, list[str]]) -> dict[str, list[str]]:
        """Add the texts of all datasets together, before each dataset's."""
        everything = list(chain.from_iterable(texts.values()))
        return {"": everything} | (texts if len(texts) > 1 else {})

    def _choose(self, dataset: str, targets: list[str]) -> list[str]:
        """Choose the metrics of all examples, or of a dataset: named metrics that don't fit it are left out."""
        fitting = choose_metrics(None if dataset else self.names, targets, self.labels[dataset])
        return [name for name in fitting if self.names is None or name in self.names]


def find_held_out_labels(tokenizer: Tokenizer, examples: Examples, are_named: bool) -> dict[str, list[str]]:
    """Find the labels among the targets of all examples (""), and of each of several datasets; see `find_labels`."""
    parts = {"": range(len(examples)), **dict(examples.list_datasets())}
    return {
        name: find_labels(decode_targets(tokenizer, examples, indices), are_named) for name, indices in parts.items()
    }


def decode_predictions(
    tokenizer: Tokenizer, examples: Examples, indices: Iterable[int], predictions: Sequence[Sequence[int]]
) -> list[str]:
    """Decode the predictions for some examples, without the template's answer suffix."""
    return [
        decode_prediction(tokenizer, ids, examples.get_template(index).answer_suffix, examples.is_raw_text(index))
        for index, ids in zip(indices, predictions, strict=True)
    ]


def generate_predictions(
    model: Any,
    examples: Sequence[Example],
    decoding: Decoding,
    batch_size: int | None,
    report: Report = silent,
    is_stopped: Callable[[], bool] = lambda: False,
    autocast: bool = False,
    constraint: Matcher | None = None,
) -> list[list[list[int]]]:
    """Generate predictions for each example's source, the best first; their ids. Call on every rank.

    Args:
        batch_size: maximum number of examples per batch; a large key-value cache makes smaller batches.
        is_stopped: whether a signal asked this rank to stop; called after each batch.
        autocast: whether to compute in mixed precision, as training does without DeepSpeed: its fp32 modules in a bf16
            base need it. The Trainer's autocast includes the model's forward, but not `generate`.
        constraint: of all predictions.
    """
    sharded = _is_sharded(model)
    budget = compute_generation_budget(model)

    def predict(indices: list[int]) -> dict[int, list[list[int]]]:
        sources = [examples[i].source_S.tolist() for i in indices]
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=autocast):
            ids = iter(generate(model, sources, decoding, sharded, constraints=[constraint] * len(sources)))
        return {index: list(islice(ids, decoding.num_replies)) for index in indices}

    def count_bytes(count: int, source: int, _target: int) -> int:
        return count * _estimate_generation_bytes(model, source, decoding.max_new_tokens, decoding.num_beams)

    batches = make_batches(_list_lengths(examples), batch_size, count_bytes, budget)
    with _switch_to_eval_mode(model), gather_decoder(model):
        return BatchRun(batches, predict, f"{EVALUATE_TASK}: predictions", report, is_stopped).run(sharded)


def compute_generation_budget(model: Any) -> int:
    """Compute the bytes that a batch of `generate_predictions` may take, in addition to the model."""
    return max(MIN_GENERATION_BYTES, _compute_key_value_bytes(model, MAX_TOKENS_PER_BATCH))


def _list_lengths(examples: Sequence[Example]) -> list[Lengths]:
    return [Lengths(sum(map(len, example.targets)), len(example.source_S)) for example in examples]


def find_max_target_length(examples: Iterable[Example]) -> int:
    """Find the length of the longest target in tokens, including the EOS token."""
    return max(len(example.target_T) for example in examples)


def select_evenly(count: int, wanted: int) -> list[int]:
    """Select `wanted` evenly spaced indices from 0 to `count` - 1: (10, 3) -> [0, 4, 9]."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)})


def _compute_key_value_bytes(model: Any, tokens: int) -> int:
    """Compute the bytes of the decoder's keys and values for this many tokens."""
    dimensions = model.architecture.dimensions
    return int(2 * dimensions.num_decoder_layers * dimensions.cache_width * tokens * model.dtype.itemsize)


def _estimate_generation_bytes(model: Any, source: int, target: int, beams: int) -> int:
    dimensions = model.architecture.dimensions
    cache = beams * _compute_key_value_bytes(model, source + target)
    scores = 2 * dimensions.num_heads * source**2 * model.dtype.itemsize  # encoder position bias, plain and masked
    logits = 4 * beams * dimensions.num_rows * 4  # one step's logits in fp32, and beam search's copies
    return int(cache + scores + logits)


@contextmanager
def _switch_to_eval_mode(model: Any) -> Iterator[None]:
    """Switch dropout off for this block, and restore each module's mode after it."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def _is_sharded(model: Any) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
