"""The sample predictions of report.html: what the model predicts for some examples before and after training.

    samples = SamplePredictions(run_folder, examples, count, tokenizer, collator, 8, autocast=True)
    trainer.add_callback(samples)
    trainer.train()
    samples.finish(trainer.model, trainer.is_world_process_zero())

Only after training is it known which examples the model predicts worst. So before training, predictions are generated
for more examples than the report shows, the candidates.
"""

import math
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from t5tune.data.caches.examples import Examples
from t5tune.data.tokens.tokenizer import Tokenizer, decode_prediction, decode_reference
from t5tune.evaluation.scoring import find_max_target_length, generate_predictions, measure_losses, select_evenly
from t5tune.inference.generation import Decoding
from t5tune.io.atomic import write_json
from t5tune.model.batches import PackedCollator, PaddedCollator
from t5tune.runs.metrics_log import SAMPLES_FILE, read_samples

CANDIDATES_PER_SAMPLE = 2
MAX_PREDICTED_TOKENS = 64  # a small limit, because under ZeRO-3 every token gathers the whole model


class SamplePredictions(TrainerCallback):  # type: ignore[misc]
    """Writes the predictions for a few examples, before the first step and after the last one, to samples.json.

    Generates them greedily, on all ranks: under ZeRO-3 each forward pass gathers weights from all of them. A resumed
    run keeps the predictions from before its first step.

    Args:
        count: how many examples are shown, of more evenly spaced candidates: half of them the worst after training.
        collator: makes the batches for the loss.
        autocast: whether the model generates in mixed precision; see `generate_predictions`.
    """

    def __init__(
        self,
        run_folder: Path,
        examples: Examples,
        count: int,
        tokenizer: Tokenizer,
        collator: PaddedCollator | PackedCollator,
        batch_size: int | None,
        autocast: bool,
    ) -> None:
        self.path = run_folder / SAMPLES_FILE
        chosen = select_evenly(len(examples), count * CANDIDATES_PER_SAMPLE)
        self.candidates = [examples[index] for index in chosen]
        self.suffixes = [examples.get_template(index).answer_suffix for index in chosen]
        self.are_raw_texts = [examples.is_raw_text(index) for index in chosen]
        self.count = count
        self.tokenizer = tokenizer
        self.collator = collator
        self.batch_size = batch_size
        self.autocast = autocast

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step > 0:
            return
        predictions = self._generate_predictions(model, list(range(len(self.candidates))))
        if state.is_world_process_zero:
            write_json(self.path, [self._decode(i) | {"before": found} for i, found in enumerate(predictions)])

    def finish(self, model: Any, is_main_process: bool) -> None:
        """Choose the samples, the worst ones last, and add the predictions of the trained model. Call on every rank."""
        found = measure_losses(model, self.candidates, self.collator, self.batch_size)
        losses = [total / tokens for total, tokens in zip(found.sums, found.tokens, strict=True)]
        others, worst = choose_samples(losses, self.count)
        chosen = [*others, *worst]
        predictions = self._generate_predictions(model, chosen)
        if not is_main_process:
            return
        # an earlier process of a resumed run may have had other candidates
        before = {(sample["source"], sample["target"]): sample["before"] for sample in read_samples(self.path.parent)}
        samples = []
        for index, prediction in zip(chosen, predictions, strict=True):
            sample = self._decode(index)
            loss = losses[index] if math.isfinite(losses[index]) else None  # JSON has no NaN
            samples.append(
                {
                    **sample,
                    "before": before.get((sample["source"], sample["target"])),
                    "after": prediction,
                    "loss": loss,
                    "worst_of": len(self.candidates) if index in worst else None,
                }
            )
        write_json(self.path, samples)

    def _decode(self, index: int) -> dict[str, Any]:
        example = self.candidates[index]
        return {
            "source": self.tokenizer.decode(self.tokenizer.special_ids.strip_source(example.source_S.tolist())),
            "target": decode_reference(
                self.tokenizer, example.target_T, self.suffixes[index], self.are_raw_texts[index]
            ),
        }

    def _generate_predictions(self, model: Any, indices: list[int]) -> list[str]:
        """Generate a prediction for each of these candidates."""
        examples = [self.candidates[index] for index in indices]
        max_tokens = min(find_max_target_length(examples), MAX_PREDICTED_TOKENS)
        decoding = Decoding(self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, max_tokens)
        predictions = generate_predictions(model, examples, decoding, self.batch_size, autocast=self.autocast)
        suffixes = (self.suffixes[index] for index in indices)
        raw = (self.are_raw_texts[index] for index in indices)
        return list(map(decode_prediction, repeat(self.tokenizer), predictions, suffixes, raw))


def choose_samples(losses: Sequence[float], count: int) -> tuple[list[int], list[int]]:
    """Choose `count` indices: evenly spaced ones, and a half with the highest losses, the worst first."""
    count = min(count, len(losses))
    # NaN compares as neither larger nor smaller
    by_loss = sorted(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    worst = by_loss[::-1][: count // 2]
    rest = [index for index in range(len(losses)) if index not in worst]
    return [rest[index] for index in select_evenly(len(rest), count - len(worst))], worst
