"""Merged checkpoints in other hands: llama.cpp's converter, CTranslate2, transformers 4."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from t5tune.data.tokenizer import load_tokenizer, save_tokenizer
from t5tune.data.vocabulary import extend_tokenizer
from t5tune.merge import merge
from t5tune.settings import MergeSettings

from .conftest import REPOSITORY, make_base
from .test_merge import stock_adapter

HARD_TEXTS = ["two words", "a\nline  and\ttabs {x}", "<extra_id_1> end", " begins with a space", "{\n    1\n}"]


def run_merge(base: Path, adapter: Path, output: Path, **changes: object) -> Path:
    merge(
        MergeSettings.model_validate(
            {"model_name_or_path": str(base), "adapter": adapter, "output_dir": output} | changes
        )
    )
    return output


@pytest.fixture(scope="module")
def sentencepiece_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose tokenizer is a spiece.model alone, as T5's first release is."""
    base = make_base(tmp_path_factory.mktemp("sentencepiece") / "base", tied=True)
    for file in base.glob("tokenizer*"):
        file.unlink()
    sentencepiece.SentencePieceTrainer.train(
        input=str(REPOSITORY / "examples" / "quickstart" / "train.jsonl"),
        model_prefix=str(base / "spiece"),
        vocab_size=250,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        input_sentence_size=300,
        minloglevel=2,
    )
    (base / "spiece.vocab").unlink()
    return base


@pytest.fixture(scope="module")
def adapter_with_tokens(sentencepiece_base: Path) -> Path:
    """An adapter that brings the base's tokenizer with tokens added, as train writes it."""
    adapter = stock_adapter(sentencepiece_base, sentencepiece_base.with_name("adapter"))
    tokenizer, added, _ = extend_tokenizer(load_tokenizer(sentencepiece_base), ["auto"], num_rows=1536)
    assert "\n" in added
    save_tokenizer(tokenizer, adapter)
    return adapter


def converters_vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id, by what llama.cpp's converter reads of a T5: the pieces, and added_tokens.json over them."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokens = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    return tokens | json.loads((folder / "added_tokens.json").read_text())


def test_sentencepiece_and_added_tokens_stand_beside_an_adapters_tokenizer(
    sentencepiece_base: Path, adapter_with_tokens: Path, tmp_path: Path
) -> None:
    merged = run_merge(sentencepiece_base, adapter_with_tokens, tmp_path / "merged")
    assert (merged / "spiece.model").read_bytes() == (sentencepiece_base / "spiece.model").read_bytes()
    vocabulary = load_tokenizer(merged).vocabulary()
    assert {"\n", "{", "<extra_id_0>"} <= vocabulary.keys()
    assert converters_vocabulary(merged) == vocabulary


def test_the_files_for_others_change_no_id_that_transformers_gives(
    sentencepiece_base: Path, adapter_with_tokens: Path, tmp_path: Path
) -> None:
    merged = run_merge(sentencepiece_base, adapter_with_tokens, tmp_path / "merged")
    ours = load_tokenizer(adapter_with_tokens)
    theirs = AutoTokenizer.from_pretrained(merged)
    for text in HARD_TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))


def test_an_added_tokens_file_of_the_adapter_is_kept(
    sentencepiece_base: Path, adapter_with_tokens: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(adapter_with_tokens, tmp_path / "adapter")
    (adapter / "added_tokens.json").write_text('{"mine": 400}')
    merged = run_merge(sentencepiece_base, adapter, tmp_path / "merged")
    assert (merged / "added_tokens.json").read_text() == '{"mine": 400}'
