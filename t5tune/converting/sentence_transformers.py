"""Write a merged model with labels in sentence-transformers' layout, where `encode` gives the logits of texts.

    write_sentence_transformers(checkpoint, architecture, folder, source_prefix="")

    config.json, model.safetensors, tokenizer    Transformer: the encoder
    1_Pooling                                    the mean over the tokens, </s> included
    2_Dense                                      the head, without an activation

The mean of the tokens' logits is the head's output for the mean of the hidden states.
"""

import shutil
from pathlib import Path

from t5tune.checkpoints.base import read_config
from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.model_folder import LICENSE_PREFIXES
from t5tune.checkpoints.tensor_files.safetensors import write_safetensors
from t5tune.checkpoints.tokenizer_files import TOKENIZER_FILE_PREFIXES
from t5tune.checkpoints.training_data import CLASS_SUFFIX
from t5tune.families.encoder import Encoder
from t5tune.file_names import CONFIG_FILE, MODEL_CARD_FILE, MODEL_FILE, SETTINGS_FILE
from t5tune.io.atomic import write_json
from t5tune.settings.groups.record_format import ConversationSettings

MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
# not training_data.json: without the head, t5tune can't use the folder
COPIED_FILES = (*TOKENIZER_FILE_PREFIXES, *LICENSE_PREFIXES, MODEL_CARD_FILE, SETTINGS_FILE)
HEAD_KEYS = ("id2label", "label2id", "problem_type")
PROMPT = "source_prefix"


def write_sentence_transformers(checkpoint: Path, architecture: Encoder, folder: Path, source_prefix: str) -> None:
    """Write the layout to an empty folder. `encode` prepends `source_prefix` to each text."""
    merged = Checkpoint(checkpoint, architecture)
    names, head = merged.list_names(), architecture.list_initial_shapes()
    encoder = {name.removeprefix(architecture.prefix): merged.get_tensor(name) for name in names if name not in head}
    write_safetensors(folder / MODEL_FILE, encoder, {"format": "pt"})
    config = {name: value for name, value in read_config(checkpoint).items() if name not in HEAD_KEYS}
    config["architectures"] = [architecture.class_name.replace(CLASS_SUFFIX, "EncoderModel")]
    # the modules after the encoder compute in fp32
    write_json(folder / CONFIG_FILE, config | {"dtype": "float32", "torch_dtype": "float32"})
    for file in checkpoint.iterdir():
        if file.name.startswith(COPIED_FILES):
            shutil.copyfile(file, folder / file.name)
    max_length = ConversationSettings.model_fields["model_max_length"].default
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    prompts = {"prompts": {PROMPT: source_prefix}, "default_prompt_name": PROMPT} if source_prefix else {}
    write_json(folder / "config_sentence_transformers.json", prompts)
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (name, path) in enumerate(MODULES.items())
    ]
    write_json(folder / "modules.json", modules)
    outputs, width = head[architecture.head_weight]
    sizes = {"in_features": width, "out_features": outputs, "bias": True}
    configs = {
        "Pooling": {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True},
        "Dense": sizes | {"activation_function": "torch.nn.modules.linear.Identity"},
    }
    for name, values in configs.items():
        (folder / MODULES[name]).mkdir()
        write_json(folder / MODULES[name] / CONFIG_FILE, values)
    dense = {f"linear.{name.rpartition('.')[2]}": merged.get_tensor(name) for name in head}
    write_safetensors(folder / MODULES["Dense"] / MODEL_FILE, dense, {"format": "pt"})
