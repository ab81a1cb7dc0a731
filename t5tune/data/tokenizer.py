"""Text -> token ids -> text, by a checkpoint's tokenizer files. Loads neither transformers nor torch.

    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("Hello"))

transformers 5 builds T5's normaliser and pre-tokenizer anew, whatever tokenizer.json holds. `save_tokenizer` names a
class that makes it take the file as it stands, so that what is trained on is what a user's AutoTokenizer gives.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5tune.errors import DependencyError, ModelError
from t5tune.io.atomic import write_json
from t5tune.io.reasons import reason_of

CONFIG = "tokenizer_config.json"
FILE = "tokenizer.json"
ADDED = "added_tokens.json"
SENTENCEPIECE = ("spiece.model", "tokenizer.model")
BYTES_OFFSET = 3  # ByT5: pad, end and unknown stand before the 256 bytes (Xue et al. 2022)
BYT5_EXTRA_IDS = 125
SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    Args:
        backend: a tokenizers.Tokenizer; None: ByT5's, whose ids are bytes.
        special_tokens: the control tokens, those three and the sentinels among them.
        folder: where it was loaded from.
        max_length: what its files give as the longest text, in tokens; None: they don't.
    """

    backend: Any
    eos_token: str
    pad_token: str
    unk_token: str
    special_tokens: tuple[str, ...]
    folder: Path
    max_length: int | None = None

    def __len__(self) -> int:
        """Entries, added and control tokens included."""
        if self.backend is None:
            return BYTES_OFFSET + 256 + BYT5_EXTRA_IDS
        return int(self.backend.get_vocab_size())

    @property
    def eos_token_id(self) -> int:
        return self._id(self.eos_token)

    @property
    def pad_token_id(self) -> int:
        return self._id(self.pad_token)

    @property
    def unk_token_id(self) -> int:
        return self._id(self.unk_token)

    def vocabulary(self) -> dict[str, int]:
        """Entry -> id; ByT5's bytes have no entries."""
        if self.backend is None:
            return {token: index for token in self.special_tokens if (index := self._id(token)) >= 0}
        return dict(self.backend.get_vocab())

    def ids_of(self, tokens: list[str]) -> list[int]:
        """The ids of entries."""
        return [self._id(token) for token in tokens]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end token; a control token that is written out counts as one."""
        if self.backend is None:
            return [byte + BYTES_OFFSET for byte in text.encode()]
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        if self.backend is None:
            return self._decode_bytes([int(i) for i in ids], skip_special_tokens)
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def _id(self, token: str) -> int:
        if self.backend is not None:
            index = self.backend.token_to_id(token)
            return -1 if index is None else int(index)
        return self.special_tokens.index(token) if token in self.special_tokens[:BYTES_OFFSET] else -1

    def _decode_bytes(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Bytes that are no character are left out, as ByT5Tokenizer does."""
        parts = []
        for index in ids:
            if BYTES_OFFSET <= index < BYTES_OFFSET + 256:
                parts.append(bytes([index - BYTES_OFFSET]))
            elif not skip_special_tokens and index < BYTES_OFFSET:
                parts.append(self.special_tokens[index].encode())
        return b"".join(parts).decode(errors="ignore")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder: tokenizer.json, else a SentencePiece model, else ByT5's bytes.

    Raises:
        ModelError: no tokenizer in the folder, or a broken one.
        DependencyError: a SentencePiece model, and no protobuf that can read it.
    """
    config = _read(folder / CONFIG)
    is_bytes = config.get("tokenizer_class") == "ByT5Tokenizer"
    file = next((folder / name for name in (FILE, *SENTENCEPIECE) if (folder / name).is_file()), None)
    if file is None and not is_bytes:
        raise ModelError(
            f"{folder}: no tokenizer in it ({', '.join((FILE, *SENTENCEPIECE))})",
            hint="copy the base model's tokenizer files there",
        )
    names = {name: _content(config.get(name), default) for name, default in SPECIAL.items()}
    length = config.get("model_max_length")
    max_length = length if isinstance(length, int) and length < 1 << 30 else None  # 1e30 stands for no limit
    if file is None:
        control = (names["pad_token"], names["eos_token"], names["unk_token"])
        sentinels = tuple(f"<extra_id_{number}>" for number in range(BYT5_EXTRA_IDS))
        return Tokenizer(None, **names, special_tokens=control + sentinels, folder=folder, max_length=max_length)
    try:
        backend = _from_json(file) if file.name == FILE else _from_sentencepiece(file, config, names)
    except DependencyError:
        raise
    except BaseException as error:  # tokenizers raises plain Exception, its Rust PanicException, protobuf DecodeError
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{file}: can't be read: {' '.join(str(error).split())[:300]}") from error
    _add_listed(backend, config, folder)
    for name, token in names.items():
        if backend.token_to_id(token) is None:
            raise ModelError(f"{folder}: {name} {token!r} is no entry of its vocabulary")
    added = backend.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special} | set(names.values())
    return Tokenizer(backend, **names, special_tokens=tuple(sorted(special)), folder=folder, max_length=max_length)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that AutoTokenizer of transformers 4 and 5 takes as they stand."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.backend is None:
        for file in sorted(tokenizer.folder.iterdir()):
            if file.name in {CONFIG, "special_tokens_map.json", ADDED}:
                shutil.copyfile(file, folder / file.name)
        return
    # by Python, since tokenizers takes no path that isn't Unicode
    (folder / FILE).write_text(tokenizer.backend.to_str(pretty=True), encoding="utf-8")
    own = {name: getattr(tokenizer, name) for name in SPECIAL}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one that builds nothing anew
        **own,
        "additional_special_tokens": [token for token in tokenizer.special_tokens if token not in own.values()],
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.max_length is not None:
        config["model_max_length"] = tokenizer.max_length
    write_json(folder / CONFIG, config)


def answer_text(tokenizer: Tokenizer, ids: Iterable[int], answer_end: str) -> str:
    """A model's ids as text, without control tokens and without what the layout puts behind an answer."""
    return tokenizer.decode(ids, skip_special_tokens=True).removesuffix(answer_end)


def true_text(tokenizer: Tokenizer, ids: Iterable[int], answer_end: str) -> str:
    """A target's ids as text: a character that the tokenizer couldn't write is \ufffd, which no answer equals."""
    kept = [int(i) for i in ids if i not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
    if tokenizer.unk_token_id not in kept:
        return answer_text(tokenizer, kept, answer_end)
    return tokenizer.decode(kept).replace(tokenizer.unk_token, "\ufffd").removesuffix(answer_end)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can't be read: {reason_of(error)}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return values


def _content(token: Any, default: str) -> str:
    """A token's text: the config gives it plain, or as an object with flags."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else default


def _from_json(file: Path) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders

    backend = Backend.from_buffer(file.read_bytes())
    backend.no_truncation()
    backend.no_padding()
    if isinstance(backend.decoder, decoders.Metaspace):  # as mT5's file has it, for whose bytes that isn't enough
        backend.decoder = decoder_of(backend, backend.decoder)
    if getattr(backend.pre_tokenizer, "prepend_scheme", None) == "always":
        # newer files leave out the first of the two, and then a space at a text's end is a token of its own, which
        # SentencePiece, T5's own tokenizer, never writes
        backend.pre_tokenizer = _words_alone()
    return backend


def decoder_of(backend: Any, *parts: Any) -> Any:
    """The parts as one decoder, which first makes characters of the bytes that stand for them (`<0xC3><0xA9>` -> é)."""
    from tokenizers import decoders

    if backend.token_to_id("<0x00>") is not None:
        parts = decoders.ByteFallback(), *parts
    return decoders.Sequence(list(parts)) if len(parts) > 1 else parts[0]


def _words_alone() -> Any:
    """T5's cut at white space, which counts for nothing else."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always", split=True)]
    )


def _from_sentencepiece(file: Path, config: dict[str, Any], names: dict[str, str]) -> Any:
    """As transformers 4 converts a T5's spiece.model: the sentinels stand behind its pieces, the highest first."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:  # no protobuf is an ImportError, one that is older than sentencepiece's a VersionError
        raise DependencyError(
            f"{file}: a SentencePiece model, which can't be read here: {' '.join(str(error).split())}",
            hint="pip install --upgrade protobuf sentencepiece",
        ) from error
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as Backend

    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    sentinels = [f"<extra_id_{number}>" for number in range(int(config.get("extra_ids", 100)))]
    pieces += [(token, 0.0) for token in reversed(sentinels)]
    backend = Backend(models.Unigram(pieces, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback))
    if model.normalizer_spec.precompiled_charsmap:
        backend.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    backend.pre_tokenizer = _words_alone()
    backend.decoder = decoder_of(backend, decoders.Metaspace("▁", "always", True))
    end = names["eos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, backend.token_to_id(end))]
    )
    control = [*names.values(), *reversed(sentinels)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return backend


def _add_listed(backend: Any, config: dict[str, Any], folder: Path) -> None:
    """Tokens that stand in the config alone or, as fastchat-t5's, in added_tokens.json, at the ids given there."""
    from tokenizers import AddedToken

    listed = {int(index): token for index, token in (config.get("added_tokens_decoder") or {}).items()}
    for content, index in _read(folder / ADDED).items():
        if isinstance(index, int):
            listed.setdefault(index, {"content": content})
    for index, token in sorted(listed.items()):
        if backend.token_to_id(token["content"]) is None and index == backend.get_vocab_size():
            flags = {
                name: bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")
            }
            backend.add_tokens([AddedToken(token["content"], **flags)])
