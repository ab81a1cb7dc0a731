"""Compare a converted model's greedy replies to a few prompts with the replies of the merged checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from t5tune.data.tokens.tokenizer import Tokenizer
from t5tune.errors import TrainingError
from t5tune.inference.generation import Decoding, generate
from t5tune.merging.verify import find_max_difference

MAX_REPLY_TOKENS = 32
TOLERANCE = 1e-3  # relative to the largest log-probability; both models compute in fp32, but sum in a different order


@dataclass(frozen=True)
class Reply:
    """The ids of a reply, without EOS, and the log-probabilities of these ids and of EOS after them."""

    ids: list[int]
    log_probs: Sequence[float]


@dataclass(frozen=True)
class Agreement:
    """Agreement of greedy replies to a few prompts.

    Args:
        replies: number of replies; `same`: of identical replies.
        error: largest difference between the log-probabilities of our replies' tokens.
        largest: largest absolute log-probability of these tokens.
    """

    replies: int
    same: int
    error: float
    largest: float

    def describe(self, converted: str) -> str:
        same = f"{converted} gives the same reply for {self.same} of {self.replies} prompts"
        return f"{same}; log-probabilities differ by at most {self.error:.2g}"

    def check_exact(self, library: str) -> None:
        """Raise TrainingError unless the replies are equal and the log-probabilities nearly so."""
        if self.same < self.replies or not self.error <= TOLERANCE * max(self.largest, 1.0):
            different = f"the merged and the converted model give different replies: {self.describe(library)}"
            raise TrainingError(
                f"{different}; nothing was written",
                hint=f"try a different release of {library}, and report its version in an issue",
            )


def generate_replies(model: Any, tokenizer: Tokenizer, sources: list[list[int]]) -> list[Reply]:
    """Generate greedy replies with a model in fp32, without the penalties of generation_config.json."""
    start, end = model.architecture.start_token_id, tokenizer.eos_token_id
    model.generation_config = transformers.GenerationConfig(decoder_start_token_id=start)
    replies = []
    for source in sources:
        (ids,) = generate(model, [source], Decoding(end, tokenizer.pad_token_id, MAX_REPLY_TOKENS))
        inputs = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[start, *ids]])}
        with torch.inference_mode():
            logits_TV = model(**inputs, use_cache=False).logits[0]
        replies.append(Reply(ids, select_log_probs(logits_TV, [*ids, end])))
    return replies


def select_log_probs(logits_TV: torch.Tensor, ids: list[int]) -> list[float]:
    """Return the log-probability of each id at its position."""
    log_probs: list[float] = logits_TV.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].tolist()
    return log_probs


def compare_replies(ours: list[Reply], theirs: list[Reply]) -> Agreement:
    """Compare replies to the same sources; `theirs` have the log-probabilities of our ids."""
    expected, found = (
        [torch.tensor(reply.log_probs, dtype=torch.float64) for reply in each] for each in (ours, theirs)
    )
    return Agreement(
        replies=len(ours),
        same=sum(one.ids == other.ids for one, other in zip(ours, theirs, strict=True)),
        error=find_max_difference(expected, found),
        largest=max(float(log_probs.abs().max()) for log_probs in expected),
    )
