"""The sample predictions of report.html: the model's predictions for some examples before and after training.

    samples = SamplePredictions(run_folder, examples, count, tokenizer, collator, 8, autocast=True)
    trainer.add_callback(samples)
    trainer.train()
    samples.finish(trainer.model, trainer.is_world_process_zero())

Which examples the model predicts worst is known only after training. So before training, it generates predictions for
more examples than the report shows: the candidates.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from t5tune.data.caches.examples import Examples, decode_targets
from t5tune.data.tokens.tokenizer import Tokenizer
from t5tune.evaluation.labels import LabelOutcome, measure_labels, name_labels
from t5tune.evaluation.scoring import (
    decode_predictions,
    find_max_target_length,
    generate_predictions,
    measure_losses,
    select_evenly,
)
from t5tune.formatting import format_label
from t5tune.inference.generation import Decoding
from t5tune.io.atomic import write_json
from t5tune.model.batches import Collator
from t5tune.runs.metrics_log import SAMPLES_FILE, read_samples

CANDIDATES_PER_SAMPLE = 2
MAX_PREDICTED_TOKENS = 64  # a small limit, because under ZeRO-3 every token gathers the whole model


class SamplePredictions(TrainerCallback):  # type: ignore[misc]
    """Writes greedy predictions for a few examples, from before and after training, to samples.json.

    All ranks generate them, because under ZeRO-3 each forward pass gathers weights from all ranks. A resumed run keeps
    the predictions from before its first step.

    Args:
        count: number of examples shown, chosen from evenly spaced candidates: half of them the worst after training.
        collator: makes the batches for the loss.
        autocast: see `generate_predictions`.
    """

    def __init__(
        self,
        run_folder: Path,
        examples: Examples,
        count: int,
        tokenizer: Tokenizer,
        collator: Collator,
        batch_size: int | None,
        autocast: bool,
    ) -> None:
        self.path = run_folder / SAMPLES_FILE
        self.examples = examples
        self.candidates = select_evenly(len(examples), count * CANDIDATES_PER_SAMPLE)
        self.count = count
        self.tokenizer = tokenizer
        self.collator = collator
        self.batch_size = batch_size
        self.autocast = autocast

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step > 0:
            return
        predictions = self._predict(model, self.candidates)
        if state.is_world_process_zero:
            samples = zip(self._decode(self.candidates), predictions, strict=True)
            write_json(self.path, [sample | {"before": prediction} for sample, prediction in samples])

    def finish(self, model: Any, is_main_process: bool) -> None:
        """Choose the samples, the worst ones last, and add the predictions of the trained model. Call on every rank."""
        losses = self._measure_losses(model)
        rest, worst = choose_samples(losses, self.count)
        chosen = [*rest, *worst]
        indices = [self.candidates[number] for number in chosen]
        predictions = self._predict(model, indices)
        if not is_main_process:
            return
        # a resumed run may have had different candidates
        before = {(sample["source"], sample["target"]): sample["before"] for sample in read_samples(self.path.parent)}
        samples = []
        for number, sample, prediction in zip(chosen, self._decode(indices), predictions, strict=True):
            sample["before"] = before.get((sample["source"], sample["target"]))
            sample["after"] = prediction
            sample["loss"] = losses[number] if math.isfinite(losses[number]) else None  # JSON has no NaN
            sample["worst_of"] = len(losses) if number in worst else None
            samples.append(sample)
        write_json(self.path, samples)

    def _decode(self, indices: list[int]) -> list[dict[str, Any]]:
        tokenizer, targets = self.tokenizer, self._write_targets(indices)
        sources = (tokenizer.special_ids.strip_source(self.examples[index].source_S.tolist()) for index in indices)
        return [
            {"source": tokenizer.decode(source), "target": target}
            for source, target in zip(sources, targets, strict=True)
        ]

    def _write_targets(self, indices: list[int]) -> list[str]:
        return [*decode_targets(self.tokenizer, self.examples, indices)]

    def _measure_losses(self, model: Any) -> list[float]:
        """Measure the mean loss of each candidate."""
        examples = [self.examples[index] for index in self.candidates]
        found = measure_losses(model, examples, self.collator, self.batch_size)
        return [total / tokens for total, tokens in zip(found.sums, found.tokens, strict=True)]

    def _predict(self, model: Any, indices: list[int]) -> list[str]:
        examples = [self.examples[index] for index in indices]
        max_tokens = min(find_max_target_length(examples), MAX_PREDICTED_TOKENS)
        decoding = Decoding(self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, max_tokens)
        predictions = generate_predictions(model, examples, decoding, self.batch_size, autocast=self.autocast)
        return decode_predictions(self.tokenizer, self.examples, indices, [best for best, *_ in predictions])


class LabelSamples(SamplePredictions):
    """Writes the labels or numbers that an encoder predicts for a few texts; see `SamplePredictions`.

    Args:
        scale: see `measure_labels`.
    """

    def __init__(self, *arguments: Any, scale: float) -> None:
        super().__init__(*arguments)
        self.scale = scale

    def _write_targets(self, indices: list[int]) -> list[str]:
        task = self.examples.label_task
        assert task is not None
        return [_write(name_labels(self.examples[index], task)) for index in indices]

    def _measure_losses(self, model: Any) -> list[float]:
        outcome = self._measure(model, self.candidates)
        return [float(outcome.measure_losses(number).mean()) for number in range(len(self.candidates))]

    def _predict(self, model: Any, indices: list[int]) -> list[str]:
        outcome = self._measure(model, indices)
        return [_write(outcome.predict(number)["prediction"]) for number in range(len(indices))]

    def _measure(self, model: Any, indices: list[int]) -> LabelOutcome:
        examples = [self.examples[index] for index in indices]
        return measure_labels(model, examples, self.collator, self.batch_size, scale=self.scale)


def _write(labels: Any) -> str:
    return " ".join(map(format_label, labels)) if isinstance(labels, list) else format_label(labels)


def choose_samples(losses: Sequence[float], count: int) -> tuple[list[int], list[int]]:
    """Choose `count` indices: (evenly spaced, and the half with the highest losses, the worst first)."""
    count = min(count, len(losses))
    # NaN compares as neither larger nor smaller
    by_loss = sorted(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    worst = by_loss[::-1][: count // 2]
    rest = [index for index in range(len(losses)) if index not in worst]
    return [rest[index] for index in select_evenly(len(rest), count - len(worst))], worst
