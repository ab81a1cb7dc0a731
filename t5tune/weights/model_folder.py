"""Write a whole checkpoint that needs no PEFT: weights, the true config.json, and what belongs to them."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from t5tune.publish import write_json
from t5tune.weights.adapter import TEMPLATE, TrainedWith
from t5tune.weights.base import read_config
from t5tune.weights.streaming import write_safetensors
from t5tune.weights.tensors import Tensor

MODEL = "model.safetensors"


def write_model(folder: Path, state: Mapping[str, Tensor], base: Path, tied: bool, trained_with: TrainedWith) -> None:
    """Write the checkpoint of a fully trained model, by the base's own tensor names."""
    write_safetensors(folder / MODEL, state, {"format": "pt"})
    write_config(base, folder, tied)
    copy_companions(base, trained_with.tokenizer_folder, trained_with.template_file, folder)


def write_config(base: Path, folder: Path, tied: bool) -> None:
    """config.json with the true `tie_word_embeddings`, and the scaling that transformers 4 derives from it spelt out.

    transformers 4 scales the decoder's output where the flag is true; 5 reads `scale_decoder_outputs`.
    """
    config = read_config(base)
    if config.get("model_type") in {"t5", "umt5"}:
        config.setdefault("scale_decoder_outputs", config.get("tie_word_embeddings", True) is not False)
    config["tie_word_embeddings"] = tied
    write_json(folder / "config.json", config)


def copy_companions(base: Path, tokenizer_folder: Path, template_file: Path, folder: Path) -> None:
    """The generation settings of the base, and the tokenizer and layout that the weights were trained with."""
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    for file in sorted(tokenizer_folder.iterdir()):
        if file.name.startswith(("tokenizer", "special_tokens", "added_tokens", "spiece")):
            shutil.copyfile(file, folder / file.name)
    if template_file.is_file():
        shutil.copyfile(template_file, folder / TEMPLATE)
