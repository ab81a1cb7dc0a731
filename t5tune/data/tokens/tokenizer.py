"""Load a checkpoint's tokenizer files, encode and decode text. Imports neither transformers nor torch.

    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("Hello"))

For T5 tokenizer classes, transformers 5 rebuilds the normalizer and the pre-tokenizer, and ignores tokenizer.json. So
`save_tokenizer` writes a generic tokenizer class: AutoTokenizer then uses the file unchanged, with the ids of training.
"""

import codecs
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from t5tune.errors import DependencyError, ModelError
from t5tune.file_names import (
    ADDED_TOKENS_FILE,
    BPE_FILES,
    SENTENCEPIECE_FILES,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from t5tune.formatting import shorten
from t5tune.io.atomic import write_json
from t5tune.io.reasons import describe_error, join_lines
from t5tune.io.untrusted import parse_json_object

BYTES_OFFSET = 3  # ByT5: ids 0 to 2 are pad, end and unknown, then come the 256 bytes (Xue et al. 2022)
BYT5_EXTRA_IDS = 125
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")  # of vocabularies with byte fallback
DEFAULT_SPECIAL_TOKENS = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
SENTINEL_PREFIX = "<extra_id_"
OTHER_SPECIAL_TOKENS = ("bos_token", "cls_token", "sep_token", "mask_token")
UNIGRAM = 1  # trainer_spec.model_type of a SentencePiece model
USER_DEFINED_PIECE = 4  # type of a SentencePiece piece that any text becomes


@dataclass(frozen=True)
class SpecialIds:
    """The special tokens around a model's texts.

    Args:
        source_start, source_end: before and after each source. T5 has only the EOS token, after the source.
        target_end: the EOS token, after each target.
    """

    source_start: tuple[int, ...]
    source_end: tuple[int, ...]
    target_end: int

    @property
    def source_size(self) -> int:
        """The number of special tokens of a source."""
        return len(self.source_start) + len(self.source_end)

    def surround_source(self, ids: Iterable[int]) -> list[int]:
        """Add the special tokens to the ids of a source."""
        return [*self.source_start, *ids, *self.source_end]

    def strip_source(self, ids: list[int]) -> list[int]:
        """Remove the special tokens from the ids of a source."""
        return ids[len(self.source_start) : len(ids) - len(self.source_end)]

    def strip_if_present(self, ids: list[int]) -> list[int]:
        """Remove the special tokens that a chat template or another tokenizer may have put around a source's ids."""
        if tuple(ids[: len(self.source_start)]) == self.source_start:
            ids = ids[len(self.source_start) :]
        if self.source_end and tuple(ids[-len(self.source_end) :]) == self.source_end:
            ids = ids[: -len(self.source_end)]
        return ids


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.

    Args:
        backend: a tokenizers.Tokenizer; None for ByT5, whose ids are bytes.
        special_tokens: all special tokens, including eos, pad and unk, and the sentinels.
        other_names: names of other special tokens in tokenizer_config.json: bos_token -> its text.
        max_length: model_max_length in its files, in tokens; None: no limit.
    """

    backend: Any = field(repr=False)
    eos_token: str
    pad_token: str
    unk_token: str
    special_tokens: tuple[str, ...]
    folder: Path
    max_length: int | None = None
    other_names: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of tokens, including added and special tokens."""
        if self.backend is None:
            return BYTES_OFFSET + 256 + BYT5_EXTRA_IDS
        return int(self.backend.get_vocab_size())

    @property
    def eos_token_id(self) -> int:
        return self._find_id(self.eos_token)

    @property
    def pad_token_id(self) -> int:
        return self._find_id(self.pad_token)

    @property
    def unk_token_id(self) -> int:
        return self._find_id(self.unk_token)

    @property
    def special_ids(self) -> SpecialIds:
        """The special tokens around sources and targets, as the tokenizer's post-processor adds them."""
        eos = self.eos_token_id
        if self.backend is None or self.backend.post_processor is None:  # a source ends with the EOS token, as T5's do
            return SpecialIds((), (eos,), eos)
        plain, whole = (list(self.backend.encode("a", add_special_tokens=added).ids) for added in (False, True))
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return SpecialIds(tuple(whole[:start]), tuple(whole[start + len(plain) :]), eos)

    def get_vocab(self) -> dict[str, int]:
        """Return {token: id} without ByT5's bytes."""
        if self.backend is None:
            return {token: index for token in self.special_tokens if (index := self._find_id(token)) >= 0}
        return dict(self.backend.get_vocab())

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        """Return the ids of tokens; -1 for a token that is not in the vocabulary."""
        return [self._find_id(token) for token in tokens]

    def encode(self, text: str) -> list[int]:
        """Encode a text without an EOS token; a special token that the text spells out becomes its id."""
        if self.backend is None:
            return [byte + BYTES_OFFSET for byte in text.encode()]
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Decode ids to text."""
        if self.backend is None:
            return self._decode_bytes([int(i) for i in ids], skip_special_tokens)
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def count_settled(self, ids: Sequence[int]) -> int:
        """Count the ids before the byte tokens at the end, whose text depends on the next token.

        The decoder joins consecutive byte tokens, even across a token without text.
        """
        count = len(ids)
        while self.backend is not None and count and self._continues_bytes(int(ids[count - 1])):
            count -= 1
        return count

    def remove_special_tokens(self, text: str) -> str:
        """Remove the special tokens that a conversation template's text spells out."""
        for token in sorted(self.special_tokens, key=len, reverse=True):
            text = text.replace(token, "")
        return text

    def _continues_bytes(self, index: int) -> bool:
        token = self.backend.id_to_token(index)
        return token is None or bool(BYTE_TOKEN.fullmatch(token)) or not self.decode([index], skip_special_tokens=True)

    def _find_id(self, token: str) -> int:
        if self.backend is not None:
            index = self.backend.token_to_id(token)
            return -1 if index is None else int(index)
        return self.special_tokens.index(token) if token in self.special_tokens[:BYTES_OFFSET] else -1

    def _decode_bytes(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Decode ByT5 ids; bytes that are not valid UTF-8 are left out, as in ByT5Tokenizer."""
        parts = []
        for index in ids:
            if BYTES_OFFSET <= index < BYTES_OFFSET + 256:
                parts.append(bytes([index - BYTES_OFFSET]))
            elif not skip_special_tokens and index < BYTES_OFFSET:
                parts.append(self.special_tokens[index].encode())
        return b"".join(parts).decode(errors="ignore")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a folder's tokenizer: tokenizer.json, a SentencePiece model, byte-level BPE's files, or ByT5's bytes."""
    config = _read_json_object(folder / SPECIAL_TOKENS_FILE) | _read_json_object(folder / TOKENIZER_CONFIG_FILE)
    candidates = (TOKENIZER_FILE, *SENTENCEPIECE_FILES, BPE_FILES[0])
    file = next((folder / name for name in candidates if (folder / name).is_file()), None)
    if file is None and config.get("tokenizer_class") != "ByT5Tokenizer":
        problem = f"{folder}: no tokenizer in this folder ({', '.join(candidates)})"
        raise ModelError(problem, hint="copy the base model's tokenizer files into it")
    names = {name: _get_token_text(config.get(name), default) for name, default in DEFAULT_SPECIAL_TOKENS.items()}
    length = config.get("model_max_length")
    max_length = length if isinstance(length, int) and length < 1 << 30 else None  # 1e30 means no limit
    if file is None:
        backend, known = None, {}
        sentinels = (f"<extra_id_{number}>" for number in range(BYT5_EXTRA_IDS))
        special = (names["pad_token"], names["eos_token"], names["unk_token"], *sentinels)  # in the order of their ids
    else:
        backend = _load_backend(file, config, names)
        _add_listed_tokens(backend, config, folder)
        for name, token in names.items():
            if backend.token_to_id(token) is None:
                raise ModelError(f"{folder}: {name} {token!r} is not in the vocabulary")
        added = backend.get_added_tokens_decoder()
        special = tuple(sorted({token.content for token in added.values() if token.special} | set(names.values())))
        others = {name: _get_token_text(config.get(name), "") for name in OTHER_SPECIAL_TOKENS}
        known = {name: token for name, token in others.items() if backend.token_to_id(token) is not None}
    return Tokenizer(backend, **names, special_tokens=special, folder=folder, max_length=max_length, other_names=known)


def _load_backend(file: Path, config: dict[str, Any], names: dict[str, str]) -> Any:
    try:
        if file.name == BPE_FILES[0]:
            return _load_byte_level_bpe(file, config, names)
        return _load_json(file) if file.name == TOKENIZER_FILE else _load_sentencepiece(file, config, names)
    except (DependencyError, ModelError):
        raise
    except BaseException as error:  # tokenizers raises Exception or its Rust PanicException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{file}: can't be read: {shorten(join_lines(error), 300)}") from error


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer files that AutoTokenizer of transformers 4 and 5 loads unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.backend is None:
        for file in sorted(tokenizer.folder.iterdir()):
            if file.name in {TOKENIZER_CONFIG_FILE, "special_tokens_map.json", ADDED_TOKENS_FILE}:
                shutil.copyfile(file, folder / file.name)
        return
    # written with Python, because tokenizers only accepts paths that are valid Unicode
    (folder / TOKENIZER_FILE).write_text(tokenizer.backend.to_str(pretty=True), encoding="utf-8")
    own = {name: getattr(tokenizer, name) for name in DEFAULT_SPECIAL_TOKENS} | dict(tokenizer.other_names)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a T5 class would rebuild the normalizer
        **own,
        "additional_special_tokens": [token for token in tokenizer.special_tokens if token not in own.values()],
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.max_length is not None:
        config["model_max_length"] = tokenizer.max_length
    write_json(folder / TOKENIZER_CONFIG_FILE, config)


def find_other_token(tokenizer: Tokenizer, other: Tokenizer) -> tuple[str, int] | None:
    """Find a token, and its id, that another tokenizer lacks or numbers differently; None: no such token.

    If there are several, return the token with the highest id: added tokens are at the end of a vocabulary.
    """
    vocabulary = other.get_vocab()
    others = ((token, index) for token, index in tokenizer.get_vocab().items() if vocabulary.get(token) != index)
    return max(others, key=lambda item: item[1], default=None)


def decode_prediction(tokenizer: Tokenizer, ids: Iterable[int], answer_suffix: str, is_raw_text: bool = False) -> str:
    """Decode a model's output, without special tokens and without the template's answer suffix.

    If spans of raw text were masked, the sentinels, which name the spans, are kept.
    """
    if is_raw_text:
        return decode_with_sentinels(tokenizer, ids).removesuffix(answer_suffix)
    return tokenizer.decode(ids, skip_special_tokens=True).removesuffix(tokenizer.remove_special_tokens(answer_suffix))


def decode_with_sentinels(tokenizer: Tokenizer, ids: Iterable[int], is_complete: bool = True) -> str:
    """Decode ids without special tokens other than sentinels.

    Args:
        is_complete: whether no ids follow; otherwise bytes at the end that may begin a character are left out.
    """
    others = [token for token in tokenizer.special_tokens if not token.startswith(SENTINEL_PREFIX)]
    left_out = set(tokenizer.convert_tokens_to_ids(others))
    kept = [int(index) for index in ids if index not in left_out]
    if tokenizer.backend is not None:
        return tokenizer.decode(kept)
    # ByT5's sentinels are its last bytes: they are sentinels where they aren't UTF-8
    data = bytes(index - BYTES_OFFSET for index in kept if index < BYTES_OFFSET + 256)
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(data, final=is_complete)
    text = re.sub("[\udc9c-\udcff]", lambda found: f"<extra_id_{0xDCFF - ord(found[0])}>", text)
    return re.sub("[\udc80-\udc9b]", "", text)


def has_sentinels(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether sentinels are among the ids; with ByT5, bytes that aren't UTF-8."""
    if tokenizer.backend is None:
        return decode_with_sentinels(tokenizer, ids) != tokenizer.decode(ids, skip_special_tokens=True)
    sentinels = [token for token in tokenizer.special_tokens if token.startswith(SENTINEL_PREFIX)]
    return not set(tokenizer.convert_tokens_to_ids(sentinels)).isdisjoint(ids)


def decode_reference(tokenizer: Tokenizer, ids: Iterable[int], answer_suffix: str, is_raw_text: bool = False) -> str:
    """Decode a target or a source; an unknown token becomes \ufffd, so that no prediction can match it."""
    kept = [int(i) for i in ids if i not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
    if tokenizer.unk_token_id not in kept:
        return decode_prediction(tokenizer, kept, answer_suffix, is_raw_text)
    return tokenizer.decode(kept).replace(tokenizer.unk_token, "\ufffd").removesuffix(answer_suffix)


def _read_json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return parse_json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can't be read: {describe_error(error)}") from error


def _get_token_text(token: Any, default: str) -> str:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else default


def _load_json(file: Path) -> Any:
    backend = Backend.from_buffer(file.read_bytes())
    backend.no_truncation()
    backend.no_padding()
    # mT5's file has only this decoder, which doesn't decode its byte tokens
    if isinstance(backend.decoder, decoders.Metaspace):
        backend.decoder = build_decoder(backend, backend.decoder)
    if getattr(backend.pre_tokenizer, "prepend_scheme", None) == "always":
        # newer files omit WhitespaceSplit; then a space at the end of a text becomes a separate token, which T5's
        # original tokenizer, SentencePiece, never produces
        backend.pre_tokenizer = _build_word_pre_tokenizer()
    return backend


def build_decoder(backend: Any, *parts: Any) -> Any:
    """Combine decoders; byte tokens are first decoded to characters (`<0xC3><0xA9>` -> é), if there are any."""
    if backend.token_to_id("<0x00>") is not None:
        parts = decoders.ByteFallback(), *parts
    return decoders.Sequence(list(parts)) if len(parts) > 1 else parts[0]


def _build_word_pre_tokenizer() -> Any:
    # it splits at whitespace; the kind and the length of the whitespace are lost
    return pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always", split=True)]
    )


def read_sentencepiece(file: Path) -> Any:
    """Read a SentencePiece model as a message of protobuf; ModelError: the file is broken."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:  # ImportError without protobuf, VersionError if protobuf is too old for sentencepiece
        problem = f"{file}: reading a SentencePiece model needs protobuf, which failed: {join_lines(error)}"
        raise DependencyError(problem, hint="pip install --upgrade protobuf sentencepiece") from error
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    except Exception as error:  # protobuf's DecodeError
        raise ModelError(f"{file}: can't be read: {shorten(join_lines(error), 300)}") from error
    if not model.pieces:  # an empty file is a valid message
        raise ModelError(f"{file}: contains no pieces", hint="copy it from the published model")
    return model


def _load_sentencepiece(file: Path, config: dict[str, Any], names: dict[str, str]) -> Any:
    """Convert a spiece.model as transformers 4 does for T5: the sentinels follow its tokens, highest number first."""
    model = read_sentencepiece(file)
    if model.trainer_spec.model_type != UNIGRAM:
        raise ValueError("not a Unigram model like T5's; save the tokenizer as tokenizer.json with AutoTokenizer")
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    sentinels = [f"<extra_id_{number}>" for number in range(int(config.get("extra_ids", 100)))]
    pieces += [(token, 0.0) for token in reversed(sentinels)]
    backend = Backend(models.Unigram(pieces, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback))
    if model.normalizer_spec.precompiled_charsmap:
        backend.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    backend.pre_tokenizer = _build_word_pre_tokenizer()
    backend.decoder = build_decoder(backend, decoders.Metaspace("▁", "always", True))
    end = names["eos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, backend.token_to_id(end))]
    )
    special = [*names.values(), *reversed(sentinels)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    # MADLAD-400's target languages, for example: <2de>
    defined = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED_PIECE]
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in defined if not piece.startswith("▁")])
    return backend


def _load_byte_level_bpe(file: Path, config: dict[str, Any], names: dict[str, str]) -> Any:
    """Build RoBERTa's tokenizer, which CodeT5 uses, as transformers does: `<s>` before a text, `</s>` after it."""
    adds_space = bool(config.get("add_prefix_space", False))
    backend = Backend(models.BPE.from_file(*(str(file.with_name(name)) for name in BPE_FILES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    backend.decoder = decoders.ByteLevel()
    start = _get_token_text(config.get("cls_token", config.get("bos_token")), "<s>")
    end = _get_token_text(config.get("sep_token"), names["eos_token"])
    others = (_get_token_text(config.get(name), "") for name in OTHER_SPECIAL_TOKENS)
    special = dict.fromkeys((*names.values(), start, end, *others, *_list_more_special_tokens(config)))
    known = [token for token in special if backend.token_to_id(token) is not None]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in known])
    for token in (end, start):
        if token not in known:
            raise ValueError(f"the special token {token!r} is not in the vocabulary")
    backend.post_processor = processors.TemplateProcessing(
        single=[start, "$A", end],
        pair=[start, "$A", end, end, "$B", end],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys((start, end))],
    )
    return backend


def _list_more_special_tokens(config: dict[str, Any]) -> list[str]:
    return [_get_token_text(token, "") for token in config.get("additional_special_tokens") or []]


def _add_listed_tokens(backend: Any, config: dict[str, Any], folder: Path) -> None:
    """Add tokens that only tokenizer_config.json or added_tokens.json (fastchat-t5) lists, at the ids given there."""
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        listed = {int(index): token for index, token in (config.get("added_tokens_decoder") or {}).items()}
        special = set(_list_more_special_tokens(config))
        for content, index in _read_json_object(folder / ADDED_TOKENS_FILE).items():
            if isinstance(index, int):
                listed.setdefault(index, {"content": content, "special": content in special})
        for index, token in sorted(listed.items()):
            if backend.token_to_id(token["content"]) is None and index == backend.get_vocab_size():
                flags = {name: bool(token.get(name)) for name in names}
                backend.add_tokens([AddedToken(token["content"], **flags)])
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # lists or objects of a different form
        problem = f"{folder / TOKENIZER_CONFIG_FILE}: added_tokens_decoder or additional_special_tokens: "
        raise ModelError(f"{problem}{describe_error(error)}", hint="compare it with the published file") from error
