"""The base's SentencePiece model, for readers that know no tokenizer.json: llama.cpp's converter, slow tokenizers.

An adapter brings a tokenizer.json with its added tokens. Pieces keep their ids in it, so the base's model is still
right, and added_tokens.json names what stands behind the pieces: {"<extra_id_99>": 32000, …}.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from t5tune.errors import CheckpointError
from t5tune.io.atomic import write_json
from t5tune.io.untrusted import holds, inside

MODELS = ("spiece.model", "tokenizer.model")
ADDED = "added_tokens.json"
TOKENIZER = "tokenizer.json"
MAX_HEAD = 4 << 20  # a thousand added tokens take 200 KB


def copy_sentencepiece(base: Path, folder: Path) -> None:
    """Put the base's SentencePiece model beside a tokenizer.json that has none, and write added_tokens.json.

    Raises:
        CheckpointError: either file is broken.
    """
    names = [name for name in MODELS if holds(base, name)]
    if not names or any(holds(folder, name) for name in MODELS) or not holds(folder, TOKENIZER):
        return
    num_pieces = _num_pieces(inside(base, names[0]))
    shutil.copyfile(base / names[0], folder / names[0])
    if not holds(folder, ADDED):
        added = sorted((token["id"], token["content"]) for token in _added_tokens(folder / TOKENIZER))
        write_json(folder / ADDED, {content: index for index, content in added if index >= num_pieces})


def _num_pieces(file: Path) -> int:
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_file=str(file)).get_piece_size())
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{file}: no SentencePiece model: {error}") from error


def _added_tokens(file: Path) -> list[dict[str, Any]]:
    """The list of tokenizer.json, which stands before its vocabulary: of mT5's 16 MB, a few KB are read."""
    with open(file, "rb") as stream:
        head = b""
        while len(head) < MAX_HEAD and (part := stream.read(1 << 16)):
            head += part
            text = head.decode("utf-8", errors="ignore")
            if found := re.search(r'"added_tokens"\s*:\s*', text):
                try:
                    tokens = json.JSONDecoder().raw_decode(text, found.end())[0]
                except ValueError:  # its end is yet to be read
                    continue
                except RecursionError:
                    break
                if isinstance(tokens, list) and all(map(_is_token, tokens)):
                    return tokens
                break
    raise CheckpointError(f"{file}: added_tokens: expected a list of tokens with id and content")


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("id")) is int and isinstance(value.get("content"), str)
