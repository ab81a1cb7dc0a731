"""Convert a merged checkpoint to CTranslate2's format, and compare its replies with the checkpoint's.

    convert_and_check(checkpoint, adapter, folder, "int8", report).same

CTranslate2's converter loads the model with `from_pretrained`, and scales the logits if `tie_word_embeddings` is true.
transformers 5 sets this flag for every T5, so Flan-T5's logits would be divided by √d_model. Therefore our loader gives
the converter the model, with the flag set as the model computes.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ctranslate2
import torch
import transformers
from ctranslate2.converters import TransformersConverter

from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.tokenizer_files import TOKENIZER_FILE_PREFIXES
from t5tune.compat.ctranslate2_patches import load_translator
from t5tune.converting.replies import MAX_REPLY_TOKENS, Agreement, Reply, compare_replies, generate_replies
from t5tune.data.tokens.tokenizer import load_tokenizer, save_tokenizer
from t5tune.errors import DependencyError, T5TuneError
from t5tune.file_names import (
    CTRANSLATE2_VOCABULARY_FILE,
    GENERATION_CONFIG_FILE,
    MODEL_CARD_FILE,
    TEMPLATE_FILE,
    TRAINING_DATA_FILE,
)
from t5tune.formatting import shorten
from t5tune.io.reasons import join_lines
from t5tune.merging.verify import read_example_ids
from t5tune.model.device import choose_device
from t5tune.model.load import TORCH_DTYPES, load_base
from t5tune.progress import Note, Report

LIBRARY = "CTranslate2"
# files copied next to the converted weights; not settings.yaml, where the URLs of a run's data may contain secrets
DESCRIBING_FILES = (
    *TOKENIZER_FILE_PREFIXES, TEMPLATE_FILE, TRAINING_DATA_FILE, GENERATION_CONFIG_FILE, MODEL_CARD_FILE,
)  # fmt: skip


class _Converter(TransformersConverter):  # type: ignore[misc]
    """CTranslate2's converter, with the model from our loader and a name for every row of the embedding."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint

    def load_model(self, model_class: Any, model_name_or_path: str, **options: Any) -> Any:
        model = load_base(self.checkpoint, _find_common_dtype(self.checkpoint), choose_device(use_cpu=True))
        # the converter uses this flag only to decide whether to scale the logits, as mT5 never does
        model.config.tie_word_embeddings = getattr(model.config, "scale_decoder_outputs", False)
        return model

    def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **options: Any) -> Any:
        # transformers can't read the only tokenizer file of some published models, such as umT5's spiece.model
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(load_tokenizer(self.checkpoint), Path(folder))
            tokenizer = super().load_tokenizer(tokenizer_class, folder, **options)
        base = open_base(self.checkpoint)
        (rows, _) = base.get_dtype_and_shape(base.architecture.tied_to)[1]
        tokens = tokenizer.get_vocab()
        # CTranslate2 identifies tokens by name, and its converter would give unused rows the names of the sentinels
        unused = sorted(set(range(rows)) - set(tokens.values()))
        tokens = tokens | {f"<unused_{index}>": index for index in unused}
        tokenizer.get_vocab = lambda: tokens
        return tokenizer


def convert_and_check(
    checkpoint: Path, adapter: Path, folder: Path, quantization: str | None, report: Report
) -> Agreement:
    """Convert a checkpoint, copy its tokenizer and description, and compare replies.

    Without quantization, both models must give the same replies.

    Args:
        adapter: the folder of the merged adapter or run; its token cache has the prompts to compare.
        folder: the output folder, which must exist.
    """
    convert(checkpoint, folder, quantization)
    for file in sorted(checkpoint.iterdir()):
        if file.name.startswith(DESCRIBING_FILES):
            shutil.copyfile(file, folder / file.name)
    is_exact = quantization in (None, "float32")
    sources = [source for source, _ in read_example_ids(checkpoint, adapter)]
    found = _compare_replies(checkpoint, folder, sources, is_exact)
    if is_exact:
        found.check_exact(LIBRARY)
    report(Note(found.describe(LIBRARY)))
    return found


def convert(checkpoint: Path, folder: Path, quantization: str | None) -> None:
    """Write the checkpoint to `folder`, which must exist, in CTranslate2's format.

    Args:
        quantization: one of CTranslate2's quantization types; None keeps the weights' dtype.
    """
    try:
        _Converter(checkpoint).convert(str(folder), quantization=quantization, force=True)
    except Exception as error:  # with an incompatible release of transformers, anything can happen
        is_full_disk = isinstance(error, OSError) and error.errno is not None  # for example
        if isinstance(error, T5TuneError) or is_full_disk:
            raise
        reason = shorten(join_lines(f"{type(error).__name__}: {error}"), 300)
        releases = f"CTranslate2 {ctranslate2.__version__} can't convert this model with transformers"
        raise DependencyError(
            f"to: {releases} {transformers.__version__}: {reason}",
            hint="try other releases of these two, or write a checkpoint with --to checkpoint and convert it elsewhere",
        ) from error


def _compare_replies(checkpoint: Path, converted: Path, sources: list[list[int]], exact: bool) -> Agreement:
    """Generate greedy replies with both models, and let CTranslate2 score our replies.

    `exact`: compute in fp32 whatever the weights' dtype, not in CTranslate2's default type on this machine.
    """
    device = choose_device(use_cpu=True)
    ours = generate_replies(load_base(checkpoint, torch.float32, device), load_tokenizer(checkpoint), sources)
    tokens = json.loads((converted / CTRANSLATE2_VOCABULARY_FILE).read_text(encoding="utf-8"))
    ids = {token: index for index, token in enumerate(tokens)}
    translator = load_translator(converted, device="cpu", compute_type="float32" if exact else "default")
    source_tokens = [[tokens[index] for index in source] for source in sources]
    lengths = {"max_input_length": 0, "max_decoding_length": MAX_REPLY_TOKENS, "min_decoding_length": 0}
    replies = translator.translate_batch(source_tokens, beam_size=1, **lengths)
    our_tokens = [[tokens[index] for index in reply.ids] for reply in ours]
    scores = translator.score_batch(source_tokens, our_tokens, max_input_length=0)
    theirs = [
        Reply([ids[token] for token in reply.hypotheses[0]], score.log_probs)
        for reply, score in zip(replies, scores, strict=True)
    ]
    return compare_replies(ours, theirs)


def _find_common_dtype(checkpoint: Path) -> torch.dtype:
    """Return the dtype of the weights, or fp32 for weights of mixed dtypes."""
    files = open_base(checkpoint)
    dtypes = {files.get_dtype_and_shape(name)[0] for name in files.list_names()}
    return TORCH_DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32
