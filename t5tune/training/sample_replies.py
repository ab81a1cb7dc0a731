"""Replies to a few examples before the first step and after the last, kept in samples.json of the run folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from t5tune.data.encoding import Example
from t5tune.data.tokenizer import Tokenizer, answer_text, true_text
from t5tune.io.atomic import write_json
from t5tune.training.evaluation import generate_replies, longest_target
from t5tune.training.metrics_log import SAMPLES, read_samples

LONGEST_REPLY = 64  # tokens: under ZeRO-3 each of them gathers the whole model


class SampleReplies(TrainerCallback):  # type: ignore[misc]
    """Greedy replies, on every rank together, since under ZeRO-3 each forward gathers from all of them.

    A run that is resumed keeps the replies that it gave before its first step.

    Args:
        answer_end: what the layout puts behind each answer.
    """

    def __init__(
        self, run_folder: Path, examples: Sequence[Example], tokenizer: Tokenizer, answer_end: str, batch_size: int
    ) -> None:
        self.path = run_folder / SAMPLES
        self.examples = examples
        self.tokenizer = tokenizer
        self.answer_end = answer_end
        self.batch_size = batch_size

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step > 0:
            return
        replies = self._replies(model)
        if state.is_world_process_zero:
            samples = [
                {
                    "source": self.tokenizer.decode(example.source_S[:-1].tolist()),
                    "target": true_text(self.tokenizer, example.target_T, self.answer_end),
                    "before": reply,
                }
                for example, reply in zip(self.examples, replies, strict=True)
            ]
            write_json(self.path, samples)

    def finish(self, model: Any, is_main_process: bool) -> None:
        """Add the replies of the trained model."""
        replies = self._replies(model)
        if is_main_process:
            samples = read_samples(self.path.parent)
            write_json(self.path, [sample | {"after": reply} for sample, reply in zip(samples, replies, strict=False)])

    def _replies(self, model: Any) -> list[str]:
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        longest = min(longest_target(self.examples), LONGEST_REPLY)
        replies = generate_replies(model, self.examples, eos, pad, self.batch_size, longest)
        return [answer_text(self.tokenizer, reply, self.answer_end) for reply in replies]
