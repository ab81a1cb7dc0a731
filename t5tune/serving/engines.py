"""Engines that generate replies: transformers and CTranslate2.

    engine.generate([generation, …], on_token)    # returns when all replies of the batch have ended

Both call `on_token` for each token. So a reply can be sent while it is generated, ends as soon as it is complete, and
takes no more time once its client is gone. `on_token` may itself generate other batches with the same engine.
"""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from t5tune.compat.ctranslate2_patches import load_translator
from t5tune.compat.quiet import quiet_libraries
from t5tune.errors import ModelError
from t5tune.file_names import CONFIG_FILE, CTRANSLATE2_VOCABULARY_FILE
from t5tune.formatting import shorten
from t5tune.inference.generation import Decoding, Sampling, find_stop_ids, generate, make_random_generator
from t5tune.io.processes import count_cores
from t5tune.io.reasons import join_lines
from t5tune.model.device import use_gpu_kernels
from t5tune.serving.batching import MAX_LEVEL
from t5tune.serving.generation import DecodingOptions, Generation, OnToken


class TransformersEngine:
    """A model that transformers runs."""

    name = "transformers"
    max_batches = 1
    has_seeds = True

    def __init__(self, model: Any, eos_token_id: int, pad_token_id: int) -> None:
        self._model = model
        self._eos_token_id, self._pad_token_id = eos_token_id, pad_token_id
        self.stop_ids = frozenset(find_stop_ids(model, eos_token_id))

    def can_read(self, source: list[int]) -> bool:
        return True

    def get_group(self, options: DecodingOptions) -> Hashable:
        return None  # replies with any options share a batch: each is sampled by itself

    def generate(self, generations: Sequence[Generation], on_token: OnToken) -> None:
        longest = max(generation.options.max_new_tokens for generation in generations)
        with quiet_libraries(), use_gpu_kernels(self._model.device):
            generate(
                self._model,
                [generation.source for generation in generations],
                Decoding(self._eos_token_id, self._pad_token_id, longest),
                on_token=on_token,
                samplings=[self._make_sampling(generation.options) for generation in generations],
            )

    def _make_sampling(self, options: DecodingOptions) -> Sampling | None:
        if options.temperature == 0:
            return None
        assert options.seed is not None
        return Sampling(options.temperature, options.top_p, make_random_generator(options.seed, self._model.device))


class TranslatorEngine:
    """A model that CTranslate2 runs.

    Args:
        compute_type: CTranslate2's; `default` is the type of the folder's weights, if the device supports it.
        max_batches: how many batches are computed at the same time. On a CPU they divide its cores.
    """

    name = "ctranslate2"
    has_seeds = False  # CTranslate2's generators belong to its threads, and take a seed only once

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
        self.stop_ids = stop_ids
        self.max_batches = max_batches

    def try_one_token(self) -> None:
        """Generate a token, or raise RuntimeError: on a GPU, CTranslate2 loads its libraries only now."""
        source = next(token for token in self._tokens if token not in self._marks)
        self._translator.translate_batch([[source]], beam_size=1, max_decoding_length=1)

    @property
    def compute_type(self) -> str:
        return str(self._translator.compute_type)

    def can_read(self, source: list[int]) -> bool:
        # CTranslate2 gives an empty reply to a source of special tokens only
        return any(self._tokens[index] not in self._marks for index in source)

    def get_group(self, options: DecodingOptions) -> Hashable:
        return (options.temperature, options.top_p) if options.temperature > 0 else None

    def generate(self, generations: Sequence[Generation], on_token: OnToken) -> None:
        options = generations[0].options
        sampling: dict[str, float] = {"sampling_topk": 1}
        if options.temperature > 0:
            sampling = {
                "sampling_topk": 0,
                "sampling_topp": options.top_p,
                "sampling_temperature": options.temperature,
            }
        self._translator.translate_batch(
            [[self._tokens[index] for index in generation.source] for generation in generations],
            beam_size=1,
            max_input_length=0,
            max_decoding_length=max(generation.options.max_new_tokens for generation in generations),
            min_decoding_length=0,
            end_token=sorted(self.stop_ids),
            callback=lambda step: on_token(step.batch_id, step.token_id),
            **sampling,
        )
