"""Conversations, and the ids that FastChat gives them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from t5tune.commands.prepare import PrepareResult
from t5tune.data.caches.cache import Cache
from t5tune.data.tokens.encoding import Example

Prepared = Callable[..., tuple[PrepareResult, Cache]]
"""A function that prepares records or a data file and opens the cache."""
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions."
)
FASTCHAT_CHARACTERS = ["<", "{", "\n", "}", "`", " ", "\\", "^", "\t"]
ANSWERS = [
    '{\n  "name": "Tomas",\n  "egg": 3\n}',
    "a\tb\t\tc",
    "back\\slash \\n is no newline, ^ and ` and ~ and <b>",
    *["def f():\n" + " " * width + "return 1" for width in range(1, 21)],
    "runs  of   spaces     mid-line",
    "   at the start",
    "\nleading newline",
    "\n\n  both",
    "\tleading tab",
    "at the end   ",
    "at the end\n\n",
    "x",
    "they do n't . Yes , it 's so ! 1 , 2",
]


def record(*texts: str, **more: Any) -> dict[str, Any]:
    """Return a ShareGPT record whose turns alternate: human, gpt, human, …"""
    turns = [{"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)]
    return {"conversations": turns, **more}


def write_lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in records), encoding="utf-8")
    return path


def load_tokenizer_of(cache: Cache) -> Any:
    """Load the cache's tokenizer with transformers, as a user would."""
    return AutoTokenizer.from_pretrained(str(cache.tokenizer_folder))


def decode(tokenizer: Any, ids: Any) -> str:
    """Decode ids without their EOS token, but with special tokens."""
    ids = [int(token) for token in ids]
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def fastchat_text(texts: list[str], system: str | None = None) -> str:
    """Render turns that alternate human, assistant, … as FastChat does, independently of the package."""
    names = ["### Human: ", "### Assistant: "]
    turns = "".join(names[index % 2] + text + "\n" for index, text in enumerate(texts))
    return (SYSTEM if system is None else system) + "\n\n" + turns


def fastchat_ids(plain: Any, text: str) -> list[int]:
    """Compute FastChat's ids: the text is split at each added token, and what is between is encoded separately."""
    first = len(plain) + 1  # [PAD] takes the first new id
    ids: list[int] = []
    for part in re.split("([" + re.escape("".join(FASTCHAT_CHARACTERS)) + "])", text):
        if part in FASTCHAT_CHARACTERS and part:
            ids.append(first + FASTCHAT_CHARACTERS.index(part))
        elif part:
            ids += encode(plain, part)
    return ids


def join_sides(example: Example, answer: str, cache: Cache, tokenizer: Any) -> list[int]:
    """Concatenate source and target. Before an added token, the space between them is a separate token."""
    space = [tokenizer.convert_tokens_to_ids("▁")] if answer.startswith(tuple(cache.added_tokens)) else []
    return [*example.source_S[:-1], *space, *example.target_T[:-1]]
