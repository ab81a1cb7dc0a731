"""Write a complete checkpoint that loads without PEFT: weights, a corrected config.json, and tokenizer files."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from t5tune.checkpoints.base import read_config
from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.tensor_files.safetensors import write_safetensors
from t5tune.checkpoints.tensor_files.tensors import TORCH_NAMES, Tensor
from t5tune.checkpoints.tokenizer_files import (
    TOKENIZER_FILE_PREFIXES,
    copy_sentencepiece,
    copy_untrusted_file,
    write_supporting_files,
)
from t5tune.data.labels import LabelTask
from t5tune.errors import CheckpointError
from t5tune.families import find_family
from t5tune.families.encoder import find_encoder_class
from t5tune.file_names import (
    ADAPTER_BIN_FILE,
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CONFIG_FILE,
    CTRANSLATE2_VOCABULARY_FILE,
    CTRANSLATE2_WEIGHTS_FILE,
    GENERATION_CONFIG_FILE,
    MODEL_CARD_FILE,
    MODEL_FILE,
    NON_LORA_FILE,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TRAINING_DATA_FILE,
)
from t5tune.formatting import shorten
from t5tune.io.atomic import write_json
from t5tune.io.untrusted import has_file, read_json_object

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # of T5Gemma 2's images
LICENSE_PREFIXES = ("LICENSE", "NOTICE")
MIXED_IDS = {"forced_decoder_ids", "sequence_bias"}  # lists of token ids and other numbers
TRAINED_FILES = {
    ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, ADAPTER_BIN_FILE, NON_LORA_FILE, MODEL_FILE, CONFIG_FILE,
    GENERATION_CONFIG_FILE, TEMPLATE_FILE, TRAINING_DATA_FILE, MODEL_CARD_FILE,
}  # fmt: skip

_TOKEN_IDS = re.compile(r".*_token_(id|ids|index)|(begin_)?suppress_tokens|bad_words_ids|force_words_ids")


def is_trained_file(name: str) -> bool:
    """Whether a file of a checkpoint belongs to the trained model; all other files serve only to resume."""
    others = (*TOKENIZER_FILE_PREFIXES, *LICENSE_PREFIXES, *PROCESSOR_FILES)
    return name in TRAINED_FILES or name.startswith(others)


def is_converted(folder: Path) -> bool:
    """Whether a folder contains a model that was converted to CTranslate2."""
    return (folder / CTRANSLATE2_WEIGHTS_FILE).is_file() and (folder / CTRANSLATE2_VOCABULARY_FILE).is_file()


def write_model(
    folder: Path,
    state: Mapping[str, Tensor],
    base: Checkpoint,
    tied: bool,
    files: Mapping[str, bytes],
    family: str | None,
    task: LabelTask | None = None,
) -> None:
    """Write the checkpoint of a fully trained model, with copies of the tensors that aren't loaded.

    Args:
        state: trained tensors in fp32, by their names in the base's files, or with labels in the model.
        files: tokenizer and template: name -> content.
    """
    skipped = filter(base.architecture.is_skipped, base.list_names())
    copied = {base.get_file_name(name): base.get_tensor(name) for name in skipped}
    write_safetensors(folder / MODEL_FILE, {**state, **copied}, {"format": "pt"})
    write_config(base.folder, folder, tied, "F32", family, task)
    copy_supporting_files(base.folder, files, folder, generates=task is None)


def write_config(
    base: Path,
    folder: Path,
    tied: bool,
    dtype: str | None = None,
    family: str | None = None,
    task: LabelTask | None = None,
) -> None:
    """Write config.json with the actual `tie_word_embeddings`, or of an encoder with a head of labels.

    Args:
        dtype: of the weights, for from_pretrained; None: the base's.
        family: key in the table of families if the model_type isn't there; the file gets that family's model_type.
    """
    config = read_config(base)
    model_family = find_family(config, base, family)
    if config.get("model_type") != model_family.model_type:
        config = model_family.complete_config(config)
        config.pop("architectures", None)
    if task is None:
        model_family.architecture.set_tied(config, tied)
    else:
        encoder_class = find_encoder_class(model_family.architecture, task.objective)
        config |= encoder_class(model_family.complete_config(config), task).describe_head()
    if dtype is not None:
        # older releases of transformers read torch_dtype, newer ones dtype
        config["torch_dtype"] = config["dtype"] = TORCH_NAMES[dtype]
    write_json(folder / CONFIG_FILE, config)


def copy_supporting_files(base: Path, files: Mapping[str, bytes], folder: Path, generates: bool = True) -> None:
    """Copy the base's generation config, processors and license, and write the training's tokenizer and template."""
    if generates and has_file(base, GENERATION_CONFIG_FILE):
        read_json_object(base, GENERATION_CONFIG_FILE)
        copy_untrusted_file(base, GENERATION_CONFIG_FILE, folder)
    for file in sorted(base.iterdir()):
        if file.name in PROCESSOR_FILES or file.name.startswith(LICENSE_PREFIXES):
            copy_untrusted_file(base, file.name, folder)
    write_supporting_files(folder, files)
    copy_sentencepiece(base, folder)
    if has_file(folder, TOKENIZER_CONFIG_FILE):
        _rename_special_tokens_key(folder)


def _rename_special_tokens_key(folder: Path) -> None:
    """Rename a key so that transformers 4 can read a file that 5 saved. Both accept the old name for a list."""
    config = read_json_object(folder, TOKENIZER_CONFIG_FILE)
    if isinstance(config.get("extra_special_tokens"), list) and "additional_special_tokens" not in config:
        old = {"extra_special_tokens": "additional_special_tokens"}
        write_json(folder / TOKENIZER_CONFIG_FILE, {old.get(name, name): value for name, value in config.items()})


def convert_token_ids(value: Any, convert: Callable[[int], Any], file: Path, key: str | None = None) -> Any:
    """Return a copy of config.json or generation_config.json, or of a value in it, with converted token ids.

    Negative numbers are kept: some files have -1 for none.

    Args:
        key: of the value, if it has ids.

    Raises:
        CheckpointError: a value has ids among other numbers, or something in place of ids.
    """
    if isinstance(value, list):
        return [convert_token_ids(each, convert, file, key) for each in value]
    if key is not None and value is not None:
        if type(value) is not int:
            problem = f"{file}: {key}: {shorten(repr(value))}: expected the id of a token"
            raise CheckpointError(problem, hint="correct or remove it")
        return convert(value) if value >= 0 else value
    if not isinstance(value, dict):
        return value
    if mixed := [name for name in sorted(MIXED_IDS & value.keys()) if value[name]]:
        raise CheckpointError(f"{file}: {mixed[0]}: its ids can't be converted", hint="remove it from the file")
    has_ids = {name: name if _TOKEN_IDS.fullmatch(name) else None for name in value}
    return {name: convert_token_ids(each, convert, file, has_ids[name]) for name, each in value.items()}
