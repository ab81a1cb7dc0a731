"""One reply that is being generated. A request makes it, and an engine fills it in a background thread."""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from t5tune.constraints import Matcher
from t5tune.errors import InvalidReplyError, T5TuneError
from t5tune.inference.generation import TokenScores
from t5tune.inference.target_scores import TargetScore

FinishReason = Literal["stop", "length"]

OnToken = Callable[[int, int], bool]
"""(index of the reply in its batch, id of its next token) -> whether the reply ends here."""


@dataclass(frozen=True)
class DecodingOptions:
    """Decoding of a reply: greedy if the temperature is 0, else nucleus sampling, by default with a random seed.

    Args:
        constraint: at the beginning of a reply; None: a free reply.
        is_scored: whether targets are scored, in place of a reply.
        num_top: how many of the likeliest tokens at each position are scored together with the reply's token; None:
            nothing is scored.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    constraint: Matcher | None = None
    num_top: int | None = None
    is_scored: bool = False


class Engine(Protocol):
    """Generates replies of one model.

    Attributes:
        name: a value of `--engine`.
        stop_ids: tokens that end a reply.
        num_rows: the number of the model's logits.
        max_batches: how many batches it can compute at the same time.
        has_seeds: whether a seed makes a sampled reply repeatable.
        can_constrain_top_p: whether replies can follow a constraint while they are sampled with a top_p below 1.
    """

    name: str
    stop_ids: frozenset[int]
    num_rows: int
    max_batches: int
    has_seeds: bool
    can_constrain_top_p: bool

    def can_read(self, source: list[int]) -> bool:
        """Whether it can reply to a source."""

    def get_group(self, options: DecodingOptions) -> Hashable:
        """Return a key; only replies with equal keys may share a batch."""

    def generate(self, generations: Sequence["Generation"], on_token: OnToken) -> None:
        """Generate the replies of a batch, or score their targets. After an error, the caller may try smaller batches.

        Before `on_token`, it sets `next_scores` of replies whose options ask for scores.

        Args:
            on_token: called with each token, in any thread. It may generate other batches before it returns.
        """


@dataclass(eq=False)
class Generation:
    """A reply, from the request to its last token. Times are from `time.monotonic`.

    Args:
        source: ids of the prompt, with special tokens.
        notify: called in the engine's thread at the end, and if `follows` after each token.
        ids: the reply so far, without the token that ended it.
        scores: of `ids`, if its options ask for them.
        targets: ids to be scored, each with the token that ends it, in place of a reply.
        logits: of labels, in place of a reply.
        num_repairs: how many tokens were replaced because the constraint refused them.
        ended: why the reply has ended, which may be an error; None: still running.
        is_canceled: True once its client is gone.
    """

    engine: Engine
    source: list[int]
    options: DecodingOptions
    notify: Callable[[], None]
    follows: bool = False
    ids: list[int] = field(default_factory=list)
    scores: list[TokenScores] = field(default_factory=list)
    next_scores: TokenScores | None = None
    targets: Sequence[list[int]] = ()
    scored_targets: list[TargetScore] = field(default_factory=list)
    logits: Any = None
    num_repairs: int = 0
    ended: FinishReason | T5TuneError | None = None
    is_canceled: bool = False
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None
    _position: int = 0

    @property
    def size(self) -> int:
        """Tokens of the prompt and of the longest possible reply."""
        return len(self.source) + self.options.max_new_tokens

    @property
    def rest(self) -> int:
        """Tokens still to generate, at most."""
        return 0 if self.is_canceled or self.ended is not None else self.options.max_new_tokens - len(self.ids)

    @property
    def is_repeatable(self) -> bool:
        """Whether generating it again gives the same tokens."""
        return self.options.temperature == 0 or self.engine.has_seeds

    def start(self) -> None:
        """Start, or start over after the batch failed: then the engine repeats tokens that may already be sent."""
        self.started_at = self.started_at or time.monotonic()
        self._position = 0
        self.scored_targets.clear()
        if not self.follows:
            self.ids.clear()
            self.scores.clear()

    def add(self, token: int) -> bool:
        """Add the next token. Return True if the reply ends here."""
        if self.is_canceled or self.ended is not None:
            return True
        if self.targets:  # a turn is over
            return False
        if self._position < len(self.ids):  # repeated after a failed batch
            # in bf16, a smaller batch may give different tokens, which can't continue the tokens already sent
            if token != self.ids[self._position]:
                self.end(T5TuneError("the reply couldn't be computed: its batch failed, and a smaller batch differs"))
                return True
            self._position += 1
            return False
        if token in self.engine.stop_ids:
            self._end_complete()
            return True
        self._position += 1
        if self.next_scores is not None:  # first: once the reply has a token, it has its scores
            self.scores.append(self.next_scores)
        self.ids.append(token)
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        if len(self.ids) == self.options.max_new_tokens:
            self.end("length")
            return True
        if self.follows:
            self.notify()
        return False

    def _end_complete(self) -> None:
        """End a reply that its stop token completes. It isn't given to the client if it violates its constraint."""
        try:
            if self.options.constraint is not None:
                self.options.constraint.check_reply(self.ids)
        except InvalidReplyError as error:
            self.end(error)
        else:
            self.end("stop")

    def add_scored(self, targets: Sequence[TargetScore]) -> None:
        """Add the scores of the next targets. The last target ends the reply."""
        self.scored_targets += targets
        if len(self.scored_targets) == len(self.targets):
            self.end("stop")

    def end(self, reason: FinishReason | T5TuneError) -> None:
        if self.ended is None:
            self.ended = reason
            self.notify()
