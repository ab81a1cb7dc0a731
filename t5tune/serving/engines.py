"""Engines that generate replies, transformers and CTranslate2, or predict labels.

    engine.generate([generation, …], on_token)    # returns when all replies of the batch have ended

Both call `on_token` for each token. So a reply can be sent while it is generated, ends as soon as it is complete, and
takes no more time once its client is gone. `on_token` may itself generate other batches with the same engine.
"""

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t5tune.compat.ctranslate2_patches import load_translator
from t5tune.compat.quiet import quiet_libraries
from t5tune.errors import ModelError
from t5tune.file_names import CONFIG_FILE, CTRANSLATE2_VOCABULARY_FILE
from t5tune.formatting import shorten
from t5tune.inference.generation import (
    Decoding,
    Sampling,
    TokenScores,
    find_stop_ids,
    generate,
    make_random_generator,
    score_token,
)
from t5tune.inference.label_predictions import compute_logits
from t5tune.inference.label_sources import make_unlabeled_example
from t5tune.inference.target_scores import Candidates, TargetScore, score_targets, set_up_scoring
from t5tune.io.processes import count_cores
from t5tune.io.reasons import join_lines
from t5tune.model.batches import Collator
from t5tune.model.device import use_gpu_kernels
from t5tune.serving.batching import MAX_LEVEL
from t5tune.serving.generation import DecodingOptions, Generation, OnToken

TARGETS_PER_PART = 16  # scored at once
EndTurn = Callable[[int], bool]


class TransformersEngine:
    """A model that transformers runs."""

    name = "transformers"
    max_batches = 1
    has_seeds = True
    can_constrain_top_p = True

    def __init__(self, model: Any, eos_token_id: int, pad_token_id: int) -> None:
        self._model = model
        self._eos_token_id, self._pad_token_id = eos_token_id, pad_token_id
        self._collator: Collator | None = None
        self.num_rows: int = model.architecture.dimensions.num_rows
        self.stop_ids = frozenset(find_stop_ids(model, eos_token_id))

    def can_read(self, source: list[int]) -> bool:
        return True

    def get_group(self, options: DecodingOptions) -> Hashable:
        return options.is_scored  # replies with any other options share a batch: each is sampled by itself

    def generate(self, generations: Sequence[Generation], on_token: OnToken) -> None:
        if generations[0].options.is_scored:
            for index, generation in enumerate(generations):
                self._score(generation, partial(on_token, index))
            return
        longest = max(generation.options.max_new_tokens for generation in generations)

        def note_scores(row: int, scores: TokenScores) -> None:
            generations[row].next_scores = scores

        num_top = [generation.options.num_top for generation in generations]
        with quiet_libraries(), use_gpu_kernels(self._model.device):
            generate(
                self._model,
                [generation.source for generation in generations],
                Decoding(self._eos_token_id, self._pad_token_id, longest),
                on_token=on_token,
                samplings=[self._make_sampling(generation.options) for generation in generations],
                constraints=[generation.options.constraint for generation in generations],
                num_top=num_top,
                on_scores=None if all(count is None for count in num_top) else note_scores,
            )

    def _score(self, generation: Generation, end_turn: EndTurn) -> None:
        collator = self._collator = self._collator or set_up_scoring(self._model, self._pad_token_id)
        source_S = np.array(generation.source)
        for targets in _divide_targets(generation, end_turn):
            first_T, *others = map(np.array, targets)
            with quiet_libraries(), use_gpu_kernels(self._model.device):
                (scores,) = score_targets(self._model, [Candidates(source_S, first_T, tuple(others))], collator)
            generation.add_scored(scores)

    def _make_sampling(self, options: DecodingOptions) -> Sampling | None:
        if options.temperature == 0:
            return None
        assert options.seed is not None
        return Sampling(options.temperature, options.top_p, make_random_generator(options.seed, self._model.device))


class LabelEngine:
    """An encoder that predicts labels, which transformers runs."""

    name = "transformers"
    max_batches, num_rows = 1, 0
    has_seeds = can_constrain_top_p = False
    stop_ids: frozenset[int] = frozenset()

    def __init__(self, model: Any, pad_token_id: int) -> None:
        self._model, self._collator = model, set_up_scoring(model, pad_token_id)

    def can_read(self, source: list[int]) -> bool:
        return True

    def get_group(self, options: DecodingOptions) -> Hashable:
        return None

    def generate(self, generations: Sequence[Generation], on_token: OnToken) -> None:
        examples = [make_unlabeled_example(generation.source, self._model.label_task) for generation in generations]
        with quiet_libraries(), use_gpu_kernels(self._model.device):
            found = compute_logits(self._model, examples, self._collator)
        for generation, logits in zip(generations, found, strict=True):
            generation.logits = logits
            generation.end("stop")


class TranslatorEngine:
    """A model that CTranslate2 runs.

    Args:
        compute_type: CTranslate2's; `default` is the type of the folder's weights, if the device supports it.
        max_batches: how many batches are computed at the same time. On a CPU they divide its cores.
    """

    name = "ctranslate2"
    has_seeds = False  # CTranslate2's generators belong to its threads, and take a seed only once
    can_constrain_top_p = False

    def __init__(
        self, folder: Path, device: Any, compute_type: str, stop_ids: frozenset[int], max_batches: int = 1
    ) -> None:
        self._tokens: list[str] = json.loads((folder / CTRANSLATE2_VOCABULARY_FILE).read_text(encoding="utf-8"))
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        self._marks = {config[name] for name in ("bos_token", "eos_token", "decoder_start_token") if name in config}
        try:
            self._translator = load_translator(
                folder,
                device=device.type,
                device_index=device.index or 0,
                compute_type=compute_type,
                # each level of interruption needs a thread; threads share the weights
                inter_threads=max_batches * (1 + MAX_LEVEL),
                intra_threads=max(1, count_cores() // max_batches),
            )
        except RuntimeError as error:
            problem = f"{folder}: CTranslate2 can't load this converted model: {shorten(join_lines(error), 300)}"
            raise ModelError(problem, hint="delete the folder, so that it is converted again") from error
        self.stop_ids, self.num_rows = stop_ids, len(self._tokens)
        self.max_batches = max_batches

    @property
    def compute_type(self) -> str:
        return str(self._translator.compute_type)

    def can_read(self, source: list[int]) -> bool:
        # CTranslate2 gives an empty reply to a source of special tokens only
        return any(self._tokens[index] not in self._marks for index in source)

    def get_group(self, options: DecodingOptions) -> Hashable:
        sampling = (options.temperature, options.top_p) if options.temperature > 0 else None
        return sampling, options.constraint is None, options.num_top, options.is_scored

    def generate(self, generations: Sequence[Generation], on_token: OnToken) -> None:
        if generations[0].options.is_scored:
            for index, generation in enumerate(generations):
                self._score(generation, partial(on_token, index))
            return
        replies = [_Reply(index, each, on_token) for index, each in enumerate(generations)]
        if not generations[0].options.num_top:
            self._continue(replies, with_logits=False)
            replies = [reply for reply in replies if reply.is_refused]
        for reply in replies:  # CTranslate2 passes the logits of one reply only
            self._continue([reply], with_logits=True)
            while reply.is_refused:
                self._continue([reply], with_logits=True)

    def _continue(self, replies: "Sequence[_Reply]", with_logits: bool) -> None:
        """Continue replies until they end, or their constraint refuses a token.

        With logits, the likeliest allowed token takes the place of the refused token. CTranslate2 can't constrain its
        search, but a greedy reply that is continued in this way is the reply of a search that masks each step.
        """
        options = replies[0].generation.options
        prefixes = [reply.ids[:] for reply in replies]
        for reply in replies:
            reply.is_refused = False

        def step(result: Any) -> bool:
            index = int(result.batch_id)
            if result.step < len(prefixes[index]):  # CTranslate2 repeats the prefix
                return False
            return replies[index].add(result, with_logits)

        sampling: dict[str, float] = {"sampling_topk": 1}
        if options.temperature > 0:
            sampling = {
                "sampling_topk": 0,
                "sampling_topp": options.top_p,
                "sampling_temperature": options.temperature,
            }
        # A thread of CTranslate2 may keep the callback for a moment. If it had the last reference to this engine, it
        # would destroy the translator, and so wait for itself, which aborts the process.
        callbacks = [step]
        try:
            self._translator.translate_batch(
                [self._name(reply.generation.source) for reply in replies],
                target_prefix=[self._name(prefix) for prefix in prefixes] if any(prefixes) else None,
                beam_size=1,
                max_input_length=0,
                max_decoding_length=max(reply.generation.options.max_new_tokens for reply in replies),
                min_decoding_length=0,
                end_token=sorted(self.stop_ids),
                return_scores=options.num_top is not None,
                return_logits_vocab=with_logits,
                callback=lambda result: callbacks[0](result),
                **sampling,
            )
        finally:
            callbacks.clear()

    def _score(self, generation: Generation, end_turn: EndTurn) -> None:
        source, greedy = self._name(generation.source), list[int]()
        self._translator.translate_batch(
            [source],
            beam_size=1,
            max_input_length=0,
            max_decoding_length=max(map(len, generation.targets)),
            end_token=sorted(self.stop_ids),
            callback=lambda step: greedy.append(step.token_id),
        )
        for targets in _divide_targets(generation, end_turn):
            names = [self._name(target[:-1]) for target in targets]  # CTranslate2 adds EOS
            found = self._translator.score_batch([source] * len(targets), names, max_input_length=0)
            pairs = zip(found, targets, strict=True)
            generation.add_scored([TargetScore(each.log_probs, greedy[: len(ids)] == ids) for each, ids in pairs])

    def _name(self, ids: Sequence[int]) -> list[str]:
        return [self._tokens[index] for index in ids]


def _divide_targets(generation: Generation, end_turn: EndTurn) -> Iterator[Sequence[list[int]]]:
    """Divide the targets to be scored; between the parts, smaller requests have their turn."""
    for start in range(0, len(generation.targets), TARGETS_PER_PART):
        if start and end_turn(0):  # canceled
            return
        yield generation.targets[start : start + TARGETS_PER_PART]


class _Reply:
    """A reply of CTranslate2, continued in several calls if it has a constraint.

    Attributes:
        is_refused: whether the last call ended early, because the constraint refused a token.
    """

    def __init__(self, index: int, generation: Generation, on_token: OnToken) -> None:
        self.generation, self.ids, self.is_refused = generation, list[int](), False
        self._index, self._on_token, self._stop_id = index, on_token, min(generation.engine.stop_ids)
        constraint = generation.options.constraint
        self._state = None if constraint is None else constraint.copy()

    def add(self, result: Any, with_logits: bool) -> bool:
        """Add the token of a step, or an allowed token instead; return whether this call of CTranslate2 ends here."""
        options, token = self.generation.options, int(result.token_id)
        is_refused = self._state is not None and not self._state.accept(token)
        if is_refused and not with_logits:
            self.is_refused = True
            return True
        if is_refused or options.num_top:
            logits_V = torch.from_numpy(np.array(result.logits, dtype=np.float64)[0])
        if is_refused:
            token = self._replace(logits_V)
        if options.num_top is not None:
            scored = is_refused or options.num_top
            self.generation.next_scores = (
                score_token(logits_V.log_softmax(-1), token, options.num_top)
                if scored
                else TokenScores(float(result.log_prob), [])
            )
        self.ids.append(token)
        has_ended = self._on_token(self._index, token)
        self.is_refused = is_refused and not has_ended
        return has_ended or is_refused

    def _replace(self, logits_V: torch.Tensor) -> int:
        """Choose the likeliest allowed token, or draw one; a reply that nothing can continue ends."""
        assert self._state is not None
        allowed_V = torch.from_numpy(self._state.find_allowed())
        if not allowed_V.any():
            return self._stop_id
        self.generation.num_repairs += 1
        logits_V = logits_V.masked_fill(~allowed_V, -torch.inf)
        temperature = self.generation.options.temperature
        chosen = logits_V.argmax() if temperature == 0 else torch.multinomial((logits_V / temperature).softmax(-1), 1)
        self._state.accept(int(chosen))
        return int(chosen)
