"""The losses and metrics of a run, for the tokens of targets, for preference pairs, or for labels.

    total = objective.compute_total(model, inputs)      # the sum over the items of a micro-batch
    objective.take_metrics()                            # means since the last call, over all ranks
    objective.evaluate(model, held_out, …)              # metrics of held-out examples

An item is a target token, a pair, or a labeled text or token. The trainer divides the sums by the number of items in
the global step, so that a step's loss doesn't depend on the division into micro-batches and ranks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from t5tune.data.caches.examples import Examples
from t5tune.data.labels import LabelTask
from t5tune.data.tokens.encoding import Example, LabeledExample
from t5tune.distributed.collectives import all_gather
from t5tune.evaluation.labels import list_label_metrics, measure_labels
from t5tune.evaluation.scoring import LOSSES_TASK, measure_losses, measure_targets
from t5tune.label_metrics import ALL, LabelTable
from t5tune.metrics import is_better_low, prefix_metric
from t5tune.model.batches import REFERENCE, Collator
from t5tune.model.label_losses import compute_label_losses
from t5tune.model.preferences import compute_dpo_losses, compute_ipo_losses, compute_log_odds_ratios, sum_answers
from t5tune.progress import Report
from t5tune.settings.groups.preferences import PreferenceSettings

Pairs = Sequence[tuple[float, float]]
"""The log-probabilities of the chosen and the rejected answer of each pair."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How held-out examples are evaluated. See `measure_losses`."""

    collator: Collator
    batch_size: int | None
    report: Report
    is_stopped: Callable[[], bool]


class RunObjective(ABC):
    """The loss and the metrics of a run.

    Attributes:
        losses: metrics of an evaluation where lower is better.
        others: the remaining metrics; where they can choose the best checkpoint, higher is better.
        tables: of the last evaluation, by dataset: how labels were predicted.
    """

    losses: tuple[str, ...]
    others: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.tables: dict[str, LabelTable] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._count: torch.Tensor | int = 0

    @abstractmethod
    def compute_total(self, model: Any, architecture: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute the sum over the items of a micro-batch; the Trainer has wrapped `model`."""

    @abstractmethod
    def evaluate(self, model: Any, examples: Examples, options: EvaluationOptions) -> dict[str, float]:
        """Measure held-out examples. Call on every rank."""

    def count_items(self, examples: Sequence[Example]) -> int | None:
        """Count the items of examples that aren't dummies; None: target tokens, which the Trainer counts."""
        return None

    def list_losses(self, examples: Examples) -> list[str]:
        """List the metrics where lower is better, of all examples and of each dataset."""
        return _prefix(self.losses, examples)

    def list_metrics(self, examples: Examples) -> list[str]:
        """List the metrics of an evaluation, of all examples and of each dataset."""
        return _prefix((*self.losses, *self.others), examples)

    def take_metrics(self) -> dict[str, float]:
        """Return the means over the items since the last call. Call on every rank."""
        if not self._sums:
            return {}
        parts = all_gather(({name: float(value) for name, value in self._sums.items()}, int(self._count)))
        total = max(1, sum(count for _, count in parts))
        means = {name: sum(sums[name] for sums, _ in parts) / total for name in self._sums}
        self._sums, self._count = {}, 0
        return means

    def _record(self, values: dict[str, torch.Tensor], count: torch.Tensor) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count = self._count + count


def widen_mask(inputs: dict[str, Any], architecture: Any) -> dict[str, Any]:
    """Return a copy of a batch, with a padding mask of four dimensions if the architecture accepts it.

    transformers would check a mask of two dimensions for padding, and wait for the GPU.
    """
    if "attention_mask" not in inputs or not architecture.accepts_4d_masks:
        return dict(inputs)
    return {**inputs, "attention_mask": inputs["attention_mask"][:, None, None, :].bool()}


def _prefix(names: Sequence[str], examples: Examples) -> list[str]:
    return [*names, *(prefix_metric(dataset, name) for dataset, _ in examples.list_datasets() for name in names)]


class TargetObjective(RunObjective):
    """Cross-entropy of the targets: supervised fine-tuning, and span corruption."""

    losses = ("loss", "perplexity")

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def compute_total(self, model: Any, architecture: Any, inputs: dict[str, Any]) -> torch.Tensor:
        inputs = widen_mask(inputs, architecture)
        total: torch.Tensor = model(**inputs, reduction="sum", label_smoothing=self.label_smoothing)
        return total

    def list_losses(self, examples: Examples) -> list[str]:
        return [*self.losses, *(prefix_metric(name, "loss") for name, _ in examples.list_datasets())]

    list_metrics = list_losses

    def evaluate(self, model: Any, examples: Examples, options: EvaluationOptions) -> dict[str, float]:
        found = measure_losses(
            model, examples, options.collator, options.batch_size, options.report, options.is_stopped
        )
        values = {"loss": found.mean, "perplexity": math.exp(min(found.mean, 700.0))}  # exp(710) overflows
        for name, indices in examples.list_datasets():
            values[prefix_metric(name, "loss")] = found.select(indices).mean
        return values


class PreferenceObjective(RunObjective):
    """A preference between two answers. DPO needs the held-out pairs' values under the reference model."""

    def __init__(self, held_out_reference: Pairs | None = None) -> None:
        super().__init__()
        self.held_out_reference = held_out_reference

    def count_items(self, examples: Sequence[Example]) -> int:
        return len(examples)

    @abstractmethod
    def compare(
        self, policy_P2: torch.Tensor, lengths_P2: torch.Tensor, reference_P2: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Compute the metrics of each pair; training minimizes `loss`."""

    def compute_total(self, model: Any, architecture: Any, inputs: dict[str, Any]) -> torch.Tensor:
        inputs = widen_mask(inputs, architecture)
        reference_P2 = inputs.pop(REFERENCE, None)
        losses_BT = model(**inputs, reduction="none")
        policy_P2, lengths_P2 = sum_answers(losses_BT, inputs["labels"], inputs.get("packing"))
        is_pair_P = lengths_P2[:, 0] > 0
        found = self.compare(policy_P2, lengths_P2.clamp_min(1), reference_P2)
        totals = {name: torch.where(is_pair_P, values_P, 0).sum() for name, values_P in found.items()}
        loss = totals.pop("loss")
        self._record(totals, is_pair_P.sum())
        return loss

    def evaluate(self, model: Any, examples: Examples, options: EvaluationOptions) -> dict[str, float]:
        policy = measure_pairs(model, examples, options)
        lengths = [tuple(map(len, example.targets)) for example in examples]
        reference = self.held_out_reference

        def average(indices: Sequence[int]) -> dict[str, float]:
            def select(values: Sequence[Sequence[float]]) -> torch.Tensor:
                return torch.tensor([values[index] for index in indices], dtype=torch.float64)

            reference_P2 = None if reference is None else select(reference)
            found = self.compare(select(policy), select(lengths), reference_P2)
            return {name: float(values_P.mean()) for name, values_P in found.items()}

        metrics = average(range(len(examples)))
        for dataset, indices in examples.list_datasets():
            metrics |= {prefix_metric(dataset, name): value for name, value in average(indices).items()}
        return metrics


class DirectPreferenceObjective(PreferenceObjective):
    """DPO or IPO, with the reference's log-probabilities from before training (Rafailov et al. 2023, Azar et al. 2023).

    Metrics have TRL's names.
    """

    losses = ("loss",)
    others = (
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    )  # fmt: skip

    def __init__(self, options: PreferenceSettings, held_out_reference: Pairs | None) -> None:
        super().__init__(held_out_reference)
        self.beta = options.dpo_beta
        self.compute_losses = (
            partial(compute_ipo_losses, beta=self.beta)
            if options.dpo_loss == "ipo"
            else partial(compute_dpo_losses, beta=self.beta, label_smoothing=options.dpo_label_smoothing)
        )

    def compare(
        self, policy_P2: torch.Tensor, lengths_P2: torch.Tensor, reference_P2: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        assert reference_P2 is not None, "it was computed before the first step"
        rewards_P2 = self.beta * (policy_P2 - reference_P2)
        losses_P = self.compute_losses(policy_P2, reference_P2)
        return {"loss": losses_P, **describe_rewards(rewards_P2, policy_P2)}


class OddsRatioObjective(PreferenceObjective):
    """ORPO: the chosen answer's cross-entropy per token, and the ratio of both answers' odds (Hong et al. 2024).

    Metrics have TRL's names. As in TRL, log-probabilities are means over the tokens of an answer.
    """

    losses = ("loss", "nll_loss")
    others = (*DirectPreferenceObjective.others, "log_odds_ratio", "log_odds_chosen")

    def __init__(self, options: PreferenceSettings) -> None:
        super().__init__()
        self.weight = options.orpo_lambda

    def compare(
        self, policy_P2: torch.Tensor, lengths_P2: torch.Tensor, reference_P2: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        means_P2 = policy_P2 / lengths_P2
        log_odds_P = compute_log_odds_ratios(means_P2)
        ratios_P = torch.nn.functional.logsigmoid(log_odds_P)
        return {
            "loss": -means_P2[:, 0] - self.weight * ratios_P,
            "nll_loss": -means_P2[:, 0],
            **describe_rewards(self.weight * means_P2, means_P2),
            "log_odds_ratio": ratios_P,
            "log_odds_chosen": log_odds_P,
        }


class LabelObjective(RunObjective):
    """Labels of texts or tokens, predicted by an encoder.

    Args:
        scale: the unit of numbers, so that they are about as large as the model's first logits.
    """

    def __init__(self, task: LabelTask, scale: float) -> None:
        super().__init__()
        self.task, self.scale = task, scale
        self.losses = tuple(name for name in ("loss", *list_label_metrics(task)) if is_better_low(name))
        self.others = tuple(name for name in list_label_metrics(task) if not is_better_low(name))

    def count_items(self, examples: Sequence[Example]) -> int:
        if not self.task.per_token:
            return len(examples)
        return sum(
            int(np.count_nonzero(~np.isnan(each.values))) for each in examples if isinstance(each, LabeledExample)
        )

    def compute_total(self, model: Any, architecture: Any, inputs: dict[str, Any]) -> torch.Tensor:
        labels, inputs = inputs["labels"], {name: value for name, value in inputs.items() if name != "labels"}
        return compute_label_losses(model(**inputs), labels, self.task, self.scale).sum()

    def evaluate(self, model: Any, examples: Examples, options: EvaluationOptions) -> dict[str, float]:
        outcome = measure_labels(
            model, examples, options.collator, options.batch_size, options.report, options.is_stopped, self.scale
        )
        metrics, self.tables = dict[str, float](), {}
        for dataset, indices in [("", range(len(examples))), *examples.list_datasets()]:
            scores, table = outcome.score(indices)
            metrics |= {prefix_metric(dataset, name): value for name, value in scores.items()}
            if table is not None:
                self.tables[dataset or ALL] = table
        return metrics


def describe_rewards(rewards_P2: torch.Tensor, policy_P2: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name the rewards and the log-probabilities of each pair as TRL does."""
    (chosen_P, rejected_P), (policy_chosen_P, policy_rejected_P) = rewards_P2.unbind(1), policy_P2.unbind(1)
    return {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/accuracies": (chosen_P > rejected_P).to(chosen_P.dtype),
        "rewards/margins": chosen_P - rejected_P,
        "logps/chosen": policy_chosen_P,
        "logps/rejected": policy_rejected_P,
    }


def measure_pairs(
    model: Any, examples: Sequence[Example], options: EvaluationOptions, task: str = LOSSES_TASK
) -> list[tuple[float, float]]:
    """Measure the log-probabilities of both answers of preference pairs, without dropout. Call on every rank."""
    sums = measure_targets(
        model, examples, options.collator, options.batch_size, options.report, options.is_stopped, task
    )
    return [(-chosen, -rejected) for chosen, rejected in sums]
