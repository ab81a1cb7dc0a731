"""Write a whole checkpoint that needs no PEFT: weights, the true config.json, and what belongs to them."""

from collections.abc import Mapping
from pathlib import Path

from t5tune.checkpoints.adapter import TrainedWith
from t5tune.checkpoints.base import read_config
from t5tune.checkpoints.safetensors import write_safetensors
from t5tune.checkpoints.sentencepiece import copy_sentencepiece
from t5tune.checkpoints.tensors import Tensor
from t5tune.checkpoints.tokenizer_files import TOKENIZER_CONFIG, copy_file, copy_template, copy_tokenizer
from t5tune.families import family_of
from t5tune.io.atomic import write_json
from t5tune.io.untrusted import holds, read_object

MODEL = "model.safetensors"
CONFIG_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
GENERATION = "generation_config.json"


def write_model(
    folder: Path, state: Mapping[str, Tensor], base: Path, tied: bool, trained_with: TrainedWith, family: str | None
) -> None:
    """Write the checkpoint of a fully trained model, by the base's own tensor names."""
    write_safetensors(folder / MODEL, state, {"format": "pt"})
    write_config(base, folder, tied, family=family)
    copy_companions(base, trained_with.tokenizer_folder, trained_with.template_file, folder)


def write_config(base: Path, folder: Path, tied: bool, dtype: str | None = None, family: str | None = None) -> None:
    """config.json with the true `tie_word_embeddings`, and the scaling that transformers 4 derives from it spelt out.

    transformers 4 scales the decoder's output where the flag is true; 5 reads `scale_decoder_outputs`.

    Args:
        dtype: what the weights were rounded to; None: they have the base's.
        family: a key of the table of families, for a model_type that isn't in it: the file says that member's then.
    """
    config = read_config(base)
    member = family_of(config, base, family)
    if config.get("model_type") != member.model_type:
        config = member.completed(config)
        config.pop("architectures", None)
    if member.scales_logits:
        config.setdefault("scale_decoder_outputs", config.get("tie_word_embeddings", True) is not False)
    config["tie_word_embeddings"] = tied
    if dtype is not None:
        # releases of transformers differ in the name that they read
        config["torch_dtype"] = config["dtype"] = CONFIG_DTYPES[dtype]
    write_json(folder / "config.json", config)


def copy_companions(base: Path, tokenizer_folder: Path, template_file: Path, folder: Path) -> None:
    """The generation settings of the base, and the tokenizer and layout that the weights were trained with.

    Raises:
        CheckpointError: one of them isn't what it should be; see companions.
    """
    if holds(base, GENERATION):
        read_object(base, GENERATION)
        copy_file(base, GENERATION, folder)
    copy_tokenizer(tokenizer_folder, folder)
    if tokenizer_folder != base:
        copy_sentencepiece(base, folder)
    if holds(folder, TOKENIZER_CONFIG):
        _write_tokenizer_config(folder)
    copy_template(template_file, folder)


def _write_tokenizer_config(folder: Path) -> None:
    """Let transformers 4 read what 5 saved: it takes a list of more special tokens by its old name alone, as 5 can."""
    config = read_object(folder, TOKENIZER_CONFIG)
    if isinstance(config.get("extra_special_tokens"), list) and "additional_special_tokens" not in config:
        old = {"extra_special_tokens": "additional_special_tokens"}
        write_json(folder / TOKENIZER_CONFIG, {old.get(name, name): value for name, value in config.items()})
