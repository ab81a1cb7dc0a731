"""A merged checkpoint in CTranslate2's format, held against the checkpoint's own replies.

    convert(checkpoint, folder, "int8")
    compare_replies(checkpoint, folder, sources, exact=False).same

The converter reads weights with `from_pretrained`, and asks `tie_word_embeddings` whether logits are scaled. In
transformers 5 that is true for every T5, so Flan-T5's logits would come out divided by √d. It is handed the model that
our own loader reads instead, and told what that one computes.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.data.tokenizer import load_tokenizer
from t5tune.errors import DependencyError
from t5tune.model.device import choose_device
from t5tune.model.generation import generate
from t5tune.model.load import EMBEDDING, TORCH_DTYPES, load_base

REPLY_TOKENS = 32
VOCABULARY = "shared_vocabulary.json"
INSTALL = "pip install ctranslate2"


@dataclass(frozen=True)
class Agreement:
    """Of greedy replies to a few prompts: how many are the same, and how far log-probabilities of ours are off."""

    replies: int
    same: int
    error: float


def check_installed() -> None:
    """Raises DependencyError where CTranslate2 can't be imported."""
    try:
        import ctranslate2.converters  # noqa: F401
    except ImportError as error:
        raise DependencyError(f"to: ctranslate2 can't be imported: {error}", hint=INSTALL) from error


def convert(checkpoint: Path, folder: Path, quantization: str | None) -> None:
    """Write the checkpoint into `folder`, which must be there, in CTranslate2's format.

    Args:
        quantization: one of CTranslate2's; None: weights keep their dtype.

    Raises:
        DependencyError: the installed converter doesn't take it.
    """
    from ctranslate2 import __version__ as version
    from ctranslate2.converters import TransformersConverter
    from transformers import __version__ as transformers_version

    class Converter(TransformersConverter):  # type: ignore[misc]
        def load_model(self, model_class: Any, model_name_or_path: str, **options: Any) -> Any:
            model = load_base(checkpoint, _dtype_of(checkpoint), choose_device(use_cpu=True))
            # of this flag the converter makes the scale of the logits, and nothing else; mT5's are never scaled
            model.config.tie_word_embeddings = getattr(model.config, "scale_decoder_outputs", False)
            return model

        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **options: Any) -> Any:
            tokenizer = super().load_tokenizer(tokenizer_class, model_name_or_path, **options)
            tokens = _with_spare_rows(tokenizer.get_vocab(), Checkpoint(checkpoint).dtype_and_shape(EMBEDDING)[1][0])
            tokenizer.get_vocab = lambda: tokens
            return tokenizer

    try:
        Converter(str(checkpoint)).convert(str(folder), quantization=quantization, force=True)
    except Exception as error:  # a converter for other releases fails in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DependencyError(
            f"to: CTranslate2 {version} doesn't convert this with transformers {transformers_version}: {reason}",
            hint="try other releases of the two; --to checkpoint writes what can be converted elsewhere",
        ) from error


def compare_replies(checkpoint: Path, converted: Path, sources: list[list[int]], exact: bool) -> Agreement:
    """Answer the sources greedily with both, and let CTranslate2 score our replies.

    Args:
        sources: ids with their end token.
        exact: compute in fp32, whatever the weights' dtype; else as CTranslate2 does by default on this machine.
    """
    import ctranslate2

    ours = _replies(checkpoint, sources)
    tokens = json.loads((converted / VOCABULARY).read_text(encoding="utf-8"))
    compute_type = "float32" if exact else "default"
    ctranslate2.set_log_level(logging.ERROR)  # what this machine can't compute in is of no use to the one that serves
    translator = ctranslate2.Translator(str(converted), device="cpu", compute_type=compute_type)
    source_tokens = [[tokens[index] for index in source] for source in sources]
    replies = translator.translate_batch(
        source_tokens,
        beam_size=1,
        max_input_length=0,
        max_decoding_length=REPLY_TOKENS,
        min_decoding_length=0,
    )
    our_tokens = [[tokens[index] for index in reply] for reply, _ in ours]
    scores = translator.score_batch(source_tokens, our_tokens, max_input_length=0)
    return Agreement(
        replies=len(sources),
        same=sum(reply.hypotheses[0] == own for reply, own in zip(replies, our_tokens, strict=True)),
        error=max(
            abs(float(theirs) - own)
            for score, (_, log_probs) in zip(scores, ours, strict=True)
            for theirs, own in zip(score.log_probs, log_probs, strict=True)
        ),
    )


def _with_spare_rows(tokens: dict[str, int], rows: int) -> dict[str, int]:
    """The tokenizer's entries, and a name of its own for each row that has none.

    The converter would call spare rows <extra_id_0> and so on once more, and CTranslate2 tells tokens by their names.
    """
    taken = set(tokens.values())
    return tokens | {f"<unused_{index}>": index for index in range(rows) if index not in taken}


def _replies(checkpoint: Path, sources: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """(ids, log-probabilities of those and of the end token) of each reply."""
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(checkpoint)
    model = load_base(checkpoint, torch.float32, choose_device(use_cpu=True))
    start, end = model.config.decoder_start_token_id, tokenizer.eos_token_id
    # generation_config.json may ask for penalties, of which a converted model knows nothing
    model.generation_config = GenerationConfig(decoder_start_token_id=start)
    result = []
    for source in sources:
        (ids,) = generate(model, [source], end, tokenizer.pad_token_id, REPLY_TOKENS)
        inputs = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[start, *ids]])}
        with torch.inference_mode():
            log_probs_TV = model(**inputs, use_cache=False).logits[0].log_softmax(-1)
        result.append((ids, log_probs_TV[torch.arange(len(ids) + 1), torch.tensor([*ids, end])].tolist()))
    return result


def _dtype_of(checkpoint: Path) -> torch.dtype:
    """The weights' own, or fp32 where they have several."""
    files = Checkpoint(checkpoint)
    dtypes = {files.dtype_and_shape(name)[0] for name in files.names()}
    return TORCH_DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32
