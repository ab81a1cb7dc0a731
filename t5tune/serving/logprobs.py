"""The log-probabilities of a reply's tokens, as OpenAI's API shows them.

    log = TokenLog(spellings, is_chat=True)
    log.describe(ids, scores)      # {"content": [{"token": " Hello", "logprob": -0.1, "bytes": [32, …], …}], …}

Joined, the tokens are the reply's text, if it ends with a whole character.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from t5tune.constraints.spelling import Spellings
from t5tune.inference.generation import TokenScores

SpelledScores = tuple[bytes, float, list[tuple[bytes, float]]]
"""The bytes of a token, its log-probability, and the likeliest tokens at its position with theirs."""


@dataclass
class TokenLog:
    """Describes the tokens of one reply, part by part.

    Args:
        num_tokens: how many tokens were described.
    """

    spellings: Spellings
    is_chat: bool
    num_tokens: int = 0
    _num_characters: int = 0

    def describe(self, ids: Sequence[int], scores: Sequence[TokenScores]) -> dict[str, Any]:
        """Describe the tokens of a reply that weren't described yet."""
        new = [
            (self._spell(token, place), each.logprob, [(self._spell(other, place), value) for other, value in each.top])
            for place, (token, each) in enumerate(zip(ids, scores, strict=True))
            if place >= self.num_tokens
        ]
        self.num_tokens = len(ids)
        if self.is_chat:
            tokens = [_show(text, value) | {"top_logprobs": [_show(*each) for each in top]} for text, value, top in new]
            return {"content": tokens, "refusal": None}
        return self._describe_completion(new)

    def _spell(self, token: int, place: int) -> bytes:
        spellings = self.spellings.first if place == 0 else self.spellings.later
        return spellings[token] or b""  # special tokens have no text

    def _describe_completion(self, new: list[SpelledScores]) -> dict[str, Any]:
        texts = [_decode(spelled) for spelled, _, _ in new]
        offsets = []
        for text in texts:
            offsets.append(self._num_characters)
            self._num_characters += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [logprob for _, logprob, _ in new],
            # of tokens with the same text, the likeliest is kept
            "top_logprobs": [{_decode(spelled): value for spelled, value in reversed(top)} for *_, top in new],
            "text_offset": offsets,
        }


def _show(spelled: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _decode(spelled), "logprob": logprob, "bytes": list(spelled)}


def _decode(spelled: bytes) -> str:
    return spelled.decode(errors="replace")  # a part of a character
