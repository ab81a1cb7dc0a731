"""Text generation: greedy decoding, beam search or sampling, with or without constraints."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor, StoppingCriteria, TemperatureLogitsWarper, TopPLogitsWarper

from t5tune.compat.transformers_patches import size_cache_by_decoder
from t5tune.constraints import Matcher
from t5tune.errors import ModelError
from t5tune.file_names import GENERATION_CONFIG_FILE
from t5tune.io.reasons import describe_error

MIN_TEMPERATURE = 1e-5  # scores divided by less are infinite
MIN_TOP_P = 1e-6  # the likeliest token is always in the nucleus; CTranslate2 reads a value below 1e-45 as 0

OnToken = Callable[[int, int], bool | None]
"""(index of the source, id of its reply's next token) -> whether this reply is to end here."""


@dataclass(frozen=True)
class TokenScores:
    """The log-probability of a token, and the likeliest tokens at its position with theirs, the likeliest first.

    They are log-softmaxes of the logits, without constraints and temperature, in nats.
    """

    logprob: float
    top: list[tuple[int, float]]


OnScores = Callable[[int, TokenScores], None]
"""Called with the index of a source and the scores of its reply's next token, before `OnToken` is."""


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding or beam search, for replies without a `Sampling`."""

    eos_token_id: int
    pad_token_id: int
    max_new_tokens: int
    num_beams: int = 1
    num_replies: int = 1  # to each source, the best first; at most num_beams
    keeps_stop: bool = False  # replies include the token that ended them


@dataclass(frozen=True)
class Sampling:
    """Nucleus sampling (Holtzman et al. 2020) of one reply.

    Each reply has its own random generator, so it doesn't depend on its batch.
    """

    temperature: float
    top_p: float
    generator: torch.Generator


def make_random_generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def generate(
    model: Any,
    sources: list[list[int]],
    decoding: Decoding,
    synced_gpus: bool = False,
    on_token: OnToken | None = None,
    samplings: Sequence[Sampling | None] = (),
    constraints: Sequence[Matcher | None] = (),
    num_top: Sequence[int | None] = (),
    on_scores: OnScores | None = None,
) -> list[list[int]]:
    """Generate replies to the sources of one batch; by default one each, without the token that ended it.

    Args:
        sources: ids, with special tokens.
        synced_gpus: continue until every rank is done. ZeRO-3 needs this, because each forward gathers weights from
            all ranks.
        on_token: called with each new id, including the id that ends a reply; only without beams.
        samplings: for each source, a sampling or None (greedy); empty: all greedy.
        constraints: for each source, the constraint of its reply, at its beginning, or None; empty: all free.
        num_top: for each source, how many of the likeliest tokens `on_scores` gets; None: it isn't called.
        on_scores: only together with on_token.
    """
    device = next(model.parameters()).device
    width = max(map(len, sources))
    input_ids_BS = torch.tensor([[*source, *[decoding.pad_token_id] * (width - len(source))] for source in sources])
    lengths_B = torch.tensor([[len(source)] for source in sources])
    stop_ids = find_stop_ids(model, decoding.eos_token_id)
    scorer = _RowScores(num_top, on_scores) if on_scores else None
    follower = _Follower(on_token, stop_ids, len(sources), scorer) if on_token else None
    processors: list[LogitsProcessor] = [scorer] if scorer else []
    if any(constraints):
        is_greedy = [decoding.num_beams == 1 and sampling is None for sampling in samplings or [None] * len(sources)]
        processors.append(_RowConstraints(constraints, stop_ids, decoding.num_beams, is_greedy))
    processors += [_RowSampler(samplings)] if any(samplings) else []
    with torch.no_grad(), size_cache_by_decoder(model), _explain_config_errors():
        output_BT = model.generate(
            input_ids=input_ids_BS.to(device),
            attention_mask=(torch.arange(width) < lengths_B).long().to(device),
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            eos_token_id=stop_ids,
            pad_token_id=decoding.pad_token_id,
            synced_gpus=synced_gpus,
            logits_processor=processors,
            stopping_criteria=[follower] if follower else None,
            # override generation_config.json: this number of replies to each source, as ids
            num_return_sequences=decoding.num_replies,
            return_dict_in_generate=False,
            # _RowSampler samples
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    replies = follower.replies if follower else [row[1:] for row in output_BT.tolist()]  # without the start token
    lengths = (next((n for n, token in enumerate(ids) if token in stop_ids), len(ids)) for ids in replies)
    return [ids[: length + decoding.keeps_stop] for ids, length in zip(replies, lengths, strict=True)]


class _RowScores(LogitsProcessor):  # type: ignore[misc]
    """Keeps the logits of a step until its tokens are known, and scores the tokens of rows that want it."""

    def __init__(self, num_top: Sequence[int | None], on_scores: OnScores) -> None:
        self._num_top, self._on_scores = num_top, on_scores
        self._logits_BV: torch.Tensor | None = None

    def __call__(self, input_ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        self._logits_BV = scores_BV
        return scores_BV

    def score(self, row: int, token: int) -> None:
        if (count := self._num_top[row]) is None or self._logits_BV is None:
            return
        self._on_scores(row, score_token(self._logits_BV[row].float().log_softmax(-1), token, count))


def score_token(logprobs_V: torch.Tensor, token: int, count: int) -> TokenScores:
    """Score a token, and the `count` likeliest tokens."""
    values, ids = logprobs_V.topk(count)
    return TokenScores(float(logprobs_V[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))


class _RowConstraints(LogitsProcessor):  # type: ignore[misc]
    """Allows each row only the tokens that continue its reply under its constraint, by setting other scores to -inf.

    It keeps the state of each reply that is alive. A beam continues any beam of its source, so the states are found by
    the source and the ids so far. To find all allowed tokens takes longer than to accept one, so the scores of a
    greedy reply change only if its likeliest token isn't allowed.
    """

    def __init__(
        self, constraints: Sequence[Matcher | None], stop_ids: list[int], num_beams: int, is_greedy: Sequence[bool]
    ) -> None:
        self._constraints, self._stop_ids, self._num_beams = constraints, stop_ids, num_beams
        self._is_greedy = is_greedy
        self._states: dict[tuple[int, ...], Matcher] = {}

    def __call__(self, input_ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        states: dict[tuple[int, ...], Matcher] = {}
        masks: dict[int, npt.NDArray[np.bool_]] = {}
        likeliest = scores_BV.argmax(-1).tolist() if any(self._is_greedy) else []
        for row, ids in enumerate(input_ids_BT[:, 1:].tolist()):  # without the start token
            source = row // self._num_beams
            constraint = self._constraints[source]
            if constraint is None:
                continue
            key = (source, *ids)
            if key not in states and (state := self._follow(constraint, key)) is not None:
                states[key] = state
            if key in states and self._is_greedy[source] and states[key].copy().accept(likeliest[row]):
                continue
            allowed_V = states[key].find_allowed() if key in states else np.zeros(scores_BV.shape[1], bool)
            if not allowed_V.any():  # the reply has ended
                allowed_V[self._stop_ids] = True
            masks[row] = allowed_V
        self._states = states
        if masks:
            scores_BV = scores_BV.clone()
        for row, allowed_V in masks.items():
            scores_BV[row, ~torch.from_numpy(allowed_V).to(scores_BV.device)] = -torch.inf
        return scores_BV

    def _follow(self, constraint: Matcher, key: tuple[int, ...]) -> Matcher | None:
        """Return the state after the ids of a key, whose last id is new; None: the reply has ended."""
        _, *ids = key
        if not ids:
            return constraint.copy()  # a different thread may copy it, too
        before = self._states.get(key[:-1])
        if before is None or ids[-1] in self._stop_ids:
            return None
        state = before.copy()
        return state if state.accept(ids[-1]) else None


class _RowSampler(LogitsProcessor):  # type: ignore[misc]
    """Samples the next token of each row, by setting the scores of all other tokens to -inf.

    transformers samples all rows of a batch with one temperature and one generator. This uses its computations, so a
    single source with the same seed gets the same reply.
    """

    def __init__(self, samplings: Sequence[Sampling | None]) -> None:
        self._samplings = samplings

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        scores_BV = scores_BV.clone()
        for row, sampling in enumerate(self._samplings):
            if sampling is None or sampling.temperature < MIN_TEMPERATURE:
                continue  # greedy
            scores_1V = TemperatureLogitsWarper(sampling.temperature)(input_ids, scores_BV[row : row + 1])
            if sampling.top_p < 1:
                scores_1V = TopPLogitsWarper(sampling.top_p)(input_ids, scores_1V)
            (drawn,) = torch.multinomial(scores_1V.softmax(-1)[0], 1, generator=sampling.generator)
            scores_BV[row] = -torch.inf
            scores_BV[row, drawn] = 0.0
        return scores_BV


class _Follower(StoppingCriteria):  # type: ignore[misc]
    """Passes each new token to `on_token`, which may end its row. Later tokens of this row are padding."""

    def __init__(self, on_token: OnToken, stop_ids: list[int], num_rows: int, scorer: _RowScores | None = None) -> None:
        self.replies: list[list[int]] = [[] for _ in range(num_rows)]
        self._scorer = scorer
        self._on_token = on_token
        self._stop_ids = stop_ids
        self._is_done = [False] * num_rows

    def __call__(self, input_ids_BT: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, token in enumerate(input_ids_BT[:, -1].tolist()):
            if not self._is_done[row]:
                self.replies[row].append(token)
                if self._scorer is not None:
                    self._scorer.score(row, token)
                self._is_done[row] = bool(self._on_token(row, token)) or token in self._stop_ids
        return torch.tensor(self._is_done, device=input_ids_BT.device)


@contextmanager
def _explain_config_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:  # transformers refuses a setting of the file
        problem = f"the model's {GENERATION_CONFIG_FILE}: transformers can't generate with it: {describe_error(error)}"
        raise ModelError(problem, hint="correct it, or remove it") from error


def find_stop_ids(model: Any, eos_token_id: int) -> list[int]:
    """Find the tokens that end a reply: EOS, and more in generation_config.json, such as the end of a turn."""
    listed = model.generation_config.eos_token_id
    others = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return list(dict.fromkeys([eos_token_id, *others]))
