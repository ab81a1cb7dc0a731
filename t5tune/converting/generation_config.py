"""Read generation_config.json: the author's settings for generating replies."""

from pathlib import Path
from typing import Any

from t5tune.checkpoints.model_folder import convert_token_ids
from t5tune.file_names import GENERATION_CONFIG_FILE
from t5tune.io.untrusted import has_file, read_json_object

# settings without an effect on our replies: ids that the model has anyway, limits and decoding methods that requests
# or our settings override, and the output format of `generate`
WITHOUT_EFFECT = {
    "decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens",
    "num_beams", "num_beam_groups", "num_return_sequences", "do_sample", "temperature", "top_k", "top_p",
    "length_penalty", "early_stopping", "use_cache", "cache_implementation", "return_dict_in_generate", "output_scores",
    "output_logits", "output_attentions", "output_hidden_states", "transformers_version",
}  # fmt: skip


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Read a model's generation_config.json; {} without this file.

    Raises:
        CheckpointError: it isn't a JSON object, or has something in place of a token's id.
    """
    if not has_file(folder, GENERATION_CONFIG_FILE):
        return {}
    given = read_json_object(folder, GENERATION_CONFIG_FILE)
    for name, value in given.items():
        if name.endswith("_token_id"):
            convert_token_ids(value, int, folder / GENERATION_CONFIG_FILE, name)
    return given


def describe_lost_settings(folder: Path) -> str | None:
    """List the settings in generation_config.json that a converted model would ignore; None: no such setting."""
    given = read_generation_config(folder)
    others = [name for name, value in given.items() if value is not None and not name.startswith("_")]
    lost = ", ".join(name for name in others if name not in WITHOUT_EFFECT)
    return f"{GENERATION_CONFIG_FILE} sets {lost}, which CTranslate2 would ignore" if lost else None
