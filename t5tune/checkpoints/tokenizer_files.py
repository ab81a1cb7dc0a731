"""Read and write the files next to the weights: the tokenizer and the conversation template.

    files = read_supporting_files(tokenizer_folder, template_file)      # name -> content
    write_supporting_files(folder, files)

The files are untrusted: each must be a regular file inside its folder, have a plausible size, and require no custom
code.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5tune.checkpoints.training_data import encode_training_data, read_training_data
from t5tune.data.tokens.templates import parse_template
from t5tune.errors import CheckpointError
from t5tune.file_names import (
    ADDED_TOKENS_FILE,
    BPE_FILES,
    SENTENCEPIECE_FILES,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TRAINING_DATA_FILE,
)
from t5tune.io.atomic import write_file, write_json
from t5tune.io.untrusted import check_inside, has_file, read_json_object, resolve_inside
from t5tune.io.yaml_file import read_yaml

CHAT_TEMPLATE_FILE, CHAT_TEMPLATES_FOLDER = "chat_template.jinja", "additional_chat_templates"
TOKENIZER_FILE_PREFIXES = ("tokenizer", "special_tokens", "added_tokens", "spiece", *BPE_FILES, CHAT_TEMPLATE_FILE)
TOKENIZER_FILES = {
    TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE,
    *SENTENCEPIECE_FILES, *BPE_FILES,
}  # fmt: skip
MAX_TOKENIZER_FILE_BYTES = 256 << 20  # Gemma's tokenizer.json has 33 MB
MAX_SCANNED_BYTES = 4 << 20  # a thousand added tokens need 200 KB


def read_supporting_files(tokenizer_folder: Path, template_file: Path) -> dict[str, bytes]:
    """Read the contents of a tokenizer's files, the conversation template and its training_data.json, by name."""
    return _read_tokenizer(tokenizer_folder) | _read_template(template_file)


def write_supporting_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, content)


def _read_tokenizer(source: Path) -> dict[str, bytes]:
    files = {
        file.name: _find_untrusted_file(source, file.name).read_bytes()
        for file in sorted(source.iterdir())
        if file.name.startswith(TOKENIZER_FILE_PREFIXES) and has_file(source, file.name)
    }
    if (source / CHAT_TEMPLATES_FOLDER).is_dir():
        check_inside(source, source / CHAT_TEMPLATES_FOLDER)
        for file in sorted((source / CHAT_TEMPLATES_FOLDER).glob("*.jinja")):
            files[f"{CHAT_TEMPLATES_FOLDER}/{file.name}"] = _find_untrusted_file(file.parent, file.name).read_bytes()
    if has_file(source, TOKENIZER_CONFIG_FILE) and read_json_object(source, TOKENIZER_CONFIG_FILE).get("auto_map"):
        code = "requires custom code from the tokenizer's repository, which t5tune doesn't run"
        raise CheckpointError(f"{source / TOKENIZER_CONFIG_FILE}: auto_map: {code}")
    return files


def _read_template(file: Path) -> dict[str, bytes]:
    files = {}
    if has_file(file.parent, file.name):
        # refuse a template here that chat and evaluate couldn't parse later
        parse_template(read_yaml(file), file)
        files[file.name] = file.read_bytes()
    if (data := read_training_data(file.parent)) is not None:
        files[TRAINING_DATA_FILE] = encode_training_data(data)
    return files


def remove_chat_template(folder: Path) -> None:
    """Remove the chat templates from the tokenizer's files in a folder."""
    (folder / CHAT_TEMPLATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / CHAT_TEMPLATES_FOLDER, ignore_errors=True)
    if has_file(folder, TOKENIZER_CONFIG_FILE):
        config = read_json_object(folder, TOKENIZER_CONFIG_FILE)
        config.pop("chat_template", None)
        write_json(folder / TOKENIZER_CONFIG_FILE, config)


def copy_sentencepiece(base: Path, folder: Path) -> None:
    """Copy the base's SentencePiece model to a folder that has only a tokenizer.json, and write added_tokens.json.

    Tools that don't read tokenizer.json need both: llama.cpp's converter and slow tokenizers. An adapter's tokenizer
    has added tokens, but the pieces keep their ids, so the base's model is still valid. added_tokens.json lists the
    tokens after the pieces: {"<extra_id_99>": 32000, …}.
    """
    names = [name for name in SENTENCEPIECE_FILES if has_file(base, name)]
    if not names or any(has_file(folder, name) for name in SENTENCEPIECE_FILES) or not has_file(folder, TOKENIZER_FILE):
        return
    num_pieces = _count_pieces(resolve_inside(base, names[0]))
    shutil.copyfile(base / names[0], folder / names[0])
    if not has_file(folder, ADDED_TOKENS_FILE):
        write_added_tokens(folder, num_pieces)


def write_added_tokens(folder: Path, num_pieces: int) -> None:
    """Write added_tokens.json for a SentencePiece model of this size, from tokenizer.json."""
    added = sorted((token["id"], token["content"]) for token in _read_added_tokens(folder / TOKENIZER_FILE))
    write_json(folder / ADDED_TOKENS_FILE, {content: index for index, content in added if index >= num_pieces})


def _count_pieces(file: Path) -> int:
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_file=str(file)).get_piece_size())
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{file}: not a valid SentencePiece model: {error}") from error


def _read_added_tokens(file: Path) -> list[dict[str, Any]]:
    """Read the added tokens of tokenizer.json, which come before its vocabulary, so its end needn't be read."""
    with open(file, "rb") as stream:
        text = stream.read(MAX_SCANNED_BYTES).decode("utf-8", errors="ignore")
    found = re.search(r'"added_tokens"\s*:\s*', text)
    try:
        tokens = json.JSONDecoder().raw_decode(text, found.end())[0] if found else None
    except (ValueError, RecursionError):
        tokens = None
    if not isinstance(tokens, list) or not all(map(_is_token, tokens)):
        raise CheckpointError(f"{file}: added_tokens: expected a list of objects with id and content")
    return tokens


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("id")) is int and isinstance(value.get("content"), str)


def copy_untrusted_file(source: Path, name: str, folder: Path) -> None:
    shutil.copyfile(_find_untrusted_file(source, name), folder / name)


def _find_untrusted_file(source: Path, name: str) -> Path:
    path = resolve_inside(source, name)
    if (size := path.stat().st_size) > MAX_TOKENIZER_FILE_BYTES:
        raise CheckpointError(f"{path}: {size} bytes; a tokenizer file may have at most {MAX_TOKENIZER_FILE_BYTES}")
    return path
