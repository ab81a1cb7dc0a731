"""The model's predictions for a few examples before the first step and after the last one, saved in samples.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from t5tune.data.encoding import Example
from t5tune.data.tokenizer import Tokenizer, decode_prediction, decode_reference
from t5tune.io.atomic import write_json
from t5tune.model.generation import Decoding
from t5tune.reports.metrics_log import SAMPLES_FILE, read_samples
from t5tune.training.evaluation import find_max_target_length, generate_predictions

MAX_PREDICTED_TOKENS = 64  # a small limit, because under ZeRO-3 every token gathers the whole model


class SamplePredictions(TrainerCallback):  # type: ignore[misc]
    """Generates predictions greedily, on all ranks: under ZeRO-3 each forward pass gathers weights from all of them.

    A resumed run keeps the predictions from before its first step.

    Args:
        answer_suffix: the text that the conversation template adds after each target.
    """

    def __init__(
        self, run_folder: Path, examples: Sequence[Example], tokenizer: Tokenizer, answer_suffix: str, batch_size: int
    ) -> None:
        self.path = run_folder / SAMPLES_FILE
        self.examples = examples
        self.tokenizer = tokenizer
        self.answer_suffix = answer_suffix
        self.batch_size = batch_size

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step > 0:
            return
        predictions = self._generate_predictions(model)
        if state.is_world_process_zero:
            samples = [
                {
                    "source": self.tokenizer.decode(example.source_S[:-1].tolist()),
                    "target": decode_reference(self.tokenizer, example.target_T, self.answer_suffix),
                    "before": prediction,
                }
                for example, prediction in zip(self.examples, predictions, strict=True)
            ]
            write_json(self.path, samples)

    def finish(self, model: Any, is_main_process: bool) -> None:
        """Add the predictions of the trained model. Call on every rank."""
        predictions = self._generate_predictions(model)
        if is_main_process:
            pairs = zip(read_samples(self.path.parent), predictions, strict=False)
            write_json(self.path, [sample | {"after": prediction} for sample, prediction in pairs])

    def _generate_predictions(self, model: Any) -> list[str]:
        max_tokens = min(find_max_target_length(self.examples), MAX_PREDICTED_TOKENS)
        decoding = Decoding(self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, max_tokens)
        predictions = generate_predictions(model, self.examples, decoding, self.batch_size)
        return [decode_prediction(self.tokenizer, ids, self.answer_suffix) for ids in predictions]
