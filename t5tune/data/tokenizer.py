"""Load a tokenizer, with errors that say what is really wrong."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from t5tune.errors import ModelError


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a folder.

    Raises:
        ModelError: no tokenizer files, broken ones, or ones that need a package that is missing.
    """
    files = ["tokenizer.json", "spiece.model", "tokenizer.model", "tokenizer_config.json"]
    if not any((folder / name).is_file() for name in files):
        raise ModelError(
            f"{folder}: no tokenizer in it ({', '.join(files)})",
            hint="copy the base model's tokenizer files there",
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever transformers, tokenizers and sentencepiece raise on broken files
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder}: its tokenizer can't be loaded: {reason}") from error


def answer_text(tokenizer: Any, ids: Iterable[int], answer_end: str) -> str:
    """A model's ids as text, without control tokens and without what the layout puts behind an answer."""
    text: str = tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
    return text.removesuffix(answer_end)


def true_text(tokenizer: Any, ids: Iterable[int], answer_end: str) -> str:
    """A target's ids as text: a character that the tokenizer couldn't write is \ufffd, which no answer equals."""
    kept = [int(i) for i in ids if i not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
    if tokenizer.unk_token_id not in kept:
        return answer_text(tokenizer, kept, answer_end)
    text: str = tokenizer.decode(kept, skip_special_tokens=False)
    return text.replace(tokenizer.unk_token, "\ufffd").removesuffix(answer_end)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer so that AutoTokenizer of transformers 4 and 5 takes tokenizer.json as it stands."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 doesn't know
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["additional_special_tokens"] = config.pop("extra_special_tokens", [])
        config.pop("backend", None)
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
