"""Copy the base's SentencePiece model, for tools that don't read tokenizer.json.

Such tools are llama.cpp's converter and slow tokenizers. An adapter has a tokenizer.json with added tokens, in which
the pieces keep their ids. So the base's model is still valid, and added_tokens.json lists the tokens after the pieces:
{"<extra_id_99>": 32000, …}.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from t5tune.errors import CheckpointError
from t5tune.file_names import ADDED_TOKENS_FILE, SENTENCEPIECE_FILES, TOKENIZER_FILE
from t5tune.io.atomic import write_json
from t5tune.io.untrusted import has_file, resolve_inside

MAX_SCANNED_BYTES = 4 << 20  # a thousand added tokens need 200 KB


def copy_sentencepiece(base: Path, folder: Path) -> None:
    """Copy the base's SentencePiece model to a folder that has only a tokenizer.json, and write added_tokens.json.

    Raises:
        CheckpointError: the SentencePiece model or tokenizer.json is broken.
    """
    names = [name for name in SENTENCEPIECE_FILES if has_file(base, name)]
    if not names or any(has_file(folder, name) for name in SENTENCEPIECE_FILES) or not has_file(folder, TOKENIZER_FILE):
        return
    num_pieces = _count_pieces(resolve_inside(base, names[0]))
    shutil.copyfile(base / names[0], folder / names[0])
    if not has_file(folder, ADDED_TOKENS_FILE):
        added = sorted((token["id"], token["content"]) for token in _read_added_tokens(folder / TOKENIZER_FILE))
        write_json(folder / ADDED_TOKENS_FILE, {content: index for index, content in added if index >= num_pieces})


def _count_pieces(file: Path) -> int:
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_file=str(file)).get_piece_size())
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{file}: not a valid SentencePiece model: {error}") from error


def _read_added_tokens(file: Path) -> list[dict[str, Any]]:
    """Read the added tokens of tokenizer.json, which come before its vocabulary: a few KB of mT5's 16 MB are read."""
    with open(file, "rb") as stream:
        head = b""
        while len(head) < MAX_SCANNED_BYTES and (part := stream.read(1 << 16)):
            head += part
            text = head.decode("utf-8", errors="ignore")
            if found := re.search(r'"added_tokens"\s*:\s*', text):
                try:
                    tokens = json.JSONDecoder().raw_decode(text, found.end())[0]
                except ValueError:  # the end of the list hasn't been read yet
                    continue
                except RecursionError:
                    break
                if isinstance(tokens, list) and all(map(_is_token, tokens)):
                    return tokens
                break
    raise CheckpointError(f"{file}: added_tokens: expected a list of objects with id and content")


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("id")) is int and isinstance(value.get("content"), str)
