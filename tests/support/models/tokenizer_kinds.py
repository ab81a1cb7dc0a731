"""Tokenizers of the kinds that models other than T5 have, made from English text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.support.prose import english_text

GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
TURN_TOKENS = ["<start_of_turn>", "<end_of_turn>"]
CODET5_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
LANGUAGES = ["<2de>", "<2en>"]


def read_corpus() -> list[str]:
    return english_text().splitlines()[:300]


def make_gemma_tokenizer(
    folder: Path, vocab_size: int = 700, added: Sequence[str] = (), splits_words: bool = True
) -> int:
    """Write a tokenizer.json like Gemma's: BPE with byte fallback, a bos before each text, and nothing after it.

    Args:
        added: special tokens that come after the others.
        splits_words: no token has a space inside, as in Gemma's own vocabulary.
    """
    tokens = [*GEMMA_SPECIAL, *TURN_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    if splits_words:
        learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learned.train_from_iterator(
        read_corpus(), trainers.BpeTrainer(vocab_size=vocab_size - len(tokens), show_progress=False)
    )
    values = json.loads(learned.to_str())["model"]
    vocab = {token: index for index, token in enumerate([*tokens, *values["vocab"]])}
    merges = [tuple(pair) for pair in values["merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (*tokens[:6], *added)])
    backend.post_processor = processors.TemplateProcessing(
        single=["<bos>", "$A"], pair=["<bos>", "$A", "<bos>", "$B"], special_tokens=[("<bos>", 2)]
    )
    (folder / "tokenizer.json").write_text(backend.to_str())
    names = {f"{name[1:-1]}_token": name for name in GEMMA_SPECIAL}
    write_config(folder, tokenizer_class="PreTrainedTokenizerFast", **names)
    return len(vocab) + len(added)


def make_codet5_tokenizer(folder: Path, vocab_size: int = 700) -> int:
    """Write vocab.json and merges.txt like CodeT5's: byte-level BPE, `<s>` before each text and `</s>` after it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=CODET5_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(read_corpus(), trainer)
    backend.model.save(str(folder))
    num_tokens = backend.get_vocab_size()
    sentinels = [f"<extra_id_{number}>" for number in range(99, -1, -1)]
    added = {token: num_tokens + number for number, token in enumerate(sentinels)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    names = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>"}
    names |= {f"{name}_token": f"<{name}>" for name in ("unk", "pad", "mask")}
    write_config(folder, tokenizer_class="RobertaTokenizer", additional_special_tokens=sentinels, **names)
    return num_tokens + len(sentinels)


def make_madlad_tokenizer(folder: Path, vocab_size: int = 700) -> int:
    """Write a spiece.model like MADLAD-400's: no pad, and pieces for the newline and for target languages."""
    train_sentencepiece(
        folder, read_corpus(), vocab_size, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True,
        user_defined_symbols=["\n", *LANGUAGES], normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    write_config(folder, tokenizer_class="T5Tokenizer", extra_ids=0, pad_token="<s>", eos_token="</s>")
    return vocab_size


def make_mt5_tokenizer(folder: Path, vocab_size: int = 700) -> int:
    """Write a spiece.model like mT5's: byte fallback, and normalization that joins spaces."""
    train_sentencepiece(folder, read_corpus(), vocab_size, byte_fallback=True, character_coverage=0.99)
    write_config(folder, tokenizer_class="T5Tokenizer", extra_ids=100)
    return vocab_size + 100


def make_protein_tokenizer(folder: Path, letters: str = "▁") -> int:
    """Write ProtT5's vocabulary, whose letters have a space before them, or Ankh's (`letters` empty), without."""
    tokens = ["<pad>", "</s>", "<unk>", *(f"{letters}{letter}" for letter in "ALGVSREDTIPKFQNYMHWCX")]
    backend = Tokenizer(models.Unigram([(token, -1.0) for token in tokens], 2, False))
    if letters:
        parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always", split=True)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
        backend.decoder = decoders.Metaspace("▁", "always", split=True)
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    (folder / "tokenizer.json").write_text(backend.to_str())
    return len(tokens)


def train_sentencepiece(folder: Path, lines: list[str], vocab_size: int, **options: Any) -> None:
    """Train a SentencePiece model with T5's special ids, and write it as spiece.model."""
    corpus = folder.with_name(f"{folder.name}-corpus.txt")
    corpus.write_text("\n".join(lines))
    given = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, **options}
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "spiece"),
        vocab_size=vocab_size,
        minloglevel=2,
        num_threads=1,
        **given,
    )
    (folder / "spiece.vocab").unlink()


def write_config(folder: Path, **values: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
