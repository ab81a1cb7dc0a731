r"""What a tokenizer can't write, and the tokens that mend it.

T5's vocabulary has no newline, tab, `<`, `\`, `^`, backquote, braces or `~`, and runs of spaces shrink to one.
Its embedding has more rows than its tokenizer has entries (32,128 and 32,100), so tokens for these need no
change of shape: they take the spare rows, and only those rows are trained.

A naive `add_tokens` ruins every space of a text: a token is normalised first, and newline and tab become a
space in it. And T5's own pre-tokenizer drops white space and writes the mark of a word's start behind each
added token, so that "\nx" and "\n x" are the same. So the tokenizer is rebuilt: tokens are matched before
normalisation, each remaining space is kept as a mark, and a mark is put only before the first word of a text.
"""

import json
from typing import Any

from t5tune.errors import ModelError

CHARACTERS = ["\n", "\t", "<", "\\", "^", "`", "{", "}", "~"]
INDENTATION = ["\n" + " " * width for width in (2, 4, 6, 8, 10, 12, 14, 16)]
FASTCHAT_PAD = "[PAD]"
FASTCHAT = ["<", "{", "\n", "}", "`", " ", "\\", "^", "\t"]
MARK = "▁"


def extend_tokenizer(tokenizer: Any, add_tokens: list[str], num_rows: int) -> tuple[Any, list[str]]:
    """Give a tokenizer the tokens that `--add-tokens` asks for.

    Args:
        tokenizer: a transformers tokenizer.
        add_tokens: ["auto"], ["none"], ["fastchat"] or the tokens themselves.
        num_rows: rows of the base's embedding, which the ids must stay below.

    Returns: the tokenizer (the same where nothing is added) and the added tokens, in the order of their ids.

    Raises:
        ModelError: there are fewer spare rows than tokens.
    """
    if add_tokens == ["none"] or not _is_metaspace(tokenizer):
        return tokenizer, []
    spare = num_rows - len(tokenizer)
    if add_tokens == ["fastchat"]:
        _check_room([FASTCHAT_PAD, *FASTCHAT], spare)
        return _fastchat(tokenizer), [FASTCHAT_PAD, *FASTCHAT]
    if add_tokens == ["auto"]:
        missing = [text for text in CHARACTERS if not can_write(tokenizer, text)]
        if not missing:
            return tokenizer, []
        # indentation makes code shorter, but nothing is lost without it: it takes what room is left
        wanted = missing + (INDENTATION if "\n" in missing else [])
        wanted = wanted[: max(spare, len(missing))]
    else:
        # the rebuilt tokenizer keeps white space, so the two kinds that it would lose come with any list
        wanted = [token for token in dict.fromkeys([*add_tokens, "\n", "\t"]) if not _is_entry(tokenizer, token)]
    _check_room(wanted, spare)
    return _rebuilt(tokenizer, wanted), wanted


def can_write(tokenizer: Any, text: str) -> bool:
    """Whether `text` between two letters comes back from the tokenizer as it went in."""
    ids = tokenizer(f"a{text}b", add_special_tokens=False)["input_ids"]
    return tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == f"a{text}b"


def extends_words(tokenizer: Any) -> bool:
    """Whether a text that follows another must be encoded without a mark before its first word."""
    return _is_metaspace(tokenizer) and _pre_tokenizer(tokenizer).get("prepend_scheme") == "first"


def spaces_are_marks(tokenizer: Any) -> bool:
    """Whether a space before a word is part of that word's token (`▁word`), and no token of its own."""
    return _is_metaspace(tokenizer) and not _is_entry(tokenizer, " ")


def _is_entry(tokenizer: Any, token: str) -> bool:
    return token in tokenizer.get_vocab()


def _is_metaspace(tokenizer: Any) -> bool:
    return tokenizer.is_fast and "Metaspace" in json.dumps(_pre_tokenizer(tokenizer))


def _pre_tokenizer(tokenizer: Any) -> dict[str, Any]:
    value = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    return value if isinstance(value, dict) else {}


def _check_room(tokens: list[str], spare: int) -> None:
    if len(tokens) > spare:
        raise ModelError(
            f"add_tokens: {len(tokens)} tokens ({' '.join(map(repr, tokens))}) for {max(spare, 0)} spare rows of "
            "the embedding",
            hint="name fewer tokens, or --add-tokens none",
        )


def _rebuilt(tokenizer: Any, tokens: list[str]) -> Any:
    """The tokenizer with `tokens`, whose text comes back whole (see the module's docstring)."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(MARK, "first", True)
    backend.decoder = decoders.Metaspace(MARK, "first", True)
    backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return _wrapped(backend, tokenizer, pad_token=tokenizer.pad_token)


def _fastchat(tokenizer: Any) -> Any:
    """FastChat's ids: its pad token, then its nine; a space is a token, and so are all other words' starts."""
    from tokenizers import AddedToken, Tokenizer, decoders

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(FASTCHAT_PAD, normalized=False, special=True)])
    backend.add_tokens([AddedToken(token, normalized=False) for token in FASTCHAT])
    # each space is a token of its own here, so a mark stands for nothing
    backend.decoder = decoders.Sequence([decoders.Replace(MARK, ""), decoders.Fuse()])
    return _wrapped(backend, tokenizer, pad_token=FASTCHAT_PAD)


def _wrapped(backend: Any, tokenizer: Any, pad_token: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=pad_token,
        additional_special_tokens=[
            token for token in tokenizer.all_special_tokens if token not in {"</s>", "<unk>", "<pad>"}
        ],
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
    )
